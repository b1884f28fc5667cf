"""Where image and video models are steered: the sites of each architecture, as diffusers names them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from .places import class_names, find_places
from .sites import find_sites

IMAGE_SITES: dict[str, str] = {
    "norms": "every normalisation layer but those of queries and keys, of the denoiser",
    "blocks": "what every transformer block puts out, each stream by itself",
}

# The paper (section 4.2) steers FLUX behind its multi-modal blocks and the first 15 single ones: later ones deteriorate images.
_OWN_PRESETS = {
    "FluxTransformer2DModel": r"transformer_blocks\.\d+:(text|image)|single_transformer_blocks\.(\d|1[0-4]):(text|image)",
}
# Norms of queries and keys, of vision towers, and of what depends on the timestep alone say nothing of the prompt.
_NO_SITES = re.compile(r".*\.(norm_(added_)?[qk]|[qk]_norm|(distilled_guidance_layer|visual)\..*)")
_BLOCKS = re.compile(r"[^.]*\.((single_)?transformer_blocks|blocks|layers)\.\d+(:\w+)?")


def image_sites(
    components: Mapping[str, nn.Module], denoisers: Sequence[str], sites: str | Sequence[str] | None = None
) -> list[str]:
    """Names of the sites that `sites` stands for in the components of a pipeline.

    Args:
        components: text encoders and denoisers by component name.
        denoisers: which of them are denoisers, the one for early steps first.
        sites: None is the preset of the first denoiser's architecture: the norms, or for FLUX what the paper steers. A component
            name stands for the preset of that component, "norms" and "blocks" for those of the first denoiser (`IMAGE_SITES`);
            everything else is as in `find_sites`. A list may mix them.

    Returns:
        Site names in registration order.

    Raises:
        ValueError: if a pattern matches nothing; the error lists the closest names.
    """
    if sites is None:
        sites = denoisers[0]
    if isinstance(sites, str):
        if sites not in components and sites not in IMAGE_SITES:
            return find_sites(components, sites)
        sites = [sites]
    names: list[str] = []
    for pattern in sites:
        if pattern in components:
            names += _preset(components[pattern], pattern)
        elif pattern in IMAGE_SITES:
            names += _named(components[denoisers[0]], denoisers[0], pattern)
        else:
            names.append(pattern)
    return find_sites(components, names)


def _preset(module: nn.Module, component: str) -> list[str]:
    own = _OWN_PRESETS.get(class_names({component: module})[component])
    if own is None:
        return _named(module, component, "norms")
    expression = re.compile(rf"{component}\.({own})")
    return [site for site in find_places({component: module}) if expression.fullmatch(site)]


def _named(module: nn.Module, component: str, preset: str) -> list[str]:
    places = find_places({component: module})
    if preset == "norms":
        found = [site for site, place in places.items() if place.is_norm and not _NO_SITES.fullmatch(site)]
    else:
        found = [site for site in places if _BLOCKS.fullmatch(site)]
    if not found:
        raise ValueError(
            f"{class_names({component: module})[component]} ({component}) has no sites for the preset {preset!r}; name the sites"
        )
    return found
