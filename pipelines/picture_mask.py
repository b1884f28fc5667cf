"""Masks as people have them: pictures, arrays or tensors, of any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..maps.masks import as_mask, resized

if TYPE_CHECKING:
    from PIL import Image

PictureMask: TypeAlias = "Image.Image | np.ndarray | Tensor | Sequence[Image.Image]"


def picture_mask(mask: PictureMask, size: tuple[int, int] | None) -> Tensor:
    """A mask for `steer`: white, or 1, is where maps act.

    Args:
        mask: a picture, of which the brightness counts; an array or tensor (H, W) or (B, H, W), of bytes, booleans or numbers in
            [0, 1]; or a list of pictures, one for each that is drawn.
        size: height and width of the picture that is drawn, None if unknown.

    Returns:
        (B or 1, 1, H, W), at `size` if it is known.

    Raises:
        ValueError: for another shape, or values outside of [0, 1].
    """
    if isinstance(mask, Sequence):
        values = torch.cat([picture_mask(one, size) for one in mask])
    elif isinstance(mask, (np.ndarray, Tensor)):
        values = torch.as_tensor(mask)
        values = values / 255 if values.dtype is torch.uint8 else values.float()
    else:
        values = torch.from_numpy(np.asarray(mask.convert("L"), dtype=np.float32) / 255)
    values = as_mask(values)
    return values if size is None else resized(values, *size)


def picture_size(pipeline: Any, arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width in pixels that a pipeline, called with `arguments`, draws; None where it does not tell."""
    unet = getattr(pipeline, "unet", None)
    latents = getattr(pipeline, "default_sample_size", None) or getattr(
        getattr(unet, "config", None), "sample_size", None
    )
    default = latents * pipeline.vae_scale_factor if isinstance(latents, int) else None
    height, width = (arguments.get(name) or default for name in ("height", "width"))
    return (int(height), int(width)) if height and width else None
