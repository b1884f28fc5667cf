"""AcT Maps: Activation Transport for image and language models.

Importing this package imports neither diffusers, transformers nor ComfyUI; names load when first used.
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
    from .pipelines import ACTMixin, StableDiffusionACTPipeline, TextGenerationACTPipeline

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
    **dict.fromkeys(("ACTMixin", "StableDiffusionACTPipeline", "TextGenerationACTPipeline"), ".pipelines"),
}

__all__ = [
    "ESTIMATORS",
    "METHODS",
    "WEB_DIRECTORY",
    "ACTMixin",
    "ActMap",
    "ActMapMetadata",
    "AffineMap",
    "Folded",
    "Method",
    "StableDiffusionACTPipeline",
    "Steering",
    "TextGenerationACTPipeline",
    "comfy_entrypoint",
    "find_sites",
    "fit_map",
    "fold",
    "steer",
]


async def comfy_entrypoint() -> Any:
    """What ComfyUI calls to get the nodes."""
    from .nodes import ACTExtension

    return ACTExtension()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
