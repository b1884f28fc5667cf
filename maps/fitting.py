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
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from time import monotonic
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
    sides = {
        "source": _micro_batches(source, batch_size, "source"),
        "target": _micro_batches(target, batch_size, "target"),
    }
    if forward is None:
        forward = _default_forward(components)
    device = next((p.device for module in components.values() for p in module.parameters()), torch.device("cpu"))

    def sample(x: Tensor, module: nn.Module, site: str, mask: Tensor | None) -> Tensor:
        dim = channel_dim(module, x)
        return samples(x, channel_dim=dim, pooling=pooling, positions=positions, seed=seed, site=site, mask=mask)

    fit = _Fit(
        sample=sample,
        estimator=ESTIMATORS[method],
        support=support,
        spatial=spatial,
        moved_sides=() if not causal else ("source", "target") if transport_target else ("source",),
        memory=_MemoryGuard(device, memory_reserve),
    )
    micro_batches = [_MicroBatch(forward, batch, side) for side, batches in sides.items() for batch in batches]
    bar = tqdm(total=len(names), disable=not progress, desc="Fitting sites", unit="site")
    with _evaluating(components), torch.no_grad(), bar:
        fit.run(modules, micro_batches, bar)
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
            n_source=(metadata and metadata.n_source) or len(source),
            n_target=(metadata and metadata.n_target) or len(target),
            costs=fit.costs,
            libraries=_library_versions(),
        ),
    )


class _MicroBatch(greenlet):
    """One micro-batch on its way through the model; switching to it runs it until it waits at a site, or to the end."""

    def __init__(self, forward: Forward, batch: Batch, side: str) -> None:
        super().__init__()
        self.gr_context = copy_context()
        self.forward, self.batch, self.side = forward, batch, side
        self.mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None

    def run(self) -> None:
        self.forward(self.batch)


@dataclass
class _Fit:
    """State of one fit. `moved_sides` are those whose activations the fitted maps move on the way."""

    sample: Callable[[Tensor, nn.Module, str, Tensor | None], Tensor]
    estimator: Callable[[Tensor, Tensor], AffineMap]
    support: str | tuple[float, float]
    spatial: str
    moved_sides: tuple[str, ...]
    memory: _MemoryGuard
    maps: dict[str, AffineMap] = field(default_factory=dict)
    costs: dict[str, tuple[float, float]] = field(default_factory=dict)

    def run(self, modules: Mapping[str, nn.Module], waiting: list[_MicroBatch], bar: tqdm) -> None:
        """Move all micro-batches from site to site, in step, until every site is fitted or the forwards end."""
        detach = [attach(module, partial(self._at_site, site)) for site, module in modules.items()]
        try:
            while len(self.maps) < len(modules) and (arrivals := self._advance(waiting)):
                site = arrivals[0][0]
                by_side: dict[str, list[Tensor]] = {"source": [], "target": []}
                for (_, pooled), micro_batch in zip(arrivals, waiting, strict=True):
                    by_side[micro_batch.side].append(pooled)
                self._fit_site(site, torch.cat(by_side["source"]), torch.cat(by_side["target"]))
                bar.update()
        finally:
            for undo in detach:
                undo()
            for micro_batch in waiting:
                if micro_batch:  # started and not finished: unwind its forward
                    micro_batch.throw(GreenletExit)

    def _at_site(self, site: str, module: nn.Module, output: Any) -> Any:
        """The hook on every site: hand samples over and wait for the map at the first visit, apply it at every visit."""
        micro_batch = getcurrent()
        if not isinstance(micro_batch, _MicroBatch):
            return output
        x = read_output(module, output, site)
        if site not in self.maps:
            micro_batch.parent.switch((site, self.sample(x, module, site, micro_batch.mask)))
        if micro_batch.side not in self.moved_sides:
            return output
        fitted = self.maps[site]
        moved = transport(
            x,
            fitted.scale,
            fitted.shift,
            fitted.lower,
            fitted.upper,
            channel_dim=channel_dim(module, x),
            spatial=self.spatial,
        )
        return replace_output(module, output, site, moved)

    def _advance(self, micro_batches: list[_MicroBatch]) -> list[tuple[str, Tensor]]:
        """Run every micro-batch to its next site; an empty list means that all forwards have ended.

        Raises:
            ValueError: if they do not all arrive at the same site.
            MemoryError: if too little memory is left.
        """
        arrivals = []
        for count, micro_batch in enumerate(micro_batches, 1):
            arrivals.append(micro_batch.switch())
            self.memory.check(count, len(micro_batches))
        places = {arrival[0] if arrival else "the end" for arrival in arrivals}
        if len(places) > 1:
            raise ValueError(
                f"micro-batches take different paths through the model: some arrive at {' and others at '.join(sorted(places))}; "
                "fit sites that every prompt visits in the same order"
            )
        return [] if places == {"the end"} else arrivals

    def _fit_site(self, site: str, source: Tensor, target: Tensor) -> None:
        try:
            fitted = self.estimator(source, target)
        except ValueError as error:
            raise ValueError(f"{site}: {error}") from None
        bounds = support_bounds(source, self.support)
        if bounds is not None:
            fitted = AffineMap(fitted.scale, fitted.shift, *bounds)
        self.maps[site] = fitted
        self.costs[site] = transport_costs(source, target, fitted)


