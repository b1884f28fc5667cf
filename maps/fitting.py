"""One-pass causal fitting.

The definition (paper, definition 3.2) fits the first site, applies its map, fits the second site on what then arrives, and so
on. Done literally that is one pass over the data per site. Here every micro-batch runs its forward in a greenlet of its
own until it reaches the next site and waits there; when all have arrived the site is fitted on all samples and all go on.
One forward per prompt fits every site, in execution order, and gives the maps of the definition.

What waits is the memory: at any time the live activations of all micro-batches, not those of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from tqdm import tqdm

from .act_map import ActMap, ActMapMetadata
from .affine import AffineMap, transport
from .estimators import ESTIMATORS, support_bounds, transport_costs
from .hooks import attach
from .memory import available_memory
from .pooling import POOLINGS, samples
from .sites import Components, as_components, channel_dim, find_sites, read_output, replace_output, resolve

Batch = Any
Forward = Callable[[Batch], Any]

SPATIAL_RULES = ("affine", "shift")


def fit_map(
    model: nn.Module | Components,
    source: Sequence[Batch],
    target: Sequence[Batch],
    *,
    sites: str | Sequence[str] | None = None,
    forward: Forward | None = None,
    method: str = "linear",
    pooling: str = "none",
    positions: int | None = 64,
    support: str | tuple[float, float] = "all",
    spatial: str = "affine",
    causal: bool = True,
    transport_target: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
    memory_reserve: float = 0.05,
    progress: bool = True,
    metadata: ActMapMetadata | None = None,
) -> ActMap:
    """Fit one affine transport map per unit and site, in one forward pass per prompt.

    Args:
        model: a module, or {component name: module} for a pipeline of several.
        source, target: micro-batches of the two prompt sets, what the model does now and what it should do. Unpaired; the
            numbers may differ. An `attention_mask` (B, T) in a mapping keeps padding out of the samples.
        sites: see `find_sites`; None takes all normalisation layers.
        forward: runs the model on a micro-batch; default `model(**batch)` for mappings, else `model(batch)`.
        method: a key of `ESTIMATORS`.
        pooling: "none" (every token or pixel is a sample), "mean", "last", "max" or "min"; see `pooling.samples`.
        positions: with pooling "none", positions drawn per prompt and site (seeded); None takes all.
        support: "all", "observed" or quantiles (low, high) of the source samples, outside which nothing is moved.
        spatial: how NCHW outputs are moved: "affine" every position by the map, "shift" all by one constant.
        causal: each site sees what the maps before it leave; otherwise all sites are fitted on the unmodified model.
        transport_target: apply the maps to the target samples too (the paper's definition) while fitting causally.
        batch_size: cut micro-batches (tensors, or mappings of tensors, rows in dim 0) into at most this many rows.
        seed: of the draw of positions.
        memory_reserve: fraction of the memory of the model's device that must stay free.
        progress: show a progress bar over sites.
        metadata: name, description and other fields to store; modes are filled in here.

    Returns:
        The `ActMap`, sites in execution order.

    Raises:
        ValueError: for an empty prompt set, unknown modes or sites, sites that no forward reaches, NaN or infinite activations
            (naming the site), or micro-batches that take different paths through the model.
        MemoryError: when the waiting micro-batches would exhaust the memory; says what to lower.
    """
    _check_modes(method, pooling, positions, spatial)
    components = as_components(model)
    names = find_sites(components, sites)
    modules = resolve(components, names, "the list of sites")
    sides = {"source": _micro_batches(source, batch_size, "source"), "target": _micro_batches(target, batch_size, "target")}
    if forward is None:
        forward = _default_forward(components)
    device = next((p.device for module in components.values() for p in module.parameters()), torch.device("cpu"))
    fit = _Fit(
        estimator=ESTIMATORS[method],
        sample=lambda x, module, site, mask: samples(
            x,
            channel_dim=channel_dim(module, x),
            pooling=pooling,
            positions=positions,
            seed=seed,
            site=site,
            mask=mask,
        ),
        support=support,
        spatial=spatial,
        causal=causal,
        moved_sides=("source", "target") if transport_target else ("source",),
        reserve=memory_reserve,
        device=device,
    )
    with _evaluating(components), torch.no_grad(), tqdm(total=len(names), disable=not progress, desc="Fitting sites", unit="site") as bar:
        fit.run(modules, sides, forward, bar)
    unreached = [site for site in names if site not in fit.maps]
    if unreached and (sites is not None or not fit.maps):
        raise ValueError(
            f"{len(unreached)} of {len(names)} sites were never reached by the forward, for example {unreached[0]}; "
            "leave them out of `sites`, or let the forward run their component"
        )
    return ActMap(
        fit.maps,
        replace(
            metadata or ActMapMetadata(created=datetime.now(timezone.utc).isoformat(timespec="seconds")),
            method=method,
            pooling=pooling,
            positions=positions if pooling == "none" else None,
            support=support,
            spatial=spatial,
            causal=causal,
            transport_target=transport_target,
            seed=seed,
            architecture={name: type(module).__name__ for name, module in components.items()},
            n_source=(metadata and metadata.n_source) or fit.rows["source"],
            n_target=(metadata and metadata.n_target) or fit.rows["target"],
            costs=fit.costs,
            libraries=_library_versions(),
        ),
    )


@dataclass
class _Run(greenlet):
    """One micro-batch on its way through the model."""


@dataclass
class _Fit:
    """State of one fit: what has been fitted, and which micro-batch waits where."""

    estimator: Callable[[Tensor, Tensor], AffineMap]
    sample: Callable[[Tensor, nn.Module, str, Tensor | None], Tensor]
    support: str | tuple[float, float]
    spatial: str
    causal: bool
    moved_sides: tuple[str, ...]
    reserve: float
    device: torch.device
    maps: dict[str, AffineMap] = field(default_factory=dict)
    costs: dict[str, tuple[float, float]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=lambda: {"source": 0, "target": 0})
