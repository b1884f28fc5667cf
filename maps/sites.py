"""Sites: the named module outputs that maps act on, and how to read and write their activations.

A site is `"<component>.<module path>"`, for example `unet.down_blocks.0.resnets.0.norm1`, with `:image` or `:text` behind it
for one stream of a block that returns several. Names are those of diffusers and transformers without the `text_model.`
level, which some versions have and others do not.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

Components = Mapping[str, nn.Module]

# Class names whose output is NCHW or (B, C, T): units along dim 1. Everything else has units in the last dim,
# also 4-D outputs such as the (B, T, heads, head_dim) of query and key norms.
_CHANNELS_FIRST = re.compile(
    r"Conv\dd|ConvTranspose\dd|GroupNorm|BatchNorm\dd|InstanceNorm\dd|ResnetBlock\w*|Transformer2DModel|GLUMBConv"
    r"|Downsample2D|Upsample2D|LoRACompatibleConv|UNetMidBlock\w*|(CrossAttn)?(Up|Down)Block2D"
)

# What blocks with several streams return, in order (None: a place that is no stream).
_STREAMS: dict[str, tuple[str | None, ...]] = {
    "FluxTransformerBlock": ("text", "image"),
    "FluxSingleTransformerBlock": ("text", "image"),
    "FluxAttention": ("image", "text"),
    "JointTransformerBlock": ("text", "image"),
    "HunyuanVideoTransformerBlock": ("image", "text"),
    "HunyuanVideoSingleTransformerBlock": ("image", "text"),
}

_NORM = re.compile(r"(Layer|Group|RMS)Norm|(Batch|Instance)Norm\dd|[A-Z]\w*(Layer|RMS)Norm")

_COMPONENT_OF_CLASS = (
    (re.compile(r".*UNet.*"), "unet"),
    (re.compile(r"CLIPText.*|T5Encoder.*"), "text_encoder"),
    (re.compile(r".*Transformer(2D|3D|2d|3d)?Model"), "transformer"),
)


def as_components(model: nn.Module | Components) -> dict[str, nn.Module]:
    """`model` as {component name: module}; a bare module is named after its class: unet, transformer, text_encoder or model.

    Raises:
        ValueError: if there is no component.
        TypeError: if a component is not a module.
    """
    if isinstance(model, nn.Module):
        kind = type(_unwrapped(model)).__name__
        return {next((name for pattern, name in _COMPONENT_OF_CLASS if pattern.fullmatch(kind)), "model"): model}
    components = dict(model)
    if not components:
        raise ValueError("no model component given: pass a module or {component name: module}")
    for name, module in components.items():
        if not isinstance(module, nn.Module):
            raise TypeError(f"component {name!r} is a {type(module).__name__}, not a torch.nn.Module")
    return components


def site_modules(components: Components) -> dict[str, nn.Module]:
    """Every module by canonical site name (without stream), in registration order; LoRA's inner layers are left out."""
    modules: dict[str, nn.Module] = {}
    for component, root in components.items():
        for path, module in root.named_modules():
            path = path.removeprefix("_orig_mod.").removeprefix("text_model.")
            parts = [part for part in path.split(".") if part not in ("", "_orig_mod")]
            if parts and not any(part == "base_layer" or part.startswith("lora_") for part in parts):
                # Of a compiled submodule the wrapper comes first, whose hooks always run.
                modules.setdefault(".".join([component, *parts]), module)
    return modules


def stream_names(module: nn.Module) -> tuple[str, ...]:
    """The streams that a block returns, or an empty tuple for a module with one output."""
    return tuple(stream for stream in _STREAMS.get(type(module).__name__, ()) if stream)


def channel_dim(module: nn.Module, x: Tensor) -> int:
    """Axis of the output `x` of `module` that counts units: 1 for convolutional modules, else the last."""
    return 1 if x.ndim > 2 and _channels_first(type(_unwrapped(module)).__name__) else -1


@cache
def _channels_first(kind: str) -> bool:
    return _CHANNELS_FIRST.fullmatch(kind) is not None


