"""One map on one model, at a strength that can change: what happens at each site, whoever calls it there.

`torch.compile` traces `ArmedSite.move`. It therefore reads tensors and the layout of places only, which are the same at every
block of a model, and nothing that a new strength or a new map changes: not the strength, not the name or number of a site.
"""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from .act_map import ActMap
from .affine import AffineMap, transport
from .masks import as_mask, blended, position_weights, stream_of
from .places import Place, Steerable, roots
from .pooling import position_mask
from .sites import read_activations, resolve


class ArmedMap:
    """A map on a model.

    Scale and shift of all sites lie in one flat buffer per device, so that a new strength is one operation however many sites
    there are. It is written in place, and sites hold views of it. Masters stay float32 on the CPU.

    Args:
        act_map: the map.
        model: a module, {component name: module}, or {site name: `Place`}.

    Raises:
        ValueError: if the model lacks sites of the map or has other unit counts.
    """

    def __init__(self, act_map: ActMap, model: Steerable) -> None:
        self.name, self.spatial = act_map.metadata.name, act_map.metadata.spatial
        found = resolve(model, list(act_map), f"act map {self.name!r}")
        for name, affine in act_map.items():
            self.check_units(name, affine.channels, found[name].unit_count, found[name].module)
        self._units = [affine.channels for affine in act_map.values()]
        self._full = _flat(act_map, "scale", "shift")
        self._bounds = _flat(act_map, "lower", "upper")
        self._strength = 0.0
        self._rows: Tensor | None = None
        self.tokens: Tensor | None = None
        self._mask: Tensor | None = None
        self.placed_mask: Tensor | None = None  # on the device, for compiled code
        self._mask_weights: dict[Any, Tensor | None] = {}
        self._on: dict[torch.device, _FlatMap] = {}
        self._device = next((device for root in roots(model) if (device := _device_of(root))), torch.device("cpu"))
        self.sites = [
            ArmedSite(self, name, number, found[name], bounded=affine.lower is not None)
            for number, (name, affine) in enumerate(act_map.items())
        ]
        for site in self.sites:
            self.bring(site, _device_of(site.place.module) or self._device)

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
            self._refresh()

    @property
    def rows(self) -> Tensor | None:
        """Factors (rows,) on the strength of each batch row; None steers all rows alike."""
        return self._rows

    @rows.setter
    def rows(self, rows: Tensor | None) -> None:
        if rows is self._rows or (rows is not None and self._rows is not None and torch.equal(rows, self._rows)):
            return
        self._rows = rows
        self._refresh()

    @property
    def mask(self) -> Tensor | None:
        """Factor (B, 1, H, W) on the displacement by position, also set as (H, W) or (B, H, W); None moves every position."""
        return self._mask

    @mask.setter
    def mask(self, mask: Tensor | None) -> None:
        mask = None if mask is None else as_mask(mask)
        if mask is None or self._mask is None or not torch.equal(mask, self._mask):
            self._mask = mask
            self._mask_weights.clear()
            self._place_mask()

    def position_weights(self, site: ArmedSite, x: Tensor, channel_dim: int) -> Tensor:
        """The mask at the positions of the activations `x` of a site, such that it broadcasts.

        Raises:
            ValueError: if the positions cannot be told apart.
        """
        mask = self.placed_mask
        assert mask is not None
        if torch.compiler.is_compiling():
            weights = position_weights(mask, x, channel_dim, site.stream)
        else:
            key = (x.shape, x.dtype, x.device, channel_dim, site.stream)
            if key not in self._mask_weights:
                with torch.inference_mode(False):
                    self._mask_weights[key] = position_weights(mask, x, channel_dim, site.stream)
            weights = self._mask_weights[key]
        if weights is None:
            raise ValueError(
                f"{site.name} has activations of shape {tuple(x.shape)}, in which the mask {tuple(mask.shape)} of act map "
                f"{self.name!r} finds no positions of the picture: give it the size of the picture or of its latents, and one "
                "row or one per picture, or leave the site out with ActMap.select"
            )
        return weights

    def load(self, device: torch.device) -> None:
        """Put all sites on `device`, where they are not. In eager models every site finds its device by itself."""
        self._device = torch.empty(0, device=device).device  # with its index
        for site in self.sites:
            if site.scale.device != self._device:
                self.bring(site, self._device)
        self._place_mask()

    def bring(self, site: ArmedSite, device: torch.device) -> None:
        """Put one site on `device`."""
        if device not in self._on:
            with torch.inference_mode(False):  # what is made in inference mode may be used outside of it
                self._on[device] = _FlatMap(self._full.to(device), self._bounds.to(device), self._units)
            self._on[device].set(self._strength, self._rows)
        site.scale, site.shift, lower, upper = self._on[device].of_site(site.number)
        site.lower, site.upper = (lower, upper) if site.bounded else (None, None)

    def _place_mask(self) -> None:
        with torch.inference_mode(False):
            self.placed_mask = None if self._mask is None else self._mask.to(self._device)

    def _refresh(self) -> None:
        moved = [flat.set(self._strength, self._rows) for flat in self._on.values()]
        if any(moved):
            for site in self.sites:
                self.bring(site, site.scale.device)

    def check_units(self, site: str, fitted: int, found: int | None, module: nn.Module) -> None:
        """Raise ValueError if a site has another number of units than the map, as far as that is known."""
        if found is not None and found != fitted:
            raise ValueError(
                f"act map {self.name!r} was fitted on {fitted} units at {site}, this model has {found} there "
                f"({type(module).__name__}): the map was made for another model"
            )


