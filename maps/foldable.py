"""Layers whose output is affine in weights of their own, and what a map makes of these weights.

A map folds where the last thing that a layer does is `out = weight * something + bias`, unit by unit: norms, linear and
convolutional layers. An adaptive norm is `norm(x) * (1 + scale) + shift` with scale and shift put out by a linear layer inside, into
whose rows the map goes. No class is trusted: every layer is run once with random weights and a random map.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .affine import transport
from .places import is_norm

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FOLDABLE = "norms, adaptive norms, linear and convolutional layers"


@dataclass(frozen=True)
class Modulation:
    """How an adaptive norm of diffusers uses what its linear layer puts out.

    Attributes:
        chunks: into how many parts of equal size it is cut.
        scale, shift: numbers of the parts that move the norm's first output.
        argument: name of the argument that the linear layer reads.
    """

    chunks: int
    scale: int
    shift: int
    argument: str = "emb"


_ADAPTIVE = {
    "AdaLayerNormZero": Modulation(6, scale=1, shift=0),
    "AdaLayerNormZeroSingle": Modulation(3, scale=1, shift=0),
    "SD35AdaLayerNormZeroX": Modulation(9, scale=1, shift=0),
    "AdaLayerNormContinuous": Modulation(2, scale=0, shift=1, argument="conditioning_embedding"),
}


class NotFoldableError(Exception):
    """Says why a map does not fold into a layer."""


@dataclass(frozen=True)
class Layer:
    """A layer that a map folds into.

    Attributes:
        module: the layer.
        owner: the module that holds its `weight` and `bias`: the layer itself, or the linear layer of an adaptive norm.
        axis: dim of the weight that counts the rows of the output.
        channel_dim: dim of the output that counts its units.
        gain: what the layer adds to its weight before it multiplies: 1 in the norms of Gemma, else 0.
        modulation: of an adaptive norm.
        reads_bias: whether the class of the owner adds a bias that is there. The RMS norms of transformers and of torch do not.
    """

    module: nn.Module
    owner: nn.Module
    axis: int = 0
    channel_dim: int = -1
    gain: float = 0.0
    modulation: Modulation | None = None
    reads_bias: bool = True

    @property
    def units(self) -> int:
        """Number of units of the output."""
        rows = _weight(self.owner).shape[self.axis]
        return rows if self.modulation is None else rows // self.modulation.chunks

    def folded(self, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of a layer that puts out `scale * out + shift` of the units (units,) where this one puts out `out`."""
        if self.modulation is not None:
            scale, shift = self._in_rows(scale, shift)
        shape = [1] * weight.ndim
        shape[self.axis] = -1
        along = scale.view(shape)
        return along * weight + self.gain * (along - 1), shift if bias is None else scale * bias + shift

    def _in_rows(self, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift of all rows of the linear layer: the norm adds 1 to its scale rows, and leaves rows for gates alone."""
        assert self.modulation is not None
        chunks = (self.modulation.chunks, len(scale))
        scales, shifts = scale.new_ones(chunks), scale.new_zeros(chunks)
        scales[self.modulation.scale] = scales[self.modulation.shift] = scale
        shifts[self.modulation.scale], shifts[self.modulation.shift] = scale - 1, shift
        return scales.flatten(), shifts.flatten()


def owner_of(module: nn.Module) -> nn.Module:
    """The module whose weights a map on the output of `module` would change."""
    linear = getattr(module, "linear", None)
    return linear if type(module).__name__ in _ADAPTIVE and isinstance(linear, nn.Module) else module


def layer_of(module: nn.Module) -> Layer:
    """How a map folds into `module`.

    Raises:
        NotFoldableError: if it does not.
    """
    owner, kind = owner_of(module), type(module).__name__
    if hasattr(owner, "base_layer"):
        raise NotFoldableError("it is wrapped by LoRA; fuse or unload the LoRA first")
    if owner is not module:
        layer = Layer(module, owner, modulation=_ADAPTIVE[kind])
    elif isinstance(module, _CONVOLUTIONS):
        layer = Layer(module, module, channel_dim=1)
    elif kind == "Conv1D":  # of transformers: a linear layer whose weight is transposed
        layer = Layer(module, module, axis=1)
    elif isinstance(module, nn.Linear):
        layer = Layer(module, module)
    elif is_norm(module) and "Batch" not in kind and "Instance" not in kind:
        layer = Layer(module, module, channel_dim=1 if isinstance(module, nn.GroupNorm) else -1)
    else:
        raise NotFoldableError(f"{kind} does not end in weights of its own; {_FOLDABLE} do")
    _check_weights(layer)
    try:
        return _proved(layer)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise NotFoldableError(f"{kind} does not run on a plain input ({error})") from None


@cache
def with_bias(kind: Any) -> Any:
    """A subclass of the same name that adds its parameter `bias`, for norms whose own class knows none."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        output = kind.forward(self, *args, **kwargs)
        return output + self.bias.to(output.dtype)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {"forward": forward, **names})


