"""Applying maps to a live model."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor

from .act_map import ActMap
from .arming import ArmedMap
from .hooks import attach
from .places import Steerable


def steer(
    model: Steerable,
    act_map: ActMap | Mapping[ActMap, float],
    strength: float = 1.0,
    *,
    rows: Tensor | None = None,
    tokens: Tensor | None = None,
    mask: Tensor | None = None,
) -> Steering:
    """Steer `model` with a map, or with several one after the other, until `remove()` or the end of the `with` block.

    Args:
        model: a module, {component name: module}, or {site name: `Place`}.
        act_map: a map, or {map: strength}; several apply at a site in the given order, and after those of earlier calls.
        strength: 0 leaves the model bit for bit as it is, 1 is the full transport; beyond [0, 1] extrapolates. With several
            maps it multiplies their strengths.
        rows: optional factors (B,) on the strength of each batch row, for example 0 for the unconditional rows of
            classifier-free guidance; also settable later as `Steering.rows`.
        tokens: optional bool mask (B, T) or (1, T), true at the tokens that are moved; also settable later as `Steering.tokens`.
        mask: optional factor (H, W) or (B, 1, H, W) in [0, 1] on the displacement at each position of the picture, at the size of
            the picture or of its latents; also settable later as `Steering.mask`. With a mask, text tokens are not moved.

    Returns:
        A `Steering`, which is a context manager and a handle.

    Raises:
        ValueError: if the model lacks sites of a map or has other unit counts, or the mask has another shape or other values.

    Example:
        >>> with steer(unet, act_map, strength=0.5) as steering:
        ...     unet(**inputs)
        ...     steering.strength = 1.0
        ...     unet(**inputs)
    """
    strengths = {act_map: 1.0} if isinstance(act_map, ActMap) else dict(act_map)
    if not strengths:
        raise ValueError("no act map to steer with")
    arms = {armed: ArmedMap(armed, model) for armed in strengths}
    return Steering(arms, {armed: strength * own for armed, own in strengths.items()}, rows, tokens, mask)


class Steering:
    """Maps armed on a model. Leaving the `with` block or `remove()` restores the model; both may be repeated."""

    def __init__(
        self,
        arms: Mapping[ActMap, ArmedMap],
        strengths: Mapping[ActMap, float],
        rows: Tensor | None,
        tokens: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        self._arms = dict(arms)
        self._detach = []
        self.rows = rows
        self.tokens = tokens
        self.mask = mask
        self.strength = strengths
        for arm in self._arms.values():
            for site in arm.sites:
                self._detach.append(attach(site.place.module, site.move))

    @property
    def strength(self) -> float | dict[ActMap, float]:
        """Strength of the map; with several maps, a dict by map. Set a float for all, or a dict for some."""
        strengths = {act_map: arm.strength for act_map, arm in self._arms.items()}
        return next(iter(strengths.values())) if len(strengths) == 1 else strengths

    @strength.setter
    def strength(self, strength: float | Mapping[ActMap, float]) -> None:
        strengths = strength if isinstance(strength, Mapping) else dict.fromkeys(self._arms, strength)
        for act_map, value in strengths.items():
            if act_map not in self._arms:
                raise ValueError(f"act map {act_map.metadata.name!r} is not armed here")
            self._arms[act_map].strength = float(value)

    @property
    def rows(self) -> Tensor | None:
        """Factors (B,) on the strength of each batch row; None steers all rows alike."""
        return self._rows

    @rows.setter
    def rows(self, rows: Tensor | None) -> None:
        self._rows = rows
        for arm in self._arms.values():
            arm.rows = rows

    @property
    def tokens(self) -> Tensor | None:
        """Mask (B, T) or (1, T) of the tokens that are moved; None moves all."""
        return self._tokens

    @tokens.setter
    def tokens(self, tokens: Tensor | None) -> None:
        self._tokens = tokens
        for arm in self._arms.values():
            arm.tokens = tokens

    @property
    def mask(self) -> Tensor | None:
        """Factor (H, W) or (B, 1, H, W) on the displacement at each position of the picture; None moves all in full."""
        return self._mask

    @mask.setter
    def mask(self, mask: Tensor | None) -> None:
        self._mask = mask
        for arm in self._arms.values():
            arm.mask = mask

    def load(self, device: torch.device | str) -> None:
        """Put the maps on `device`. Needed only if a compiled model has moved since it was armed; eager ones tell by themselves."""
        for arm in self._arms.values():
            arm.load(torch.device(device))

    def remove(self) -> None:
        """Take the maps off the model."""
        while self._detach:
            self._detach.pop()()
        for arm in self._arms.values():
            arm.sites.clear()  # they refer back to the map, whose buffers so go with the handle

    def __enter__(self) -> Steering:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
