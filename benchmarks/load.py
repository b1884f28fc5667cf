"""What it takes to load a map, arm it, change its strength and take it off again, for a map of SDXL's real size.

    python benchmarks/load.py
    python benchmarks/load.py --device cuda --json load.json

The map moves the 256 normalisation layers of SDXL's U-Net with their 294,080 units. The U-Net has its real shape; only its
normalisation layers have weights, since nothing here depends on the others.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles

import torch
from rich.table import Table
from torch import nn

from actmaps.maps import ActMap, steer
from actmaps.maps.sites import resolve
from measuring import Stopwatch, add_options, finished, started
from random_models import Subject, build

LOAD_TARGET, STRENGTH_TARGET = 100.0, 1.0  # milliseconds
STEPS = {
    "load": "ActMap.load, its checks included; the file is in the system's cache",
    "arm": "steer(unet, act_map)",
    "first layer": "after arming, the first steered layer of a forward, with whatever arming left to it",
    "a layer": "the same layer again: the forward's own share",
    "set": "steering.strength = x",
    "first layer again": "after that, the first steered layer of a forward",
    "remove": "steering.remove()",
}
Rounds = dict[str, list[float]]


def sdxl_with_norms_only(device: torch.device, dtype: torch.dtype) -> Subject:
    """SDXL's U-Net, of whose weights only those of the normalisation layers exist."""
    subject = build("sdxl", torch.device("meta"), dtype, real=True)
    for place in resolve(subject.module, list(subject.random_map()), "the benchmark").values():
        norm = place.module.to_empty(device=device)
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)
    return subject


@torch.no_grad()
def measure(subject: Subject, file: Path, rounds: int) -> Rounds:
    """Milliseconds of each step, of every round, after one that does not count."""
    unet, found = subject.module, list(ActMap.load(file))
    first = resolve(unet, found[:1], "the benchmark")[found[0]]
    weight = first.module.weight
    x = torch.randn(1, len(weight), 2, 2, device=weight.device, dtype=weight.dtype)
    taken: Rounds = {step: [] for step in STEPS}

    @contextmanager
    def timed(step: str) -> Iterator[None]:
        watch = Stopwatch(weight.device)
        with watch.running():
            yield
        taken[step].append(1000 * watch.wall)

    for _ in range(rounds + 1):
        with timed("load"):
            act_map = ActMap.load(file)
        with timed("arm"):
            steering = steer(unet, act_map)
        with timed("first layer"):
            first.module(x)
        with timed("a layer"):
            first.module(x)
        with timed("set"):
            steering.strength = 0.5
        with timed("first layer again"):
            first.module(x)
        with timed("remove"):
            steering.remove()
    return {step: times[1:] for step, times in taken.items()}


def totals(taken: Rounds) -> dict[str, float]:
    """Medians over rounds of what a user waits for, in milliseconds."""
    by_round = [dict(zip(taken, times, strict=True)) for times in zip(*taken.values(), strict=True)]
    return {
        "load and arm": median(t["load"] + t["arm"] + t["first layer"] - t["a layer"] for t in by_round),
        "change the strength": median(t["set"] + t["first layer again"] - t["a layer"] for t in by_round),
    }


def table(taken: Rounds, sums: dict[str, float], act_map: ActMap, size: int) -> Table:
    units = sum(affine.channels for affine in act_map.values())
    made = Table(
        title=f"A map of {len(act_map)} sites, {units:,} units, {size / 1e6:.2f} MB; milliseconds, medians of {len(taken['load'])}"
    )
    for column in ("step", "median", "quartiles", "what is timed"):
        made.add_column(column, justify="right" if column in ("median", "quartiles") else "left")
    for step, times in taken.items():
        low, _, high = quantiles(times, n=4, method="inclusive")
        made.add_row(step, f"{median(times):.2f}", f"{low:.2f} to {high:.2f}", STEPS[step])
    made.add_section()
    for (name, milliseconds), target in zip(sums.items(), (LOAD_TARGET, STRENGTH_TARGET), strict=True):
        style = "green" if milliseconds < target else "red"
        made.add_row(
            name, f"[{style}]{milliseconds:.2f}[/]", "", f"target: below {target:g}; less the forward's own share"
        )
    return made


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    add_options(parser)
    options = parser.parse_args(arguments)
    console, device, dtype = started(options)
    subject = sdxl_with_norms_only(device, dtype)
    act_map = subject.random_map()
    with tempfile.TemporaryDirectory() as folder, console.status("measuring"):
        file = Path(folder) / "map.safetensors"
        act_map.save(file)
        size = file.stat().st_size
        taken = measure(subject, file, options.rounds)
    sums = totals(taken)
    console.print(table(taken, sums, act_map, size))
    finished(console, options, device, {"milliseconds": {step: median(t) for step, t in taken.items()} | sums})


if __name__ == "__main__":
    main()
