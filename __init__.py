"""AcT Maps: Activation Transport for image and language models.

Importing this package imports neither diffusers, transformers nor ComfyUI; names load when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .maps import ESTIMATORS, ActMap, ActMapMetadata, AffineMap, Steering, find_sites, fit_map, steer
    from .pipelines import ACTMixin, StableDiffusionACTPipeline

__version__ = "0.1.0"

# Where ComfyUI finds the help pages of the nodes.
WEB_DIRECTORY = "./web"

_HOME = {
    **dict.fromkeys(
        ("ESTIMATORS", "ActMap", "ActMapMetadata", "AffineMap", "Steering", "find_sites", "fit_map", "steer"), ".maps"
    ),
    **dict.fromkeys(("ACTMixin", "StableDiffusionACTPipeline"), ".pipelines"),
}

__all__ = [
    "ESTIMATORS",
    "WEB_DIRECTORY",
    "ACTMixin",
    "ActMap",
    "ActMapMetadata",
    "AffineMap",
    "StableDiffusionACTPipeline",
    "Steering",
    "comfy_entrypoint",
    "find_sites",
    "fit_map",
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
