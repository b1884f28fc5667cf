"""Places: where a site lies in a live model, and how to read and write the activations there.

Most often that is the whole output of one module. Blocks with several streams return one entry per stream; implementations that
fuse projections or concatenate streams hold several sites in one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias, TypeGuard

from torch import Tensor, nn

# Class names whose output is NCHW or (B, C, T): units along dim 1. Everything else has units in the last dim,
# also 4-D outputs such as the (B, T, heads, head_dim) of query and key norms.
_CHANNELS_FIRST = re.compile(
    r"Conv\dd|ConvTranspose\dd|GroupNorm|BatchNorm\dd|InstanceNorm\dd|ResnetBlock\w*|Transformer2DModel|GLUMBConv"
    r"|Downsample2D|Upsample2D|LoRACompatibleConv|UNetMidBlock\w*|(CrossAttn)?(Up|Down)Block2D"
)

# What blocks and attentions with several streams return, in order.
_STREAMS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            *(
                "FluxTransformerBlock",
                "FluxSingleTransformerBlock",
                "Flux2TransformerBlock",
            ),
            *(
                "ChromaTransformerBlock",
                "QwenImageTransformerBlock",
                "JointTransformerBlock",
                "AuraFlowJointTransformerBlock",
            ),
            *("LongCatImageTransformerBlock", "LongCatImageSingleTransformerBlock"),
            *("OvisImageTransformerBlock", "OvisImageSingleTransformerBlock"),
        ),
        ("text", "image"),
    ),
    **dict.fromkeys(
        (
            *("FluxAttention", "Flux2Attention", "Attention"),
            *("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"),
            *("HunyuanVideoTokenReplaceTransformerBlock", "HunyuanVideoTokenReplaceSingleTransformerBlock"),
            *("HunyuanImageTransformerBlock", "HunyuanImageSingleTransformerBlock"),
            *("CogVideoXBlock", "CogView4TransformerBlock", "MochiTransformerBlock"),
        ),
        ("image", "text"),
    ),
}

_NORM = re.compile(r"(Layer|Group|RMS)Norm|(Batch|Instance)Norm\dd|[A-Z]\w*(Layer|RMS)Norm")

_COMPONENT_OF_CLASS = (
    (re.compile(r".*UNet.*"), "unet"),
    (re.compile(r"CLIPText.*|T5Encoder.*"), "text_encoder"),
    (re.compile(r".*Transformer(2D|3D|2d|3d)?Model"), "transformer"),
)


@dataclass(frozen=True)
class Place:
    """A module, and the part of its output that holds a site's activations.

    Attributes:
        module: the module.
        entry: index of the activations where the module returns a tuple, a list or a ModelOutput.
        units: the channels of the site, where one module computes several sites side by side; None takes all.
        tokens: tells which positions (dim 1) are the site's, where several streams are concatenated; None takes all.
        channels_first: units lie along dim 1 instead of the last dim of an output with more than two.
    """

    module: nn.Module
    entry: int = 0
    units: slice | None = None
    tokens: Callable[[], slice] | None = None
    channels_first: bool = False

    def channel_dim(self, x: Tensor) -> int:
        """Axis of the activations `x` that counts units."""
        return 1 if self.channels_first and x.ndim > 2 else -1

    @property
    def unit_count(self) -> int | None:
        """Number of units, where the module's attributes tell, else None."""
        if self.units is not None:
            return len(range(*self.units.indices(self.units.stop)))
        return _unit_count(_unwrapped(self.module))

    @property
    def is_norm(self) -> bool:
        """Whether the module is a plain normalisation layer (one input, one output)."""
        return is_norm(self.module)

    def read(self, output: Any) -> Any:
        """The activations in the module's `output`; not a tensor if the site was ill chosen."""
        value = output[self.entry] if _has_entries(output) else output
        if (self.units is None and self.tokens is None) or not isinstance(value, Tensor):
            return value
        return value[self._part(value)]

    def write(self, output: Any, activations: Tensor) -> Any:
        """`output` with its activations replaced; other entries, units and tokens are kept as they are."""
        if not _has_entries(output):
            return self._within(output, activations)
        value = self._within(output[self.entry], activations)
        if isinstance(output, (tuple, list)):
            entries = [*output[: self.entry], value, *output[self.entry + 1 :]]
            return output._make(entries) if hasattr(output, "_make") else type(output)(entries)
        # A transformers ModelOutput: copied, since callers may hold on to the original.
        replaced = type(output)(**output)
        replaced[list(output.keys())[self.entry]] = value
        return replaced

    def _part(self, whole: Tensor) -> tuple[slice, ...]:
        part = [slice(None)] * whole.ndim
        if self.tokens is not None:
            part[1] = self.tokens()
        if self.units is not None:
            part[self.channel_dim(whole)] = self.units
        return tuple(part)

    def _within(self, whole: Tensor, activations: Tensor) -> Tensor:
        if self.units is None and self.tokens is None:
            return activations
        whole = whole.clone()
        whole[self._part(whole)] = activations
        return whole


