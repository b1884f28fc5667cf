"""Applying maps to a live model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import isfinite
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .act_map import ActMap
from .affine import transport
from .hooks import attach
from .sites import Components, as_components, channel_dim, read_output, replace_output, resolve, unit_count


def steer(
    model: nn.Module | Components,
    act_map: ActMap | Mapping[ActMap, float],
    strength: float = 1.0,
    *,
    rows: Tensor | None = None,
) -> Steering:
    """Steer `model` with a map, or with several one after the other, until `remove()` or the end of the `with` block.

    Args:
        model: a module, or {component name: module}.
        act_map: a map, or {map: strength}; several apply at a site in the given order, and after those of earlier calls.
        strength: 0 leaves the model bit for bit as it is, 1 is the full transport; beyond [0, 1] extrapolates. With several
            maps it multiplies their strengths.
        rows: optional factors (B,) on the strength of each batch row, for example 0 for the unconditional rows of
            classifier-free guidance; also settable later as `Steering.rows`.

    Returns:
        A `Steering`, which is a context manager and a handle.

    Raises:
        ValueError: if the model lacks sites of a map or has other unit counts.

    Example:
        >>> with steer(unet, act_map, strength=0.5) as steering:
        ...     unet(**inputs)
        ...     steering.strength = 1.0
        ...     unet(**inputs)
    """
    components = as_components(model)
    strengths = {act_map: 1.0} if isinstance(act_map, ActMap) else dict(act_map)
    if not strengths:
        raise ValueError("no act map to steer with")
    arms = {armed: _Arm(armed, components) for armed in strengths}
    return Steering(arms, {armed: strength * own for armed, own in strengths.items()}, rows)


class Steering:
    """Maps armed on a model. Leaving the `with` block or `remove()` restores the model; both may be repeated."""

    def __init__(self, arms: Mapping[ActMap, _Arm], strengths: Mapping[ActMap, float], rows: Tensor | None) -> None:
        self._arms = dict(arms)
        self._detach = []
        self.rows = rows
        self.strength = strengths
        for arm in self._arms.values():
            for site in arm.sites:
                self._detach.append(attach(site.module, partial(self._at_site, arm, site)))

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
            self._arms[act_map].set_strength(float(value))

    def _at_site(self, arm: _Arm, site: _Site, module: nn.Module, output: Any) -> Any:
        if arm.strength == 0:
            return output
        x = read_output(module, output, site.name)
        moved = arm.move(site, module, x)
        if self.rows is not None:
            moved = _by_row(x, moved, self.rows, site.name)
        return replace_output(module, output, site.name, moved)

    def remove(self) -> None:
        """Take the maps off the model."""
        while self._detach:
            self._detach.pop()()

    def __enter__(self) -> Steering:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


@dataclass(frozen=True)
class _Site:
    """One armed site, and its place in the flat buffer of the map."""

    name: str
    module: nn.Module
    start: int
    stop: int


class _Arm:
    """One map on one model at a strength that can change.

    Scale and shift of all sites lie in one flat buffer, so that a new strength is one operation however many sites there
    are. Masters stay float32 on the CPU; copies, scale and shift at the current strength, are kept per device.
    """

    def __init__(self, act_map: ActMap, components: Components) -> None:
        self.name, self.spatial = act_map.metadata.name, act_map.metadata.spatial
        modules = resolve(components, list(act_map), f"act map {self.name!r}")
        self.sites = []
        start = 0
        for site, affine in act_map.items():
            self._check_units(site, affine.channels, unit_count(modules[site]), modules[site])
            stop = start + affine.channels
            self.sites.append(_Site(site, modules[site], start, stop))
            start = stop
        parts = [torch.cat([getattr(affine, name) for affine in act_map.values()]) for name in ("scale", "shift")]
        self._full = torch.stack(parts).cpu()
        self._identity = torch.tensor([[1.0], [0.0]]).expand_as(self._full)
        self._bounds = {site: (affine.lower, affine.upper) for site, affine in act_map.items()}
        self._moves: dict[torch.device, Tensor] = {}
        self._supports: dict[tuple[torch.device, str], tuple[Tensor | None, Tensor | None]] = {}
        self.strength = 0.0

    def set_strength(self, strength: float) -> None:
        if not isfinite(strength):
            raise ValueError(f"the strength of act map {self.name!r} must be finite, got {strength}")
        if strength != self.strength:
            self.strength = strength
            self._moves.clear()

    def move(self, site: _Site, module: nn.Module, x: Tensor) -> Tensor:
        dim = channel_dim(module, x)
        self._check_units(site.name, site.stop - site.start, x.shape[dim], module)
        if x.device not in self._moves:
            self._moves[x.device] = torch.lerp(self._identity, self._full, self.strength).to(x.device)
        if (x.device, site.name) not in self._supports:
            lower, upper = (None if bound is None else bound.to(x.device) for bound in self._bounds[site.name])
            self._supports[x.device, site.name] = lower, upper
        scale, shift = self._moves[x.device][:, site.start : site.stop]
        lower, upper = self._supports[x.device, site.name]
        return transport(x, scale, shift, lower, upper, channel_dim=dim, spatial=self.spatial)

    def _check_units(self, site: str, fitted: int, found: int | None, module: nn.Module) -> None:
        if found is not None and found != fitted:
            raise ValueError(
                f"act map {self.name!r} was fitted on {fitted} units at {site}, this model has {found} there "
                f"({type(module).__name__}): the map was made for another model"
            )


def _by_row(x: Tensor, moved: Tensor, rows: Tensor, site: str) -> Tensor:
    """`moved` at the strength factor of each row: exactly `x` where it is 0, exactly `moved` where it is 1."""
    if x.shape[0] % len(rows):
        raise ValueError(f"{site} has {x.shape[0]} rows, which is no multiple of the {len(rows)} row strengths")
    factor = rows.to(x.device, torch.promote_types(x.dtype, torch.float32)).repeat_interleave(x.shape[0] // len(rows))
    factor = factor.view(-1, *[1] * (x.ndim - 1))
    between = torch.lerp(x.to(factor.dtype), moved.to(factor.dtype), factor).to(x.dtype)
    return torch.where(factor == 0, x, torch.where(factor == 1, moved, between))
