"""AcT Maps: Activation Transport for image and language models.

Importing this package imports neither diffusers, transformers nor ComfyUI; names load when first used. Every pipeline of
diffusers has a class here: `XACTPipeline` for `XPipeline`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .maps import (
        ESTIMATORS,
        METHODS,
        ActMap,
        ActMapMetadata,
        AffineMap,
        Folded,
        Method,
        Steering,
        find_sites,
        fit_map,
        fold,
        steer,
    )
    from .pipelines import (
        ACTGuidance,
        ACTMixin,
        FluxACTPipeline,
        StableDiffusion3ACTPipeline,
        StableDiffusionACTPipeline,
        StableDiffusionXLACTPipeline,
        TextGenerationACTPipeline,
        act_pipeline_class,
        load_act_pipeline,
        strength_curve,
        strength_window,
    )

__version__ = "0.1.0"

# Where ComfyUI finds the help pages of the nodes.
WEB_DIRECTORY = "./web"

_HOME = {
    **dict.fromkeys(
        (
            *("ESTIMATORS", "METHODS", "ActMap", "ActMapMetadata", "AffineMap", "Folded", "Method", "Steering"),
            *("find_sites", "fit_map", "fold", "steer"),
        ),
        ".maps",
    ),
    **dict.fromkeys(
        (
            "ACTGuidance",
            "ACTMixin",
            "act_pipeline_class",
            "load_act_pipeline",
            "strength_curve",
            "strength_window",
        ),
        ".pipelines",
    ),
}

__all__ = [
    "ESTIMATORS",
    "METHODS",
    "WEB_DIRECTORY",
    "ACTGuidance",
    "ACTMixin",
    "ActMap",
    "ActMapMetadata",
    "AffineMap",
    "FluxACTPipeline",
    "Folded",
    "Method",
    "StableDiffusion3ACTPipeline",
    "StableDiffusionACTPipeline",
    "StableDiffusionXLACTPipeline",
    "Steering",
    "TextGenerationACTPipeline",
    "act_pipeline_class",
    "comfy_entrypoint",
    "find_sites",
    "fit_map",
    "fold",
    "load_act_pipeline",
    "steer",
    "strength_curve",
    "strength_window",
]


async def comfy_entrypoint() -> Any:
    """What ComfyUI calls to get the nodes."""
    from .nodes import ACTExtension

    return ACTExtension()


def __getattr__(name: str) -> Any:
    home = ".pipelines" if name.endswith("ACTPipeline") else _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home, __name__), name)