def _weight(owner: nn.Module) -> Tensor:
    weight = owner._parameters.get("weight")
    if weight is None:
        raise NotFoldableError("it has no weight to fold into, or one that is no plain parameter")
    return weight


def _check_weights(layer: Layer) -> None:
    """Raise NotFoldableError unless weight and bias are plain numbers that can be changed in place."""
    weight, bias = _weight(layer.owner), getattr(layer.owner, "bias", None)
    for values in (weight,) if bias is None else (weight, bias):
        if type(values) is not nn.Parameter or type(values.data) is not Tensor or values.dtype not in _DTYPES:
            dtype = f" of {values.dtype}" if isinstance(values, Tensor) else ""
            raise NotFoldableError(f"its weights are quantised or sharded ({type(values).__name__}{dtype})")
        if values.device.type == "meta":
            raise NotFoldableError("its weights are offloaded; load them first")
    if weight.ndim > 1 and layer.owner is layer.module and is_norm(layer.module):
        raise NotFoldableError(f"it normalises {weight.ndim} dims at once")


def _proved(layer: Layer) -> Layer:
    """`layer` with its gain and what it makes of a bias, shown by folding a random map into random weights."""
    shape, device, kind = _weight(layer.owner).shape, _weight(layer.owner).device, type(layer.module).__name__
    generator = torch.Generator(device).manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    # Neither half precision nor the inference mode of the caller is to decide.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        inputs = [random(*sizes) for sizes in _input_shapes(layer)]
        weight, bias = random(*shape) * (shape[layer.axis] / shape.numel()) ** 0.5, random(shape[layer.axis])
        before, none = (None, None) if getattr(layer.owner, "bias", None) is None else (bias, torch.zeros_like(bias))
        if is_norm(layer.module) and _run(layer, inputs, torch.zeros_like(weight), none).any():
            layer = replace(layer, gain=1.0)
        plain = _run(layer, inputs, weight, before)
        if before is None and torch.equal(_run(layer, inputs, weight, bias), plain):
            layer = replace(layer, reads_bias=False)
        scale, shift = 1.5 + random(layer.units).tanh(), random(layer.units)
        folded = _run(layer, inputs, *layer.folded(weight, before, scale, shift))
        moved = transport(plain, scale, shift, channel_dim=layer.channel_dim)
        # Wide enough for matrix products in TF32; a wrong formula is off by the size of the map.
        if not torch.allclose(folded, moved, rtol=0, atol=1e-2 * float(moved.abs().max())):
            raise NotFoldableError(f"{kind} computes something else than scale times input plus bias")
    return layer


def _input_shapes(layer: Layer) -> list[tuple[int, ...]]:
    """Shapes of inputs that are as small as the layer takes."""
    module, owner = layer.module, layer.owner
    if layer.modulation is not None:
        return [(2, 3, layer.units), (2, _weight(owner).shape[1])]
    if isinstance(module, _CONVOLUTIONS):
        reach = zip(module.dilation, module.kernel_size, strict=True)
        return [(2, module.in_channels, *(dilation * (size - 1) + 1 for dilation, size in reach))]
    if isinstance(module, nn.GroupNorm):
        return [(2, layer.units, 3)]
    weight = _weight(module)
    return [(2, weight.shape[1 - layer.axis] if weight.ndim > 1 else layer.units)]


def _run(layer: Layer, inputs: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Output of the layer's class with other weights, in float32. The module and its hooks take no part."""
    kind: Any = type(layer.owner)
    if bias is not None and not layer.reads_bias:
        kind = with_bias(kind)
    owner = _twin(layer.owner, {"weight": weight, "bias": bias}, kind=kind)
    if layer.modulation is None:
        return type(owner).forward(owner, *inputs)
    norm: Any = layer.module.norm
    parameters = {name: value.float() for name, value in norm.named_parameters(recurse=False)}
    inner = {**layer.module._modules, "linear": owner, "norm": _twin(norm, parameters), "emb": None}
    adaptive = _twin(layer.module, {}, modules=inner)
    output = type(adaptive).forward(adaptive, inputs[0], **{layer.modulation.argument: inputs[1]})
    return output[0] if isinstance(output, tuple) else output


def _twin(
    module: nn.Module, parameters: dict[str, Tensor | None], modules: dict[str, Any] | None = None, kind: Any = None
) -> Any:
    """A module with the same attributes, but other parameters and children, maybe of another class, and without hooks."""
    kind = kind or type(module)
    twin = kind.__new__(kind)
    nn.Module.__init__(twin)
    kept = {
        name: value for name, value in module.__dict__.items() if name not in (*twin.__dict__, "forward", *parameters)
    }
    twin.__dict__.update(kept)
    twin.__dict__["_parameters"] = {**dict.fromkeys(module._parameters), **parameters}
    twin.__dict__["_modules"] = modules or {}
    return twin
