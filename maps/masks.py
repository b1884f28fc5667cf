"""Spatial masks: where in the picture a map acts.

A mask (H, W) is a factor in [0, 1] on the displacement at each position. Feature maps (NCHW) take it at their own size. Token
sequences of the picture are told from others by their length, which is that of the mask at a power-of-two fraction of its size, so it should
come at the size of the picture or of its latents. With a mask, text tokens are not moved: they have no place in the picture.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.nn import functional as F

# Parts of the names of modules that work on text, or on vectors drawn from it, in denoisers of diffusers.
_TEXT_WORDS = {"text", "txt", "context", "caption", "add", "added"}
_TEXT = re.compile(r".*attn2\.(to_k|to_v|norm_k)(\..*)?")
# Within them text and picture are one sequence, text first.
_JOINT = re.compile(r".*single_transformer_blocks\.\d+\.[^:]*")


def stream_of(site: str) -> str:
    """Which tokens a site of a denoiser holds: "text", "joint" (text, then picture) or "image", by its name."""
    path = site.partition(".")[2]
    if _TEXT.fullmatch(path) or _TEXT_WORDS.intersection(re.split(r"[._:]", path)):
        return "text"
    return "joint" if _JOINT.fullmatch(path) else "image"


def as_mask(mask: Tensor) -> Tensor:
    """`mask` (H, W), (B, H, W) or (B, 1, H, W) as (B, 1, H, W) in float32 on the CPU.

    Raises:
        ValueError: for another shape, and values outside of [0, 1].
    """
    if mask.ndim not in (2, 3, 4) or (mask.ndim == 4 and mask.shape[1] != 1) or not mask.numel():
        raise ValueError(f"a mask has shape (H, W), (B, H, W) or (B, 1, H, W), got {tuple(mask.shape)}")
    with torch.inference_mode(False):  # may be used outside of it
        values = mask.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("a mask has values between 0 (not moved) and 1 (moved in full); divide one of bytes by 255")
    return values.reshape(-1, 1, *values.shape[-2:])


def resized(mask: Tensor, height: int, width: int) -> Tensor:
    """`mask` (B, 1, H, W) at another size by the mean over areas, which keeps ones and zeros as they are."""
    return mask if mask.shape[-2:] == (height, width) else F.adaptive_avg_pool2d(mask, (height, width))


def position_weights(mask: Tensor, x: Tensor, channel_dim: int, stream: str) -> Tensor | None:
    """`mask` (B, 1, H, W) at the positions of the activations `x` of a site, in their dtype and such that it broadcasts.

    Rows of the mask stand for equally large groups of rows of `x`. None where the positions of the picture cannot be told apart.

    Args:
        stream: of the site, "image" or "joint"; see `stream_of`.
    """
    if x.shape[0] % mask.shape[0]:
        return None
    mask = mask.to(x.device)
    if mask.shape[0] > 1:
        mask = mask.repeat_interleave(x.shape[0] // mask.shape[0], 0)
    channel_dim %= x.ndim
    if channel_dim == 1 and x.ndim in (4, 5):
        weights = resized(mask, x.shape[-2], x.shape[-1])
        return (weights if x.ndim == 4 else weights.unsqueeze(2)).to(x.dtype)
    # Heads may be as many as a small picture has tokens, which are more.
    for dim in sorted({*range(1, x.ndim)} - {channel_dim}, key=lambda dim: -x.shape[dim]):
        grid = _grid(x.shape[dim], mask.shape[-2], mask.shape[-1], joint=stream == "joint")
        if grid is not None:
            weights = resized(mask, *grid).flatten(1)
            weights = F.pad(weights, (x.shape[dim] - weights.shape[1], 0))
            shape = [1] * x.ndim
            shape[0], shape[dim] = weights.shape
            return weights.view(shape).to(x.dtype)
    return None


def _grid(tokens: int, height: int, width: int, joint: bool) -> tuple[int, int] | None:
    """Rows and columns of a picture of `tokens` tokens: the mask's over a power of two, rounded up or down.

    Of a joint sequence the picture is the largest part that there is a grid for.
    """
    factor = 1
    while factor < 2 * max(height, width):
        for rows, columns in ((-(-height // factor), -(-width // factor)), (height // factor, width // factor)):
            count = rows * columns
            if count > 1 and (count < tokens if joint else count == tokens):
                return rows, columns
        factor *= 2
    return None


def blended(x: Tensor, moved: Tensor, weights: Tensor) -> Tensor:
    """`moved` where the weights are 1, `x` where they are 0, each bit for bit, and in proportion between."""
    between = torch.lerp(x, moved, weights)
    return torch.where(weights == 1, moved, torch.where(weights == 0, x, between))
