"""Multiple-choice accuracy through lm-eval, on models whose answers are known beforehand."""

import json
import math
import sys

import pytest
import torch

import tiny_language_models
from actmaps.evaluation.language.ability import harness, multiple_choice, read_questions
from actmaps.maps import ActMap, ActMapMetadata, AffineMap, steer

ROWS = [
    {"question": "Which is it?", "choices": ["a cat", "a dog", "no animal"], "answer": 1},
    {"question": "And which here?", "choices": ["both of them", "one"], "answer": 0},
    {"question": "Is {{ this }} read as it stands?", "choices": ["yes", "no"], "answer": 1},
]


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval", reason="accuracy is measured with lm-eval: pip install lm_eval")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_language_models.tokenizer()


@pytest.fixture(scope="module", params=["llama", "gemma"])
def model(request, tokenizer):
    return getattr(tiny_language_models, request.param)(tokenizer)


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    return path


def log_likelihoods(model, tokenizer, row):
    """Of each choice behind the question, by one plain forward each."""
    context = f"Question: {row['question']}\nAnswer:"
    first = len(tokenizer(context).input_ids)
    sums = []
    for choice in row["choices"]:
        ids = tokenizer(f"{context} {choice}", return_tensors="pt").input_ids
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0].log_softmax(-1)
        sums.append(scores[:-1].gather(-1, ids[0, 1:, None])[first - 1 :].sum().item())
    return sums


def expected(model, tokenizer):
    """Shares of right answers, by likelihood and by likelihood per character."""
    plain, normalised = [], []
    for row in ROWS:
        sums = log_likelihoods(model, tokenizer, row)
        rates = [total / len(choice) for total, choice in zip(sums, row["choices"], strict=True)]
        plain.append(sums.index(max(sums)) == row["answer"])
        normalised.append(rates.index(max(rates)) == row["answer"])
    return sum(plain) / len(ROWS), sum(normalised) / len(ROWS)


def test_accuracy_is_that_of_the_likelihoods(lm_eval, model, tokenizer, questions):
    scores = multiple_choice(model, tokenizer, questions)
    assert (scores.accuracy, scores.normalised) == pytest.approx(expected(model, tokenizer))
    assert scores.questions == 3
    share = scores.accuracy
    assert scores.accuracy_se == pytest.approx(math.sqrt(share * (1 - share) / 2))


def test_it_is_that_of_the_steered_model(lm_eval, tokenizer, questions):
    model = tiny_language_models.llama(tokenizer)
    # Maps far from the identity, until one changes an answer.
    before = expected(model, tokenizer)
    for seed in range(20):
        shift = 3 * torch.randn(32, generator=torch.Generator().manual_seed(seed))
        act_map = ActMap({"model.model.norm": AffineMap(torch.ones(32), shift)}, ActMapMetadata(name="shove"))
        with steer({"model": model}, act_map):
            if (wanted := expected(model, tokenizer)) == before:
                continue
            scores = multiple_choice(model, tokenizer, questions)
        assert (scores.accuracy, scores.normalised) == pytest.approx(wanted)
        return
    raise AssertionError("no map changed an answer")


def test_limit_asks_the_first_questions(lm_eval, tokenizer, questions):
    scores = multiple_choice(tiny_language_models.llama(tokenizer), tokenizer, questions, limit=1)
    assert scores.questions == 1
    assert math.isnan(scores.accuracy_se)


def test_the_global_generators_stay_as_they_are(lm_eval, tokenizer, questions):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    multiple_choice(tiny_language_models.llama(tokenizer), tokenizer, questions, limit=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_packages_own_questions_can_be_read():
    from actmaps.evaluation.language.ability import _QUESTIONS

    questions = read_questions(_QUESTIONS.read_text(encoding="utf-8"), "questions.jsonl")
    assert len(questions) >= 50
    assert all(len(set(row["choices"])) == len(row["choices"]) >= 2 for row in questions)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "?", "choices": ["a", "b"]}', "line 2: expected a JSON object .*'answer'"),
        ('{"question": "?", "choices": ["a", "b"], "answer": 2}', "line 2: answer is 2, expected 0 to 1"),
        ("not JSON", "line 2: expected a JSON object"),
    ],
)
def test_a_bad_line_is_named(line, message):
    with pytest.raises(ValueError, match=message):
        read_questions(f"{json.dumps(ROWS[0])}\n{line}", "mine.jsonl")
    with pytest.raises(ValueError, match=r"mine.jsonl has no questions"):
        read_questions("\n", "mine.jsonl")


def test_harness_says_what_it_lacks(lm_eval, tokenizer, monkeypatch):
    model = tiny_language_models.llama(tokenizer)
    with pytest.raises(ValueError, match="no task 'mmlooo'"):
        harness(model, tokenizer, ["mmlooo"])
    import datasets

    def no_network(*_, **__):
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(ConnectionError, match=r"arc_easy is neither in the cache .* bring the cache along"):
        harness(model, tokenizer, ["arc_easy"])


def test_harness_runs_a_named_task_on_the_model(lm_eval, tokenizer, monkeypatch):
    import datasets

    rows = [
        {"question": r["question"], "choices": {"text": r["choices"], "label": ["A", "B", "C"][: len(r["choices"])]}}
        | {"answerKey": "ABC"[r["answer"]]}
        for r in ROWS
    ]
    stand_in = datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_list(rows)))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stand_in)
    model = tiny_language_models.llama(tokenizer)
    found = harness(model, tokenizer, ["arc_easy"], num_fewshot=0)
    assert found["arc_easy"]["acc"] == pytest.approx(expected(model, tokenizer)[0])


def test_without_lm_eval_it_says_what_to_install(tokenizer, questions, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(ImportError, match="pip install lm_eval"):
        multiple_choice(None, tokenizer, questions)
