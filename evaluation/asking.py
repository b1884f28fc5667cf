"""What is asked of a model when a map is judged: prompts to draw with the map, and what prompting alone can do beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..maps.presets import Preset


@dataclass(frozen=True)
class Comparison:
    """Prompts to draw without a map."""

    prompts: list[str]
    negative_prompt: str | None = None


def concept_words(preset: Preset) -> str:
    """What a preset brings in or takes away: its first tag, else its name."""
    side = preset.source if preset.kind == "negation" else preset.target
    return side.tags[0] if side.tags else preset.name.removeprefix("no-").replace("-", " ")


def comparisons(preset: Preset, subjects: Sequence[str], words: str, seed: int = 0) -> dict[str, Comparison]:
    """What prompting alone can do about `words`, by label: say it, forbid it, or leave it out."""
    prompts = preset.judge_prompts(subjects, seed)
    target = preset.prompts(subjects, seed)[1]
    if preset.kind == "negation":
        return {
            f"“{words}” as\nnegative prompt": Comparison(prompts, words),
            "without it\nin the prompt": Comparison(target),
        }
    plainest = [f"{prompt}, {words}" for prompt in prompts] if preset.kind == "style" else target
    return {f"“{words}”\nin the prompt": Comparison(plainest)}
