"""Inducing a concept: does a steered model write about it, and still readably (paper, section 4.2)?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .fluency import continuation_perplexity, distinct_n, perplexity, repetition
from .generation import continuations
from .judges import ConceptJudge
from .own_texts import Concept

if TYPE_CHECKING:
    from ...pipelines import TextGenerationACTPipeline

# What one would write before an opener instead of steering.
INSTRUCTION = "A short text about {concept}.\n\n"


@dataclass(frozen=True)
class ConceptScores:
    """How present a concept is, and how fluent the texts are.

    Attributes:
        probability: mean p(concept) of the judge; threshold_share: share of texts above its threshold.
        word_share: share of texts with one of the concept's words.
        perplexity: of the steered model on neutral prose.
        text_perplexity: of the unsteered model on the texts, given their openers.
        distinct: different word pairs over all word pairs.
        repetition: share of word triples that occurred before in the same text.
    """

    probability: float
    threshold_share: float
    word_share: float
    perplexity: float
    text_perplexity: float
    distinct: float
    repetition: float


def concept_judge(concept: Concept, neutral: Sequence[str]) -> ConceptJudge:
    """The judge of a concept, calibrated on its sentences against neutral ones."""
    return ConceptJudge(concept.name, concept.word_forms, concept.sentences, neutral)


def concept_presence(
    pipe: TextGenerationACTPipeline,
    judge: ConceptJudge,
    openers: Sequence[str],
    prose: Sequence[str],
    *,
    act_strength: float | Mapping[str, Any] | None = None,
    instruction: str = "",
    max_new_tokens: int = 40,
    **generation: Any,
) -> ConceptScores:
    """Let the steered model continue openers that are not about the concept, and judge the texts.

    Args:
        pipe: a pipeline with its maps loaded and active.
        judge: see `concept_judge`.
        openers: beginnings of texts.
        prose: neutral texts for the perplexity of the steered model.
        act_strength, instruction, max_new_tokens, **generation: see `continuations`.
    """
    texts = continuations(
        pipe, openers, act_strength=act_strength, instruction=instruction, max_new_tokens=max_new_tokens, **generation
    )
    probabilities = judge(texts)
    with pipe.steered(act_strength):
        steered_perplexity = perplexity(pipe.model, pipe.tokenizer, prose)
    return ConceptScores(
        probability=float(probabilities.mean()),
        threshold_share=float((probabilities >= judge.threshold).mean()),
        word_share=judge.word_share(texts),
        perplexity=steered_perplexity,
        text_perplexity=continuation_perplexity(pipe.model, pipe.tokenizer, openers, texts),
        distinct=distinct_n(texts, 2),
        repetition=repetition(texts),
    )
