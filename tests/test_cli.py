"""The command line, on a tiny real pipeline where a model is needed."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import tiny_language_models
import tiny_models
from actmaps import __version__, cli, cli_options
from actmaps.demo import dataset
from actmaps.demo.model import WEIGHTS
from actmaps.maps import ActMap, ActMapMetadata, AffineMap, presets
from actmaps.maps.presets import BUILT_IN, load_preset
from actmaps.pipelines import StableDiffusionACTPipeline, TextGenerationACTPipeline

NORM_OUT = "unet.conv_norm_out"
COMMANDS = ("demo", "fit", "sweep", "generate", "inspect", "blend", "push", "export", "presets")


def run(*arguments, code=0):
    """What a command prints, on both channels."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    StableDiffusionPipeline(**tiny_models.components()).save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    source, target = tmp_path / "source.txt", tmp_path / "target.txt"
    source.write_text("a cat\na dog\n\na tree\n")
    target.write_text("a cat, ink\na dog, ink\na tree, ink\n")
    return "--source", source, "--target", target


def save_map(path, shift=1.0, **metadata):
    by = torch.zeros(16)
    by[0] = shift
    act_map = ActMap(
        {NORM_OUT: AffineMap(torch.ones(16), by)}, ActMapMetadata(name=path.stem, rows="both", **metadata)
    )
    act_map.save(path)
    return path


# Help and errors -----------------------------------------------------------------------------------------------------


def test_help_appears_without_loading_anything_heavy():
    code = "import sys, actmaps.cli; assert not {'torch', 'diffusers', 'matplotlib', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command):
    text = run(command, "--help")
    assert f"$ actmaps {command}" in text
    assert "--debug" in text


def test_version():
    assert run("--version").strip() == f"actmaps {__version__}"


def test_the_package_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "actmaps", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"actmaps {__version__}"


