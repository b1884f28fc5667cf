"""From the samples of one site to its map, by one process or by several that share the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .affine import AffineMap
from .estimators import support_bounds, transport_costs
from .methods import Method
from .ranks import Ranks


@dataclass(frozen=True)
class FittedSite:
    """The map of some units, and their transport costs (C,) before and after it."""

    fitted: AffineMap
    before: Tensor
    after: Tensor

    @property
    def costs(self) -> tuple[float, float]:
        """Means over units."""
        return float(self.before.mean()), float(self.after.mean())

    def packed(self) -> Tensor:
        """All of it as one tensor (C, 6); bounds that the map lacks are NaN."""
        fitted = self.fitted
        none = torch.full_like(fitted.scale, torch.nan)
        bounds = (none if bound is None else bound for bound in (fitted.lower, fitted.upper))
        return torch.stack([fitted.scale, fitted.shift, *bounds, self.before, self.after], dim=1)

    @classmethod
    def unpacked(cls, packed: Tensor) -> FittedSite:
        """What was `packed`."""
        scale, shift, lower, upper, before, after = packed.t().contiguous()
        bounds = () if lower.isnan().all() else (lower, upper)
        return cls(AffineMap(scale, shift, *bounds), before, after)


@dataclass(frozen=True)
class SiteFitter:
    """How the samples of a site become its map."""

    method: Method
    support: str | tuple[float, float]
    ranks: Ranks

    def fit(self, site: str, sides: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> FittedSite:
        """Fit a site on the samples of all ranks. Every rank calls this, and gets the same.

        Where a unit's map depends on that unit alone, each rank fits its share of the units; else each fits all.

        Args:
            site: its name, for errors.
            sides: source and target samples of this rank, (n, C) and (m, C) in float32.
            rows: n of every rank, and m of every rank.

        Raises:
            ValueError: for samples that the method refuses.
            RankError: if another rank has failed.
        """
        if self.ranks.count > 1 and self.method.per_unit:
            return self._shared(site, sides, rows)
        source, target = map(self.ranks.concatenate, sides, rows)
        return self._alone(site, source, target)

    def _alone(self, site: str, source: Tensor, target: Tensor) -> FittedSite:
        try:
            fitted = self.method.estimator(source, target)
        except ValueError as error:
            raise ValueError(f"{site}: {error}") from None
        bounds = support_bounds(source, self.support)
        if bounds is not None:
            fitted = AffineMap(fitted.scale, fitted.shift, *bounds)
        return FittedSite(fitted, *transport_costs(source, target, fitted))

    def _shared(self, site: str, sides: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> FittedSite:
        ranks, units = self.ranks, sides[0].shape[1]
        swapped = ranks.swap_units(torch.cat(list(sides)), [n + m for n, m in zip(*rows, strict=True)])
        of_ranks = swapped.split(
            [count for pair in zip(*rows, strict=True) for count in pair]
        )  # source, target, by turns
        source, target = torch.cat(of_ranks[::2]), torch.cat(of_ranks[1::2])
        mine, failure = source.shape[1], None
        part = source.new_full((mine, 6), torch.nan)
        try:
            if mine:
                part = self._alone(site, source, target).packed()
        except BaseException as error:  # not raised yet: the others wait for this part
            failure = error
        whole = ranks.concatenate(part, ranks.sizes(units))
        if whole[:, 0].isnan().any():  # which no scale is
            with ranks.reporting():
                if failure is not None:
                    raise failure
            ranks.meet()
        return FittedSite.unpacked(whole)
