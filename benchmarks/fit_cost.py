"""What fitting costs: time against the plain forward passes and against a pass per site, and peak memory.

    python benchmarks/fit_cost.py                      # all tables
    python benchmarks/fit_cost.py --model unet --prompts 32 --repeats 5 --memory-prompts
    python benchmarks/fit_cost.py --json fit_cost.json

Models are randomly initialised: a U-Net with the blocks of Stable Diffusion 1.5 at reduced width, and a text encoder of the
size of CLIP-L. Repetitions of the plain passes and of the fit alternate; medians are shown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from actmaps.maps import ESTIMATORS, METHODS, ActMap, AffineMap, Method, find_sites, fit_map, steer
from actmaps.maps.methods import TRANSPORTS
from actmaps.maps.pooling import samples
from actmaps.maps.sites import resolve

TARGET_RATIO = 1.15
POSITIONS = 64
Batches = dict[str, list[dict[str, Tensor]]]


def unet(size: int) -> tuple[nn.Module, Callable[[int, Tensor], dict[str, Tensor]]]:
    """Stable Diffusion 1.5's U-Net at a fifth of its width for `size` x `size` latents, and a function that makes inputs."""
    model = UNet2DConditionModel(
        sample_size=size,
        block_out_channels=(64, 128, 256, 256),
        cross_attention_dim=128,
        attention_head_dim=8,
        norm_num_groups=32,
    )

    def inputs(rows: int, shift: Tensor) -> dict[str, Tensor]:
        return {
            "sample": torch.randn(rows, 4, size, size),
            "timestep": torch.randint(0, 1000, (rows,)),
            "encoder_hidden_states": torch.randn(rows, 77, 128) + shift,
        }

    return model.eval(), inputs


def text_encoder() -> tuple[nn.Module, Callable[[int, Tensor], dict[str, Tensor]]]:
    """A text encoder with CLIP-L's 12 layers of width 768, and a function that makes prompts of 77 tokens."""
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=1000
    )

    def inputs(rows: int, shift: Tensor) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(0, 500, (rows, 77)) + (400 * shift).long()}

    return CLIPTextModel(config).eval(), inputs


