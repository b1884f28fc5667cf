"""How fluent texts are: perplexity under a causal language model, and how much they repeat themselves or each other."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .data import checked_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOOTHING = 0.1  # counts for no match at all, as in the first method of Chen and Cherry (2014)


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = 256,
    batch_size: int = 8,
) -> float:
    """Perplexity of texts: exp of the mean negative log likelihood over all tokens of all texts.

    A text begins as the tokenizer begins it: with <bos> for Llama and Gemma, without for SmolLM2 and GPT-2. The first token has no context
    and is not scored, be it <bos> or not.

    Args:
        model: a causal language model, steered or not.
        tokenizer: its tokenizer; its padding side does not matter.
        texts: empty ones count for nothing.
        max_length: tokens of a text that are read, <bos> among them.
        batch_size: texts at a time. Logits of a batch take batch_size x max_length x vocabulary x 4 bytes.

    Raises:
        ValueError: if there is no token to score.
    """
    rows = [(_ids(tokenizer, text)[:max_length], 1) for text in checked_texts(texts)]
    return _perplexity(_token_log_likelihoods(model, rows, batch_size))


def continuation_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    continuations: Sequence[str],
    *,
    batch_size: int = 8,
) -> float:
    """Perplexity of continuations, each given its prompt; the tokens of prompts are not scored.

    Args:
        prompts: n texts.
        continuations: n texts that follow them immediately, white space included; empty ones count for nothing.
        model, tokenizer, batch_size: see `perplexity`.

    Raises:
        ValueError: for unequal numbers, or if there is no token to score.
    """
    rows = _continued(tokenizer, prompts, continuations)
    return _perplexity(_token_log_likelihoods(model, rows, batch_size))


def answer_log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    batch_size: int = 8,
) -> tuple[Tensor, Tensor]:
    """Log likelihood of answers, each given its prompt, as the multiple choice of TruthfulQA compares them.

    Args:
        prompts: n texts.
        answers: n texts that follow them immediately, white space included: " Paris" after "Answer:".
        model, tokenizer, batch_size: see `perplexity`.

    Returns:
        (sums, counts): summed log probability of each answer's tokens as float64 (n,), and the number of these tokens as int64 (n,).

    Raises:
        ValueError: for unequal numbers, or an answer without a token.
    """
    rows = _continued(tokenizer, prompts, answers)
    scores = _token_log_likelihoods(model, rows, batch_size)
    if empty := [index for index, score in enumerate(scores) if not len(score)]:
        raise ValueError(f"answer {empty[0]}, {answers[empty[0]]!r}, has no token after its prompt")
    sums = torch.tensor([score.sum().item() for score in scores], dtype=torch.float64)
    return sums, torch.tensor([len(score) for score in scores])


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all n-grams of words, in all texts together; nan if no text has n words."""
    grams = [gram for text in checked_texts(texts) for gram in _ngrams(_words(text), n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition(texts: Sequence[str], n: int = 3) -> float:
    """Share of n-grams of words that occurred before in the same text; nan if no text has n words."""
    grams = [_ngrams(_words(text), n) for text in checked_texts(texts)]
    total = sum(map(len, grams))
    return 1 - sum(len(set(own)) for own in grams) / total if total else math.nan


def self_bleu(texts: Sequence[str], n: int = 4, sample: int | None = None, seed: int = 0) -> float:
    """Mean BLEU of each text against all the others: 1 if all are alike, near 0 if they share nothing.

    Args:
        texts: at least two with a word; texts without one are left out.
        n: longest n-grams; all lengths up to n weigh alike.
        sample: how many texts, drawn at random, take part; by default all.
        seed: of the draw.

    Raises:
        ValueError: for fewer than two texts.
    """
    words = [found for text in checked_texts(texts) if (found := _words(text))]
    if sample is not None and sample < len(words):
        words = random.Random(seed).sample(words, sample)
    if len(words) < 2:
        raise ValueError(f"{len(words)} texts with words: to compare each with the others, give at least two")
    precisions = [_precisions([Counter(_ngrams(own, size)) for own in words]) for size in range(1, n + 1)]
    lengths = [len(own) for own in words]
    scores = []
    for index, length in enumerate(lengths):
        others = lengths[:index] + lengths[index + 1 :]
        reference = min(others, key=lambda other: (abs(other - length), other))
        brevity = min(0.0, 1 - reference / length)
        # Without a single common word the score is 0; smoothing is for longer n-grams.
        matched = precisions[0][index] >= 1 / length
        logs = sum(math.log(precision[index]) for precision in precisions) / n
        scores.append(math.exp(brevity + logs) if matched else 0.0)
    return sum(scores) / len(scores)


def _precisions(counts: list[Counter[tuple[str, ...]]]) -> list[float]:
    """Of each text's n-grams, the share found in another text, each at most as often as in the text that has it most; smoothed."""
    most: dict[tuple[str, ...], list[int]] = {}  # the two highest counts: that of "the others" is one of them
    for own in counts:
        for gram, count in own.items():
            most[gram] = sorted([*most.get(gram, [0, 0]), count])[-2:]
    precisions = []
    for own in counts:
        matches = 0
        for gram, count in own.items():
            second, first = most[gram]
            matches += min(count, second if count == first else first)
        precisions.append((matches or SMOOTHING) / max(own.total(), 1))
    return precisions


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def _ids(tokenizer: Any, text: str) -> list[int]:
    # The chat template has written <bos> already.
    begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return tokenizer(text, add_special_tokens=not begun).input_ids


def _continued(tokenizer: Any, prompts: Sequence[str], continuations: Sequence[str]) -> list[tuple[list[int], int]]:
    """Ids of prompt and continuation, and where the continuation begins: at the first id that it changes or adds."""
    prompts, continuations = checked_texts(prompts), checked_texts(continuations)
    if len(prompts) != len(continuations):
        raise ValueError(f"{len(prompts)} prompts but {len(continuations)} continuations: give one to each")
    rows = []
    for prompt, continuation in zip(prompts, continuations, strict=True):
        before, whole = _ids(tokenizer, prompt), _ids(tokenizer, prompt + continuation)
        # Tokenised together, since a word may be torn in two otherwise.
        same = (a == b for a, b in zip(before, whole, strict=False))
        begin = next((index for index, equal in enumerate(same) if not equal), min(len(before), len(whole)))
        rows.append((whole, max(begin, 1) if continuation else len(whole)))
    return rows


@torch.no_grad()
def _token_log_likelihoods(model: Any, rows: Sequence[tuple[list[int], int]], batch_size: int) -> list[Tensor]:
    """Log probabilities of ids[begin:], float64, for each row (ids, begin), begin >= 1.

    Rows are padded on the right, where causal attention keeps the padding from being seen whatever kind of positions a model has; and
    sorted, so that there is little of it and few logits are computed in vain.
    """
    found = [torch.zeros(0, dtype=torch.float64) for _ in rows]
    order = sorted((i for i, (ids, begin) in enumerate(rows) if len(ids) > begin), key=lambda i: len(rows[i][0]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest, first = max(len(rows[i][0]) for i in chosen), min(rows[i][1] for i in chosen)
        ids, mask = torch.zeros(2, len(chosen), longest, dtype=torch.long)
        for line, i in enumerate(chosen):
            own = rows[i][0]
            ids[line, : len(own)], mask[line, : len(own)] = torch.tensor(own), 1
        logits = model(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            use_cache=False,
            logits_to_keep=longest - first + 1,
        ).logits
        for line, i in enumerate(chosen):
            own, begin = rows[i]
            # Column 0 of the logits predicts token `first`.
            scored = logits[line, begin - first : len(own) - first].float()
            targets = torch.tensor(own[begin:], device=scored.device)[:, None]
            log_likelihoods = scored.gather(-1, targets)[:, 0] - scored.logsumexp(-1)
            found[i] = log_likelihoods.double().cpu()
    return found


def _perplexity(scores: Iterable[Tensor]) -> float:
    everything = torch.cat([torch.zeros(0, dtype=torch.float64), *scores])
    if not len(everything):
        raise ValueError("no token to score: all texts are empty")
    return math.exp(-everything.mean().item())
