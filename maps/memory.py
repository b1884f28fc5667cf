"""How much memory is left, so that a fit stops with advice before the machine swaps."""

from __future__ import annotations

from pathlib import Path

import torch


def available_memory(device: torch.device) -> tuple[int, int]:
    """Free and total bytes for tensors on `device`; (0, 0) where the platform does not tell."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached, total
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return 0, 0
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free, total = (int(fields[key].split()[0]) * 1024 for key in ("MemAvailable", "MemTotal"))
    return free, total
