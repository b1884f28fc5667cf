"""Pictures of the same prompts and seeds at several strengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from ..pipelines import ACTMixin


def strength_sweep(
    pipe: ACTMixin, prompts: Sequence[str], strengths: Sequence[float], *, seed: int = 0, **call_options: Any
) -> list[list[Image.Image]]:
    """Draw every prompt at every strength of the active maps.

    Args:
        pipe: a text-to-image pipeline with act maps.
        prompts: one row each; prompt i is drawn from seed `seed + i`, the same at every strength.
        strengths: one column each.
        seed: of the first row.
        **call_options: for the pipeline's call, such as `num_inference_steps`.

    Returns:
        Rows of pictures, one row per prompt, one picture per strength.
    """
    columns = [
        pipe(list(prompts), generator=_generators(seed, len(prompts)), act_strength=strength, **call_options).images
        for strength in strengths
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def _generators(seed: int, count: int) -> list[Any]:
    import torch

    return [torch.Generator().manual_seed(seed + i) for i in range(count)]
