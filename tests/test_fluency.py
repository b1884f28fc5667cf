"""Perplexity against a naive loop, and counts of n-grams against hand counts."""

import math

import pytest
import torch

import tiny_language_models
from actmaps.evaluation.language.fluency import (
    answer_log_likelihoods,
    continuation_perplexity,
    distinct_n,
    perplexity,
    repetition,
    self_bleu,
)

TEXTS = ["the cat sat on the mat", "a dog", "it rains and rains in spain, mostly on the plain"]
PROMPTS = ["the cat", "a dog that barks", "it"]
CONTINUATIONS = [" sat on the mat", " bites", " rains"]


@pytest.fixture(scope="module", params=["llama", "gemma"])
def model(request):
    return getattr(tiny_language_models, request.param)(tiny_language_models.tokenizer())


@pytest.fixture
def tokenizer():
    return tiny_language_models.tokenizer()


def naive_log_likelihoods(model, ids, begin=1):
    """log p(ids[t] | ids[:t]) for t >= begin, one forward pass per token and no padding."""
    return [
        model(torch.tensor([ids[:t]])).logits[0, -1].double().log_softmax(-1)[ids[t]].item()
        for t in range(begin, len(ids))
    ]


def naive_perplexity(scores):
    return math.exp(-sum(scores) / len(scores))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("side", ["left", "right"])
def test_perplexity_weighs_every_token_alike_whatever_the_batches_and_the_padding_side(
    model, tokenizer, side, batch_size
):
    tokenizer.padding_side = side
    scores = [score for text in TEXTS for score in naive_log_likelihoods(model, tokenizer(text).input_ids)]
    assert len(scores) == sum(map(len, TEXTS))  # <bos> begins each text, and is not scored
    found = perplexity(model, tokenizer, TEXTS, batch_size=batch_size)
    assert found == pytest.approx(naive_perplexity(scores), rel=1e-5)


def test_perplexity_reads_max_length_tokens(model, tokenizer):
    scores = [score for text in TEXTS for score in naive_log_likelihoods(model, tokenizer(text).input_ids[:7])]
    assert perplexity(model, tokenizer, TEXTS, max_length=7) == pytest.approx(naive_perplexity(scores), rel=1e-5)


def test_a_tokenizer_that_adds_no_bos_gets_none(model):
    plain = tiny_language_models.tokenizer(adds_bos=False)
    ids = plain("the cat").input_ids
    assert len(ids) == len("the cat")
    expected = naive_perplexity(naive_log_likelihoods(model, ids))
    assert perplexity(model, plain, ["the cat"]) == pytest.approx(expected, rel=1e-5)