def test_an_error_is_one_line_that_says_what_to_do():
    lines = run("presets", "demo-neon", code=1).strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: there is no preset 'demo-neon' (closest: demo-neon-sign")


def test_debug_lets_the_error_through():
    result = CliRunner().invoke(cli.app, ["presets", "demo-neon", "--debug"])
    assert isinstance(result.exception, ValueError)


def test_unexpected_errors_are_marked_as_such(monkeypatch):
    def broken(_name):
        raise RuntimeError("a [red] surprise\nin two lines")

    monkeypatch.setattr(presets, "load_preset", broken)
    text = run("presets", "demo-neon-sign", code=1)
    assert text.strip() == (
        "error: unexpected RuntimeError: a [red] surprise in two lines (--debug shows where it comes from)"
    )


# presets -------------------------------------------------------------------------------------------------------------


def test_presets_are_listed_with_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setenv("ACTMAPS_PRESETS", str(tmp_path))
    text = run("presets")
    assert "demo-neon-sign" in text
    assert str(tmp_path) in text


def test_a_broken_preset_is_reported_after_the_others(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text("name = 3")
    monkeypatch.setenv("ACTMAPS_PRESETS", str(tmp_path))
    text = run("presets", code=1)
    assert "demo-neon-sign" in text
    assert "mine.toml: name is 3; it must be a text" in text


def test_presets_are_grouped_by_kind_and_by_the_models_that_they_are_meant_for(tmp_path, monkeypatch):
    monkeypatch.setenv("ACTMAPS_PRESETS", str(tmp_path))
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\nkind = "concept"\ndescription = "A [boat]."\nlicence = "CC0-1.0"\n'
        '[source]\ntemplates = ["{subject}"]\n[target]\ntemplates = ["{subject}, boat"]\n'
    )
    groups = [group.splitlines() for group in re.split(r"\n\s*\n", run("presets").strip())]
    named = {group[0].strip(): [line.split()[0] for line in group[2:]] for group in groups[:-1]}
    assert list(named) == [
        "Styles, for Stable Diffusion, SDXL, SD3, FLUX; not the demo model",
        "Styles, for the demo model",
        "Negations, for Stable Diffusion, SDXL, SD3, FLUX; not the demo model",
        "Negations, for the demo model",
        "Concepts",
    ]
    assert named["Negations, for the demo model"] == ["demo-no-crown", "demo-no-hat", "demo-no-sunglasses"]
    assert "ukiyo-e" in named["Styles, for Stable Diffusion, SDXL, SD3, FLUX; not the demo model"]
    assert named["Concepts"] == ["mine"]


def test_a_preset_shows_what_it_is_meant_for_and_judged_on():
    text = run("presets", "no-gorilla", "--count", 3)
    assert "meant for: Stable Diffusion" in text
    assert re.search(r"source +target +judged on", text)
    assert "judged on" not in run("presets", "anime", "--count", 3)


def test_a_preset_shows_its_prompts():
    text = run("presets", "demo-no-hat", "--count", 3)
    assert text.count("with a hat") == 3
    assert "3 of its" in text


# fit -----------------------------------------------------------------------------------------------------------------


def test_fit_on_prompt_files_writes_a_map(model, prompts, tmp_path):
    output = tmp_path / "ink.safetensors"
    text = run(
        *("fit", "--model", model, *prompts, "--output", output, "--sites", NORM_OUT, "--timesteps", "0,0.5"),
        *("--steps", 4, "--method", "mean", "--positions", "all", "--support", "0.1,0.9", "--rows", "both"),
        *("--latents", "target", "--spatial", "shift", "--at-once", "--transport-target", "--seed", 5),
    )
    act_map = ActMap.load(output)
    data = act_map.metadata
    assert list(act_map) == [NORM_OUT]
    assert (data.spatial, data.causal, data.transport_target) == ("shift", False, True)
    assert (data.name, data.method, data.positions, data.support) == ("ink", "mean", None, (0.1, 0.9))
    assert (data.timesteps, data.rows, data.seed, data.n_source, data.n_target) == ((0.0, 0.5), "both", 5, 3, 3)
    assert str(output) in text


def test_fit_gives_what_the_pipeline_gives(model, prompts, tmp_path):
    output = tmp_path / "ink.safetensors"
    run(
        "fit",
        "--model",
        model,
        *prompts,
        "-o",
        output,
        "--sites",
        "unet",
        "--steps",
        3,
        "--timesteps",
        1,
        "--batch-size",
        2,
    )
    pipe = StableDiffusionACTPipeline.from_pretrained(model)
    source, target = (path.read_text().split("\n") for path in prompts[1::2])
    expected = pipe.fit_act_map(
        *([text for text in side if text] for side in (source, target)),
        sites=["unet"],
        num_inference_steps=3,
        timesteps=1,
        batch_size=2,
    )
    fitted = ActMap.load(output)
    assert list(fitted) == list(expected)
    assert all(torch.equal(fitted[site].scale, expected[site].scale) for site in expected)


def test_fit_on_a_preset_takes_over_its_advice(model, tmp_path):
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\nkind = "style"\ndescription = "D"\nlicence = "CC0-1.0"\nsubjects = ["cat", "dog", "cow"]\n'
        '[source]\ntemplates = ["{subject}"]\n[target]\ntemplates = ["{subject}, ink"]\n'
        f'[recommended.StableDiffusion]\nsites = ["{NORM_OUT}"]\nstrength = 0.7\nsupport = "observed"\n'
    )
    output = tmp_path / "map.safetensors"
    run(
        "fit",
        "-m",
        model,
        "--preset",
        tmp_path / "mine.toml",
        "--count",
        2,
        "--timesteps",
        1,
        "--steps",
        2,
        "-o",
        output,
    )
    act_map = ActMap.load(output)
    data = act_map.metadata
    assert list(act_map) == [NORM_OUT]
    assert act_map[NORM_OUT].lower is not None
    assert (data.name, data.presets, data.recommended_strength, data.licence) == ("mine", ("mine",), 0.7, "CC0-1.0")
    assert data.n_source == data.n_target == 2


@pytest.mark.parametrize("name", [path.stem for path in sorted(BUILT_IN.glob("*.toml"))])
def test_every_built_in_preset_can_be_fitted_with_its_advice(model, name):
    pipe = StableDiffusionACTPipeline.from_pretrained(model)
    preset = load_preset(name)
    act_map = pipe.fit_preset(preset, count=3, num_inference_steps=2, timesteps=1, progress=False)
    advice = preset.recommendation("StableDiffusion")
    assert act_map.components == (advice.sites or ("unet",))
    assert (act_map[NORM_OUT].lower is None) == (advice.support == "all")
    assert act_map.metadata.recommended_strength == advice.strength
    assert act_map.metadata.n_source == act_map.metadata.n_target == 3


