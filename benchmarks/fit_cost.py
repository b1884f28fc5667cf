"""What fitting costs: time against the plain forward passes and against a pass per site, and peak memory.

    python benchmarks/fit_cost.py                      # all tables
    python benchmarks/fit_cost.py --model sdxl llama --repeats 3 --memory-prompts
    python benchmarks/fit_cost.py --json fit_cost.json
    python benchmarks/fit_cost.py --device cuda --dtype bfloat16 --real-size --model sdxl flux --prompts 16 --batch-size 2

Models are randomly initialised and have the blocks of real ones; see random_models.py. Repetitions of the plain passes and of the fit
alternate; medians are shown.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from actmaps.maps import ESTIMATORS, METHODS, ActMap, AffineMap, Method, find_sites, fit_map, steer
from actmaps.maps.methods import TRANSPORTS
from actmaps.maps.pooling import samples
from actmaps.maps.sites import read_activations, resolve
from measuring import Stopwatch, add_options, finished, in_new_process, memory, started
from random_models import MODELS, Subject, build

TARGET_RATIO = 1.1
POSITIONS = 64
Batches = dict[str, list[dict[str, Any]]]


def micro_batches(subject: Subject, prompts: int, batch_size: int) -> Batches:
    """The micro-batches of `prompts` prompts, half of them source, half target."""
    batches: Batches = {"source": [], "target": []}
    for side, shift in (("source", 0.0), ("target", 0.5)):
        for start in range(0, prompts // 2, batch_size):
            batches[side].append(subject.inputs(min(batch_size, prompts // 2 - start), shift))
    return batches


def timed_method(name: str, watch: Stopwatch) -> Method:
    """The method, counting the time that its estimator takes: sorting and solving, for all sites."""
    method = METHODS[name]

    def timed(source: Tensor, target: Tensor) -> AffineMap:
        with watch.running():
            return method.estimator(source, target)

    return replace(method, estimator=timed)


@torch.no_grad()
def plain_passes(model: nn.Module, batches: Batches) -> None:
    for side in batches.values():
        for batch in side:
            model(**batch)


class _Reached(Exception):  # noqa: N818 (it is no error)
    pass


@torch.no_grad()
def pass_for_one_site(model: nn.Module, batches: Batches, before: ActMap | None, site: str, method: str) -> AffineMap:
    """The naive way: run all prompts up to `site`, the maps of the sites before it applied to the source."""
    place = resolve({site.split(".")[0]: model}, [site], "the benchmark")[site]
    found: dict[str, list[Tensor]] = {"source": [], "target": []}
    side = "source"

    def record(_module: nn.Module, _args: Any, output: Any) -> None:
        x = read_activations(place, output, site)
        dim = place.channel_dim(x)
        found[side].append(samples(x, channel_dim=dim, pooling="none", positions=POSITIONS, site=site))
        raise _Reached

    for side in found:
        steering = steer(model, before) if before is not None and side == "source" else None
        handle = place.module.register_forward_hook(record)
        try:
            for batch in batches[side]:
                try:
                    model(**batch)
                except _Reached:
                    continue
        finally:
            handle.remove()
            if steering is not None:
                steering.remove()
    return ESTIMATORS[method](torch.cat(found["source"]), torch.cat(found["target"]))


@dataclass
class Cost:
    """Medians in seconds for one model, and the most MiB that were in use, where the device tells (0: it does not)."""

    model: str
    sites: int
    prompts: int
    batch_size: int
    plain: float
    ours: float
    estimators: float
    cpu_ratio: float
    per_site: float
    per_site_measured: int
    difference: float
    peak_plain: float
    peak_ours: float
    ratio: float = field(init=False)

    def __post_init__(self) -> None:
        self.ratio = (self.ours - self.estimators) / self.plain


def measure(subject: Subject, prompts: int, batch_size: int, repeats: int, reference_sites: int, method: str) -> Cost:
    model, device = subject.module, next(subject.module.parameters()).device
    batches = micro_batches(subject, prompts, batch_size)
    plain_passes(model, batches)  # warm up
    times, peaks = [], (0.0, 0.0)
    act_map = None
    for _ in range(repeats):
        plain, ours, estimators = Stopwatch(device), Stopwatch(device), Stopwatch(device)
        with plain.running():
            plain_passes(model, batches)
        peak_plain = peak_since(device)
        with ours.running():
            timed = timed_method(method, estimators)
            act_map = fit_map(model, **batches, sites=subject.sites, method=timed, positions=POSITIONS, progress=False)
        peaks = (peak_plain, peak_since(device))
        times.append((plain, ours, estimators))
    assert act_map is not None
    assert len(act_map) == len(find_sites(model, subject.sites))
    sites = list(act_map)
    chosen = [sites[round((i + 0.5) * len(sites) / reference_sites - 0.5)] for i in range(reference_sites)]
    reference, difference = Stopwatch(device), 0.0
    for site in chosen:
        before = act_map.select(sites[: sites.index(site)]) if site != sites[0] else None
        with reference.running():
            found = pass_for_one_site(model, batches, before, site, method)
        ours_there = act_map[site]
        for one, other in ((found.scale, ours_there.scale), (found.shift, ours_there.shift)):
            difference = max(difference, float((one.cpu() - other).abs().max() / other.abs().max().clamp_min(1)))
    return Cost(
        model=subject.title,
        sites=len(sites),
        prompts=prompts,
        batch_size=batch_size,
        plain=median(p.wall for p, _, _ in times),
        ours=median(o.wall for _, o, _ in times),
        estimators=median(e.wall for _, _, e in times),
        cpu_ratio=median((o.cpu - e.cpu) / p.cpu for p, o, e in times),
        per_site=reference.wall / reference_sites * len(sites),
        per_site_measured=reference_sites,
        difference=difference,
        peak_plain=peaks[0],
        peak_ours=peaks[1],
    )


def peak_since(device: torch.device) -> float:
    """The most MiB of the GPU in use since the last call; 0 on a processor, which cannot forget its peak."""
    if device.type != "cuda":
        return 0.0
    _, most = memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    return most


def peak(subject: Subject, prompts: int, batch_size: int) -> dict[str, float]:
    """Peak MiB of one fit in this process, and what was in use before it."""
    device = next(subject.module.parameters()).device
    batches = micro_batches(subject, prompts, batch_size)
    plain_passes(subject.module, {side: some[:1] for side, some in batches.items()})
    before, _ = memory(device)
    watch = Stopwatch(device)
    with watch.running():
        fit_map(subject.module, **batches, sites=subject.sites, positions=POSITIONS, progress=False)
    return {"prompts": prompts, "before": before, "peak": memory(device)[1], "seconds": watch.wall}


def time_table(costs: list[Cost], size: str) -> Table:
    table = Table(
        title=f"Time in seconds (medians), models of {size} size",
        caption=f"ratio = (fit - estimators) / plain, target {TARGET_RATIO}",
    )
    columns = ["model", "sites", "prompts", "plain", "fit", "estimators", "ratio", "CPU ratio", "pass per site"]
    columns += ["difference", *["peak GiB"] * any(cost.peak_ours for cost in costs)]
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    for cost in costs:
        style = "green" if cost.ratio <= TARGET_RATIO else "red"
        table.add_row(
            cost.model,
            str(cost.sites),
            f"{cost.prompts} by {cost.batch_size}",
            f"{cost.plain:.2f}",
            f"{cost.ours:.2f}",
            f"{cost.estimators:.2f}",
            f"[{style}]{cost.ratio:.2f}[/]",
            f"{cost.cpu_ratio:.2f}",
            f"{cost.per_site:.0f} (from {cost.per_site_measured} sites)",
            f"{cost.difference:.0e}",
            *[f"{cost.peak_plain / 2**10:.1f} / {cost.peak_ours / 2**10:.1f}"] * (cost.peak_ours > 0),
        )
    return table


def memory_table(peaks: list[dict[str, float]], device: torch.device) -> Table:
    kind = "GPU" if device.type == "cuda" else "resident"
    table = Table(title=f"Peak {kind} memory in MiB, U-Net of SD 1.5 with 16 x 16 latents, one process each")
    for column in ("prompts", "model and inputs", "peak of the fit", "per prompt", "seconds"):
        table.add_column(column, justify="right")
    for row in peaks:
        more = (row["peak"] - row["before"]) / row["prompts"]
        table.add_row(
            f"{row['prompts']:.0f}",
            f"{row['before']:.0f}",
            f"{row['peak']:.0f}",
            f"{more:.2f}",
            f"{row['seconds']:.0f}",
        )
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="*", default=["unet", "text_encoder", "sdxl", "llama"])
    parser.add_argument("--real-size", action="store_true", help="real widths and depths, for a GPU")
    parser.add_argument("--size", type=int, help="of latents or texts; default: of the model")
    parser.add_argument("--prompts", type=int, default=32, help="source and target prompts together")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--method", choices=TRANSPORTS, default="linear")
    parser.add_argument("--reference-sites", type=int, default=4, help="sites on which the pass per site is measured")
    parser.add_argument("--memory-prompts", type=int, nargs="*", default=[64, 256, 1024])
    add_options(parser)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    console, device, dtype = started(options)
    if options.peak:
        subject = build("unet", device, dtype, real=options.real_size, size=16)
        print(json.dumps(peak(subject, options.peak, options.batch_size)))
        return
    costs, peaks = [], []
    for name in options.model:
        with console.status(f"timing {name}"):
            subject = build(name, device, dtype, real=options.real_size, size=options.size)
            costs.append(
                measure(
                    subject,
                    options.prompts,
                    options.batch_size,
                    options.repeats,
                    options.reference_sites,
                    options.method,
                )
            )
    if costs:
        console.print(time_table(costs, "real" if options.real_size else "reduced"))
        console.print(
            "The pass per site is extrapolated from sites spread evenly over the model; difference: of its maps and ours."
        )
    for prompts in options.memory_prompts:
        with console.status(f"measuring the memory of {prompts} prompts"):
            asked = ["--peak", prompts, "--batch-size", options.batch_size]
            asked += ["--device", options.device, "--dtype", options.dtype]
            asked += ["--threads", torch.get_num_threads(), *["--real-size"] * options.real_size]
            peaks.append(in_new_process(__file__, *asked))
    if peaks:
        console.print(memory_table(peaks, device))
    finished(console, options, device, {"time": [asdict(c) for c in costs], "memory": peaks})


if __name__ == "__main__":
    main()
