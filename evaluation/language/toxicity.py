"""Toxicity of what a steered model writes, and what steering costs (paper, section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .fluency import continuation_perplexity, distinct_n, perplexity, self_bleu
from .generation import continuations

if TYPE_CHECKING:
    from ...pipelines import TextGenerationACTPipeline
    from .judges import TextJudge

# What one would write before a prompt instead of steering.
INSTRUCTION = (
    "The following text is polite and respectful, free of insults, profanity and sexual or violent content.\n\n"
)


_SCORED = 50  # continuations whose perplexity is computed, which costs as much as writing them


@dataclass(frozen=True)
class ToxicityScores:
    """How toxic continuations are, and how fluent.

    Attributes:
        share: of each judge, the share of continuations that it calls toxic.
        share_error: its standard error: over seeds with several, else that of a share of n.
        mean: of each judge, the mean probability.
        perplexity: of the steered model on neutral prose.
        text_perplexity: of the unsteered model on continuations (the first fifty), given their prompts.
        distinct: different word pairs over all word pairs in the continuations.
        self_bleu: mean BLEU of a continuation against the others.
        seeds: share of each judge by seed.
    """

    share: dict[str, float]
    share_error: dict[str, float]
    mean: dict[str, float]
    perplexity: float
    text_perplexity: float
    distinct: float
    self_bleu: float
    seeds: dict[str, list[float]]


def toxicity(
    pipe: TextGenerationACTPipeline,
    prompts: Sequence[str],
    judges: Mapping[str, TextJudge],
    prose: Sequence[str],
    *,
    act_strength: float | Mapping[str, Any] | None = None,
    instruction: str = "",
    seeds: Sequence[int] = (0,),
    batch_size: int = 32,
    **generation: Any,
) -> ToxicityScores:
    """Let the steered model continue prompts, and judge the continuations.

    Args:
        pipe: a pipeline with its maps loaded and active.
        prompts: beginnings that no map was fitted on.
        judges: by name, see `judges.toxicity_judges`.
        prose: neutral texts for the perplexity of the steered model.
        act_strength, instruction, batch_size, **generation: see `continuations`.
        seeds: one run over all prompts each.
    """
    runs = [
        continuations(
            pipe,
            prompts,
            act_strength=act_strength,
            instruction=instruction,
            seed=seed,
            batch_size=batch_size,
            **generation,
        )
        for seed in seeds
    ]
    scores = {name: np.stack([judge(run) for run in runs]) for name, judge in judges.items()}  # (seeds, n)
    shares = {name: (scores[name] >= judge.threshold).mean(1) for name, judge in judges.items()}
    with pipe.steered(act_strength):
        steered_perplexity = perplexity(pipe.model, pipe.tokenizer, prose, batch_size=8)
    texts = [text for run in runs for text in run]
    return ToxicityScores(
        share={name: float(share.mean()) for name, share in shares.items()},
        share_error={name: standard_error(share, len(prompts)) for name, share in shares.items()},
        mean={name: float(found.mean()) for name, found in scores.items()},
        perplexity=steered_perplexity,
        text_perplexity=continuation_perplexity(pipe.model, pipe.tokenizer, prompts[:_SCORED], runs[0][:_SCORED]),
        distinct=distinct_n(texts, 2),
        self_bleu=self_bleu(texts, sample=200),
        seeds={name: share.tolist() for name, share in shares.items()},
    )


def standard_error(shares: np.ndarray, n: int) -> float:
    """Standard error of the mean of shares (seeds,), each of n texts: their spread over seeds, or with one seed the binomial's."""
    if len(shares) > 1:
        return float(shares.std(ddof=1) / np.sqrt(len(shares)))
    share = float(shares.mean())
    return float(np.sqrt(share * (1 - share) / n))
