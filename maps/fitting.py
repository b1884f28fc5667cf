"""One-pass causal fitting.

The definition (paper, definition 3.2) fits the first site, applies its map, fits the second site on what then arrives, and so
on. Done literally that is one pass over the data per site. Here every micro-batch runs its forward in a greenlet of its
own until it reaches the next site and waits there; when all have arrived the site is fitted on all samples and all go on.
One forward per prompt fits every site, in execution order, and gives the maps of the definition.

What waits is the memory: at any time the live activations of all micro-batches, not those of one.

In a process group every rank takes its share of the micro-batches. At each site the ranks swap their samples, so that each has all samples of some units,
fits these, and gets the maps of the others: what every rank goes on with is the map that one process would have fitted.

Grad mode, inference mode and autocast belong to the thread, which all micro-batches share; each switch saves and restores
them, so that a forward may enter and leave them as it likes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from time import monotonic
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor
from tqdm import tqdm

from .act_map import ActMap, ActMapMetadata
from .affine import AffineMap, transport
from .estimators import check_support
from .hooks import attach
from .memory import available_memory
from .methods import Method, as_method
from .offload import Offload
from .places import Place, Steerable, as_components, class_names, evaluating, is_places, roots
from .pooling import POOLINGS, samples
from .ranks import Ranks
from .site_fitting import SiteFitter
from .sites import find_sites, read_activations, resolve

Batch = Any
Forward = Callable[[Batch], Any]

SPATIAL_RULES = ("affine", "shift")


def fit_map(
    model: Steerable,
    source: Sequence[Batch],
    target: Sequence[Batch],
    *,
    sites: str | Sequence[str] | None = None,
    forward: Forward | None = None,
    method: str | Method = "linear",
    pooling: str | None = None,
    positions: int | None = 64,
    support: str | tuple[float, float] | None = None,
    spatial: str = "affine",
    causal: bool | None = None,
    transport_target: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
    offload: bool = False,
    memory_reserve: float = 0.05,
    progress: bool | Callable[[float], None] = True,
    metadata: ActMapMetadata | None = None,
    ranks: Ranks | None = None,
) -> ActMap:
    """Fit one affine transport map per unit and site, in one forward pass per prompt.

    In a process group of torch.distributed, call it on every rank with the same arguments: each runs its share of the
    micro-batches, and each returns the whole map, which is the same for any number of ranks.

    Args:
        model: a module, {component name: module} for a pipeline of several, or {site name: `Place`}.
        source, target: micro-batches of the two prompt sets, what the model does now and what it should do. Unpaired; the
            numbers may differ. An `attention_mask` (B, T) in a mapping keeps padding out of the samples; a `sample_mask` (B, T),
            which is for a `forward` of your own, comes before it and may leave out other tokens too.
        sites: see `find_sites`; None takes all normalisation layers.
        forward: runs the model on a micro-batch; default `model(**batch)` for mappings, else `model(batch)`.
        method: a key of `METHODS`, or a `Method` of your own. Pooling, support and causality default to the method's conventions.
        pooling: "none" (every token or pixel is a sample, the default for transport maps), "mean", "last", "max" or "min"; see
            `pooling.samples`.
        positions: with pooling "none", positions drawn per prompt and site (seeded); None takes all.
        support: "all", "observed" or quantiles (low, high) of the source samples, outside which nothing is moved.
        spatial: how NCHW outputs are moved: "affine" every position by the map, "shift" all by one constant.
        causal: each site sees what the maps before it leave; otherwise all sites are fitted on the unmodified model.
        transport_target: apply the maps to the target samples too (the paper's definition) while fitting causally.
        batch_size: cut micro-batches (tensors, or mappings of tensors, rows in dim 0) into at most this many rows.
        seed: of the draw of positions.
        offload: keep the activations of waiting micro-batches in host memory; slower, for models on a GPU.
        memory_reserve: fraction of the memory of the model's device that must stay free.
        progress: show a progress bar over sites (on rank 0); or a function that takes the fraction done, and is called whenever a
            micro-batch has reached a site. What it raises ends the fit.
        metadata: name, description and other fields to store; modes are filled in here.
        ranks: the processes that fit together; default all of the process group. `Ranks()` fits in this process alone.

    Returns:
        The `ActMap`, sites in execution order.

    Raises:
        ValueError: for an empty prompt set, unknown modes or sites, sites that no forward reaches, NaN or infinite activations
            (naming the site), micro-batches that take different paths through the model, or ranks with different arguments.
        MemoryError: when the waiting micro-batches would exhaust the memory; says what to lower.
        RankError: when another rank has failed; says with what.
    """
    method = as_method(method)
    pooling = method.pooling if pooling is None else pooling
    support = method.support if support is None else support
    causal = method.causal if causal is None else causal
    _check_modes(pooling, positions, support, spatial)
    places = resolve(model, find_sites(model, sites), "the list of sites")
    sides = {
        "source": _micro_batches(source, batch_size, "source"),
        "target": _micro_batches(target, batch_size, "target"),
    }
    if forward is None:
        forward = _default_forward(model)
    weights = [t for module in roots(model) for t in (*module.parameters(), *module.buffers())]
    device = weights[0].device if weights else torch.device("cpu")
    ranks = Ranks.current() if ranks is None else ranks
    counts = {side: len(batches) for side, batches in sides.items()}
    shapes = [tuple(weight.shape) for weight in weights]
    modes = (method.name, pooling, positions, support, spatial, causal, transport_target, seed)
    started = _started_alike(ranks, list(places), counts, shapes, modes)

    def sample(x: Tensor, place: Place, site: str, mask: Tensor | None) -> Tensor:
        dim = place.channel_dim(x)
        return samples(x, channel_dim=dim, pooling=pooling, positions=positions, seed=seed, site=site, mask=mask)

    fit = _Fit(
        sample=sample,
        fitter=SiteFitter(method, support, ranks),
        spatial=spatial,
        moved_sides=() if not causal else ("source", "target") if transport_target else ("source",),
        memory=_MemoryGuard(device, memory_reserve),
        report=progress if callable(progress) else None,
    )
    bar = tqdm(total=len(places), disable=progress is not True or ranks.rank > 0, desc="Fitting sites", unit="site")
    # A compiled forward cannot wait in the middle: it runs as Python.
    with evaluating(roots(model)), torch.no_grad(), torch.compiler.set_stance("force_eager"), bar:
        micro_batches = [
            _MicroBatch(forward, batch, side, Offload(weights) if offload else None)
            # what is left over of the sources goes to the first ranks, of the targets to those after them
            for side, first in (("source", 0), ("target", counts["source"]))
            for batch in ranks.share(sides[side], first)
        ]
        fit.run(places, micro_batches, bar)
    unreached = [site for site in places if site not in fit.maps]
    if unreached and (sites is not None or not fit.maps):
        raise ValueError(
            f"{len(unreached)} of {len(places)} sites were never reached by the forward, for example {unreached[0]}; "
            "leave them out of `sites`, or let the forward run their component"
        )
    metadata = metadata or ActMapMetadata()
    with torch.inference_mode(False):  # a map fitted within inference mode may be used outside of it
        maps = {site: fitted.to("cpu").clone() for site, fitted in fit.maps.items()}
    return ActMap(
        maps,
        replace(
            metadata,
            created=metadata.created or started.isoformat(timespec="seconds"),
            method=method.name,
            pooling=pooling,
            positions=positions if pooling == "none" else None,
            support=support if isinstance(support, str) else (support[0], support[1]),
            spatial=spatial,
            causal=causal,
            transport_target=transport_target,
            seed=seed,
            architecture=metadata.architecture or class_names(model),
            n_source=metadata.n_source or sum(map(_prompt_count, source)),
            n_target=metadata.n_target or sum(map(_prompt_count, target)),
            costs=fit.costs,
            libraries=_library_versions(),
        ),
    )


class _MicroBatch(greenlet):
    """One micro-batch on its way through the model."""

    def __init__(self, forward: Forward, batch: Batch, side: str, offload: Offload | None) -> None:
        super().__init__()
        self.gr_context = copy_context()
        self.forward, self.batch, self.side, self.offload = forward, batch, side, offload
        self.modes = _Modes.current()  # those of the fit, until the forward waits within others
        self.site: str | None = None
        self.pooled: Tensor | None = None

    def run(self) -> None:
        self.forward(self.batch)

    @property
    def mask(self) -> Tensor | None:
        """Which tokens are samples, as the micro-batch says now: its forward may change that on the way."""
        masks = self.batch if isinstance(self.batch, Mapping) else {}
        return masks.get("sample_mask", masks.get("attention_mask"))

    def advance(self) -> str | None:
        """Run to the next site, whose name is returned and whose samples lie in `pooled`; None at the end of the forward."""
        self.site = None
        if self.offload is None:
            with self.modes.entered():
                self.switch()
            return self.site
        self.offload.restore()
        with self.modes.entered(), self.offload:
            self.switch()
        if self.pooled is not None:
            self.pooled = self.pooled.clone()  # samples may be a view of the activations, which are about to leave
        self.offload.park()
        return self.site

    def wait(self, site: str) -> None:
        """Called within the forward, with samples of `site` in `pooled`: wait until its map is fitted."""
        self.site, self.modes = site, _Modes.current()
        self.parent.switch()

    def end(self) -> None:
        """Unwind the forward if it is under way."""
        if self:
            if self.offload is not None:
                self.offload.restore()
            with self.modes.entered():
                self.throw(GreenletExit)


@dataclass(frozen=True)
class _Modes:
    """Modes of the thread that a forward may change."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def current(cls) -> _Modes:
        autocast = tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """These modes inside, and those of before after."""
        before = self.current()
        with torch.inference_mode(self.inference):
            torch.set_grad_enabled(self.grad)
            self._set_autocast()
            try:
                yield
            finally:
                before._set_autocast()

    def _set_autocast(self) -> None:
        for device, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


@dataclass
class _Fit:
    """State of one fit. `moved_sides` are those whose activations the fitted maps move on the way."""

    sample: Callable[[Tensor, Place, str, Tensor | None], Tensor]
    fitter: SiteFitter
    spatial: str
    moved_sides: tuple[str, ...]
    memory: _MemoryGuard
    report: Callable[[float], None] | None = None
    maps: dict[str, AffineMap] = field(default_factory=dict)
    costs: dict[str, tuple[float, float]] = field(default_factory=dict)

    def run(self, places: Mapping[str, Place], waiting: list[_MicroBatch], bar: tqdm) -> None:
        """Move all micro-batches from site to site, in step, until every site is fitted or the forwards end."""
        with ExitStack() as undo:  # runs all of these, even if one of them raises
            for micro_batch in waiting:
                undo.callback(micro_batch.end)
            for site, place in places.items():
                undo.callback(attach(place.module, partial(self._at_site, site, place)))
            while len(self.maps) < len(places) and self._fit_next(list(places), waiting):
                bar.update()

    def _fit_next(self, sites: list[str], waiting: list[_MicroBatch]) -> bool:
        """Move all micro-batches of all ranks to the next site and fit it; false if their forwards have ended instead."""
        with self.fitter.ranks.reporting():
            arrived = self._advance(waiting, len(sites))
            sides = self._collect(waiting)
        site, rows, units = self._meet(sites, arrived, sides)
        if site is None:
            return False
        found = self.fitter.fit(site, [side.view(len(side), units) for side in sides], rows)
        self.maps[site], self.costs[site] = found.fitted, found.costs
        return True

    def _at_site(self, site: str, place: Place, output: Any) -> Any:
        """The hook on every site: hand samples over and wait for the map at the first visit, apply it at every visit."""
        micro_batch = getcurrent()
        if not isinstance(micro_batch, _MicroBatch):
            return output
        x = read_activations(place, output, site)
        if site not in self.maps:
            micro_batch.pooled = self.sample(x, place, site, micro_batch.mask)
            micro_batch.wait(site)
        if micro_batch.side not in self.moved_sides:
            return output
        fitted = self.maps[site]
        moved = transport(
            x,
            fitted.scale,
            fitted.shift,
            fitted.lower,
            fitted.upper,
            channel_dim=place.channel_dim(x),
            spatial=self.spatial,
        )
        return place.write(output, moved)

    def _advance(self, micro_batches: list[_MicroBatch], sites: int) -> set[str | None]:
        """Run every micro-batch to its next site and name it; None is the end. Empty on a rank without micro-batches.

        Raises:
            ValueError: if they do not all arrive at the same site.
            MemoryError: if too little memory is left.
        """
        places: set[str | None] = set()
        for count, micro_batch in enumerate(micro_batches, 1):
            places.add(micro_batch.advance())
            self.memory.check(count, len(micro_batches))
            if self.report is not None:
                self.report((len(self.maps) + count / len(micro_batches)) / sites)
        _check_same_place(places)
        return places

    def _meet(
        self, sites: list[str], arrived: set[str | None], sides: list[Tensor]
    ) -> tuple[str | None, list[Sequence[int]], int]:
        """Where the micro-batches of all ranks are, how many samples of each side every rank has, and of how many units.

        Raises:
            ValueError: if they are not all at the same site, or have different numbers of units.
            RankError: if another rank has failed.
        """
        order: list[str | None] = [*sites, None]
        number = max(map(order.index, arrived), default=-1)
        numbers, n, c, m, d = zip(*self.fitter.ranks.meet(number, *sides[0].shape, *sides[1].shape), strict=True)
        places = {order[number] for number in numbers if number >= 0}
        _check_same_place(places)
        site, units = places.pop(), {*c, *d} - {0}
        if len(units) > 1:
            raise ValueError(
                f"{site}: samples must be (n, C) and (m, C) with the same C, got {(sum(n), max(c))} and {(sum(m), max(d))}"
            )
        return site, [n, m], max(units, default=0)

    def _collect(self, micro_batches: list[_MicroBatch]) -> list[Tensor]:
        """The samples (n, C) of source and target, taken from the micro-batches; (0, 0) where there are none."""
        taken: dict[str, list[Tensor]] = {"source": [], "target": []}
        device = self.memory.device
        for micro_batch in micro_batches:
            if micro_batch.pooled is not None:
                device = micro_batch.pooled.device
                taken[micro_batch.side].append(micro_batch.pooled)
                micro_batch.pooled = None
        return [torch.cat(side) if side else torch.empty(0, 0, device=device) for side in taken.values()]


def _check_same_place(places: set[str | None]) -> None:
    """Raise ValueError if micro-batches have arrived at several sites, of which None is the end."""
    if len(places) > 1:
        named = " and others at ".join(sorted(place or "the end" for place in places))
        raise ValueError(
            f"micro-batches take different paths through the model: some arrive at {named}; "
            "fit sites that every prompt visits in the same order"
        )


def _started_alike(ranks: Ranks, *arguments: Any) -> datetime:
    """When rank 0 started to fit, once all ranks have; ValueError if they have different arguments."""
    now = int(datetime.now(timezone.utc).timestamp())
    heard = ranks.meet(zlib.crc32(repr(arguments).encode()), now)
    if len({checksum for checksum, _ in heard}) > 1:
        raise ValueError(
            "the ranks were given different models, sites, micro-batches or options; call fit_map on every rank with the "
            "same arguments, all micro-batches included, or with ranks=Ranks() to fit in one process alone"
        )
    return datetime.fromtimestamp(heard[0][1], timezone.utc)


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
                "timesteps, at a smaller size, in half precision, with smaller `positions`, or (on a GPU) with offload=True; a smaller `batch_size` lowers "
                "only what one forward needs on top"
            )


