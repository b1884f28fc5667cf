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
from .affine import AffineMap, transport
from .hooks import attach
from .places import Place, Steerable
from .pooling import position_mask
from .sites import read_activations, resolve


def steer(
    model: Steerable,
    act_map: ActMap | Mapping[ActMap, float],
    strength: float = 1.0,
    *,
    rows: Tensor | None = None,
    tokens: Tensor | None = None,
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
    strengths = {act_map: 1.0} if isinstance(act_map, ActMap) else dict(act_map)
    if not strengths:
        raise ValueError("no act map to steer with")
    arms = {armed: ArmedMap(armed, model) for armed in strengths}
    return Steering(arms, {armed: strength * own for armed, own in strengths.items()}, rows, tokens)


class Steering:
    """Maps armed on a model. Leaving the `with` block or `remove()` restores the model; both may be repeated."""

    def __init__(
        self,
        arms: Mapping[ActMap, ArmedMap],
        strengths: Mapping[ActMap, float],
        rows: Tensor | None,
        tokens: Tensor | None,
    ) -> None:
        self._arms = dict(arms)
        self._detach = []
        self.rows = rows
        self.tokens = tokens
        self.strength = strengths
        for arm in self._arms.values():
            for site in arm.sites:
                self._detach.append(attach(site.place.module, partial(self._at_site, arm, site)))

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

    @staticmethod
    def _at_site(arm: ArmedMap, site: ArmedSite, _module: nn.Module, output: Any) -> Any:
        return output if arm.strength == 0 else arm.move(site, output)

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
class ArmedSite:
    """One site of an armed map, and its number among them."""

    name: str
    place: Place
    number: int
    units: int
    bounded: bool


class ArmedMap:
    """One map on one model, at a strength that can change. It knows what to do at each site; who calls it there is another matter.

    Scale and shift of all sites lie in one flat buffer, so that a new strength is one operation however many sites there
    are. Masters stay float32 on the CPU; copies, scale and shift at the current strength, are kept per device.

    Args:
        act_map: the map.
        model: a module, {component name: module}, or {site name: `Place`}.

    Raises:
        ValueError: if the model lacks sites of the map or has other unit counts.
    """

    def __init__(self, act_map: ActMap, model: Steerable) -> None:
        self.name, self.spatial = act_map.metadata.name, act_map.metadata.spatial
        found = resolve(model, list(act_map), f"act map {self.name!r}")
        self.sites: list[ArmedSite] = []
        for number, (site, affine) in enumerate(act_map.items()):
            self._check_units(site, affine.channels, found[site].unit_count, found[site].module)
            self.sites.append(ArmedSite(site, found[site], number, affine.channels, affine.lower is not None))
        self._full = _flat(act_map, "scale", "shift")
        self._bounds = _flat(act_map, "lower", "upper")
        # A shift of minus zero leaves every number as it is, minus zero included.
        self._identity = torch.tensor([[1.0], [-0.0]]).expand_as(self._full)
        self._strength = 0.0
        self._rows: Tensor | None = None
        self.tokens: Tensor | None = None
        # By device, of each site: scale and shift (units,), or (rows, units) with row factors; and lower and upper (units,).
        self._moves: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        self._supports: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}

    @property
    def strength(self) -> float:
        """Strength of the map; not finite ones raise ValueError."""
        return self._strength

    @strength.setter
    def strength(self, strength: float) -> None:
        if not isfinite(strength):
            raise ValueError(f"the strength of act map {self.name!r} must be finite, got {strength}")
        if strength != self._strength:
            self._strength = strength
            self._moves.clear()

    @property
    def rows(self) -> Tensor | None:
        """Factors (rows,) on the strength of each batch row; None steers all rows alike."""
        return self._rows

    @rows.setter
    def rows(self, rows: Tensor | None) -> None:
        if rows is self._rows or (rows is not None and self._rows is not None and torch.equal(rows, self._rows)):
            return
        self._rows = rows
        self._moves.clear()

    def load(self, device: torch.device) -> None:
        """Put the map at its present strength on `device`, unless it is there."""
        if device in self._moves:
            return
        identity, full = self._identity, self._full
        with torch.inference_mode(False):  # what is loaded in inference mode may be used outside of it
            if self._rows is None:
                moves = torch.lerp(identity, full, self._strength)
            else:
                factors = (self._strength * self._rows.to("cpu", torch.float32))[:, None]
                moves = torch.lerp(identity[:, None], full[:, None], factors)
                moves = torch.where(factors == 0, identity[:, None], moves)
            self._moves[device] = self._by_site(moves.to(device))
            if device not in self._supports:
                self._supports[device] = self._by_site(self._bounds.to(device))

    def _by_site(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        first, second = (part.split([site.units for site in self.sites], dim=-1) for part in flat)
        return list(zip(first, second, strict=True))

    def move(self, site: ArmedSite, output: Any) -> Any:
        """The `output` of the site's module with its activations moved.

        Raises:
            ValueError: if they are no tensor, have another number of units, rows that the row factors do not divide, or tokens
                that the token mask does not fit.
        """
        x = read_activations(site.place, output, site.name)
        dim = site.place.channel_dim(x)
        self._check_units(site.name, site.units, x.shape[dim], site.place.module)
        device = x.device
        if device not in self._moves:
            self.load(device)
        scale, shift = self._moves[device][site.number]
        if scale.ndim == 2 and x.shape[0] % scale.shape[0]:
            raise ValueError(
                f"{site.name} has {x.shape[0]} rows, which is no multiple of the {scale.shape[0]} row strengths"
            )
        lower, upper = self._supports[device][site.number] if site.bounded else (None, None)
        moved = transport(x, scale, shift, lower, upper, channel_dim=dim, spatial=self.spatial)
        if self.tokens is not None:
            moved = torch.where(self._moved_positions(site.name, x, dim), moved, x)
        return site.place.write(output, moved)

    def _moved_positions(self, site: str, x: Tensor, channel_dim: int) -> Tensor:
        """The token mask in the shape of `x`, with one unit. Rows of the mask stand for equally large groups."""
        tokens = self.tokens
        assert tokens is not None
        if x.shape[0] % len(tokens) == 0:
            tokens = tokens.repeat_interleave(x.shape[0] // len(tokens), 0)
        positions = position_mask(tokens, x, channel_dim)
        if positions is None:
            raise ValueError(
                f"{site} has activations of shape {tuple(x.shape)}, in which the {tokens.shape[1]} tokens of the token mask "
                "cannot be told apart; steer all tokens there, or leave the site out"
            )
        return positions.unsqueeze(channel_dim)

    def _check_units(self, site: str, fitted: int, found: int | None, module: nn.Module) -> None:
        if found is not None and found != fitted:
            raise ValueError(
                f"act map {self.name!r} was fitted on {fitted} units at {site}, this model has {found} there "
                f"({type(module).__name__}): the map was made for another model"
            )


def _flat(act_map: ActMap, *names: str) -> Tensor:
    """The named tensors of all sites, each end to end: (len(names), units). Zeros stand for bounds that a site lacks."""

    def of_site(affine: AffineMap, name: str) -> Tensor:
        values = getattr(affine, name)
        return torch.zeros(affine.channels) if values is None else values.cpu()

    return torch.stack([torch.cat([of_site(affine, name) for affine in act_map.values()]) for name in names])
