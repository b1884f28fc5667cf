"""What the benchmarks share: their options, a clock, timings side by side, peak memory, and the line that names the machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that all benchmarks have."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, help="of the processor; default: torch's own choice")
    parser.add_argument("--json", type=Path, help="write all figures here too")


def started(options: argparse.Namespace) -> tuple[Console, torch.device, torch.dtype]:
    """What the common options ask for."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("this torch finds no CUDA device; leave --device out to measure on the processor")
    return Console(width=140), device, DTYPES[options.dtype]


def finished(console: Console, options: argparse.Namespace, device: torch.device, figures: Mapping[str, Any]) -> None:
    """Print the machine, and store the figures where the options ask for it."""
    about = machine(device)
    console.print(" · ".join(f"{key} {value}" for key, value in about.items()))
    if options.json:
        temporary = options.json.with_suffix(".tmp")
        temporary.write_text(json.dumps({"machine": about, **figures}, indent=1))
        temporary.replace(options.json)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    about: dict[str, Any] = {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        about["GPU"] = torch.cuda.get_device_name(device)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
    return about | {"load": load, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d %H:%M")}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Stopwatch:
    """Wall and processor seconds, of all that ran inside `running`."""

    device: torch.device
    wall: float = 0.0
    cpu: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add the time that passes inside."""
        synchronize(self.device)
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            synchronize(self.device)
            self.wall += time.perf_counter() - wall
            self.cpu += time.process_time() - cpu


@dataclass
class Timings:
    """Seconds by name and round: every round timed each of them once, one after the other."""

    wall: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)

    def seconds(self, name: str) -> float:
        """Median over rounds."""
        return median(self.wall[name])

    def ratio(self, name: str, to: str) -> float:
        """Median of the ratios within each round."""
        return median(self._ratios(self.wall, name, to))

    def cpu_ratio(self, name: str, to: str) -> float:
        """The same of processor time, which what else the machine does hardly changes."""
        return median(self._ratios(self.cpu, name, to))

    def spread(self, name: str, to: str) -> tuple[float, float]:
        """Quartiles of the ratios."""
        ratios = self._ratios(self.wall, name, to)
        if len(ratios) < 2:
            return ratios[0], ratios[0]
        low, _, high = quantiles(ratios, n=4, method="inclusive")
        return low, high

    @staticmethod
    def _ratios(seconds: dict[str, list[float]], name: str, to: str) -> list[float]:
        return [a / max(b, 1e-9) for a, b in zip(seconds[name], seconds[to], strict=True)]


# Entering sets up what is to be timed and gives the function that is; leaving takes it down again.
Setup = Callable[[], AbstractContextManager[Callable[[], Any]]]


def side_by_side(setups: Mapping[str, Setup], rounds: int, device: torch.device, *, warm: bool = True) -> Timings:
    """Time each of the setups once in every round; if `warm`, always after one run of it that does not count."""
    timings = Timings({name: [] for name in setups}, {name: [] for name in setups})
    for number in range(rounds):
        names = list(setups)
        for name in names if number % 2 else reversed(names):
            with setups[name]() as run:
                if warm:
                    run()
                watch = Stopwatch(device)
                with watch.running():
                    run()
            timings.wall[name].append(watch.wall)
            timings.cpu[name].append(watch.cpu)
    return timings


def memory(device: torch.device) -> tuple[float, float]:
    """MiB that are in use now, and the most that ever were: of the GPU, or resident ones of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20, torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        unit = 2**20 if sys.platform == "darwin" else 2**10
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        return most, most
    # Not ru_maxrss here, which a new process inherits from the one that started it.
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 2**10, int(fields["VmHWM"].split()[0]) / 2**10


def in_new_process(script: str, *arguments: object) -> Any:
    """What `script` prints with these arguments, read as JSON: the peak memory of a process is that of all it ever did.

    Raises:
        RuntimeError: with what it wrote to stderr, if it fails.
    """
    command = [sys.executable, script, *map(str, arguments)]
    ran = subprocess.run(command, check=False, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{ran.stderr}")
    return json.loads(ran.stdout)
