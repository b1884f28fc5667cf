"""The bundled demo model as ComfyUI's MODEL, CLIP and VAE, from its diffusers folder and without diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import comfy.latent_formats
import comfy.ldm.modules.diffusionmodules.model as autoencoder
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy import sd1_clip
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from comfy.supported_models_base import ClipTarget
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

WEIGHTS = Path(__file__).parents[1] / "demo" / "weights"


class DemoLatent(comfy.latent_formats.LatentFormat):
    """Latents of 8 channels, which need no scaling."""

    latent_channels = 8


class DemoModel(comfy.supported_models.SD15):
    """Stable Diffusion 1.5 at the demo's size, with velocity prediction and no signal at the last timestep."""

    latent_format = DemoLatent
    sampling_settings = {"linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000, "zsnr": True}  # noqa: RUF012
    memory_usage_factor = 0.2

    def model_type(self, _state_dict: dict[str, Tensor], _prefix: str = "") -> ModelType:
        """What the U-Net predicts."""
        return ModelType.V_PREDICTION

    def inpaint_model(self) -> bool:
        """ComfyUI would take a U-Net with 8 channels for one that inpaints."""
        return False


class DemoTokenizer(sd1_clip.SDTokenizer):
    """CLIP's tokenizer with the demo's vocabulary and 24 tokens."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        config = _config("text_encoder")
        super().__init__(
            str(WEIGHTS / "tokenizer"),
            max_length=config["max_position_embeddings"],
            embedding_directory=embedding_directory,
            embedding_size=config["hidden_size"],
            tokenizer_data=tokenizer_data or {},
        )


class DemoTokenizers(sd1_clip.SD1Tokenizer):
    """The tokenizer under the name of its text encoder."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=DemoTokenizer)


class DemoTextEncoder(sd1_clip.SDClipModel):
    """CLIP's text encoder at the demo's size."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
        config = _config("text_encoder")
        tokens = {"start": config["bos_token_id"], "end": config["eos_token_id"], "pad": config["pad_token_id"]}
        super().__init__(
            device=device,
            dtype=dtype,
            max_length=config["max_position_embeddings"],
            textmodel_json_config=config,
            special_tokens=tokens,
            return_projected_pooled=False,
            model_options=model_options or {},
        )
        self.transformer.text_model.embeddings.token_embedding = self.operations.Embedding(
            config["vocab_size"], config["hidden_size"], dtype=dtype, device=device
        )


class DemoTextEncoders(sd1_clip.SD1ClipModel):
    """The text encoder as ComfyUI holds it."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=DemoTextEncoder)


def load_demo_model() -> tuple[ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of the demo model, new objects with every call.

    Pictures have 64 x 64 pixels; 20 steps of euler at a guidance scale of 4 suit it.

    Raises:
        FileNotFoundError, ValueError: if its weights are missing or damaged.
    """
    return _load_model(), _load_clip(), _load_vae()


def _load_model() -> ModelPatcher:
    config = _config("unet")
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    levels = len(widths)
    demo = DemoModel(
        {
            "image_size": config["sample_size"],
            "in_channels": config["in_channels"],
            "out_channels": config["out_channels"],
            "model_channels": widths[0],
            "channel_mult": [width // widths[0] for width in widths],
            "num_res_blocks": [layers] * levels,
            "transformer_depth": [1] * layers * levels,
            "transformer_depth_middle": 1,
            "transformer_depth_output": [1] * (layers + 1) * levels,
            "context_dim": config["cross_attention_dim"],
            "adm_in_channels": None,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": False,
            "use_temporal_attention": False,
            "legacy": False,
        }
    )
    demo.unet_config["num_heads"] = config["attention_head_dim"]
    demo.set_inference_dtype(torch.float32, None)
    offload_device = comfy.model_management.unet_offload_device()
    model = demo.get_model({}, device=offload_device)
    names = comfy.utils.unet_to_diffusers(demo.unet_config)
    weights = {names[name]: tensor for name, tensor in _weights("unet", "diffusion_pytorch_model").items()}
    model.diffusion_model.load_state_dict(weights)
    model.eval().requires_grad_(False)
    return ModelPatcher(model, comfy.model_management.get_torch_device(), offload_device)


def _load_clip() -> comfy.sd.CLIP:
    clip = comfy.sd.CLIP(ClipTarget(DemoTokenizers, DemoTextEncoders), model_options={"dtype": torch.float32})
    weights = {f"text_model.{name}": tensor for name, tensor in _weights("text_encoder", "model").items()}
    missing, unexpected = clip.load_sd(weights)
    if unexpected or any("text_projection" not in name and "logit_scale" not in name for name in missing):
        raise ValueError(f"the demo model's text encoder lacks {missing[:3]} and has unknown {unexpected[:3]}")
    return clip


def _load_vae() -> comfy.sd.VAE:
    config = _config("vae")
    widths = config["block_out_channels"]
    params = {
        "embed_dim": config["latent_channels"],
        "ddconfig": {
            "double_z": True,
            "z_channels": config["latent_channels"],
            "resolution": config["sample_size"],
            "in_channels": config["in_channels"],
            "out_ch": config["out_channels"],
            "ch": widths[0],
            "ch_mult": [width // widths[0] for width in widths],
            "num_res_blocks": config["layers_per_block"],
            "attn_resolutions": [],
            "dropout": 0.0,
        },
    }
    # ComfyUI's autoencoder has norms of 32 groups; this default is the only place that says so.
    with patch.object(autoencoder.Normalize, "__defaults__", (config["norm_num_groups"],)):
        vae = comfy.sd.VAE(_weights("vae", "diffusion_pytorch_model"), config={"params": params}, dtype=torch.float32)
    vae.latent_channels = config["latent_channels"]
    return vae


def _config(part: str) -> dict[str, Any]:
    path = WEIGHTS / part / "config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _weights(part: str, name: str) -> dict[str, Tensor]:
    path = WEIGHTS / part / f"{name}.safetensors"
    try:
        return {key: tensor.float() for key, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> Exception:
    kind = FileNotFoundError if isinstance(error, OSError) else ValueError
    return kind(
        f"the demo model's {path.relative_to(WEIGHTS.parents[1])} is missing or damaged ({error}); install AcT Maps again: "
        "clone the whole repository or unpack the whole archive"
    )