def test_fit_says_which_models_a_preset_is_meant_for(model, tmp_path):
    options = ("--count", 2, "--timesteps", 1, "--steps", 2, "-o", tmp_path / "map.safetensors")
    text = run("fit", "-m", model, "--preset", "anime", *options)
    assert text.startswith("Preset anime is meant for Stable Diffusion, SDXL, SD3, FLUX; not the demo model.")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("-o", "map.pt", "--preset", "demo-no-hat"), "--output must end in .safetensors, got 'map.pt'"),
        (("-o", "m.safetensors"), "either by --preset or by both --source and --target"),
        (("-o", "m.safetensors", "--source", "x.txt"), "either by --preset or by both"),
        (("-o", "m.safetensors", "--preset", "p", "--source", "x", "--target", "y"), "either by --preset or by both"),
        (("-o", "m.safetensors", "--source", "x.txt", "--target", "y.txt"), "No such file or directory: 'x.txt'"),
        (("-o", "m.safetensors", "--source", "x", "--target", "y", "--count", 2), "--count go with --preset"),
        (("-o", "m.safetensors", "--preset", "demo-no-hat", "--timesteps", "some"), "every timestep must be a number"),
        (("-o", "m.safetensors", "--preset", "demo-no-hat", "--dtype", "int8"), "--dtype must be float32"),
        (("-o", "m.safetensors", "--preset", "demo-no-hat", "-m", "./nowhere"), "./nowhere is no diffusers model"),
    ],
)
def test_fit_refuses(arguments, problem):
    assert problem in run("fit", *arguments, code=1)


def test_unknown_pipelines_are_refused_by_name(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "CrayonPipeline", "_diffusers_version": "0.36.0"}')
    text = run("fit", "-m", tmp_path, "--preset", "demo-no-hat", "-o", "m.safetensors", code=1)
    assert "has no pipeline 'CrayonPipeline'" in text


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        (None, None),
        ([], None),
        (["unet"], ["unet"]),
        (["norm1", "norm2"], ["norm1", "norm2"]),
        ([r"unet\..*norm1"], r"unet\..*norm1"),
    ],
)
def test_one_site_pattern_may_be_a_regular_expression(given, parsed):
    assert cli_options.parse_sites(given) == parsed


@pytest.mark.parametrize(("given", "parsed"), [("3", 3), ("0", (0.0,)), ("0,0.5", (0.0, 0.5)), ("0.5", (0.5,))])
def test_timesteps_are_a_count_or_fractions(given, parsed):
    assert cli._parse_timesteps(given) == parsed


# sweep ---------------------------------------------------------------------------------------------------------------


def cells(picture, rows, columns, size):
    """The pictures in a grid, cut out by the frames around them."""
    frame = np.asarray(picture.convert("RGB"), int)
    line = (frame == [211, 215, 222]).all(-1)
    corners = [
        (x + 1, y + 1)
        for y, x in zip(*np.nonzero(line), strict=True)
        if line[y, x : x + size + 2].all() and line[y : y + size + 2, x].all()
    ]
    assert len(corners) == rows * columns
    return [
        [frame[y : y + size, x : x + size] for x, y in corners[r * columns : (r + 1) * columns]] for r in range(rows)
    ]


def test_sweep_draws_every_prompt_at_every_strength(model, tmp_path):
    act_map, output = save_map(tmp_path / "ink.safetensors"), tmp_path / "grids" / "grid.png"
    run(
        *("sweep", "-m", model, "--map", act_map, "-p", "a cat", "-p", "a dog", "--strengths", "0,3", "--steps", 2),
        *("--cell", 16, "--seed", 4, "-o", output),
    )
    grid = cells(Image.open(output), rows=2, columns=2, size=16)
    pipe = StableDiffusionACTPipeline.from_pretrained(model)
    for row, (prompt, seed) in enumerate((("a cat", 4), ("a dog", 5))):
        plain = pipe(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(seed)).images[0]
        assert np.abs(grid[row][0] - np.asarray(plain, int)).max() <= 1
        assert np.abs(grid[row][1] - np.asarray(plain, int)).max() > 1