def build(name: str, prompts: int, batch_size: int, size: int = 32) -> tuple[nn.Module, Batches]:
    """A model and the micro-batches of `prompts` prompts, half of them source, half target."""
    torch.manual_seed(0)
    model, inputs = unet(size) if name == "unet" else text_encoder()
    batches: Batches = {"source": [], "target": []}
    for side, shift in (("source", 0.0), ("target", 0.5)):
        for start in range(0, prompts // 2, batch_size):
            batches[side].append(inputs(min(batch_size, prompts // 2 - start), torch.tensor(shift)))
    return model, batches


@dataclass
class Stopwatch:
    """Wall and processor seconds."""

    wall: float = 0.0
    cpu: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add the time that passes inside."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.wall += time.perf_counter() - wall
            self.cpu += time.process_time() - cpu


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

    def record(_module: nn.Module, _args: Any, x: Tensor) -> None:
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
    """Medians in seconds for one model."""

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
    ratio: float = field(init=False)

    def __post_init__(self) -> None:
        self.ratio = (self.ours - self.estimators) / self.plain


def measure(name: str, prompts: int, batch_size: int, repeats: int, reference_sites: int, method: str) -> Cost:
    model, batches = build(name, prompts, batch_size)
    plain_passes(model, {side: micro_batches[:1] for side, micro_batches in batches.items()})  # warm up
    times = []
    act_map = None
    for _ in range(repeats):
        plain, ours, estimators = Stopwatch(), Stopwatch(), Stopwatch()
        with plain.running():
            plain_passes(model, batches)
        with ours.running():
            timed = timed_method(method, estimators)
            act_map = fit_map(model, **batches, method=timed, positions=POSITIONS, progress=False)
        times.append((plain, ours, estimators))
    assert act_map is not None
    assert len(act_map) == len(find_sites(model))
    sites = list(act_map)
    chosen = [sites[round((i + 0.5) * len(sites) / reference_sites - 0.5)] for i in range(reference_sites)]
    reference, difference = Stopwatch(), 0.0
    for site in chosen:
        before = act_map.select(sites[: sites.index(site)]) if site != sites[0] else None
        with reference.running():
            found = pass_for_one_site(model, batches, before, site, method)
        ours_there = act_map[site]
        for one, other in ((found.scale, ours_there.scale), (found.shift, ours_there.shift)):
            difference = max(difference, float((one - other).abs().max() / other.abs().max().clamp_min(1)))
    return Cost(
        model=name,
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
    )


def peak(prompts: int, batch_size: int) -> dict[str, float]:
    """Peak resident MiB of one fit in this process, and what was resident before it."""
    model, batches = build("unet", prompts, batch_size, size=16)
    plain_passes(model, {side: micro_batches[:1] for side, micro_batches in batches.items()})
    before, _ = resident()
    watch = Stopwatch()
    with watch.running():
        fit_map(model, **batches, positions=POSITIONS, progress=False)
    return {"prompts": prompts, "before": before, "peak": resident()[1], "seconds": watch.wall}


def resident() -> tuple[float, float]:
    """MiB of this process that are resident now, and the most that ever were."""
    status = Path("/proc/self/status")
    if not status.exists():
        unit = 2**20 if sys.platform == "darwin" else 2**10
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        return most, most
    # Not ru_maxrss here, which a new process inherits from the one that started it.
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 2**10, int(fields["VmHWM"].split()[0]) / 2**10


def peak_in_new_process(prompts: int, batch_size: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--peak", str(prompts), "--batch-size", str(batch_size)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def time_table(costs: list[Cost]) -> Table:
    table = Table(
        title="Time in seconds (medians)", caption=f"ratio = (fit - estimators) / plain, target {TARGET_RATIO}"
    )
    for column in ("model", "sites", "prompts", "plain", "fit", "estimators", "ratio", "CPU ratio", "pass per site"):
        table.add_column(column, justify="left" if column == "model" else "right")
    table.add_column("difference", justify="right")
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
        )
    return table


def memory_table(peaks: list[dict[str, float]]) -> Table:
    table = Table(title="Peak resident memory in MiB, U-Net with 16 x 16 latents, one process each")
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


def machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("unet", "text_encoder"), nargs="*", default=["unet", "text_encoder"])
    parser.add_argument("--prompts", type=int, default=32, help="source and target prompts together")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--method", choices=TRANSPORTS, default="linear")
    parser.add_argument("--reference-sites", type=int, default=4, help="sites on which the pass per site is measured")
    parser.add_argument("--memory-prompts", type=int, nargs="*", default=[64, 256, 1024])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, help="write all figures here too")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peak:
        print(json.dumps(peak(options.peak, options.batch_size)))
        return
    console = Console(width=120)
    about = machine()
    console.print(" · ".join(f"{key} {value}" for key, value in about.items()))
    costs, peaks = [], []
    for name in options.model:
        with console.status(f"timing {name}"):
            costs.append(
                measure(
                    name,
                    options.prompts,
                    options.batch_size,
                    options.repeats,
                    options.reference_sites,
                    options.method,
                )
            )
    if costs:
        console.print(time_table(costs))
        console.print(
            "The pass per site is extrapolated from sites spread evenly over the model; difference: of its maps and ours."
        )
    for prompts in options.memory_prompts:
        with console.status(f"measuring the memory of {prompts} prompts"):
            peaks.append(peak_in_new_process(prompts, options.batch_size))
    if peaks:
        console.print(memory_table(peaks))
    if options.json:
        options.json.write_text(
            json.dumps({"machine": about, "time": [asdict(c) for c in costs], "memory": peaks}, indent=1)
        )


if __name__ == "__main__":
    main()
