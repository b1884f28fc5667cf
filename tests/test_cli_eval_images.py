"""`actmaps eval images` on a tiny pipeline, judged by a tiny CLIP."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from typer.testing import CliRunner

import tiny_clip
import tiny_models
from actmaps import cli
from actmaps.evaluation.clip import ClipJudge
from actmaps.evaluation.images import Sampling, draw
from actmaps.maps import ActMap, ActMapMetadata, AffineMap
from actmaps.pipelines import StableDiffusionACTPipeline

SUBJECTS = ["cat", "dog", "tree", "boat", "house"]
STYLE = """
name = "ink"
kind = "style"
description = "Ink."
licence = "Apache-2.0"
subjects = ["cat", "dog", "tree", "boat", "house"]
[source]
templates = ["{subject}"]
[target]
templates = ["{subject}, {tags}"]
tags = ["ink", "wash"]
random_tags = 1
"""
NEGATION = """
name = "no-hat"
kind = "negation"
description = "Hats go."
licence = "Apache-2.0"
subjects = ["cat", "dog", "tree", "boat", "house"]
[source]
templates = ["{subject} with {tags}"]
tags = ["a hat"]
[target]
templates = ["{subject}"]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of the pipeline and of the judge."""
    folder = tmp_path_factory.mktemp("models")
    StableDiffusionPipeline(**tiny_models.components()).save_pretrained(folder / "pipeline")
    return folder / "pipeline", tiny_clip.save_clip(folder / "clip")


@pytest.fixture
def run(models, tmp_path):
    (tmp_path / "ink.toml").write_text(STYLE)
    (tmp_path / "no-hat.toml").write_text(NEGATION)

    def run(*arguments, code=0):
        quick = ("--steps", "2", "--device", "cpu", "--output", tmp_path / "out")
        options = ("--model", models[0], "--clip", models[1], *quick, *arguments)
        result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["eval", "images", *map(str, options)])
        assert result.exit_code == code, result.output
        return result.output

    return run


def rows_of(tmp_path):
    return json.loads((tmp_path / "out" / "figures.json").read_text())["rows"]


def save_map(path, shift, **metadata):
    by = torch.zeros(16)
    by[0] = shift
    data = ActMapMetadata(name=path.stem, rows="both", **metadata)
    ActMap({"unet.conv_norm_out": AffineMap(torch.ones(16), by)}, data).save(path)
    return path


def test_a_style_is_fitted_and_judged_on_other_subjects(run, tmp_path, models):
    text = run("--preset", tmp_path / "ink.toml", "--count", "2", "--fit-count", "3", "--strengths", "0,0.5,1")
    assert "Fitting on 3 pairs of prompts" in text
    assert all(label in text for label in ("unsteered", "strength 0.5", "“ink” in the prompt", "image similarity"))
    stored = json.loads((tmp_path / "out" / "figures.json").read_text())
    rows = stored["rows"]
    assert [row["strength"] for row in rows] == [0, 0.5, 1, None]

    pipe = StableDiffusionACTPipeline.from_pretrained(models[0])
    pipe.set_progress_bar_config(disable=True)
    act_map = ActMap.load(tmp_path / "out" / "ink.safetensors")
    assert act_map.metadata.n_source == 3
    pipe.load_act_map(act_map)
    judge, sampling = ClipJudge.from_pretrained(models[1], "cpu"), Sampling(2, None, 10_000, 8)
    subjects = stored["about"]["prompts"]
    plain, steered, asked = (
        judge.embed_images(draw(pipe, prompts, sampling, act_strength=strength))
        for prompts, strength in ((subjects, 0.0), (subjects, 1.0), ([f"{subject}, ink" for subject in subjects], 0.0))
    )
    for row, seen in ((rows[0], plain), (rows[2], steered), (rows[3], asked)):
        assert row["clip_score"] == pytest.approx(float(judge.clip_score(seen, subjects).mean()), abs=1e-4)
        assert row["probability"] == pytest.approx(float(judge.probability(seen, "ink").mean()), abs=1e-4)
    assert rows[2]["image_similarity"] < rows[0]["image_similarity"] == pytest.approx(1)


def test_pictures_are_written(run, tmp_path):
    run("--preset", tmp_path / "ink.toml", "--count", "2", "--strengths", "1")
    with Image.open(tmp_path / "out" / "grid.png") as grid, Image.open(tmp_path / "out" / "plot.png") as plot:
        assert grid.width > 3 * 160
        assert grid.height > 2 * 160
        assert plot.size == (80 + 3 * 520, 420)


def test_a_negation_has_a_negative_prompt_beside_it_where_guidance_is_used(run, tmp_path):
    options = ("--preset", tmp_path / "no-hat.toml", "--count", "2", "--strengths", "1")
    text = run(*options)
    assert "“a hat” as negative prompt" in text
    assert "without it in the prompt" in text
    without = run(*options, "--guidance-scale", "1")
    assert "as negative prompt" not in without
    assert "Without classifier-free guidance there is no negative prompt" in without


def test_maps_are_measured_one_after_another(run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a boat\na lake\na hill\n")
    files = [save_map(tmp_path / f"{name}.safetensors", shift) for name, shift in (("weak", 0.1), ("strong", 3.0))]
    options = ("--prompts", prompts, "--concept", "ink", "--strengths", "0,1", "--count", "2")
    text = run("--map", files[0], "--map", files[1], *options)
    assert all(label in text for label in ("strength 1 weak", "strength 1 strong", "“ink” in the prompt"))
    rows = rows_of(tmp_path)
    assert [(row["map"], row["strength"]) for row in rows] == [(None, 0), ("weak", 1), ("strong", 1), (None, None)]
    assert rows[2]["image_similarity"] < rows[1]["image_similarity"]


def test_the_preset_of_a_map_says_what_it_does(run, tmp_path):
    file = save_map(tmp_path / "hats.safetensors", 1.0, presets=(str(tmp_path / "no-hat.toml"),))
    text = run("--map", file, "--strengths", "1", "--count", "1")
    assert "“a hat” as negative prompt" in text
    assert "Fitting" not in text
    assert "on some of which the map may have been fitted" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --map, or --preset to fit a map on"),
        (("--map", "plain.safetensors"), "the maps do not tell one preset that they were fitted on; say by --concept"),
        (
            ("--map", "plain.safetensors", "--concept", "ink"),
            "this map comes with no list of subjects; give --prompts",
        ),
        (
            ("--preset", "ink.toml", "--count", "5"),
            "preset 'ink' has 5 subjects, none is left to fit on; lower --count",
        ),
        (("--preset", "ink.toml", "--strengths", "much"), "every strength must be a number, got 'much'"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    save_map(tmp_path / "plain.safetensors", 1.0)
    assert run(*arguments, code=1).strip().splitlines()[-1].startswith(f"error: {message}")


def test_help_has_examples(run):
    assert "$ actmaps eval images" in run("--help")
