"""What the demo model is made of: Stable Diffusion's architecture at a size that a CPU can train.

Nothing here trains; see `train`. Weights are a diffusers folder that `StableDiffusionPipeline.from_pretrained` loads.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

WEIGHTS = Path(__file__).parent / "weights"
TOKENS = 24  # the longest caption of the data set has 21 tokens
VOCABULARY = 2000
BOS, EOS = "<|startoftext|>", "<|endoftext|>"

VAE_CONFIG: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 128),
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "sample_size": 64,
    "scaling_factor": 1.0,
}
UNET_CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 8,
    "out_channels": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (64, 192),
    "layers_per_block": 1,
    "attention_head_dim": 8,  # the number of heads, as in Stable Diffusion 1.5's configuration
    "cross_attention_dim": 128,
}
TEXT_CONFIG: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": TOKENS,
}
SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,  # what StableDiffusionPipeline insists on; trailing spacing does not use it
}


class Denoiser(nn.Module):
    """The two modules that are trained together: text encoder and UNet."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel):
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """Latents (B, C, H, W), timesteps (B,), tokens (B, T) -> predicted velocity (B, C, H, W)."""
        states = self.text_encoder(tokens).last_hidden_state
        return self.unet(latents, timesteps, encoder_hidden_states=states, return_dict=False)[0]


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY, tokens: int = TOKENS) -> CLIPTokenizer:
    """Learn byte-pair merges on `texts` and return a CLIP tokenizer with them (lower case, padded to `tokens`)."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import CLIPTokenizer

    # An empty CLIP tokenizer lends its normaliser and pre-tokeniser, so that merges are learnt on what it will see.
    template = CLIPTokenizer(vocab={BOS: 0, EOS: 1}, merges=[]).backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = template.normalizer, template.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789'-.,!?&()"),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    state = json.loads(learner.to_str())["model"]
    vocab = dict(state["vocab"])
    # Single characters at the end of a word are not all seen in the texts, but a user's prompt may have them.
    for character in [key for key in vocab if len(key) == 1]:
        vocab.setdefault(f"{character}</w>", len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=[tuple(merge) for merge in state["merges"]], model_max_length=tokens)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """int64 (len(texts), tokens), padded and cut like the pipelines do it."""
    return tokenizer(
        texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def build_vae(config: dict[str, Any] = VAE_CONFIG) -> AutoencoderKL:
    """A fresh autoencoder, randomly initialised from torch's global generator."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**config)


def build_denoiser(
    tokenizer: CLIPTokenizer, unet: dict[str, Any] = UNET_CONFIG, text: dict[str, Any] = TEXT_CONFIG
) -> Denoiser:
    """A fresh text encoder and UNet, randomly initialised from torch's global generator."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **text,
    )
    return Denoiser(CLIPTextModel(config), UNet2DConditionModel(**unet))


def build_scheduler() -> DDIMScheduler:
    """DDIM with velocity prediction and zero terminal SNR, as trained and as shipped."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(**SCHEDULER_CONFIG)


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Fold per-channel standardisation of the latents into the 1 x 1 convolutions around them, in place.

    Afterwards the encoder returns (z - mean) / std and the decoder takes it: reconstructions stay what they were.

    Args:
        mean: (C,) mean of the latents over images and positions.
        std: (C,) their standard deviation, all above 0.
    """
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()  # the second half is the log variance
    post.bias += torch.einsum("oc,c->o", post.weight[:, :, 0, 0], mean)
    post.weight *= std[None, :, None, None]


def save_weights(folder: Path, tokenizer: CLIPTokenizer, denoiser: Denoiser, vae: AutoencoderKL) -> None:
    """Write a Stable Diffusion folder in half precision; an older one at `folder` is replaced in one step."""
    from diffusers import StableDiffusionPipeline

    pipeline = build_pipeline(StableDiffusionPipeline, tokenizer, denoiser, vae)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".weights-"))
    try:
        for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            module.half()
        pipeline.vae.register_to_config(_name_or_path="")  # not the folder that it was trained in
        pipeline.save_pretrained(scratch / "new", safe_serialization=True)
        if folder.exists():
            os.rename(folder, scratch / "old")
        os.rename(scratch / "new", folder)
    finally:
        shutil.rmtree(scratch)


def build_pipeline(pipeline_class: type, tokenizer: CLIPTokenizer, denoiser: Denoiser, vae: AutoencoderKL) -> Any:
    """An instance of a StableDiffusionPipeline class around copies of the modules, in evaluation mode."""
    from copy import deepcopy

    denoiser, vae = deepcopy(denoiser), deepcopy(vae)
    return pipeline_class(
        vae=vae.eval(),
        text_encoder=denoiser.text_encoder.eval(),
        tokenizer=tokenizer,
        unet=denoiser.unet.eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
