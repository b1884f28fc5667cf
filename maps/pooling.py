"""Samples from one module output: how tokens or pixels become rows for the estimators."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import lru_cache

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
        mask: (B, T), true where a token is real; used when `x` has T tokens, also one per attention head, as in
            (B, T, heads, C) or (B, heads, T, C). Padding never becomes a sample.

    Raises:
        ValueError: for an unknown pooling.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    if x.ndim == 2:
        return x.float()
    real = None if mask is None else position_mask(mask, x, channel_dim)
    real = None if real is None else real.flatten(1)
    x = x.movedim(channel_dim, -1).flatten(1, -2)
    rows, count = x.shape[:2]
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
        return x.masked_fill(~keep, 0).sum(1) / keep.sum(1)
    if pooling == "last":
        last = (real * torch.arange(1, count + 1, device=x.device)).argmax(1)
        return x[torch.arange(rows, device=x.device), last]
    if pooling == "max":
        return x.masked_fill(~keep, -torch.inf).amax(1)
    return x.masked_fill(~keep, torch.inf).amin(1)


def position_mask(mask: Tensor, x: Tensor, channel_dim: int) -> Tensor | None:
    """`mask` (B, T) over the positions of `x`: its shape without the units; None where `x` has no token dimension."""
    channels_last = channel_dim % x.ndim == x.ndim - 1
    if mask.ndim != 2 or len(mask) != len(x) or not (channels_last or x.ndim == 3):
        return None
    shape = x.movedim(channel_dim, -1).shape[:-1]
    tokens = next((dim for dim in range(1, len(shape)) if shape[dim] == mask.shape[1]), None)
    if tokens is None:
        return None
    by_token = [size if dim in (0, tokens) else 1 for dim, size in enumerate(shape)]
    return mask.to(x.device, torch.bool).view(by_token).expand(shape)


def _drawn(x: Tensor, real: Tensor | None, positions: int, seed: int, site: str) -> Tensor:
    """`positions` random positions per row of `x` (B, T, C), or all real ones of a row that has fewer."""
    priority = _priorities(x.shape[1], seed, site).to(x.device)
    if real is None:
        return x[:, priority.topk(positions).indices].flatten(0, 1).float()
    drawn = priority.where(real, -1.0).topk(positions, dim=1).indices
    kept = real.gather(1, drawn)
    return x.gather(1, drawn[..., None].expand(-1, -1, x.shape[-1]))[kept].float()


@lru_cache(maxsize=1024)
def _priorities(count: int, seed: int, site: str) -> Tensor:
    """A random number per position: those with the largest are drawn."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{site}".encode()))
    return torch.rand(count, generator=generator)