def unit_count(module: nn.Module) -> int | None:
    """Number of units that `module` puts out, where its attributes tell, else None."""
    module = _unwrapped(module)
    for attribute in ("num_channels", "out_channels", "out_features"):
        count = getattr(module, attribute, None)
        if isinstance(count, int):
            return count
    weight = getattr(module, "weight", None)
    return weight.shape[0] if is_norm(module) and isinstance(weight, Tensor) and weight.ndim == 1 else None


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a plain normalisation layer (one input, one output)."""
    return _NORM.fullmatch(type(_unwrapped(module)).__name__) is not None


def _unwrapped(module: nn.Module) -> nn.Module:
    """The layer inside a LoRA wrapper or a compiled module, whose output has the same layout."""
    for attribute in ("_orig_mod", "base_layer"):
        inner = getattr(module, attribute, None)
        if isinstance(inner, nn.Module):
            return _unwrapped(inner)
    return module


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
    model: nn.Module | Components,
    patterns: str | Sequence[str] | None = None,
    *,
    example: Mapping[str, Any] | Tensor | Callable[[], Any] | None = None,
) -> list[str]:
    """Names of the sites that match `patterns`.

    Args:
        model: a module, or {component name: module}.
        patterns: list of names or suffixes, or a full-match regular expression; None takes all normalisation layers,
            which the paper (section 4) finds best for U-Nets and language models. The name of a component stands for
            its normalisation layers.
        example: one input (a mapping is passed as keywords), or a function that runs the forward. With it the sites come in
            execution order and those that the forward does not reach are left out; without it they come in registration
            order, which in a U-Net differs.

    Raises:
        ValueError: if nothing matches; the error lists the closest names.
    """
    components = as_components(model)
    modules = site_modules(components)
    norms = [site for site, module in modules.items() if is_norm(module)]
    if patterns is None:
        if not norms:
            raise ValueError(f"no normalisation layer in {', '.join(components)}; name the sites")
        sites = norms
    else:
        named = [name for site, module in modules.items() for name in _site_and_streams(site, module)]
        sites = match_sites(named, _expanded(patterns, components, norms))
    if example is None:
        return sites
    reached = _trace(components, modules, sites, example)
    if not reached:
        raise ValueError(f"the example input reaches none of the {len(sites)} matching sites, for example {sites[0]}")
    return reached


def _expanded(patterns: str | Sequence[str], components: Components, norms: Sequence[str]) -> str | list[str]:
    """`patterns` with component names replaced by the names of their normalisation layers."""
    if isinstance(patterns, str) and patterns not in components:
        return patterns
    expanded: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        expanded += [n for n in norms if n.startswith(f"{pattern}.")] if pattern in components else [pattern]
    return expanded


def _site_and_streams(site: str, module: nn.Module) -> list[str]:
    return [f"{site}:{stream}" for stream in stream_names(module)] or [site]


@contextmanager
def evaluating(components: Components) -> Iterator[None]:
    """All modules in eval mode, so that neither dropout nor running statistics act; each module's mode is restored after."""
    training = [module for root in components.values() for module in root.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _trace(
    components: Components,
    modules: Mapping[str, nn.Module],
    sites: Sequence[str],
    example: Mapping[str, Any] | Tensor | Callable[[], Any],
) -> list[str]:
    """The `sites` in the order in which one forward over `example` visits them."""
    reached: dict[str, None] = {}
    handles = []
    for site in sites:
        module = modules[site.split(":")[0]]
        handles.append(module.register_forward_hook(lambda *_, site=site: reached.setdefault(site)))
    try:
        with evaluating(components), torch.no_grad():
            if callable(example):
                example()
            elif len(components) != 1:
                raise ValueError("with several components, example must be a function that runs the forward")
            elif isinstance(example, Mapping):
                next(iter(components.values()))(**example)
            else:
                next(iter(components.values()))(example)
    finally:
        for handle in handles:
            handle.remove()
    return list(reached)


def resolve(components: Components, sites: Sequence[str], owner: str) -> dict[str, nn.Module]:
    """The module of each site.

    Raises:
        ValueError: naming `owner` (what the sites belong to) and the sites that the components lack.
    """
    modules = site_modules(components)
    missing = [site for site in sites if site.split(":")[0] not in modules]
    if missing:
        kinds = ", ".join(f"{name}: {type(module).__name__}" for name, module in components.items())
        raise ValueError(
            f"{owner} has {len(missing)} of {len(sites)} sites that this model ({kinds}) lacks, for example {missing[0]} "
            f"(closest here: {closest(missing[0], list(modules))}); it was made for another model, or select its sites first"
        )
    resolved = {}
    for site in sites:
        path, _, stream = site.partition(":")
        streams = stream_names(modules[path])
        if stream and stream not in streams:
            raise ValueError(
                f"{site}: {type(modules[path]).__name__} has no stream {stream!r} ({', '.join(streams) or 'one output'})"
            )
        resolved[site] = modules[path]
    return resolved


def read_output(module: nn.Module, output: Any, site: str) -> Tensor:
    """The activations of `site` in the `output` of its module: a tensor, one stream, or the first entry of a tuple."""
    several = isinstance(output, (tuple, list)) or hasattr(output, "to_tuple")
    value = output[_index(module, site)] if several else output
    if not isinstance(value, Tensor):
        raise ValueError(f"{site} puts out {type(value).__name__}, not a tensor; choose another site")
    return value


def replace_output(module: nn.Module, output: Any, site: str, value: Tensor) -> Any:
    """`output` with the activations of `site` replaced by `value`; other entries are kept as they are."""
    if isinstance(output, Tensor):
        return value
    index = _index(module, site)
    if isinstance(output, (tuple, list)):
        entries = [*output[:index], value, *output[index + 1 :]]
        return output._make(entries) if hasattr(output, "_make") else type(output)(entries)
    # A transformers ModelOutput: copied, since callers may hold on to the original.
    replaced = type(output)(**output)
    replaced[list(output.keys())[index]] = value
    return replaced


def _index(module: nn.Module, site: str) -> int:
    _, _, stream = site.partition(":")
    return _STREAMS[type(module).__name__].index(stream) if stream else 0
