"""Pipelines with act maps: diffusers pipelines whose text encoders and denoiser are steered, and language models.

Every diffusers pipeline has one: `XACTPipeline` for `XPipeline`, for example `StableDiffusionXLImg2ImgACTPipeline`.

Names load when first used, so that language models do not need diffusers, nor image models a language model's pipeline.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import diffusers

    from .act_guidance import ACTGuidance
    from .image_pipelines import act_pipeline_class, load_act_pipeline
    from .mixin import ACTMixin
    from .strength import strength_curve, strength_window
    from .text_generation import TextGenerationACTPipeline

    class StableDiffusionACTPipeline(ACTMixin, diffusers.StableDiffusionPipeline): ...  # noqa: D101

    class StableDiffusionXLACTPipeline(ACTMixin, diffusers.StableDiffusionXLPipeline): ...  # noqa: D101

    class StableDiffusion3ACTPipeline(ACTMixin, diffusers.StableDiffusion3Pipeline): ...  # noqa: D101

    class FluxACTPipeline(ACTMixin, diffusers.FluxPipeline): ...  # noqa: D101


_HOME = {
    "ACTGuidance": ".act_guidance",
    "ACTMixin": ".mixin",
    "TextGenerationACTPipeline": ".text_generation",
    "act_pipeline_class": ".image_pipelines",
    "load_act_pipeline": ".image_pipelines",
    "strength_curve": ".strength",
    "strength_window": ".strength",
}

__all__ = [
    "ACTGuidance",
    "ACTMixin",
    "FluxACTPipeline",
    "StableDiffusion3ACTPipeline",
    "StableDiffusionACTPipeline",
    "StableDiffusionXLACTPipeline",
    "TextGenerationACTPipeline",
    "act_pipeline_class",
    "load_act_pipeline",
    "strength_curve",
    "strength_window",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    if name.endswith("ACTPipeline"):
        from .image_pipelines import act_pipeline_class

        try:
            return act_pipeline_class(name.replace("ACTPipeline", "Pipeline"))
        except ValueError as error:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}: {error}") from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
