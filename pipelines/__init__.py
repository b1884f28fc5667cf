"""Pipelines with act maps: diffusers pipelines whose text encoders and denoiser are steered."""

from .mixin import ACTMixin
from .stable_diffusion import StableDiffusionACTPipeline

__all__ = ["ACTMixin", "StableDiffusionACTPipeline"]