def test_bos_written_by_a_chat_template_is_not_doubled(model, tokenizer):
    templated = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_dict=True)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    expected = naive_perplexity(naive_log_likelihoods(model, ids))
    assert perplexity(model, tokenizer, [templated]) == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_a_uniform_model_is_the_size_of_its_vocabulary(tokenizer):
    model = tiny_language_models.llama(tokenizer)
    model.lm_head.weight.zero_()
    assert perplexity(model, tokenizer, TEXTS) == pytest.approx(len(tokenizer), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_continuation_perplexity_scores_no_token_of_the_prompts(model, tokenizer, batch_size):
    scores = []
    for prompt, continuation in zip(PROMPTS, CONTINUATIONS, strict=True):
        own = naive_log_likelihoods(model, tokenizer(prompt + continuation).input_ids, begin=1 + len(prompt))
        assert len(own) == len(continuation)
        scores += own
    found = continuation_perplexity(model, tokenizer, PROMPTS, CONTINUATIONS, batch_size=batch_size)
    assert found == pytest.approx(naive_perplexity(scores), rel=1e-5)


def test_empty_continuations_count_for_nothing(model, tokenizer):
    alone = continuation_perplexity(model, tokenizer, PROMPTS[:1], CONTINUATIONS[:1])
    assert continuation_perplexity(model, tokenizer, PROMPTS[:2], [CONTINUATIONS[0], ""]) == pytest.approx(alone)


def test_answers_are_summed_and_counted_in_the_order_given(model, tokenizer):
    sums, counts = answer_log_likelihoods(model, tokenizer, PROMPTS, CONTINUATIONS, batch_size=2)
    expected = [
        sum(naive_log_likelihoods(model, tokenizer(prompt + answer).input_ids, begin=1 + len(prompt)))
        for prompt, answer in zip(PROMPTS, CONTINUATIONS, strict=True)
    ]
    torch.testing.assert_close(sums, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    assert counts.tolist() == [len(answer) for answer in CONTINUATIONS]


def test_a_token_across_the_border_belongs_to_the_answer(tokenizer):
    tokenizer.add_tokens(["ts"])
    model = tiny_language_models.llama(tokenizer)
    ids = tokenizer("the cats sit").input_ids
    assert ids[-5] == len(tokenizer) - 1  # "ts" is one token, of which the prompt has the "t"
    sums, counts = answer_log_likelihoods(model, tokenizer, ["the cat"], ["s sit"])
    assert counts.tolist() == [5]
    assert sums.item() == pytest.approx(sum(naive_log_likelihoods(model, ids, begin=len(ids) - 5)), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: perplexity(m, t, "a text"), "one string"),
        (lambda m, t: perplexity(m, t, [""]), "no token to score"),
        (lambda m, t: continuation_perplexity(m, t, ["a"], [""]), "no token to score"),
        (lambda m, t: continuation_perplexity(m, t, ["a", "b"], ["c"]), "2 prompts but 1 continuations"),
        (lambda m, t: answer_log_likelihoods(m, t, ["a", "b"], ["c", ""]), "answer 1, '', has no token"),
        (lambda m, t: self_bleu(["alone", " "]), "1 texts with words"),
    ],
)
def test_what_cannot_be_scored_is_named(model, tokenizer, call, message):
    with pytest.raises(ValueError, match=message):
        call(model, tokenizer)


def test_distinct_n_counts_over_all_texts():
    assert distinct_n(["a b a b", "A b"], 1) == 2 / 6
    assert distinct_n(["a b a b", "a c"], 2) == 3 / 4  # ab, ba, ab, ac
    assert math.isnan(distinct_n(["a", ""], 2))


def test_repetition_counts_within_each_text():
    assert repetition(["one two three four", "one two three four"]) == 0
    assert repetition(["no no no no no"]) == pytest.approx(2 / 3)  # three times "no no no", of which two repeat
    assert repetition(["no no no no no", "one two three"]) == 2 / 4
    assert math.isnan(repetition(["too short"]))


def test_self_bleu_of_equal_texts_is_1_and_of_unrelated_ones_0():
    assert self_bleu(["one two three four five"] * 3) == pytest.approx(1)
    assert self_bleu(["one two three four", "five six seven eight"]) == 0


def test_self_bleu_by_hand():
    """Bigrams: precisions 2/3 and 1/2 for the first; 2/4 and 1/3 for the second; the first is shorter by a word."""
    first, second = "a b c", "a b d e"
    expected = (math.exp(1 - 4 / 3) * math.sqrt(2 / 3 * 1 / 2) + math.sqrt(2 / 4 * 1 / 3)) / 2
    assert self_bleu([first, second], n=2) == pytest.approx(expected)


def test_self_bleu_equals_that_of_nltk():
    bleu = pytest.importorskip("nltk.translate.bleu_score", reason="compares with nltk: pip install nltk")
    texts = [*TEXTS, "the cat sat on a dog", "the plain in spain", "rains on the cat , and the cat sat on the mat"]
    words = [text.replace(",", " ,").split() for text in texts]
    smooth = bleu.SmoothingFunction(epsilon=0.1).method1
    expected = [
        bleu.sentence_bleu(words[:i] + words[i + 1 :], own, smoothing_function=smooth) for i, own in enumerate(words)
    ]
    assert self_bleu(texts) == pytest.approx(sum(expected) / len(expected))


def test_self_bleu_of_a_sample_depends_on_the_seed_alone():
    texts = [f"number {i} and {i % 3} of them" for i in range(30)]
    assert self_bleu(texts, sample=5, seed=1) == self_bleu(texts, sample=5, seed=1)
    assert self_bleu(texts, sample=5, seed=1) != self_bleu(texts, sample=5, seed=2)
    assert self_bleu(texts, sample=30) == self_bleu(texts)
