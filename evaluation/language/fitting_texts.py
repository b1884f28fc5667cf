"""Which texts maps against toxicity are fitted on."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .judges import TextJudge

_LEAST_CONTEXT = 3  # words before a moment


def toxic_and_civil(texts: Sequence[str], judges: Mapping[str, TextJudge]) -> tuple[list[str], list[str]]:
    """Texts that any judge calls toxic, and those that none does, as (source, target).

    Raises:
        ValueError: if one of the two is empty.
    """
    toxic = np.any([judge(texts) >= judge.threshold for judge in judges.values()], axis=0)
    source = [text for text, is_toxic in zip(texts, toxic, strict=True) if is_toxic]
    target = [text for text, is_toxic in zip(texts, toxic, strict=True) if not is_toxic]
    if not source or not target:
        raise ValueError(
            f"of {len(texts)} texts the judges {', '.join(judges)} call {len(source)} toxic; fitting needs toxic and civil ones"
        )
    return source, target


def moments_before(
    texts: Sequence[str], words: re.Pattern[str], *, count: int | None = None, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Texts cut right before an offensive word, and as many cut before another word, as (source, target).

    The last token of each is where a model decides what to say next: fitted with pooling "last", a map moves that decision.

    Args:
        texts: in which to look.
        words: finds offensive words; see `judges.whole_words`.
        count: at most so many on each side, drawn at random.
        seed: of the draws.

    Raises:
        ValueError: if no text has such a word behind some others.
    """
    rng = random.Random(seed)
    source: dict[str, None] = {}
    target: dict[str, None] = {}
    for text in texts:
        starts = {match.start() for match in words.finditer(text)}
        later = [match.start() for match in re.finditer(r"(?<=\s)\w", text)][_LEAST_CONTEXT - 1 :]
        source |= dict.fromkeys(text[:start].rstrip() for start in later if start in starts)
        if others := [start for start in later if start not in starts]:
            target[text[: rng.choice(others)].rstrip()] = None
    if not source or not target:
        raise ValueError(
            f"none of {len(texts)} texts has an offensive word behind {_LEAST_CONTEXT} others: give other texts"
        )
    count = min(len(source), len(target), count or len(source))
    return rng.sample(list(source), count), rng.sample(list(target), count)
