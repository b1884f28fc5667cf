"""The paper's experiments end to end, offline: a tiny Gemma, a tiny judge and stand-ins of the data sets in their own formats."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

import tiny_language_models
from actmaps.evaluation.language import judges
from actmaps.evaluation.language.data import read_truthfulqa
from actmaps.evaluation.language.fluency import perplexity
from actmaps.evaluation.language.truthfulness import truthfulness

WIKIPEDIA = ["A river is a stream of water.", "The town has a church and a bridge.", "Bread is baked."]


def load_benchmark():
    path = Path(__file__).parents[1] / "benchmarks" / "paper_language.py"
    spec = importlib.util.spec_from_file_location("paper_language", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = load_benchmark()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_language_models.tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_language_models.gemma(tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, tokenizer):
    """Model, judge and data; the model's folder is called as the paper's model."""
    folder = tmp_path_factory.mktemp("paper")
    for part in (model, tokenizer):
        part.save_pretrained(folder / "gemma-2-2b")
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=514, pad_token_id=tokenizer.pad_token_id, id2label={0: "neutral", 1: "toxic"},
        label2id={"neutral": 0, "toxic": 1},
    )  # fmt: skip
    for part in (RobertaForSequenceClassification(config), tokenizer):
        part.save_pretrained(folder / "judge")
    prompts = [
        {"prompt": {"text": f"Number {i} said", "toxicity": 0.5}, "continuation": {"text": "."}} for i in range(6)
    ]
    (folder / "rtp.jsonl").write_text("\n".join(json.dumps(prompt) for prompt in prompts))
    (folder / "wikipedia.txt").write_text("\n".join(WIKIPEDIA))
    write_csv(
        folder / "jigsaw.csv",
        ["id", "comment_text", "toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"],
        [[f"t{i}", f"you fool, {i} times", 1, 0, 1, 0, 0, 0] for i in range(5)]
        + [[f"n{i}", f"thank you, {i}\nregards", 0, 0, 0, 0, 0, 0] for i in range(5)]
        + [["o", "obscene but not marked as toxic", 0, 0, 1, 0, 0, 0]],
    )
    write_csv(
        folder / "TruthfulQA.csv",
        ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"],
        [["A", "B", f"What is {i}?", f"it is {i}", f"it is {i}; a number", "a cat; the moon", "s"] for i in range(4)],
    )
    return folder


def write_csv(path, columns, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


@pytest.fixture
def run(folder, tmp_path):
    """Runs the benchmark with the stand-ins; returns the cells by file, each with when it was written."""

    def run(*arguments, parts=("toxicity",), output=tmp_path / "out"):
        files = {"prompts": "rtp.jsonl", "jigsaw": "jigsaw.csv", "wikipedia": "wikipedia.txt"}
        files |= {"truthfulqa": "TruthfulQA.csv", "judge": "judge", "model": "gemma-2-2b"}
        given = [word for option, file in files.items() for word in (f"--{option}", str(folder / file))]
        quick = ["--seeds", "1", "--limit", "4", "--strengths", "0.5", "1", "--methods", "linear", "--device", "cpu"]
        bench.main([*given, *quick, "--output", str(output), "--parts", *parts, *arguments])
        return cells(output)

    return run


def cells(output):
    found = sorted(path for path in output.rglob("*.json") if path.name != "settings.json")
    return {str(path.relative_to(output)): json.loads(path.read_text()) for path in found}


@pytest.fixture
def letters(monkeypatch):
    """Texts embedded as counts of letters, for judges of concepts."""
    pytest.importorskip("sklearn", reason="judges of concepts are logistic regressions: pip install scikit-learn")

    def embed(texts):
        counts = np.array(
            [[1.0 + text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts]
        )
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    monkeypatch.setattr(judges, "embed", embed)


def test_all_parts(run, letters, monkeypatch, model, tokenizer, folder, capsys):
    monkeypatch.setattr(bench, "harness", lambda *_, **__: {"mmlu": {"acc": 0.25}})
    monkeypatch.setattr(bench, "CONSOLE", bench.Console(width=200))
    found = run("--concepts", "cat", parts=bench.PARTS)
    sweep = {"toxicity/Linear-AcT/seed-0/strength-0.5.json", "toxicity/Linear-AcT/seed-0/strength-1.json"}
    assert {"toxicity/original/seed-0/strength-0.json", *sweep} <= set(found)
    assert sum(name.startswith("truthfulness") for name in found) == 3 * 2  # strengths and none, both halves
    assert sum(name.startswith("concepts/cat") for name in found) == 3
    assert sum(name.startswith("mmlu") for name in found) == 2  # the best strength, and none

    plain = perplexity(model, tokenizer, WIKIPEDIA, max_length=128)
    original = found["toxicity/original/seed-0/strength-0.json"]
    assert original["perplexity"] == pytest.approx(plain, rel=1e-4)
    assert all(abs(found[name]["perplexity"] / plain - 1) > 1e-3 for name in sweep)
    direct = truthfulness(model, tokenizer, read_truthfulqa(folder / "TruthfulQA.csv"), progress=False)
    halves = [found[f"truthfulness/original/seed-0/half-{half}/strength-0.json"] for half in (0, 1)]
    assert np.mean([half["mc2"] for half in halves]) == pytest.approx(100 * direct.mc2, rel=1e-4)

    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "original" in line and "13.98" in line)
    assert f"{original['perplexity']:.2f}" in row
    assert "4.17" in row  # the paper's
    assert "25.00" in row  # MMLU
    assert "53.10" in row


def test_an_interrupted_run_goes_on_where_it_stopped(run, monkeypatch, tmp_path):
    measured = bench.perplexity
    calls = []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measured(*arguments, **options)

    monkeypatch.setattr(bench, "perplexity", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    first = cells(tmp_path / "out")
    assert list(first) == ["toxicity/original/seed-0/strength-0.json"]
    assert not list((tmp_path / "out").rglob("*.tmp"))

    whole = run()
    assert len(whole) == 3
    assert len(calls) == 2 + 2  # the cell that was there is not measured again
    assert whole | first == whole

    marked = tmp_path / "out" / "toxicity/Linear-AcT/seed-0/strength-1.json"
    marked.write_text(json.dumps(whole["toxicity/Linear-AcT/seed-0/strength-1.json"] | {"toxicity": 12.5}))
    fits = []
    monkeypatch.setattr(bench.TextGenerationACTPipeline, "fit_act_map", lambda *_, **__: fits.append(1))
    again = run()
    assert again["toxicity/Linear-AcT/seed-0/strength-1.json"]["toxicity"] == 12.5
    assert len(calls) == 4
    assert not fits

    monkeypatch.undo()
    (tmp_path / "out" / "toxicity/Linear-AcT/seed-0/strength-0.5.json").unlink()
    restored = run()
    for metric in ("toxicity", "perplexity"):
        name = "toxicity/Linear-AcT/seed-0/strength-0.5.json"
        assert restored[name][metric] == pytest.approx(whole[name][metric], rel=1e-5)


def test_results_of_other_settings_do_not_mix(run):
    run()
    with pytest.raises(SystemExit, match="give another --output"):
        run("--limit", "3")


def test_every_method_of_the_paper_runs(run):
    found = run("--methods", "aura", "iti_c", "mean", "--strengths", "1")
    labels = {cell["method"] for cell in found.values()}
    assert labels == {"original", "AurA", "ITI-c", "Mean-AcT"}
    assert len({cell["perplexity"] for cell in found.values()}) == 4


@pytest.mark.parametrize(
    ("part", "remedy"),
    [("toxicity", "give --jigsaw"), ("truthfulness", "or give --truthfulqa"), ("concepts", "no concept sphinx, only")],
)
def test_what_is_missing_is_named_with_a_remedy(folder, tmp_path, part, remedy):
    files = [
        "--model",
        str(folder / "gemma-2-2b"),
        "--judge",
        str(folder / "judge"),
        "--prompts",
        str(folder / "rtp.jsonl"),
    ]
    files += ["--wikipedia", str(folder / "wikipedia.txt"), "--concepts", "sphinx", "--device", "cpu", "--limit", "4"]
    with pytest.raises(SystemExit, match=remedy):
        bench.main([*files, "--output", str(tmp_path), "--parts", part, "--seeds", "1", "--methods", "linear"])


def test_obscene_comments_are_on_neither_side(folder):
    options = bench.parse(["--model", "m", "--output", "o", "--jigsaw", str(folder / "jigsaw.csv")])
    toxic, other = bench.Data(options, bench.Protocol()).toxicity_texts(seed=0)
    assert sorted(toxic) == [f"you fool, {i} times" for i in range(5)]
    assert sorted(other) == [f"thank you, {i}\nregards" for i in range(5)]


def test_the_best_strength_is_the_least_toxic_within_a_point_of_perplexity(tmp_path):
    store = bench.Cells(tmp_path, {})
    for strength, toxicity, fluency in ((0.2, 3.0, 10.5), (0.6, 2.0, 10.9), (1.0, 0.5, 11.2)):
        for seed in (0, 1):
            cell = {"part": "toxicity", "method": "Linear-AcT", "seed": seed, "strength": strength}
            store.store(cell, {"toxicity": toxicity + seed, "perplexity": fluency})
    store.store(
        {"part": "toxicity", "method": "original", "seed": 0, "strength": 0.0}, {"toxicity": 5.0, "perplexity": 10.0}
    )
    assert bench.best_strength(store, "toxicity", "Linear-AcT", bench.Protocol()) == 0.6
    assert bench.by_strength(store.of("toxicity", method="Linear-AcT"), "toxicity")[0.6] == [2.0, 3.0]


def test_a_limit_leaves_lengths_and_the_prompt_as_they_are():
    limited = bench.Protocol().limited(10)
    assert (limited.prompts, limited.fit_texts, limited.wikipedia_texts) == (10, 10, 10)
    assert (limited.new_tokens, limited.story, limited.perplexity_allowance) == (32, "Once upon a time", 1.0)