def _check_modes(pooling: str, positions: int | None, support: str | tuple[float, float], spatial: str) -> None:
    for value, name, known in ((pooling, "pooling", POOLINGS), (spatial, "spatial", SPATIAL_RULES)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if positions is not None and positions < 1:
        raise ValueError(f"positions must be at least 1, or None for all, got {positions}")
    check_support(support)


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
    counts = set(_lengths(batch))
    if len(counts) != 1:
        raise ValueError(
            f"cannot count the rows of a micro-batch ({type(batch).__name__}): its entries have {sorted(counts)} rows"
        )
    return counts.pop()


def _prompt_count(batch: Batch) -> int:
    """Rows of a micro-batch, or 1 if it does not tell."""
    counts = set(_lengths(batch))
    return counts.pop() if len(counts) == 1 else 1


def _lengths(batch: Batch) -> Iterator[int]:
    if isinstance(batch, Mapping):
        for value in batch.values():
            yield from _lengths(value)
    elif _has_rows(batch):
        yield len(batch)


def _has_rows(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.ndim > 0)


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    if isinstance(batch, Mapping):
        return {key: _rows(value, start, stop) for key, value in batch.items()}
    return batch[start:stop] if _has_rows(batch) else batch


def _default_forward(model: Steerable) -> Forward:
    components = {} if is_places(model) else as_components(model)
    if len(components) != 1:
        raise ValueError(
            f"with several components ({', '.join(components) or 'places only'}) give `forward`, which runs them on a micro-batch"
        )
    (model,) = components.values()
    return lambda batch: model(**batch) if isinstance(batch, Mapping) else model(batch)


def _library_versions() -> dict[str, str]:
    versions = {}
    for package in ("actmaps", "torch", "diffusers", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