def test_sweep_compares_with_another_prompt_and_several_maps(model, tmp_path):
    one, two = save_map(tmp_path / "one.safetensors", 2.0), save_map(tmp_path / "two.safetensors", -2.0)
    output = tmp_path / "grid.png"
    arguments = (
        "sweep",
        "-m",
        model,
        "--map",
        one,
        "--map",
        f"zwei={two}",
        "-p",
        "a cat",
        "--strengths",
        "0,1",
        "--steps",
        2,
    )
    run(*arguments, "--compare", "{prompt}, ink", "--cell", 16, "-o", output)
    (plain, with_one, asked), (plain_too, with_two, asked_too) = cells(Image.open(output), rows=2, columns=3, size=16)
    assert np.array_equal(plain, plain_too)
    assert np.array_equal(asked, asked_too)
    assert not np.array_equal(with_one, with_two)
    assert not np.array_equal(plain, asked)
    # Together the opposite shifts cancel.
    run(*arguments, "--together", "--cell", 16, "-o", output)
    ((plain, both),) = cells(Image.open(output), rows=1, columns=2, size=16)
    assert np.abs(plain - both).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--map", "none.safetensors"), "there is no act map file none.safetensors"),
        (("--map", "MAP", "--strengths", "0,high"), "every strength must be a number, got 'high'"),
        (("--map", "MAP", "--map", "MAP"), "two maps have the same name"),
        (("--map", "MAP", "--compare", "ink"), "--compare needs {prompt}"),
        (("--map", "MAP", "-o", "grid.doc"), "'grid.doc' has no ending of a picture file"),
    ],
)
def test_sweep_refuses(arguments, problem, tmp_path):
    act_map = str(save_map(tmp_path / "ink.safetensors"))
    arguments = [act_map if argument == "MAP" else argument for argument in arguments]
    assert problem in run("sweep", "-p", "a cat", *arguments, code=1)


# inspect and blend ---------------------------------------------------------------------------------------------------


def test_inspect_shows_metadata_costs_and_units(tmp_path):
    act_map = save_map(tmp_path / "ink.safetensors", -2.5, costs={NORM_OUT: (4.0, 1.0)}, description="Wet ink.")
    text, plot = run("inspect", act_map, "--plot", tmp_path / "map.png"), Image.open(tmp_path / "map.png")
    assert re.search(rf"{re.escape(NORM_OUT)}\s+16\s+4\s+1\s+25%", text)
    assert re.search(rf"{re.escape(NORM_OUT)}\s+0\s+1.000\s+-2.500", text)
    assert "Wet ink." in text
    assert plot.size == (1200, 860)


def test_inspect_refuses_what_is_no_map(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no map")
    assert "damaged" in run("inspect", tmp_path / "x.safetensors", code=1)


def test_blend_weighs_the_maps(tmp_path):
    one, two = save_map(tmp_path / "one.safetensors", 2.0), save_map(tmp_path / "two.safetensors", 10.0)
    output = tmp_path / "both.safetensors"
    run("blend", f"{one}=0.5", f"{two}=0.25", "-o", output, "--name", "both")
    blended = ActMap.load(output)
    assert blended[NORM_OUT].shift[0] == 0.5 * 2.0 + 0.25 * 10.0
    assert blended.metadata.name == "both"


@pytest.mark.parametrize(
    ("item", "problem"),
    [("one.safetensors", "without a weight; write one.safetensors=0.5"), ("MAP=much", "must be a number")],
)
def test_blend_refuses(item, problem, tmp_path):
    item = item.replace("MAP", str(save_map(tmp_path / "one.safetensors")))
    assert problem in run("blend", item, "-o", tmp_path / "out.safetensors", code=1)


def test_push_writes_the_repository_into_a_folder(tmp_path):
    act_map, picture = save_map(tmp_path / "ink.safetensors"), tmp_path / "grid.png"
    Image.new("RGB", (2, 2)).save(picture)
    folder = tmp_path / "repository"
    options = ("--picture", picture, "--base-model", "org/model", "--sample", "a fox", "--sample", "a cat")
    text = run("push", act_map, "user/ink", *options, "--folder", folder)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "act_map.safetensors", "preview.png"]
    assert str(folder / "README.md") in text
    card = (folder / "README.md").read_text()
    assert "base_model: org/model" in card
    assert "- a fox\n- a cat\n" in card
    assert list(ActMap.load(folder)) == [NORM_OUT]


def test_push_uploads(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "actmaps.maps.hub.push_to_hub",
        lambda *given, **options: calls.append((given, options)) or "http://hub/commit/1",
    )
    act_map = save_map(tmp_path / "ink.safetensors")
    assert "Uploaded: http://hub/commit/1" in run("push", act_map, "user/ink", "--private", "--message", "Wet")
    (((pushed, repo_id), options),) = calls
    assert (pushed.metadata.name, repo_id) == ("ink", "user/ink")
    assert options == {
        "picture": None, "base_model": None, "samples": (), "private": True, "commit_message": "Wet",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("none.safetensors", "user/ink"), "there is no act map file none.safetensors"),
        (("MAP", "two words"), "Repo id must use alphanumeric chars"),
        (("MAP", "user/ink", "--picture", "grid.png"), "there is no picture grid.png"),
    ],
)
def test_push_refuses(arguments, problem, tmp_path):
    act_map = str(save_map(tmp_path / "ink.safetensors"))
    arguments = [act_map if argument == "MAP" else argument for argument in arguments]
    assert problem in run("push", *arguments, "--folder", tmp_path / "out", code=1)