Components: TypeAlias = Mapping[str, nn.Module]
Places: TypeAlias = Mapping[str, Place]
# What can be steered: a module, {component name: module}, or {site name: place} for models with names of their own.
Steerable: TypeAlias = "nn.Module | Components | Places"


def as_components(model: Steerable) -> dict[str, nn.Module]:
    """`model` as {component name: module}; a bare module is named after its class: unet, transformer, text_encoder or model.

    Raises:
        ValueError: if there is no component.
        TypeError: if a component is not a module.
    """
    if isinstance(model, nn.Module):
        kind = type(_unwrapped(model)).__name__
        return {next((name for pattern, name in _COMPONENT_OF_CLASS if pattern.fullmatch(kind)), "model"): model}
    components: dict[str, Any] = dict(model)
    if not components:
        raise ValueError("no model component given: pass a module or {component name: module}")
    for name, module in components.items():
        if not isinstance(module, nn.Module):
            raise TypeError(f"component {name!r} is a {type(module).__name__}, not a torch.nn.Module")
    return components


def find_places(model: Steerable) -> dict[str, Place]:
    """Every place of `model` by canonical site name, in registration order.

    LoRA's inner layers are left out, and neither they nor `torch.compile` change a name.

    Raises:
        ValueError: if there is no component.
        TypeError: if a component is not a module.
    """
    if is_places(model):
        return dict(model)
    places: dict[str, Place] = {}
    for component, root in as_components(model).items():
        for path, module in root.named_modules():
            path = path.removeprefix("_orig_mod.").removeprefix("text_model.")
            parts = [part for part in path.split(".") if part not in ("", "_orig_mod")]
            if parts and not any(part == "base_layer" or part.startswith("lora_") for part in parts):
                # Of a compiled submodule the wrapper comes first, whose hooks always run.
                for stream, place in _places_of(module).items():
                    places.setdefault(".".join([component, *parts]) + stream, place)
    return places


def is_places(model: Steerable) -> TypeGuard[Places]:
    """Whether `model` is given by its places only."""
    return isinstance(model, Mapping) and any(isinstance(value, Place) for value in model.values())


def roots(model: Steerable) -> list[nn.Module]:
    """The modules that hold all others of `model`, as far as it tells them."""
    return [place.module for place in model.values()] if is_places(model) else list(as_components(model).values())


def class_names(model: Steerable) -> dict[str, str]:
    """Class name of each component; empty for a model that is given by its places only."""
    if is_places(model):
        return {}
    return {name: type(_unwrapped(module)).__name__ for name, module in as_components(model).items()}


def _places_of(module: nn.Module) -> dict[str, Place]:
    """The places in one module by suffix of their name, which is empty for a module with one output."""
    kind = type(module).__name__
    streams = _STREAMS.get(kind, ())
    if not streams or (kind.endswith("Attention") and not _joins_streams(module)):
        return {"": whole_output(module)}
    return {f":{stream}": Place(module, entry) for entry, stream in enumerate(streams)}


def _joins_streams(attention: nn.Module) -> bool:
    """Whether an attention puts out both streams: it projects the text out again, or leaves it to nobody in the last block."""
    return getattr(attention, "to_add_out", None) is not None or getattr(attention, "context_pre_only", None) is True


def whole_output(module: nn.Module) -> Place:
    """The one tensor that `module` puts out."""
    return Place(module, channels_first=_channels_first(type(_unwrapped(module)).__name__))


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a plain normalisation layer (one input, one output)."""
    return _NORM.fullmatch(type(_unwrapped(module)).__name__) is not None


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """All modules in eval mode, so that neither dropout nor running statistics act; each module's mode is restored after."""
    training = [module for root in modules for module in root.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@cache
def _channels_first(kind: str) -> bool:
    return _CHANNELS_FIRST.fullmatch(kind) is not None


def _unit_count(module: nn.Module) -> int | None:
    for attribute in ("num_channels", "out_channels", "out_features"):
        count = getattr(module, attribute, None)
        if isinstance(count, int):
            return count
    weight = getattr(module, "weight", None)
    return weight.shape[0] if is_norm(module) and isinstance(weight, Tensor) and weight.ndim == 1 else None


def _unwrapped(module: nn.Module) -> nn.Module:
    """The layer inside a LoRA wrapper or a compiled module, whose output has the same layout."""
    for name in ("_orig_mod", "base_layer"):
        inner = module._modules.get(name)
        if inner is not None:
            return _unwrapped(inner)
    return module


def _has_entries(output: Any) -> bool:
    return not isinstance(output, Tensor) and (isinstance(output, (tuple, list)) or hasattr(output, "to_tuple"))