@dataclass
class _MemoryGuard:
    """Ends a fit before the device's memory runs out. `reserve` is the fraction that must stay free."""

    device: torch.device
    reserve: float
    _next_check: float = 0.0

    def check(self, waiting: int, total: int) -> None:
        """Raise MemoryError when less than the reserve is free; looks at most twenty times a second."""
        now = monotonic()
        if now < self._next_check:
            return
        self._next_check = now + 0.05
        free, size = available_memory(self.device)
        if size and free < self.reserve * size:
            raise MemoryError(
                f"only {free / 2**30:.1f} of {size / 2**30:.1f} GiB are free on {self.device} while {waiting} of {total} "
                "micro-batches have reached a site: the live activations of every prompt wait there. Fit on fewer prompts or "
                "timesteps, at a smaller size, in half precision, or with smaller `positions`; a smaller `batch_size` lowers "
                "only what one forward needs on top"
            )


def _check_modes(method: str, pooling: str, positions: int | None, spatial: str) -> None:
    for value, name, known in (
        (method, "method", tuple(ESTIMATORS)),
        (pooling, "pooling", POOLINGS),
        (spatial, "spatial", SPATIAL_RULES),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if positions is not None and positions < 1:
        raise ValueError(f"positions must be at least 1, or None for all, got {positions}")


def _micro_batches(batches: Sequence[Batch], batch_size: int | None, side: str) -> list[Batch]:
    """The micro-batches of one side, cut to at most `batch_size` rows."""
    if isinstance(batches, (str, Mapping)) or not isinstance(batches, Sequence):
        raise ValueError(
            f"{side} must be a sequence of micro-batches, got {type(batches).__name__}; wrap a single one in a list"
        )
    if not batches:
        raise ValueError(f"the {side} set is empty: give at least one micro-batch of {side} prompts")
    if batch_size is None:
        return list(batches)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return [
        _rows(batch, start, start + batch_size)
        for batch in batches
        for start in range(0, _row_count(batch), batch_size)
    ]


def _row_count(batch: Batch) -> int:
    """Rows of a micro-batch that is a tensor, a list, or a mapping of those."""
    values = batch.values() if isinstance(batch, Mapping) else [batch]
    counts = {len(value) for value in values if isinstance(value, (Tensor, list, tuple))}
    if len(counts) != 1:
        raise ValueError(
            f"cannot count the rows of a micro-batch ({type(batch).__name__}): its entries have {sorted(counts)} rows"
        )
    return counts.pop()


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    if isinstance(batch, Mapping):
        return {k: v[start:stop] if isinstance(v, (Tensor, list, tuple)) else v for k, v in batch.items()}
    return batch[start:stop]


def _default_forward(components: Components) -> Forward:
    if len(components) != 1:
        raise ValueError(
            f"with several components ({', '.join(components)}) give `forward`, which runs them on a micro-batch"
        )
    (model,) = components.values()
    return lambda batch: model(**batch) if isinstance(batch, Mapping) else model(batch)


@contextmanager
def _evaluating(components: Components) -> Iterator[None]:
    """All modules in eval mode, so that dropout does not enter the statistics; each mode is restored after."""
    training = [m for root in components.values() for m in root.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _library_versions() -> dict[str, str]:
    versions = {}
    for package in ("actmaps", "torch", "diffusers", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
