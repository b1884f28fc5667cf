"""Which texts maps against toxicity are fitted on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .judges import TextJudge


def toxic_and_civil(texts: Sequence[str], judges: Mapping[str, TextJudge]) -> tuple[list[str], list[str]]:
    """Texts that any judge calls toxic, and those that none does, as (source, target).

    Raises:
        ValueError: if one of the two is empty.
    """
    toxic = np.any([judge(texts) >= judge.threshold for judge in judges.values()], axis=0)
    source, target = (
        [text for text, is_toxic in zip(texts, toxic, strict=True) if is_toxic == side] for side in (True, False)
    )
    if not source or not target:
        raise ValueError(
            f"of {len(texts)} texts the judges {', '.join(judges)} call {len(source)} toxic; fitting needs toxic and civil ones"
        )
    return source, target
