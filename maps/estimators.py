"""Estimators: from source and target activations to one affine map per unit.

Every estimator takes source samples (n, C) and target samples (m, C), unpaired, and returns an `AffineMap` of C units.
All units are solved at once, in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .affine import AffineMap

Estimator = Callable[[Tensor, Tensor], AffineMap]

# A unit has no slope to estimate when its source is constant up to float32 rounding of its mean, or so narrow beside
# the target that the slope would exceed 1e4; it is then moved by the mean shift alone.
_ROUNDING = 1e-6
_LARGEST_SLOPE = 1e4


def _check(source: Tensor, target: Tensor, at_least: int, method: str) -> None:
    if source.ndim != 2 or target.ndim != 2 or source.shape[1] != target.shape[1]:
        raise ValueError(
            f"samples must be (n, C) and (m, C) with the same C, got {tuple(source.shape)} and {tuple(target.shape)}"
        )
    for side, samples in (("source", source), ("target", target)):
        if len(samples) < at_least:
            raise ValueError(
                f"method {method!r} needs at least {at_least} {side} sample{'s' * (at_least > 1)}, got {len(samples)}; "
                + ("add prompts, or use method='mean'" if len(samples) else f"the {side} set is empty")
            )
        if not torch.isfinite(samples).all():
            raise ValueError(f"the {side} activations have NaN or infinite entries")


def _sorted_units(samples: Tensor) -> Tensor:
    """Samples (n, C) as (C, n), every unit sorted, in float64."""
    by_unit = samples.t().contiguous()
    if by_unit.device.type == "cpu":  # numpy's vectorised sort is an order of magnitude faster than torch's here
        return torch.from_numpy(np.sort(by_unit.numpy(), axis=-1)).double()
    return by_unit.sort(-1).values.double()


def _assemble(slope: Tensor, source: Tensor, target: Tensor) -> AffineMap:
    """The map with the given slopes that carries mean to mean, with dead units shrunk to the mean shift."""
    source, target = source.double(), target.double()
    mean_a, mean_b = source.mean(0), target.mean(0)
    std_a, std_b = source.std(0, correction=0), target.std(0, correction=0)
    dead = (std_a <= _ROUNDING * mean_a.abs()) | (std_a * _LARGEST_SLOPE <= std_b) & (std_b > 0) | (std_a == 0)
    scale = torch.where(dead, 1.0, slope)
    return AffineMap(scale.float(), (mean_b - scale * mean_a).float())


def linear(source: Tensor, target: Tensor) -> AffineMap:
    """Linear-AcT (paper, equation 6): least squares of the sorted target on the sorted source.

    scale = sum_i w_i a(i) b(i) / sum_i w_i a(i)^2 over centred, sorted values; shift = mean_b - scale * mean_a. With unequal
    counts the two quantile functions are matched on the merged grid of their ranks, w_i being the grid's spacing. The
    scale is never negative.

    Args:
        source: (n, C), n >= 2.
        target: (m, C), m >= 2.

    Raises:
        ValueError: for too few samples, mismatched C, NaN or infinite entries.
    """
    _check(source, target, 2, "linear")
    a, b = _sorted_units(source), _sorted_units(target)
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    n, m = a.shape[1], b.shape[1]
    if n == m:
        covariance = (a * b).sum(-1) / n
    else:
        # Ranks in units of 1 / (n m), so that the merged grid is exact.
        ends_a = torch.arange(1, n + 1, device=a.device) * m
        ends_b = torch.arange(1, m + 1, device=a.device) * n
        grid = torch.cat([ends_a, ends_b]).unique()
        weights = grid.diff(prepend=grid.new_zeros(1)).double() / (n * m)
        covariance = (a[:, torch.searchsorted(ends_a, grid)] * b[:, torch.searchsorted(ends_b, grid)]) @ weights
    variance = a.square().mean(-1)
    return _assemble(covariance / variance.clamp_min(torch.finfo(torch.float64).tiny), source, target)


def mean(source: Tensor, target: Tensor) -> AffineMap:
    """Mean-AcT (paper, section 3.3): scale 1, shift mean_b - mean_a. Arguments as for `linear`, n and m >= 1."""
    _check(source, target, 1, "mean")
    source, target = source.double(), target.double()
    shift = target.mean(0) - source.mean(0)
    return AffineMap(torch.ones_like(shift).float(), shift.float())


def gaussian(source: Tensor, target: Tensor) -> AffineMap:
    """Optimal transport between Gaussians: scale std_b / std_a, shift mean_b - scale * mean_a. Arguments as for `linear`."""
    _check(source, target, 2, "gaussian")
    source, target = source.double(), target.double()
    std_a, std_b = source.std(0, correction=0), target.std(0, correction=0)
    return _assemble(std_b / std_a.clamp_min(torch.finfo(torch.float64).tiny), source, target)


ESTIMATORS: dict[str, Estimator] = {"linear": linear, "mean": mean, "gaussian": gaussian}


def support_bounds(source: Tensor, support: str | tuple[float, float]) -> tuple[Tensor, Tensor] | None:
    """Per-unit bounds inside which a map acts (paper, section 3.2).

    Args:
        source: source samples (n, C).
        support: "all" (no bounds), "observed" (smallest and largest sample), or quantiles (q_low, q_high).

    Raises:
        ValueError: for anything else.
    """
    if support == "all":
        return None
    if support == "observed":
        return source.amin(0), source.amax(0)
    if isinstance(support, str) or len(support) != 2 or not 0 <= support[0] < support[1] <= 1:
        raise ValueError(f'support must be "all", "observed" or quantiles (low, high) within [0, 1], got {support!r}')
    ranks = _sorted_units(source)
    low, high = (ranks[:, round(q * (ranks.shape[1] - 1))] for q in support)
    return low, high


def transport_costs(source: Tensor, target: Tensor, fitted: AffineMap) -> tuple[float, float]:
    """Mean over units of the squared 2-Wasserstein distance before and after `fitted`, in its Gaussian closed form.

    The distance is (mean_a - mean_b)^2 + (std_a - std_b)^2, from the first two moments of the samples (n, C) and (m, C).
    """
    mean_a, mean_b = source.mean(0), target.mean(0)
    std_a, std_b = source.std(0, correction=0), target.std(0, correction=0)
    moved_mean, moved_std = fitted.scale * mean_a + fitted.shift, fitted.scale.abs() * std_a
    before = (mean_a - mean_b).square() + (std_a - std_b).square()
    after = (moved_mean - mean_b).square() + (moved_std - std_b).square()
    return float(before.mean()), float(after.mean())
