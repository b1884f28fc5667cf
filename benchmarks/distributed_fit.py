"""What several processes gain: one fit by one process and by all of them, in turns.

    python benchmarks/distributed_fit.py                                     # two processes of one thread each
    python benchmarks/distributed_fit.py --processes 4 --model unet --prompts 64 --rounds 5
    python benchmarks/distributed_fit.py --device cuda --dtype bfloat16 --real-size --model sdxl   # a GPU per process

The processes are started once. In each round the first one fits alone while the others sleep, then all fit together. Models have random weights; see
random_models.py. CPU: processor seconds of all processes together, as multiples of those of one that fits alone; what it exceeds 1 by is what
sharing costs, also where other work slows all down.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, dataclass
from statistics import median

import torch
import torch.distributed as dist
from rich.table import Table

from actmaps.maps import ActMap, Ranks, fit_map
from measuring import Stopwatch, add_options, finished, started
from random_models import MODELS, Subject, build

TARGET = 1.8  # for two processes


@dataclass(frozen=True)
class Gain:
    """Medians in seconds for one model; `cpu` is a ratio, and so is `speed_up`, of medians within each round."""

    model: str
    sites: int
    prompts: int
    batch_size: int
    alone: float
    together: float
    speed_up: float
    cpu: float
    difference: float


def micro_batches(subject: Subject, prompts: int, batch_size: int) -> dict[str, list]:
    """Micro-batches of `prompts` prompts, half of them source, half target; the same in every process."""
    torch.manual_seed(0)
    return {
        side: [
            subject.inputs(min(batch_size, prompts // 2 - start), shift)
            for start in range(0, prompts // 2, batch_size)
        ]
        for side, shift in (("source", 0.0), ("target", 0.5))
    }


def measure(subject: Subject, options: argparse.Namespace, device: torch.device) -> Gain:
    """Time both ways of fitting; every rank calls this."""
    ranks, batches = Ranks.current(), micro_batches(subject, options.prompts, options.batch_size)

    def timed(who: Ranks) -> tuple[Stopwatch, float, ActMap | None]:
        """Seconds of rank 0, processor seconds of all that fit, and the map."""
        watch, act_map = Stopwatch(device), None
        ranks.meet()
        if ranks.rank < who.count:
            with watch.running():
                act_map = fit_map(subject.module, **batches, sites=subject.sites, progress=False, ranks=who)
        cpu = ranks.gather(torch.tensor([watch.cpu], dtype=torch.float64, device=device))
        return watch, float(cpu.sum()), act_map

    timed(ranks)  # warms up
    rounds = [(timed(Ranks()), timed(ranks)) for _ in range(options.rounds)]
    (*_, expected), (*_, found) = rounds[-1]
    return Gain(
        model=subject.title,
        sites=len(found or ()),
        prompts=options.prompts,
        batch_size=options.batch_size,
        alone=median(alone.wall for (alone, *_), _ in rounds),
        together=median(together.wall for _, (together, *_) in rounds),
        speed_up=median(alone.wall / together.wall for (alone, *_), (together, *_) in rounds) if expected else 0.0,
        cpu=median(shared / max(single, 1e-9) for (_, single, _), (_, shared, _) in rounds),
        difference=difference(expected, found) if expected and found else 0.0,
    )


def difference(one: ActMap, other: ActMap) -> float:
    """The largest difference of scales and shifts, relative to the largest of their site."""
    pairs = ((getattr(one[site], part), getattr(other[site], part)) for site in one for part in ("scale", "shift"))
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1)) for a, b in pairs)


def table(gains: list[Gain], processes: int) -> Table:
    shown = Table(
        title=f"Seconds of one process and of {processes}", caption=f"target for two processes: {TARGET} times as fast"
    )
    for column in (
        "model",
        "sites",
        "prompts",
        "1 process",
        f"{processes} processes",
        "times as fast",
        "CPU",
        "difference",
    ):
        shown.add_column(column, justify="left" if column == "model" else "right")
    for gain in gains:
        shown.add_row(
            gain.model,
            str(gain.sites),
            f"{gain.prompts} by {gain.batch_size}",
            f"{gain.alone:.2f}",
            f"{gain.together:.2f}",
            f"[{'green' if gain.speed_up >= TARGET * processes / 2 else 'red'}]{gain.speed_up:.2f}[/]",
            f"{gain.cpu:.2f}",
            f"{gain.difference:.0e}",
        )
    return shown


def work(rank: int, options: argparse.Namespace, meeting_point: str) -> None:
    """What every process does; the first one prints."""
    console, device, dtype = started(options)
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{meeting_point}",
        rank=rank,
        world_size=options.processes,
    )
    subjects = (build(name, device, dtype, real=options.real_size) for name in options.model)
    gains = [measure(subject, options, device) for subject in subjects]
    if rank == 0:
        console.print(table(gains, options.processes))
        figures = {"processes": options.processes, "gains": [asdict(gain) for gain in gains]}
        finished(console, options, device, figures)
    dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.set_defaults(threads=1)  # of every process
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--model", choices=MODELS, nargs="*", default=["unet", "text_encoder"])
    parser.add_argument("--prompts", type=int, default=32, help="source and target prompts together")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--real-size", action="store_true", help="models at their real width and depth")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (options, f"{folder}/meeting-point"), options.processes)


if __name__ == "__main__":
    main()