# export --------------------------------------------------------------------------------------------------------------


def test_export_writes_a_lora_file_for_the_model(model, tmp_path):
    act_map = save_map(tmp_path / "ink.safetensors", 2.0)
    output = tmp_path / "loras" / "ink.safetensors"
    text = run("export", act_map, "-m", model, "-o", output, "--strength", "0.5")
    assert str(output) in text
    differences = load_file(output)
    assert list(differences) == ["lora_unet_conv_norm_out.diff_b"]
    assert differences["lora_unet_conv_norm_out.diff_b"].tolist() == [0.5 * 2.0] + [0.0] * 15


def test_export_names_what_it_leaves_out(model, tmp_path):
    bounds = torch.zeros(16), torch.ones(16)
    site = "unet.conv_in"
    bounded = AffineMap(torch.full((16,), 2.0), torch.ones(16), *bounds)
    path, output = tmp_path / "ink.safetensors", tmp_path / "lora.safetensors"
    ActMap({site: bounded, NORM_OUT: AffineMap(torch.full((16,), 2.0), torch.ones(16))}).save(path)
    arguments = ("export", path, "-m", model, "-o", output)
    assert f"{site}: its map has a support" in run(*arguments, code=1)
    assert not output.exists()
    assert f"1 sites are left out: {site}" in run(*arguments, "--partial")
    assert {key.split(".")[0] for key in load_file(output)} == {"lora_unet_conv_norm_out"}


# demo ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "preset"), [("style", "demo-pop-art"), ("negation", "demo-no-hat")])
def test_the_demo_draws_what_its_maps_were_not_fitted_on(kind, preset):
    subjects = cli.DEMO_SUBJECTS[kind]
    assert not set(subjects) & set(load_preset(preset).subjects)
    assert {subject.split(" with ")[0] for subject in subjects} & set(dataset.subjects("held_out"))


@pytest.mark.slow
@pytest.mark.skipif(not Path(WEIGHTS).exists(), reason="the demo model's weights are not there")
def test_demo_writes_maps_and_pictures(tmp_path):
    text = run("demo", "--output", tmp_path, "--count", 12, "--subject", "lion")
    for name, columns in (("demo-pop-art", 6), ("demo-no-hat", 7)):
        act_map = ActMap.load(tmp_path / f"{name}.safetensors")
        assert act_map.metadata.presets == (name,)
        assert str(tmp_path / f"{name}.png") in text
        drawn = cells(Image.open(tmp_path / f"{name}.png"), rows=1, columns=columns, size=160)
        assert np.abs(drawn[0][0] - drawn[0][4]).mean() > 5
    assert "actmaps sweep --map" in text


# Language models -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    tokens = tiny_language_models.tokenizer()
    TextGenerationACTPipeline(model=tiny_language_models.llama(tokens), tokenizer=tokens).save_pretrained(folder)
    return folder


def test_a_language_model_is_fitted_and_continues_prompts(language_model, prompts, tmp_path):
    output = tmp_path / "ink.safetensors"
    text = run("fit", "--model", language_model, *prompts, "--sites", "post_norms", "--method", "iti_c", "-o", output)
    assert "actmaps generate --model" in text
    data = ActMap.load(output).metadata
    assert (data.name, data.method, data.pooling, data.model_name) == ("ink", "iti_c", "last", "llama")
    options = ("--strengths", "0,50", "--tokens", 5, "--greedy")
    text = run("generate", "-m", language_model, "--map", output, "-p", "a cat", "-p", "a [dog]", *options)
    assert "a [dog]" in text
    found = [
        line.removeprefix("50").removeprefix("0").strip() for line in text.splitlines() if re.match("(0|50) ", line)
    ]
    assert len(found) == 4
    assert found[0] != found[1]


def test_options_of_image_models_are_refused_for_language_models(language_model, prompts, tmp_path):
    options = ("--timesteps", "3", "--steps", "5", "-o", tmp_path / "ink.safetensors")
    text = run("fit", "--model", language_model, *prompts, *options, code=1)
    assert "is a language model; --timesteps, --steps are for image models" in text
    assert not (tmp_path / "ink.safetensors").exists()
