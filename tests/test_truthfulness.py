"""TruthfulQA scores: likelihoods as a plain forward gives them, and what follows from them."""

import math

import pytest
import torch

import tiny_language_models
from actmaps.evaluation.language import truthfulness as module
from actmaps.evaluation.language.data import Question
from actmaps.evaluation.language.truthfulness import PRIMER, mc1, mc2, truthfulness
from actmaps.maps import ActMap, ActMapMetadata, AffineMap, steer

QUESTIONS = [
    Question("Who eats?", "a cat", ("a cat", "a cow", "cats and cows"), ("a car", "the moon")),
    Question("Is it so", "no", ("no",), ("yes", "yes, and always", "no, but yes.")),
    Question("Why", "why not", ("because",), ("blue",)),  # the best answer need not be among the correct ones
]
SHORT = "Q: one?\nA: two.\n\n"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_language_models.tokenizer()


@pytest.fixture(scope="module", params=["llama", "gemma"])
def model(request, tokenizer):
    return getattr(tiny_language_models, request.param)(tokenizer)


@pytest.fixture
def act_map(model):
    generator = torch.Generator().manual_seed(0)
    scale, shift = 1 + torch.rand(32, generator=generator), torch.randn(32, generator=generator)
    site = "model.model.layers.0.post_attention_layernorm"
    return ActMap({site: AffineMap(scale, shift)}, ActMapMetadata(name="truth"))


def plain(model, tokenizer, primer, question):
    """Log-likelihoods of all answers, each in one forward on its whole text, without any cache."""
    found = {}
    for answer in (question.best, *question.correct, *question.incorrect):
        context = f"{primer}Q: {question.question}\nA:"
        whole = tokenizer(f"{context} {answer.removesuffix('.')}.", return_tensors="pt").input_ids
        first = len(tokenizer(context).input_ids)
        with torch.no_grad():
            log_probabilities = model(input_ids=whole, use_cache=False).logits[0].log_softmax(-1)
        found[answer] = sum(
            log_probabilities[number - 1, whole[0, number]].item() for number in range(first, whole.shape[1])
        )
    return found


def scored(model, tokenizer, primer, questions, batch_size, monkeypatch):
    """The log-likelihoods that `truthfulness` works with, question by question."""
    seen = []
    monkeypatch.setattr(module, "mc1", lambda found, question: seen.append(found) or mc1(found, question))
    scores = truthfulness(model, tokenizer, questions, batch_size=batch_size, primer=primer, progress=False)
    return seen, scores


@pytest.mark.parametrize("batch_size", [16, 2])
@pytest.mark.parametrize("primer", ["", SHORT, PRIMER], ids=["no primer", "short", "standard"])
def test_cached_likelihoods_are_those_of_plain_forwards(model, tokenizer, primer, batch_size, monkeypatch):
    found, _ = scored(model, tokenizer, primer, QUESTIONS, batch_size, monkeypatch)
    for likelihoods, question in zip(found, QUESTIONS, strict=True):
        assert likelihoods == pytest.approx(plain(model, tokenizer, primer, question), abs=1e-4)


def test_they_are_so_under_steering_and_steering_changes_them(model, tokenizer, act_map, monkeypatch):
    unsteered, before = scored(model, tokenizer, SHORT, QUESTIONS, 16, monkeypatch)
    with steer({"model": model}, act_map):
        steered, after = scored(model, tokenizer, SHORT, QUESTIONS, 16, monkeypatch)
        for likelihoods, question in zip(steered, QUESTIONS, strict=True):
            assert likelihoods == pytest.approx(plain(model, tokenizer, SHORT, question), abs=1e-4)
    assert abs(unsteered[0]["a cat"] - steered[0]["a cat"]) > 0.1
    assert abs(before.mc2 - after.mc2) > 1e-3
    again, _ = scored(model, tokenizer, SHORT, QUESTIONS, 16, monkeypatch)
    assert again == unsteered


def test_scores_follow_from_the_likelihoods(model, tokenizer):
    scores = truthfulness(model, tokenizer, QUESTIONS, primer=SHORT, progress=False)
    wins, mass = [], []
    for question in QUESTIONS:
        found = plain(model, tokenizer, SHORT, question)
        wins.append(all(found[question.best] > found[answer] for answer in question.incorrect))
        correct = sum(math.exp(found[answer]) for answer in question.correct)
        mass.append(correct / (correct + sum(math.exp(found[answer]) for answer in question.incorrect)))
    assert scores.best_wins.tolist() == wins
    assert scores.mc1 == pytest.approx(sum(wins) / 3)
    assert scores.correct_mass == pytest.approx(mass, abs=1e-4)
    assert scores.mc2 == pytest.approx(sum(mass) / 3, abs=1e-4)
    variance = sum((m - sum(mass) / 3) ** 2 for m in mass) / 2
    assert scores.mc2_se == pytest.approx(math.sqrt(variance / 3), abs=1e-4)


def test_hand_computed_shares():
    question = Question("?", "a", ("a", "b"), ("c", "d"))
    likelihoods = {answer: math.log(p) for answer, p in {"a": 0.2, "b": 0.1, "c": 0.15, "d": 0.05}.items()}
    assert mc1(likelihoods, question)
    assert mc2(likelihoods, question) == pytest.approx(0.6)
    lower = {answer: value - 2000 for answer, value in likelihoods.items()}  # beyond the smallest double
    assert mc2(lower, question) == pytest.approx(0.6)
    assert not mc1(likelihoods | {"c": likelihoods["a"]}, question)  # a tie is no win


def test_the_primer_is_read_once_and_no_position_more_than_needed_gets_logits(tokenizer):
    model = tiny_language_models.llama(tokenizer)
    tokens, logits = [], []
    body = model.model.register_forward_hook(lambda _m, _args, output: tokens.append(output[0].shape[:2]))
    head = model.lm_head.register_forward_hook(lambda _m, _args, output: logits.append(output.shape[1]))
    truthfulness(model, tokenizer, QUESTIONS[:2], primer=SHORT, progress=False)
    body.remove(), head.remove()
    context = len(tokenizer(f"{SHORT}Q: Who eats?\nA:").input_ids)
    primer = len(tokenizer(SHORT + "Q: ").input_ids)
    assert tokens[:3] == [(1, primer), (1, context - primer - 1), (5, len(" cats and cows."))]
    # " a c" is shared by three answers; then "at.", "ow.", "ar.", " the moon." less its blank, " cats and cows." less its blank.
    distinct = {
        text[:end]
        for text in (" a cat.", " a cow.", " cats and cows.", " a car.", " the moon.")
        for end in range(len(text))
    }
    assert logits[:3] == [0, 0, len(distinct)]


def test_what_cannot_be_scored_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="no questions"):
        truthfulness(model, tokenizer, [])
    with pytest.raises(ValueError, match="'Why' has no incorrect answer"):
        truthfulness(model, tokenizer, [Question("Why", "a", ("a",), ())])
