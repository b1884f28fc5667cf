"""benchmarks/language.py end to end on a tiny model: every part, resumed and shared between shards."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import tiny_language_models
from actmaps.evaluation.language import concepts
from actmaps.pipelines import TextGenerationACTPipeline

FILE = Path(__file__).parents[1] / "benchmarks" / "language.py"
QUESTIONS = (
    "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
    "Adversarial,Nature,Is it day?,Yes,Yes; Sure,No; Never,none\n"
)


class EvenJudge:
    """Texts of an even number of letters are toxic, or about the concept."""

    threshold, accuracy = 0.5, 1.0

    def __call__(self, texts):
        return np.array([float(len(text) % 2 == 0) for text in texts])

    def word_share(self, texts):
        return float(self(texts).mean())


@pytest.fixture
def bench(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("language_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, spec.name, module)
    spec.loader.exec_module(module)
    tokens = tiny_language_models.tokenizer()
    folder = tmp_path / "model"
    TextGenerationACTPipeline(model=tiny_language_models.llama(tokens), tokenizer=tokens).save_pretrained(folder)
    prompts = [f"the {word} went to the awful {word} of it" for word in ("sun", "moon", "cat", "dog", "sea", "hill")]
    monkeypatch.setattr(module, "toxicity_prompts", lambda: prompts)
    monkeypatch.setattr(module, "split_prompts", lambda found, seed, fit: (found[:4], found[4:]))
    monkeypatch.setattr(module, "neutral_prose", lambda split: ["it rained all day", "nobody came"] * 8)
    monkeypatch.setattr(
        module, "toxicity_judges", lambda: dict.fromkeys(["profanity", "hatesonar", "word list"], EvenJudge())
    )
    monkeypatch.setattr(module, "word_list", lambda: frozenset({"awful"}))
    monkeypatch.setattr(concepts, "concept_judge", lambda *_: EvenJudge())
    monkeypatch.setattr(module, "TOXICITY", [module.MOMENTS[1], module.Setting("aura"), module.Setting("actadd", texts="moments"),
                                             module.Setting("repe", texts="moments")])  # fmt: skip
    monkeypatch.setattr(module, "SWEEP", (1.0,))
    monkeypatch.setattr(module, "CONCEPTS", [module.Setting("iti_c")])
    monkeypatch.setattr(module, "CONCEPT_STRENGTHS", {"multiplier": (1.0, 2.0)})
    monkeypatch.setattr(module, "TRUTHFULNESS", [module.Setting("mean", "last")])
    known = module.load_concepts()
    monkeypatch.setattr(module, "load_concepts", lambda: {"cat": known["cat"]})
    (tmp_path / "questions.csv").write_text(QUESTIONS)
    arguments = [
        "--output",
        tmp_path / "out",
        "--model",
        folder,
        "--limit",
        2,
        "--truthfulqa",
        tmp_path / "questions.csv",
    ]

    def run(*more):
        module.main([str(argument) for argument in [*arguments, "--threads", 1, "--fit-tokens", 200, *more]])
        return tmp_path / "out"

    return run


def stored(folder, part):
    return {row["row"]: row for row in json.loads((folder / f"{part}.json").read_text())["rows"]}


def test_every_part_is_measured_tabled_and_resumed(bench, capsys):
    pytest.importorskip("lm_eval", reason="needs lm-eval: make language")
    folder = bench()
    toxicity = stored(folder, "toxicity")
    assert list(toxicity)[:2] == ["unsteered", "asked in words"]
    assert toxicity["linear, last, at once, moments"]["strength"] > 0
    assert toxicity["linear, last, at once, moments"]["accuracy"] is not None
    assert {row["strength"] for row in json.loads((folder / "concepts.json").read_text())["rows"]} == {0, 1, 2, None}
    assert set(stored(folder, "truthfulness")) == {"unsteered", "asked in words", "mean, last"}
    assert [row["strength"] for row in json.loads((folder / "sweep.json").read_text())["rows"]][::2] == [0, 1]
    assert (folder / "concepts.png").is_file()
    assert (folder / "sweep.png").is_file()
    assert "Toxicity of" in capsys.readouterr().out
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*/*.json")}
    bench()
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*/*.json")}


def test_shards_share_the_work(bench):
    parts = ("--parts", "texts")
    folder = bench(*parts, "--shard", "0/2")
    assert len(list((folder / "texts").glob("*.json"))) == 1
    bench(*parts, "--shard", "1/2")
    assert len(list((folder / "texts").glob("*.json"))) == 2


def test_what_is_lacking_is_said(bench):
    with pytest.raises(SystemExit, match="has no texts to fit on yet: run with --parts texts first"):
        bench("--parts", "toxicity")
