"""Sites: the named module outputs that maps act on, and how users choose them.

A site is `"<component>.<module path>"`, for example `unet.down_blocks.0.resnets.0.norm1`, with `:image` or `:text` behind it
for one stream of a block that returns several. Names are those of diffusers and transformers without the `text_model.`
level, which some versions have and others do not.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .places import Place, Places, Steerable, as_components, class_names, evaluating, find_places, roots


def closest(name: str, names: Sequence[str], n: int = 3) -> str:
    """`names` most like `name`, as text for an error."""
    near = difflib.get_close_matches(name, names, n=n, cutoff=0.3) or list(names[:n])
    return ", ".join(near) or "none"


def match_sites(sites: Sequence[str], patterns: str | Sequence[str]) -> list[str]:
    """The `sites` that match, in their order.

    Args:
        sites: full site names.
        patterns: a string is a regular expression that must match a whole name; a list holds names or suffixes of names
            (whole dotted parts, so "norm1" matches "unet.down_blocks.0.norm1" but not "...xnorm1").

    Raises:
        ValueError: if the expression is malformed, or any pattern matches nothing; it lists the closest names.
    """
    if isinstance(patterns, str):
        try:
            expression = re.compile(patterns)
        except re.error as error:
            raise ValueError(f"site pattern {patterns!r} is not a regular expression: {error}") from None
        found = [site for site in sites if expression.fullmatch(site)]
        if not found:
            raise ValueError(f"site pattern {patterns!r} matches no site; closest: {closest(patterns, sites)}")
        return found
    if not patterns:
        raise ValueError("the list of site patterns is empty; use None for the preset of the architecture")
    wanted = {pattern: [s for s in sites if _has_suffix(s, pattern)] for pattern in patterns}
    for pattern, found in wanted.items():
        if not found:
            raise ValueError(f"site {pattern!r} is not in the model; closest: {closest(pattern, sites)}")
    union = set().union(*wanted.values())
    return [site for site in sites if site in union]


def _has_suffix(site: str, suffix: str) -> bool:
    return any(name == suffix or name.endswith("." + suffix) for name in (site, site.split(":")[0]))


def find_sites(
    model: Steerable,
    patterns: str | Sequence[str] | None = None,
    *,
    example: Mapping[str, Any] | Tensor | Callable[[], Any] | None = None,
) -> list[str]:
    """Names of the sites that match `patterns`.

    Args:
        model: a module, {component name: module}, or {site name: `Place`}.
        patterns: list of names or suffixes, or a full-match regular expression; None takes all normalisation layers,
            which the paper (section 4) finds best for U-Nets and language models. The name of a component stands for
            its normalisation layers.
        example: one input (a mapping is passed as keywords), or a function that runs the forward. With it the sites come in
            execution order and those that the forward does not reach are left out; without it they come in registration
            order, which in a U-Net differs.

    Raises:
        ValueError: if nothing matches; the error lists the closest names.
    """
    places = find_places(model)
    norms = [site for site, place in places.items() if place.is_norm]
    if patterns is None:
        if not norms:
            raise ValueError(f"no normalisation layer in {', '.join(component_names(places))}; name the sites")
        sites = norms
    else:
        sites = match_sites(list(places), _expanded(patterns, norms, component_names(places)))
    if example is None:
        return sites
    run = example if callable(example) else _run_of(model, example)
    with evaluating(roots(model)):
        reached = _trace({site: places[site] for site in sites}, run)
    if not reached:
        raise ValueError(f"the example input reaches none of the {len(sites)} matching sites, for example {sites[0]}")
    return reached


def component_names(sites: Iterable[str]) -> list[str]:
    """The components that `sites` belong to, in order of appearance."""
    return list(dict.fromkeys(site.split(".", 1)[0] for site in sites))


def _expanded(patterns: str | Sequence[str], norms: Sequence[str], components: Sequence[str]) -> str | list[str]:
    """`patterns` with component names replaced by the names of their normalisation layers."""
    if isinstance(patterns, str) and patterns not in components:
        return patterns
    expanded: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        expanded += [n for n in norms if n.startswith(f"{pattern}.")] if pattern in components else [pattern]
    return expanded


def _run_of(model: Steerable, example: Mapping[str, Any] | Tensor) -> Callable[[], Any]:
    """A function that runs the one component of `model` on `example`."""
    components = as_components(model)
    if len(components) != 1:
        raise ValueError("with several components, example must be a function that runs the forward")
    (module,) = components.values()
    return lambda: module(**example) if isinstance(example, Mapping) else module(example)


def _trace(places: Places, run: Callable[[], Any]) -> list[str]:
    """The sites in the order in which `run` visits them."""
    reached: dict[str, None] = {}
    handles = []
    for site, place in places.items():
        handles.append(place.module.register_forward_hook(lambda *_, site=site: reached.setdefault(site)))
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiled code may not notice the hooks
            run()
    finally:
        for handle in handles:
            handle.remove()
    return list(reached)


def resolve(model: Steerable, sites: Sequence[str], owner: str) -> dict[str, Place]:
    """The place of each site.

    Raises:
        ValueError: naming `owner` (what the sites belong to) and the sites that the model lacks.
    """
    places = find_places(model)
    missing = [site for site in sites if site not in places]
    if missing:
        stream_of = missing[0].split(":")[0]
        streams = [name for name in places if name == stream_of or name.startswith(f"{stream_of}:")]
        if streams and ":" in missing[0]:
            kind = type(places[streams[0]].module).__name__
            known = ", ".join(name.split(":")[1] for name in streams if ":" in name)
            raise ValueError(
                f"{missing[0]}: {kind} has no stream {missing[0].split(':')[1]!r} ({known or 'one output'})"
            )
        kinds = [f"{name}: {kind}" for name, kind in class_names(model).items()] or component_names(places)
        raise ValueError(
            f"{owner} has {len(missing)} of {len(sites)} sites that this model ({', '.join(kinds)}) lacks, "
            f"for example {missing[0]} (closest here: {closest(missing[0], list(places))}); it was made for another model, "
            "or select its sites first"
        )
    return {site: places[site] for site in sites}


def read_activations(place: Place, output: Any, site: str) -> Tensor:
    """The activations of `site` in the `output` of its module.

    Raises:
        ValueError: if they are no tensor.
    """
    value = place.read(output)
    if not isinstance(value, Tensor):
        raise ValueError(f"{site} puts out {type(value).__name__}, not a tensor; choose another site")
    return value
