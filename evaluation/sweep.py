"""Pictures of the same prompts and seeds at several strengths, beside what prompting alone gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from .asking import comparisons, concept_words
from .grid import draw_grid

if TYPE_CHECKING:
    from ..maps import ActMap
    from ..maps.presets import Preset
    from ..pipelines import ACTMixin

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def strength_sweep(
    pipe: ACTMixin, prompts: Sequence[str], strengths: Sequence[float], *, seed: int = 0, **call_options: Any
) -> list[list[Image.Image]]:
    """Draw every prompt at every strength of the active maps.

    Args:
        pipe: a text-to-image pipeline with maps loaded and active.
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


def strength_labels(strengths: Sequence[float]) -> list[str]:
    """Column labels for `draw_grid`."""
    return ["0\nunsteered" if strength == 0 else f"{strength:g}" for strength in strengths]


def preset_sweep(
    pipe: ACTMixin,
    preset: Preset,
    act_map: ActMap,
    subjects: Sequence[str],
    *,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    **call_options: Any,
) -> Image.Image:
    """A grid that shows what a map fitted on `preset` does to subjects, with the preset's own words in the prompt beside it.

    Args:
        pipe: a text-to-image pipeline without active maps; it is left as it was.
        act_map: the map, fitted on the preset.
        subjects: one row each.
        strengths, seed, call_options: as for `strength_sweep`.
    """
    prompts, word = preset.judge_prompts(subjects, seed), concept_words(preset)
    compared = comparisons(preset, subjects, word, seed)
    if preset.kind == "negation":
        title = f"Taking away “{word}” with an act map"
        subtitle = f"The prompts name “{word}”, those of the last column do not."
    else:
        title, subtitle = f"Bringing in “{word}” with an act map", "No prompt names it but those of the last column."
    name = pipe.load_act_map(act_map, f"sweep of {preset.name}")
    try:
        rows = strength_sweep(pipe, prompts, strengths, seed=seed, **call_options)
    finally:
        pipe.delete_act_maps(name)
    for comparison in compared.values():
        negative = comparison.negative_prompt
        options = call_options if negative is None else call_options | {"negative_prompt": [negative] * len(prompts)}
        extra = strength_sweep(pipe, comparison.prompts, [0.0], seed=seed, **options)
        rows = [row + more for row, more in zip(rows, extra, strict=True)]
    return draw_grid(
        rows,
        prompts,
        [*strength_labels(strengths), *compared],
        title=title,
        subtitle=f"{subtitle} Every row keeps its seed.",
        heading="strength of the map",
        apart=len(compared),
        apart_heading="for comparison",
    )
