"""How much memory is left, so that a fit stops with advice before the machine swaps."""

from __future__ import annotations

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
# Limit, usage and statistics of a container's memory: control groups version 2 and 1.
_CONTROL_GROUPS = tuple(
    tuple(Path("/sys/fs/cgroup", name) for name in names)
    for names in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    )
)


def available_memory(device: torch.device) -> tuple[int, int]:
    """Free and total bytes for tensors on `device`; (0, 0) where the platform does not tell."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached, total
    if device.type != "cpu" or not _MEMINFO.exists():
        return 0, 0
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    free, total = (int(fields[key].split()[0]) * 1024 for key in ("MemAvailable", "MemTotal"))
    for limit, usage, statistics in _CONTROL_GROUPS:
        if limit.exists() and (size := limit.read_text().strip()) != "max" and int(size) < total:
            cache = dict(line.split() for line in statistics.read_text().splitlines())["inactive_file"]
            total, free = int(size), min(free, int(size) - int(usage.read_text()) + int(cache))
    return free, total
