"""The bundled demo model: a small Stable Diffusion trained on captioned emoji in nine drawing styles, and its judges.

    pipeline = actmaps.demo.load_pipeline()
    image = pipeline("red apple, pixel art", num_inference_steps=20).images[0]

Only `STYLES` and `subjects` are cheap; the rest imports diffusers when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .dataset import subjects
from .styles import STYLES

if TYPE_CHECKING:
    from ..pipelines import StableDiffusionACTPipeline
    from .judges import Judges

__all__ = ["STYLES", "load_judges", "load_pipeline", "subjects"]


def load_pipeline(device: str = "cpu") -> StableDiffusionACTPipeline:
    """The demo model as a pipeline with act maps. Pictures have 64 x 64 pixels; 20 steps and a guidance scale of 4 suit it.

    Args:
        device: where to put it. Weights are stored in half precision and loaded in single precision.
    """
    from ..pipelines import StableDiffusionACTPipeline
    from .model import WEIGHTS

    pipeline = StableDiffusionACTPipeline.from_pretrained(WEIGHTS)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.float()
    pipeline.register_to_config(_name_or_path="demo")  # what maps name as their model, in place of a path
    return pipeline.to(device)


def load_judges() -> Judges:
    """The style and content judges, trained on rendered images only."""
    from .judges import Judges

    return Judges.load()