class ArmedSite:
    """One site of an armed map.

    Attributes:
        scale, shift: (units,), or (rows, units) with row factors, at the strength of the map.
        lower, upper: support (units,) of a bounded map, else None.
        stream: "image", "text" or "joint"; see `masks.stream_of`.
    """

    scale: Tensor
    shift: Tensor
    lower: Tensor | None
    upper: Tensor | None

    def __init__(self, arm: ArmedMap, name: str, number: int, place: Place, bounded: bool) -> None:
        self.arm, self.name, self.number, self.place, self.bounded = arm, name, number, place, bounded
        self.stream = stream_of(name)

    def move(self, output: Any) -> Any:
        """The `output` of the site's module with its activations moved.

        At strength 0 it is returned as it is. Compiled code moves it by scale 1 and shift -0.0, which changes no bit either.

        Raises:
            ValueError: if they are no tensor, have another number of units, rows that the row factors do not divide, or tokens
                or positions that a mask does not fit.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and self.arm.strength == 0:
            return output
        masked = self.arm.placed_mask is not None
        if masked and self.stream == "text":
            return output
        x = read_activations(self.place, output, self.name)
        dim = self.place.channel_dim(x)
        if x.shape[dim] != self.scale.shape[-1]:
            self.arm.check_units(self.name, self.scale.shape[-1], x.shape[dim], self.place.module)
        if not compiling and self.scale.device != x.device:
            self.arm.bring(self, x.device)
        scale, shift, lower, upper = self.scale, self.shift, self.lower, self.upper
        if compiling and scale.device != x.device:
            scale, shift = scale.to(x.device), shift.to(x.device)
            lower, upper = (None, None) if lower is None or upper is None else (lower.to(x.device), upper.to(x.device))
        if scale.ndim == 2 and x.shape[0] % scale.shape[0]:
            raise ValueError(
                f"{self.name} has {x.shape[0]} rows, which is no multiple of the {scale.shape[0]} row strengths"
            )
        moved = transport(x, scale, shift, lower, upper, channel_dim=dim, spatial=self.arm.spatial)
        if self.arm.tokens is not None:
            moved = torch.where(self._moved_positions(self.arm.tokens, x, dim), moved, x)
        if masked:
            moved = blended(x, moved, self.arm.position_weights(self, x, dim))
        return self.place.write(output, moved)

    def _moved_positions(self, tokens: Tensor, x: Tensor, channel_dim: int) -> Tensor:
        """The token mask in the shape of `x`, with one unit. Rows of the mask stand for equally large groups."""
        if x.shape[0] % len(tokens) == 0:
            tokens = tokens.repeat_interleave(x.shape[0] // len(tokens), 0)
        positions = position_mask(tokens, x, channel_dim)
        if positions is None:
            raise ValueError(
                f"{self.name} has activations of shape {tuple(x.shape)}, in which the {tokens.shape[1]} tokens of the token "
                "mask cannot be told apart; steer all tokens there, or leave the site out"
            )
        return positions.unsqueeze(channel_dim)


class _FlatMap:
    """Scale and shift of all sites end to end on one device, at one strength.

    Args:
        full: scale and shift (2, units) at strength 1.
        bounds: lower and upper (2, units).
        units: of each site.
    """

    def __init__(self, full: Tensor, bounds: Tensor, units: list[int]) -> None:
        self._full, self._units = full, units
        # A shift of minus zero leaves every number as it is, minus zero included.
        self._identity = torch.tensor([[1.0], [-0.0]], device=full.device).expand_as(full)
        self._bounds = self._by_site(bounds)
        self._now = torch.empty(0, device=full.device)
        self._moves: list[tuple[Tensor, Tensor]] = []

    def set(self, strength: float, rows: Tensor | None) -> bool:
        """Write scale and shift at `strength`, with factors (rows,) on it; tells whether they lie in new memory."""
        kinds, units = self._full.shape
        factors = [1.0] if rows is None else rows.tolist()
        shape = (kinds, units) if rows is None else (kinds, len(factors), units)
        moved = self._now.shape != shape
        with torch.inference_mode(False), torch.no_grad():
            if moved:
                self._now = torch.empty(shape, device=self._full.device)
                self._moves = self._by_site(self._now)
            for row, factor in zip(self._now.view(kinds, -1, units).unbind(1), factors, strict=True):
                if factor * strength == 0:
                    row.copy_(self._identity)
                else:
                    torch.lerp(self._identity, self._full, factor * strength, out=row)
        return moved

    def of_site(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scale, shift, lower and upper of a site; those without a support have bounds of zero."""
        return *self._moves[number], *self._bounds[number]

    def _by_site(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        first, second = (part.split(self._units, dim=-1) for part in flat)
        return list(zip(first, second, strict=True))


def _device_of(module: nn.Module) -> torch.device | None:
    """Where the module's weights are, if it has any and they are anywhere."""
    weight = next((t for tensors in (module.parameters(), module.buffers()) for t in tensors), None)
    return None if weight is None or weight.is_meta else weight.device


def _flat(act_map: ActMap, *names: str) -> Tensor:
    """The named tensors of all sites, each end to end: (len(names), units). Zeros stand for bounds that a site lacks."""

    def of_site(affine: AffineMap, name: str) -> Tensor:
        values = getattr(affine, name)
        return torch.zeros(affine.channels) if values is None else values.cpu()

    return torch.stack([torch.cat([of_site(affine, name) for affine in act_map.values()]) for name in names])
