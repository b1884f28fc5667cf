"""Samples from one module output: how tokens or pixels become rows for the estimators."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

POOLINGS = ("none", "mean", "last", "max", "min")


def samples(
    x: Tensor,
    *,
    channel_dim: int,
    pooling: str,
    positions: int | None = None,
    seed: int = 0,
    site: str = "",
    mask: Tensor | None = None,
) -> Tensor:
    """Samples (n, C) in float32 from the activations `x` of a batch.

    Args:
        x: module output with the batch in dim 0 and C units along `channel_dim`; all other dims are positions.
        channel_dim: axis of the units.
        pooling: "none" makes every real position a sample; "mean", "last", "max", "min" reduce each row to one.
        positions: with "none", how many positions to draw per row (None: all). The draw depends on seed, site and the
            number of positions only, so it is the same for every row and every way to cut the data into batches.
        seed, site: of that draw.
        mask: (B, T), true where a token is real; used when `x` has T positions. Padding never becomes a sample.

    Raises:
        ValueError: for an unknown pooling.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    x = x.movedim(channel_dim, -1)
    if x.ndim == 2:
        return x.float()
    rows, units = x.shape[0], x.shape[-1]
    x = x.reshape(rows, -1, units)
    count = x.shape[1]
    real = mask.to(x.device, torch.bool) if mask is not None and mask.shape == (rows, count) else None
    if pooling == "none":
        if positions is not None and positions < count:
            return _drawn(x, real, positions, seed, site)
        return (x.flatten(0, 1) if real is None else x[real]).float()
    x = x.float()
    if real is None:
        reduce: dict[str, Callable[[], Tensor]] = {
            "mean": lambda: x.mean(1),
            "last": lambda: x[:, -1],
            "max": lambda: x.amax(1),
            "min": lambda: x.amin(1),
        }
        return reduce[pooling]()
    keep = real[..., None]
    if pooling == "mean":
        return (x * keep).sum(1) / keep.sum(1)
    if pooling == "last":
        last = (real * torch.arange(1, count + 1, device=x.device)).argmax(1)
        return x[torch.arange(rows, device=x.device), last]
    if pooling == "max":
        return x.masked_fill(~keep, -torch.inf).amax(1)
    return x.masked_fill(~keep, torch.inf).amin(1)


def _drawn(x: Tensor, real: Tensor | None, positions: int, seed: int, site: str) -> Tensor:
    """`positions` random positions per row of `x` (B, T, C), or all real ones of a row that has fewer."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{site}".encode()))
    priority = torch.rand(x.shape[1], generator=generator).to(x.device)
    if real is None:
        return x[:, priority.topk(positions).indices].flatten(0, 1).float()
    drawn = priority.where(real, -1.0).topk(positions, dim=1).indices
    kept = real.gather(1, drawn)
    return x.gather(1, drawn[..., None].expand(-1, -1, x.shape[-1]))[kept].float()
