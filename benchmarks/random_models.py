"""Models of real shapes with random weights, and inputs for them: at a reduced width for a processor, or at the real one for a GPU.

Reduced or not, a model has the blocks of the real one: SDXL's U-Net its 256 normalisation layers, FLUX its two kinds of blocks. FLUX
and Llama are reduced in depth too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM

from actmaps.maps import ActMap, AffineMap, find_sites
from actmaps.maps.sites import resolve

# The paper steers FLUX at the outputs of its blocks, both streams of the first kind.
FLUX_SITES = r"transformer\.transformer_blocks\.\d+:(image|text)|transformer\.single_transformer_blocks\.\d+:image"


@dataclass(frozen=True)
class Subject:
    """A model to measure on.

    Attributes:
        title: what it is, for the tables.
        module: the model.
        make: makes the inputs of some rows on the CPU; a shift between 0 and 1 tells prompt sets apart.
        sites: patterns of the sites that a map moves; None takes all normalisation layers.
    """

    title: str
    module: nn.Module
    make: Callable[[int, float], dict[str, Any]] = field(repr=False)
    sites: str | None = None

    def inputs(self, rows: int, shift: float = 0.0) -> dict[str, Any]:
        """Random inputs of `rows` rows on the model's device and in its precision."""
        weight = next(self.module.parameters())
        return _placed(self.make(rows, shift), weight.device, weight.dtype)

    def random_map(self, scale: float = 0.05) -> ActMap:
        """A map that moves every unit of every site a little."""
        generator = torch.Generator().manual_seed(0)
        sites = find_sites(self.module, self.sites)
        counts = self._unit_counts(sites)
        noise = {site: scale * torch.randn(2, counts[site], generator=generator) for site in sites}
        return ActMap({site: AffineMap(1 + slope, shift) for site, (slope, shift) in noise.items()})

    def _unit_counts(self, sites: list[str]) -> dict[str, int]:
        """Units of each site: what a normalisation layer tells, and the width of the model where a block does not."""
        places = resolve(self.module, sites, "the benchmark")
        width = getattr(self.module, "inner_dim", 0)
        return {site: place.unit_count or width for site, place in places.items()}


def unet(real: bool, size: int | None = None) -> Subject:
    """Stable Diffusion 1.5's U-Net (reduced: a fifth of its width) on `size` x `size` latents."""
    size = size or (64 if real else 32)
    cross = 768 if real else 128
    model = UNet2DConditionModel(
        sample_size=size,
        block_out_channels=(320, 640, 1280, 1280) if real else (64, 128, 256, 256),
        cross_attention_dim=cross,
        attention_head_dim=8,
        norm_num_groups=32,
    )

    def make(rows: int, shift: float) -> dict[str, Any]:
        return {
            "sample": torch.randn(rows, 4, size, size),
            "timestep": torch.randint(0, 1000, (rows,)),
            "encoder_hidden_states": torch.randn(rows, 77, cross) + shift,
        }

    return Subject("U-Net of SD 1.5", model, make)


def sdxl(real: bool, size: int | None = None) -> Subject:
    """SDXL's U-Net (reduced: a fifth of its width) on `size` x `size` latents."""
    size = size or (128 if real else 16)
    width, cross, pooled, time = (320, 2048, 1280, 256) if real else (64, 256, 160, 32)
    model = UNet2DConditionModel(
        sample_size=size,
        block_out_channels=(width, 2 * width, 4 * width),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20) if real else (1, 2, 4),  # the number of heads, which are 64 wide
        cross_attention_dim=cross,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time,
        projection_class_embeddings_input_dim=6 * time + pooled,
    )

    def make(rows: int, shift: float) -> dict[str, Any]:
        return {
            "sample": torch.randn(rows, 4, size, size),
            "timestep": torch.randint(0, 1000, (rows,)),
            "encoder_hidden_states": torch.randn(rows, 77, cross) + shift,
            "added_cond_kwargs": {
                "text_embeds": torch.randn(rows, pooled) + shift,
                "time_ids": torch.tensor([[8.0 * size, 8.0 * size, 0, 0, 8.0 * size, 8.0 * size]]).expand(rows, 6),
            },
        }

    return Subject("U-Net of SDXL", model, make)


def flux(real: bool, size: int | None = None) -> Subject:
    """FLUX.1's transformer (reduced: a sixth of its width, a tenth of its depth) on `size` x `size` image tokens."""
    size = size or (64 if real else 16)
    heads, tokens, joint, pooled = (24, 512, 4096, 768) if real else (8, 64, 256, 128)
    axes = (16, 56, 56) if real else (8, 28, 28)
    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=19 if real else 2,
        num_single_layers=38 if real else 4,
        attention_head_dim=sum(axes),
        num_attention_heads=heads,
        joint_attention_dim=joint,
        pooled_projection_dim=pooled,
        axes_dims_rope=axes,
    )

    def make(rows: int, shift: float) -> dict[str, Any]:
        places = torch.cartesian_prod(torch.arange(1), torch.arange(size), torch.arange(size)).float()
        return {
            "hidden_states": torch.randn(rows, size * size, 64),
            "timestep": torch.rand(rows),
            "encoder_hidden_states": torch.randn(rows, tokens, joint) + shift,
            "pooled_projections": torch.randn(rows, pooled) + shift,
            "img_ids": places,
            "txt_ids": torch.zeros(tokens, 3),
        }

    return Subject("transformer of FLUX.1", model, make, FLUX_SITES)


def text_encoder(real: bool, size: int | None = None) -> Subject:  # noqa: ARG001 (its real size is small enough)
    """A text encoder with CLIP-L's 12 layers of width 768, on prompts of `size` tokens."""
    size = size or 77
    width = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    config = CLIPTextConfig(**width, vocab_size=1000, bos_token_id=998, eos_token_id=999, pad_token_id=999)
    return Subject("text encoder, CLIP-L", CLIPTextModel(config), _token_ids(size))


def llama(real: bool, size: int | None = None) -> Subject:
    """A language model of Llama 3's kind (real: of 8B's shape, reduced: 16 layers of width 512), on texts of `size` tokens."""
    size = size or (512 if real else 64)
    shape: dict[str, int] = (
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
        if real
        else {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16, "vocab_size": 4096}
    )
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8} if real else {"num_attention_heads": 8}
    return Subject("language model, Llama", LlamaForCausalLM(LlamaConfig(**shape, **heads)), _token_ids(size))


def _token_ids(size: int) -> Callable[[int, float], dict[str, Any]]:
    def make(rows: int, shift: float) -> dict[str, Any]:
        return {"input_ids": torch.randint(0, 500, (rows, size)) + int(400 * shift)}

    return make


MODELS: dict[str, Callable[[bool, int | None], Subject]] = {
    "unet": unet,
    "text_encoder": text_encoder,
    "sdxl": sdxl,
    "flux": flux,
    "llama": llama,
}


def build(
    name: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    real: bool = False,
    size: int | None = None,
) -> Subject:
    """The model of that name, its weights made on the device and in that precision, seeded.

    Args:
        name: a key of `MODELS`.
        device, dtype: where the weights lie, and what they are.
        real: the real widths and depths.
        size: height and width of the latents or image tokens, or the number of text tokens; None takes the model's own.
    """
    torch.manual_seed(0)
    with device, _default_dtype(dtype):
        subject = MODELS[name](real, size)
    subject.module.eval().requires_grad_(False)
    return subject


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _placed(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    return {name: _placed(entry, device, dtype) for name, entry in value.items()}
