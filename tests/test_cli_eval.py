"""`actmaps eval` on a tiny language model, with judges and texts that need no package."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import tiny_language_models
from actmaps import cli
from actmaps.evaluation.language import concepts, data, judges
from actmaps.pipelines import TextGenerationACTPipeline

PROSE = ["it rained all day", "nobody came"]
COMMANDS = ("toxicity", "concept", "truthfulness", "ability")


class VowelJudge:
    """Texts of an even number of bytes are toxic."""

    name, threshold, accuracy = "even", 0.5, 1.0

    def __call__(self, texts):
        return np.array([float(len(text) % 2 == 0) for text in texts])

    def word_share(self, texts):
        return 0.5


def run(*arguments, code=0):
    result = CliRunner(env={"COLUMNS": "220"}).invoke(cli.app, ["eval", *(str(argument) for argument in arguments)])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokens = tiny_language_models.tokenizer()
    TextGenerationACTPipeline(model=tiny_language_models.gemma(tokens), tokenizer=tokens).save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(
        "\n".join(
            f"{word} went to the awful sun"
            for word in [
                "sun",
                "seas",
                "cat",
                "dogs",
                "hill",
                "ways",
                "moon",
                "stars",
                "lake",
                "river",
                "tree",
                "bushes",
            ]
        )
    )
    return file


@pytest.fixture(autouse=True)
def without_packages(monkeypatch):
    monkeypatch.setattr(data, "neutral_prose", lambda _split: PROSE)
    monkeypatch.setattr(data, "word_list", lambda: frozenset({"awful"}))
    monkeypatch.setattr(judges, "toxicity_judges", lambda: {"even": VowelJudge()})
    monkeypatch.setattr(concepts, "concept_judge", lambda _concept, _neutral: VowelJudge())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command):
    assert f"$ actmaps eval {command}" in run(command, "--help")


def test_toxicity_is_tabled_stored_and_drawn(model, prompts, tmp_path):
    files = tmp_path / "found.json", tmp_path / "found.png"
    options = ("--strengths", "0,1", "--seeds", "0,1", "--tokens", 4, "--json", files[0], "--plot", files[1])
    text = run("toxicity", "--model", model, "--prompts", prompts, *options)
    assert all(label in text for label in ("unsteered", "strength 1", "asked in words", "toxic: even"))
    stored = json.loads(files[0].read_text())
    assert [row["strength"] for row in stored["rows"]] == [0, 1, None]
    assert stored["rows"][0]["share.even"] == np.mean(stored["rows"][0]["seeds.even"])
    assert stored["rows"][0]["perplexity"] != stored["rows"][1]["perplexity"]
    assert Image.open(files[1]).size == (1120, 420)


def test_maps_against_toxicity_may_be_fitted_on_whole_texts(model, prompts, monkeypatch):
    seen = []
    fit = TextGenerationACTPipeline.fit_act_map
    monkeypatch.setattr(
        TextGenerationACTPipeline, "fit_act_map", lambda self, *a, **k: seen.append(fit(self, *a, **k)) or seen[-1]
    )
    for more in ((), ("--whole",), ("--pooling", "mean")):
        run(
            "toxicity", "-m", model, "--prompts", prompts, "--strengths", "0", "--tokens", 3, "--method", "mean", *more
        )
    modes = [(found.metadata.pooling, found.metadata.causal) for found in seen]
    assert modes == [("last", False), ("none", True), ("mean", False)]


def test_a_map_from_a_file_is_measured(model, tmp_path, prompts):
    pipe = TextGenerationACTPipeline.from_pretrained(str(model), device="cpu")
    pipe.fit_act_map(["cold"], ["warm"], name="warm", method="mean", progress=False).save(
        tmp_path / "warm.safetensors"
    )
    text = run("toxicity", "-m", model, "--map", tmp_path / "warm.safetensors", "--prompts", prompts, "--tokens", 2)
    assert "Fitting on" not in text
    assert "strength 0.25" in text


def test_a_map_is_fitted_on_ones_own_texts(model, tmp_path, prompts):
    source, target = tmp_path / "source.txt", tmp_path / "target.txt"
    source.write_text("cold\nfrosty\n")
    target.write_text("warm\nmild\nhot\n")
    options = ("--method", "mean", "--sites", "post_norms", "--strengths", "1", "--tokens", 2)
    text = run("toxicity", "-m", model, "--source", source, "--target", target, "--prompts", prompts, *options)
    assert "Fitting on 2 source and 3 target texts" in text


def test_concepts_are_induced(model, tmp_path):
    options = ("--concept", "cat", "--strengths", "0,1", "--limit", 3, "--tokens", 3, "--json", tmp_path / "cat.json")
    text = run("concept", "-m", model, *options)
    assert "Fitting on 200 source and 60 target texts" in text
    assert [row["word_share"] for row in json.loads((tmp_path / "cat.json").read_text())["rows"]] == [0.5] * 3


def test_truthfulness_is_asked_of_the_questions_file(model, tmp_path):
    questions = tmp_path / "questions.csv"
    questions.write_text(
        "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
        "Adversarial,Nature,Is it day?,Yes,Yes; Sure,No; Never,none\n"
    )
    text = run("truthfulness", "-m", model, "--questions", questions, "--strengths", "0,1", "--method", "mean")
    assert all(word in text for word in ("MC1", "MC2", "unsteered", "asked in words"))


def test_ability_needs_a_map(model, tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm-eval: make language")
    pipe = TextGenerationACTPipeline.from_pretrained(str(model), device="cpu")
    pipe.fit_act_map(["cold"], ["warm"], name="warm", method="mean", progress=False).save(
        tmp_path / "warm.safetensors"
    )
    text = run("ability", "-m", model, "--map", tmp_path / "warm.safetensors", "--strengths", "0,1", "--limit", 4)
    assert all(word in text for word in ("accuracy", "perplexity", "unsteered", "strength 1"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--source", "a.txt"), "give both --source and --target, or neither"),
        (("--strengths", "much"), "every strength must be a number, got 'much'"),
        (("--map", "absent.safetensors"), "there is no act map file absent.safetensors"),
        (("--plot", "plot.doc"), "'plot.doc' has no ending of a picture file"),
    ],
)
def test_mistakes_are_one_line(model, prompts, arguments, message):
    text = run("toxicity", "-m", model, "--prompts", prompts, *arguments, code=1)
    assert text.strip().splitlines()[-1].startswith(f"error: {message}")


def test_unknown_concepts_are_answered_with_the_known_ones(model):
    assert "there is no concept 'sea'; there are football, cloud" in run(
        "concept", "-m", model, "--concept", "sea", code=1
    )
