"""Where the reference and we deliberately differ, each shown by a small experiment: what it gives, what we give, and why."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from rich.table import Table
from torch import nn

from actmaps.maps import ESTIMATORS, ActMap, ActMapMetadata, AffineMap, steer
from actmaps.maps.estimators import support_bounds

from .checkout import as_affine, fitted_hook, reference_module


@dataclass
class Difference:
    """One difference, in words and numbers for the table."""

    case: str
    reference: str
    ours: str
    reason: str


@torch.no_grad()
def differences() -> list[Difference]:
    """All of them, in the order of the method: estimators, supports, application."""
    torch.manual_seed(0)
    found = (
        _constant,
        _narrow,
        _unequal_counts,
        _unequal_std,
        _strict_bounds,
        _quantiles,
        _mean_of_the_map,
    )
    return [experiment() for experiment in found]


def table(rows: list[Difference]) -> Table:
    made = Table(title="Where they differ, and why", show_lines=True)
    for column in ("case", "reference", "ours", "reason"):
        made.add_column(column)
    for row in rows:
        made.add_row(row.case, row.reference, row.ours, row.reason)
    return made


def _constant() -> Difference:
    source, target = torch.full((64, 1), 0.3), torch.randn(64, 1)
    slopes = []
    for seed in range(20):
        np.random.seed(seed)  # noqa: NPY002 (the reference draws from the global generator)
        slopes.append(float(as_affine(fitted_hook("linear", source, target)).scale))
    ours = ESTIMATORS["linear"](source, target)
    return Difference(
        "linear, a unit whose source is constant",
        f"slopes from {min(slopes):.0e} to {max(slopes):.0e} over 20 seeds",
        f"slope {float(ours.scale):g}, the mean shift",
        "it adds noise of 1e-8 to the source and divides by the noise's variance",
    )


def _narrow() -> Difference:
    source, target = 5e-5 * torch.randn(64, 1), 1 + 5e-5 * torch.randn(64, 1)
    moved: dict[str, list[str]] = {"reference": [], "ours": []}
    for method in ("gaussian", "mean"):
        maps = {
            "reference": as_affine(fitted_hook(method, source, target)),
            "ours": ESTIMATORS[method](source, target),
        }
        for side, affine in maps.items():
            moved[side].append(f"{float((affine.apply(source) - source).mean()):.3f}")
    return Difference(
        "gaussian and mean, standard deviations of 5e-5",
        f"moved by {' and '.join(moved['reference'])}",
        f"moved by {' and '.join(moved['ours'])}",
        "it leaves units below 1e-4 where they are, however far the means are apart (here 1)",
    )


def _unequal_counts() -> Difference:
    source, target = torch.randn(48, 1), 2 * torch.randn(64, 1)
    try:
        fitted_hook("linear", source, target)
    except AssertionError:
        reference = "AssertionError"
    else:
        reference = "fits"
    return Difference(
        "linear, 48 source and 64 target samples",
        reference,
        f"slope {float(ESTIMATORS['linear'](source, target).scale):.2f} (the truth is 2)",
        "we match quantile functions, it sorted lists of one length; its scripts cut the larger set to size",
    )


def _unequal_std() -> Difference:
    source, target = torch.randn(8, 1), torch.randn(64, 1)
    reference, ours = as_affine(fitted_hook("gaussian", source, target)), ESTIMATORS["gaussian"](source, target)
    return Difference(
        "gaussian, 8 source and 64 target samples",
        f"slope {float(reference.scale):.4f}",
        f"slope {float(ours.scale):.4f}; times {sqrt((64 / 63) / (8 / 7)):.4f} is its slope: {float(ours.scale) * sqrt((64 / 63) / (8 / 7)):.4f}",
        "its standard deviations divide by n - 1, ours by n; with equal counts the ratio is the same",
    )


def _strict_bounds() -> Difference:
    source, target = torch.randn(32, 100), 3 + torch.randn(32, 100)
    hook = fitted_hook("linear", source, target, support="observed")
    lower, upper = support_bounds(source, "observed") or (None, None)
    affine = ESTIMATORS["linear"](source, target)
    ours = AffineMap(affine.scale, affine.shift, lower, upper).apply(source)
    left = (hook(None, None, source.clone()) == source).float().mean()
    return Difference(
        "support of 32 observed samples, applied to them",
        f"{float(left):.1%} stay",
        f"{float((ours == source).float().mean()):.1%} stay",
        "its bounds are exclusive, so that the smallest and the largest of the 32 are outside; ours are inclusive",
    )


def _quantiles() -> Difference:
    source = torch.randn(64, 1000)
    reference = reference_module("act.utils.quantiles").compute_quantiles(source)["q_10_90"]
    ours = support_bounds(source, (0.1, 0.9)) or ()
    gap = max(float((a - b).abs().max()) for a, b in zip(reference, ours, strict=True))
    return Difference(
        "support from 10 % to 90 % of 64 samples",
        "interpolates between samples",
        f"takes the nearest sample: up to {gap:.2f} standard deviations away",
        "a bound that is a sample needs no interpolation; the two agree at 0 % and 100 %",
    )


def _mean_of_the_map() -> Difference:
    norm = nn.GroupNorm(4, 16)
    x = torch.randn(2, 16, 8, 8)
    moments = norm(x).mean((2, 3))
    source, target = moments.repeat(16, 1) + 0.1 * torch.randn(32, 16), torch.randn(32, 16)
    hook = fitted_hook("gaussian", source, target, support="observed")
    act_map = ActMap({"model.0": as_affine(hook)}, ActMapMetadata(support="observed"))
    model = nn.Sequential(norm)
    with steer(model, act_map):
        ours = model(x)
    plain = norm(x)
    reference = hook(norm, (x,), plain.clone())
    return Difference(
        "gaussian with a support on a convolutional output",
        f"moves {float((reference != plain).float().mean()):.0%} of the entries",
        f"moves {float((ours != plain).float().mean()):.0%}",
        "it tests the mean over the picture and then moves every pixel by the affine map; we test what we move",
    )
