"""Estimators: from source and target activations to one affine map per unit.

Every estimator takes source samples (n, C) and target samples (m, C), unpaired, and returns an `AffineMap` of C units.
All units are solved at once, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from .affine import AffineMap

Estimator = Callable[[Tensor, Tensor], AffineMap]

# A unit has no slope to estimate when its source is constant up to float32 rounding of its mean, or so narrow beside
# the target that the slope would exceed 1e4; it is then moved by the mean shift alone.
_ROUNDING = 1e-6
_LARGEST_SLOPE = 1e4

# Values that are solved at once: float64 copies and sorts of some units, not of all, bound the memory on top of the samples.
_BLOCK = 2**22


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
    check_samples(source, target, 2, "linear")
    return _solve(source, target, lambda a, b: _rank_covariance(a, b) / a.square().mean(-1), ordered=True)


def mean(source: Tensor, target: Tensor) -> AffineMap:
    """Mean-AcT (paper, section 3.3): scale 1, shift mean_b - mean_a. Arguments as for `linear`, n and m >= 1."""
    check_samples(source, target, 1, "mean")
    shift = target.mean(0, dtype=torch.float64) - source.mean(0, dtype=torch.float64)
    return AffineMap(torch.ones_like(shift), shift)


def gaussian(source: Tensor, target: Tensor) -> AffineMap:
    """Optimal transport between Gaussians: scale std_b / std_a, shift mean_b - scale * mean_a. Arguments as for `linear`."""
    check_samples(source, target, 2, "gaussian")
    return _solve(source, target, lambda a, b: _std(b) / _std(a), ordered=False)


def check_samples(source: Tensor, target: Tensor, at_least: int, method: str) -> None:
    """Raise ValueError for too few samples, unequal unit counts, NaN or infinite entries."""
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


def _solve(source: Tensor, target: Tensor, slopes: Callable[[Tensor, Tensor], Tensor], *, ordered: bool) -> AffineMap:
    """The map that carries mean to mean with the slopes that `slopes` gives, dead units shrunk to the mean shift.

    `slopes` gets the centred samples of some units, (C', n) and (C', m) in float64, sorted if `ordered`.
    """
    parts = []
    for a, b in unit_blocks(source, target, ordered=ordered):
        mean_a, mean_b = a.mean(-1), b.mean(-1)
        a, b = a.sub_(mean_a[:, None]), b.sub_(mean_b[:, None])
        std_a, std_b = _std(a), _std(b)
        dead = (std_a == 0) | (std_a <= _ROUNDING * mean_a.abs()) | (std_a * _LARGEST_SLOPE < std_b)
        scale = torch.where(dead, 1.0, slopes(a, b))
        parts.append(torch.stack([scale, mean_b - scale * mean_a]))
    return AffineMap(*torch.cat(parts, dim=1))


def unit_blocks(source: Tensor, target: Tensor, *, ordered: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
    """Samples (n, C) and (m, C) some units at a time: float64 copies (C', n) and (C', m), every unit sorted if `ordered`."""
    width = max(1, _BLOCK // (len(source) + len(target)))
    for some_source, some_target in zip(source.split(width, dim=1), target.split(width, dim=1), strict=True):
        yield _by_unit(some_source, ordered), _by_unit(some_target, ordered)


def _by_unit(samples: Tensor, ordered: bool) -> Tensor:
    """A float64 copy (C, n) of samples (n, C), every unit sorted if `ordered`."""
    by_unit = samples.detach().t()
    if not ordered:
        return by_unit.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    if by_unit.device.type == "cpu" and by_unit.dtype is not torch.bfloat16:
        # numpy's vectorised sort is an order of magnitude faster than torch's here
        return torch.from_numpy(np.sort(by_unit.contiguous().numpy(), axis=-1)).to(torch.float64)
    return by_unit.sort(-1).values.to(torch.float64)


def _std(centred: Tensor) -> Tensor:
    return centred.square().mean(-1).sqrt()


def _rank_covariance(a: Tensor, b: Tensor) -> Tensor:
    """Covariance (C,) of the quantile functions of sorted, centred samples (C, n) and (C, m)."""
    n, m = a.shape[1], b.shape[1]
    if n == m:
        return (a * b).mean(-1)
    # Ranks in units of 1 / (n m), so that the merged grid is exact.
    ends_a = torch.arange(1, n + 1, device=a.device) * m
    ends_b = torch.arange(1, m + 1, device=a.device) * n
    grid = torch.cat([ends_a, ends_b]).unique()
    weights = grid.diff(prepend=grid.new_zeros(1)).double() / (n * m)
    return (a[:, torch.searchsorted(ends_a, grid)] * b[:, torch.searchsorted(ends_b, grid)]) @ weights


def check_support(support: str | tuple[float, float]) -> None:
    """Raise ValueError unless `support` is "all", "observed" or quantiles (low, high) with 0 <= low < high <= 1."""
    if support in ("all", "observed"):
        return
    if isinstance(support, (tuple, list)) and len(support) == 2 and 0 <= support[0] < support[1] <= 1:
        return
    raise ValueError(f'support must be "all", "observed" or quantiles (low, high) within [0, 1], got {support!r}')


def support_bounds(source: Tensor, support: str | tuple[float, float]) -> tuple[Tensor, Tensor] | None:
    """Per-unit bounds inside which a map acts (paper, section 3.2).

    Args:
        source: source samples (n, C).
        support: "all" (no bounds), "observed" (smallest and largest sample), or quantiles (q_low, q_high).

    Raises:
        ValueError: for anything else.
    """
    check_support(support)
    if support == "all":
        return None
    if support == "observed":
        return source.amin(0), source.amax(0)
    ranks = [round(float(q) * (len(source) - 1)) for q in support]
    blocks = source.split(max(1, _BLOCK // len(source)), dim=1)
    low, high = torch.cat([_by_unit(block, ordered=True)[:, ranks] for block in blocks]).unbind(1)
    return low, high


def transport_costs(source: Tensor, target: Tensor, fitted: AffineMap) -> tuple[Tensor, Tensor]:
    """The squared 2-Wasserstein distance (C,) of every unit before and after `fitted`, in its Gaussian closed form.

    The distance is (mean_a - mean_b)^2 + (std_a - std_b)^2, from the first two moments of the samples (n, C) and (m, C).
    """
    (mean_a, std_a), (mean_b, std_b) = _moments(source), _moments(target)
    moved_mean, moved_std = fitted.scale * mean_a + fitted.shift, fitted.scale.abs() * std_a
    before = (mean_a - mean_b).square() + (std_a - std_b).square()
    after = (moved_mean - mean_b).square() + (moved_std - std_b).square()
    return before, after


def _moments(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of samples (n, C)."""
    mean = samples.mean(0)
    return mean, (samples - mean).square_().mean(0).sqrt()
