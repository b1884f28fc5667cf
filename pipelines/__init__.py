"""Pipelines with act maps: diffusers pipelines whose text encoders and denoiser are steered, and language models.

Names load when first used, so that language models do not need diffusers, nor image models a language model's pipeline.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .mixin import ACTMixin
    from .stable_diffusion import StableDiffusionACTPipeline
    from .text_generation import TextGenerationACTPipeline

_HOME = {
    "ACTMixin": ".mixin",
    "StableDiffusionACTPipeline": ".stable_diffusion",
    "TextGenerationACTPipeline": ".text_generation",
}

__all__ = ["ACTMixin", "StableDiffusionACTPipeline", "TextGenerationACTPipeline"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
