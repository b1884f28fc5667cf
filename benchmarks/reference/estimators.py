"""The reference's estimators and ours on the same samples: maps, time and peak memory."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from actmaps.maps import ESTIMATORS, AffineMap
from actmaps.maps.estimators import support_bounds
from measuring import in_new_process, memory, side_by_side

from .checkout import as_affine, fitted_hook, map_difference, reference_module

UNITS = 1280


@dataclass
class Estimation:
    """One estimator on one number of samples."""

    method: str
    samples: int
    reference_seconds: float
    quantile_seconds: float
    """Of which it takes nine pairs of quantiles, whichever the map will use."""
    our_seconds: float
    reference_mib: float
    our_mib: float
    difference: float
    """Of scale and shift, the largest, relative to the largest of its kind."""


def two_samples(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Source and target samples (count, UNITS) with other means and widths in every unit."""
    generator = torch.Generator().manual_seed(0)
    mean, width = torch.randn(2, 2, 1, UNITS, generator=generator)
    both = mean + (0.1 + width.abs()) * torch.randn(2, count, UNITS, generator=generator)
    return both[0].to(device), both[1].to(device)


def our_fit(method: str, source: Tensor, target: Tensor) -> AffineMap:
    """Map and observed support: the reference estimates both."""
    affine = ESTIMATORS[method](source, target)
    bounds = support_bounds(source, "observed")
    assert bounds is not None
    return AffineMap(affine.scale, affine.shift, *bounds)


def estimate(method: str, count: int, rounds: int, device: torch.device, again: list[str]) -> Estimation:
    """Both estimators on the same samples. Script and arguments `again` measure the memory of one, see `peak`."""
    source, target = two_samples(count, device)
    quantiles = reference_module("act.utils.quantiles").compute_quantiles
    sorted_in = source if method == "linear" else source.double()
    timings = side_by_side(
        {
            "reference": lambda: nullcontext(lambda: fitted_hook(method, source, target, support="observed")),
            "quantiles": lambda: nullcontext(lambda: quantiles(sorted_in)),
            "ours": lambda: nullcontext(lambda: our_fit(method, source, target)),
        },
        rounds,
        device,
        warm=False,
    )
    peaks = {side: in_new_process(*again, "--peak", side, method, count) for side in ("reference", "ours")}
    reference = as_affine(fitted_hook(method, source, target, support="observed"))
    return Estimation(
        method=method,
        samples=count,
        reference_seconds=timings.seconds("reference"),
        quantile_seconds=timings.seconds("quantiles"),
        our_seconds=timings.seconds("ours"),
        reference_mib=peaks["reference"],
        our_mib=peaks["ours"],
        difference=map_difference(reference, our_fit(method, source, target)),
    )


def peak(side: str, method: str, count: int, device: torch.device) -> float:
    """MiB that one fit needs on top of the samples."""
    fitted_hook("mean", *two_samples(8, device))  # what is imported on first use
    source, target = two_samples(count, device)
    before, _ = memory(device)
    fitted_hook(method, source, target) if side == "reference" else our_fit(method, source, target)
    return memory(device)[1] - before


def table(rows: list[Estimation]) -> Table:
    made = Table(
        title=f"Estimators, samples of {UNITS} units with the observed support",
        caption="quantiles: the reference takes nine pairs in every fit; MiB: peak on top of the samples;\n"
        "difference: of scale and shift, relative to the largest",
    )
    columns = ["method", "samples of each side", "reference", "of which quantiles", "ours", "times as fast"]
    for column in (*columns, "reference MiB", "our MiB", "difference"):
        made.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        made.add_row(
            row.method,
            str(row.samples),
            f"{1000 * row.reference_seconds:.0f} ms",
            f"{1000 * row.quantile_seconds:.0f} ms",
            f"{1000 * row.our_seconds:.0f} ms",
            f"{row.reference_seconds / row.our_seconds:.1f}",
            f"{row.reference_mib:.0f}",
            f"{row.our_mib:.0f}",
            f"{row.difference:.0e}",
        )
    return made
