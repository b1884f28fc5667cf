"""The one-dimensional affine transport map of every unit of one site."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def _along(values: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """View `values` (C,) or (rows, C) so that it broadcasts along `channel_dim` (and dim 0) of `x`."""
    if values.ndim == 1 and channel_dim == -1:
        return values
    shape = [1] * x.ndim
    shape[channel_dim] = values.shape[-1]
    if values.ndim == 2:
        if len(values) != x.shape[0]:
            values = values.repeat_interleave(x.shape[0] // len(values), 0)
        shape[0] = x.shape[0]
    return values.view(shape)


def transport(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    lower: Tensor | None = None,
    upper: Tensor | None = None,
    *,
    channel_dim: int = -1,
    spatial: str = "affine",
) -> Tensor:
    """Move activations by `scale * x + shift`, unit by unit.

    Args:
        x: activations of any shape with C entries along `channel_dim`.
        scale, shift: float32 tensors (C,), or (rows, C) with a map for every row of the batch, strength already folded in.
            Fewer rows than `x` has stand for equally large groups, such as the heads of an attention layer.
        lower, upper: bounds (C,) of the support; entries outside stay as they are.
        channel_dim: axis of `x` that counts units.
        spatial: "affine" moves every position by the map; "shift" moves all positions (dims 2 and up, NCHW) by the
            one constant that the map gives at their mean, which keeps the spatial contrast. The support is tested where
            the map is: at every position, or at the mean.

    Returns:
        A new tensor with the dtype, shape and device of `x`. Half precision is computed in float32 and rounded once.
    """
    scale, shift = _along(scale, x, channel_dim), _along(shift, x, channel_dim)
    tested = x
    if spatial == "shift" and x.ndim > 2 and channel_dim % x.ndim == 1:
        tested = x.mean(dim=tuple(range(2, x.ndim)), keepdim=True, dtype=torch.float32)
        moved = x + torch.addcmul(shift, scale - 1, tested)
    elif scale.shape[-1] > 1:
        moved = torch.addcmul(shift, scale, x)
    else:
        moved = (x * scale).add_(shift)  # half the time of addcmul, where units are not the last dim
    moved = moved.to(x.dtype)
    if lower is None or upper is None:
        return moved
    tested = tested.float()  # bounds are float32: the smallest and largest sample lie inside in every precision
    inside = (tested >= _along(lower, x, channel_dim)) & (tested <= _along(upper, x, channel_dim))
    return torch.where(inside, moved, x)


@dataclass(frozen=True, eq=False)
class AffineMap:
    """Per-unit affine transport maps `T(a) = scale * a + shift` (Activation Transport, section 3.1).

    Attributes:
        scale, shift: float32 tensors of shape (C,), one entry per unit.
        lower, upper: optional bounds (C,), inclusive; outside them an activation is left as it is.

    Raises:
        ValueError: if shapes differ, an entry is not finite, only one bound is given, or a lower bound exceeds its upper one.
    """

    scale: Tensor
    shift: Tensor
    lower: Tensor | None = None
    upper: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.lower is None) != (self.upper is None):
            raise ValueError("a support needs both bounds: give lower and upper, or neither")
        for name in ("scale", "shift", "lower", "upper"):
            values = getattr(self, name)
            if values is None:
                continue
            values = torch.as_tensor(values).detach().to(torch.float32)
            object.__setattr__(self, name, values)
            if values.ndim != 1 or values.shape != self.scale.shape:
                raise ValueError(
                    f"{name} has shape {tuple(values.shape)}, expected {tuple(self.scale.shape)} like scale"
                )
            if not torch.isfinite(values).all():
                raise ValueError(f"{name} has entries that are not finite")
        if self.lower is not None and self.upper is not None and (self.lower > self.upper).any():
            raise ValueError("lower exceeds upper at some units")

    @classmethod
    def identity(cls, channels: int) -> AffineMap:
        """The map that leaves all `channels` units as they are."""
        return cls(torch.ones(channels), torch.zeros(channels))

    @property
    def channels(self) -> int:
        """Number of units C."""
        return self.scale.shape[0]

    @property
    def unit_mask(self) -> Tensor:
        """Which units the map moves at all: bool (C,)."""
        return (self.scale != 1) | (self.shift != 0)

    def at(self, strength: float) -> AffineMap:
        """The map at a strength: displacement interpolation, exactly the identity at 0 and this map at 1 (section 3.2)."""
        scale = torch.lerp(torch.ones_like(self.scale), self.scale, strength)
        return AffineMap(scale, strength * self.shift, self.lower, self.upper)

    def apply(self, x: Tensor, strength: float = 1.0, channel_dim: int = -1) -> Tensor:
        """Transport `x`; see `transport`. Strength 0 returns `x` itself.

        Raises:
            ValueError: if `x` has another number of units along `channel_dim`.
        """
        if x.shape[channel_dim] != self.channels:
            raise ValueError(
                f"the map has {self.channels} units, x has {x.shape[channel_dim]} along dim {channel_dim}"
            )
        if strength == 0:
            return x
        at = self.at(strength).to(x.device)
        return transport(x, at.scale, at.shift, at.lower, at.upper, channel_dim=channel_dim)

    def inverse(self) -> AffineMap:
        """The map from target back to source. Bounds are carried over to the target side.

        Raises:
            ValueError: where a scale is 0, since such a unit forgets its source.
        """
        zero = (self.scale == 0).nonzero().flatten().tolist()
        if zero:
            raise ValueError(
                f"units {zero[:5]} have scale 0 and no inverse; fit the map with the prompt sets exchanged"
            )
        inverse = AffineMap(1 / self.scale, -self.shift / self.scale)
        if self.lower is None or self.upper is None:
            return inverse
        ends = self.scale * self.lower + self.shift, self.scale * self.upper + self.shift
        return AffineMap(inverse.scale, inverse.shift, torch.minimum(*ends), torch.maximum(*ends))

    def then(self, other: AffineMap) -> AffineMap:
        """Composition: `other` after this map.

        Raises:
            ValueError: if unit counts differ, or `other` has a support (its test would need the moved value).
        """
        if other.channels != self.channels:
            raise ValueError(f"cannot compose maps of {self.channels} and {other.channels} units")
        if other.lower is not None:
            raise ValueError("cannot fold a map with a support behind another one; steer with both maps instead")
        return AffineMap(other.scale * self.scale, other.scale * self.shift + other.shift, self.lower, self.upper)

    def to(self, device: torch.device | str) -> AffineMap:
        """The same map on `device`."""
        bounds = (
            (None, None)
            if self.lower is None or self.upper is None
            else (self.lower.to(device), self.upper.to(device))
        )
        return AffineMap(self.scale.to(device), self.shift.to(device), *bounds)

    def clone(self) -> AffineMap:
        """The same map with storage of its own."""
        bounds = (None, None) if self.lower is None or self.upper is None else (self.lower.clone(), self.upper.clone())
        return AffineMap(self.scale.clone(), self.shift.clone(), *bounds)
