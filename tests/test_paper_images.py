"""The paper's image experiments end to end, offline: a tiny Stable Diffusion, a tiny CLIP, and presets of one style and one negation."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextModelWithProjection

import tiny_clip
import tiny_models
from actmaps import pipelines
from actmaps.evaluation.clip import ClipJudge
from actmaps.evaluation.images import Sampling, draw
from actmaps.maps import ActMap, find_sites
from actmaps.pipelines import ACTMixin, StableDiffusionACTPipeline

CAPTIONS = ["cat", "dog", "tree", "boat", "house", "lake", "hill", "bird"]
PRESET = """
name = "{name}"
kind = "{kind}"
description = "One."
licence = "Apache-2.0"
subjects = ["sun"]
[source]
{source}
[target]
{target}
"""
PLAIN = 'templates = ["{subject}"]'
INK = 'templates = ["{subject}, {tags}"]\ntags = ["ink", "wash"]\nrandom_tags = 1'
HAT = 'templates = ["{subject} with {tags}"]\ntags = ["a hat"]'


def load_benchmark():
    path = Path(__file__).parents[1] / "benchmarks" / "paper_images.py"
    spec = importlib.util.spec_from_file_location("paper_images", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = load_benchmark()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Model, judge, captions and presets."""
    folder = tmp_path_factory.mktemp("paper")
    StableDiffusionPipeline(**tiny_models.components()).save_pretrained(folder / "model")
    tiny_clip.save_clip(folder / "clip")
    (folder / "captions.txt").write_text("\n".join(CAPTIONS))
    ink = PRESET.format(name="ink", kind="style", source=PLAIN, target=INK)
    (folder / "ink.toml").write_text(ink)
    (folder / "wash.toml").write_text(ink.replace('name = "ink"', 'name = "wash"').replace('"ink", "wash"', '"wash"'))
    (folder / "no-hat.toml").write_text(PRESET.format(name="no-hat", kind="negation", source=HAT, target=PLAIN))
    return folder


@pytest.fixture
def run(folder, tmp_path):
    """Runs the benchmark on some presets; returns the cells by file."""

    def run(*arguments, concepts=("ink",), output=tmp_path / "out"):
        options = {"model": "model", "clip": "clip", "captions": "captions.txt"}
        given = [word for option, file in options.items() for word in (f"--{option}", str(folder / file))]
        quick = [
            "--steps",
            "2",
            "--limit",
            "3",
            "--keep",
            "2",
            "--batch-size",
            "2",
            "--strengths",
            "1",
            "0.5",
            "--methods",
            "linear",
            "--device",
            "cpu",
        ]
        chosen = ["--concepts", *(str(folder / f"{name}.toml") for name in concepts)]
        bench.main([*given, *quick, *chosen, "--output", str(output), *arguments])
        return cells(output)

    return run


def cells(output):
    found = sorted(path for part in ("styles", "negations") for path in (output / part).rglob("*.json"))
    return {str(path.relative_to(output)): json.loads(path.read_text()) for path in found}


@pytest.fixture
def drawn(monkeypatch):
    """The prompts and the options of everything that is drawn."""
    calls, original = [], bench.draw_batches

    def record(pipe, prompts, sampling, **how):
        calls.append((list(prompts), how))
        return original(pipe, prompts, sampling, **how)

    monkeypatch.setattr(bench, "draw_batches", record)
    return calls


@pytest.fixture
def fits(monkeypatch):
    """Source and target prompts of every fit."""
    calls, original = [], StableDiffusionACTPipeline.fit_act_map

    def record(self, *prompts, **options):
        calls.append(prompts)
        return original(self, *prompts, **options)

    monkeypatch.setattr(StableDiffusionACTPipeline, "fit_act_map", record)
    return calls


CELLS = [
    "styles/ink/Linear-AcT/seed-0/strength-0.5.json",
    "styles/ink/Linear-AcT/seed-0/strength-1.json",
    "styles/ink/in the prompt/seed-0/strength-0.json",
    "styles/ink/unsteered/seed-0/strength-0.json",
]


def test_a_style_is_measured_on_captions_that_no_map_was_fitted_on(
    run, folder, drawn, fits, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(bench, "CONSOLE", bench.Console(width=200))
    found = run()
    assert list(found) == CELLS
    prompts = drawn[0][0]
    assert drawn == [
        (prompts, {}),
        ([f"{prompt}, ink" for prompt in prompts], {}),
        (prompts, {"act_strength": 0.5}),
        (prompts, {"act_strength": 1.0}),
    ]
    assert len(set(prompts) & set(CAPTIONS)) == 3
    ((source, target),) = fits
    assert set(source) <= set(CAPTIONS) - set(prompts)
    assert all(asked in (f"{plain}, ink", f"{plain}, wash") for plain, asked in zip(source, target, strict=True))

    pipe = StableDiffusionACTPipeline.from_pretrained(folder / "model")
    pipe.set_progress_bar_config(disable=True)
    act_map = ActMap.load(tmp_path / "out/styles/ink/Linear-AcT/seed-0/map.safetensors")
    data = act_map.metadata
    assert (data.timesteps, data.window, data.pooling, data.transport_target) == ((0.0,), (0.0, 1.0), "mean", True)
    assert (data.n_source, data.n_target, data.support) == (3, 3, "all")
    pipe.load_act_map(act_map)
    judge, sampling = ClipJudge.from_pretrained(folder / "clip", "cpu"), Sampling(2, None, bench.FRESH, 2)
    plain, steered = (judge.embed_images(draw(pipe, prompts, sampling, act_strength=s)) for s in (0.0, 0.5))
    scores = judge.scores(steered, prompts, "ink", plain)
    cell = found[CELLS[0]]
    assert cell["probability"] == pytest.approx(100 * scores.probability, rel=1e-4)
    assert cell["clip_score"] == pytest.approx(scores.clip_score, abs=1e-4)
    assert cell["image_similarity"] == pytest.approx(scores.image_similarity, abs=1e-4) != 1
    assert found[CELLS[3]]["relative_clip_score"] == 100

    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("Linear-AcT") and " 0.5 " in line)
    assert f"{cell['probability']:.1f}" in row
    assert f"{cell['clip_score']:.3f}" in row


def test_a_negation_has_the_concept_forbidden_and_left_out_beside_it(run, drawn, tmp_path):
    found = run(concepts=["no-hat"])
    prompts = drawn[0][0]
    assert all(prompt.endswith(" with a hat") for prompt in prompts)
    assert drawn[1:] == [
        (prompts, {"negative_prompt": "a hat"}),
        ([prompt.removesuffix(" with a hat") for prompt in prompts], {}),
        (prompts, {"act_strength": 0.5}),
        (prompts, {"act_strength": 1.0}),
    ]
    assert {cell["method"] for cell in found.values()} == {
        "unsteered", "negative prompt", "left out of the prompt", "Linear-AcT",
    }  # fmt: skip
    act_map = ActMap.load(tmp_path / "out/negations/no-hat/Linear-AcT/seed-0/map.safetensors")
    assert act_map.metadata.support == "observed"


def test_without_guidance_nothing_is_forbidden(run, drawn):
    run("--guidance-scale", "0", concepts=["no-hat"])
    assert not any("negative_prompt" in how for _, how in drawn)


def test_styles_share_the_pictures_of_the_captions_alone(run, drawn):
    found = run(concepts=["ink", "wash"])
    assert sum(how == {} and prompts == drawn[0][0] for prompts, how in drawn) == 1
    assert "styles/wash/unsteered/seed-0/strength-0.json" in found


def test_an_interrupted_run_goes_on_where_it_stopped(run, drawn, fits, monkeypatch, tmp_path):
    embed = ClipJudge.embed_images

    def interrupted(self, pictures):
        if len(drawn) == 4:  # after the first batch of the last cell
            raise KeyboardInterrupt
        return embed(self, pictures)

    monkeypatch.setattr(ClipJudge, "embed_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    first = cells(tmp_path / "out")
    assert sorted(first) == [name for name in CELLS if name != CELLS[1]]

    monkeypatch.setattr(ClipJudge, "embed_images", embed)
    whole = run()
    assert whole | first == whole
    assert len(drawn) == 4 + 1  # what is there is not drawn again
    assert len(fits) == 1  # nor fitted
    assert not [path for path in (tmp_path / "out").rglob("*") if "unfinished" in path.name or path.suffix == ".tmp"]

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "styles").rglob("*.*")}
    run()
    assert len(drawn) == 5
    assert times == {path: path.stat().st_mtime_ns for path in times}

    # A cell can be judged again from its embeddings, and drawn again to the same figures.
    (tmp_path / "out" / CELLS[0]).unlink()
    assert run()[CELLS[0]] == pytest.approx(whole[CELLS[0]], abs=1e-4)
    assert len(drawn) == 5
    (tmp_path / "out" / CELLS[0]).unlink()
    (tmp_path / "out" / CELLS[0]).with_suffix(".safetensors").unlink()
    assert run()[CELLS[0]] == pytest.approx(whole[CELLS[0]], abs=1e-4)
    assert (len(drawn), len(fits)) == (6, 1)


def test_results_of_other_settings_do_not_mix(run):
    run()
    with pytest.raises(SystemExit, match="give another --output"):
        run("--steps", "3")


def test_every_method_runs_and_they_differ(run):
    found = run("--methods", "linear", "mean", "iti_c")
    at_one = {cell["method"]: cell["image_similarity"] for cell in found.values() if cell["strength"] == 1}
    assert set(at_one) == {"Linear-AcT", "Mean-AcT", "ITI-c"}
    assert len(set(at_one.values())) == 3


def test_runs_have_captions_and_noise_of_their_own(run, drawn, capsys):
    run("--seeds", "2")
    assert len(drawn) == 8
    assert drawn[0][0] != drawn[4][0]
    assert " ± " in capsys.readouterr().out


def test_grids_animations_and_plots_are_drawn(run, tmp_path):
    run()
    pictures = tmp_path / "out" / "pictures"
    kept = sorted((tmp_path / "out/styles/ink/Linear-AcT/seed-0/strength-0.5").glob("*.png"))
    assert [path.name for path in kept] == ["000.png", "001.png"]
    with Image.open(kept[0]) as picture, Image.open(pictures / "ink" / "Linear-AcT.png") as grid:
        assert picture.size == (16, 16)
        assert grid.width > 4 * 256  # unsteered, two strengths, in the prompt
        assert 2 * 256 < grid.height < 3 * 256
    with Image.open(pictures / "ink" / "Linear-AcT.gif") as animation:
        assert animation.n_frames == 4  # 0, 0.5, 1, 0.5
        assert 2 * 256 < animation.width < 3 * 256
    with Image.open(pictures / "styles.png") as plot:
        assert plot.size == (80 + 3 * 520, 420)
    stored = json.loads((tmp_path / "out" / "styles.json").read_text())
    assert [row["strength"] for row in stored["rows"]] == [None, None, 0.5, 1]


def test_the_papers_numbers_stand_beside_ours(tmp_path):
    store = bench.Cells(tmp_path, {})
    figures = {"probability": 50.0, "clip_score": 0.2, "relative_clip_score": 90.0, "image_similarity": 0.8}
    for concept, shares in (("anime", (90.0, 94.0)), ("sketch", (100.0, 96.0))):
        for seed, share in enumerate(shares):
            cell = {"part": "styles", "concept": concept, "method": "Linear-AcT", "seed": seed, "strength": 1.0}
            store.store(cell, figures | {"share": share})
    (method, *_) = bench.METHODS
    report = bench.overview(store, "styles", "SDXL-Lightning", [method])
    assert report.markdown().splitlines()[-1] == (
        "| Linear-AcT | 1 | 95.0 ± 0.0 | 95 | 50.0 ± 0.0 | 0.200 ± 0.000 | 90.0 ± 0.0 | 80 | 0.800 ± 0.000 |"
    )
    assert bench.by_concept(store, "styles", [method]).markdown().splitlines()[-1] == "| Linear-AcT | 1 | 92 | 98 |"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [(("--keep", "0"), "--keep must be at least 1"), (("--strengths", "0", "1"), "--strengths must be above 0")],
)
def test_options_that_make_no_sense_are_refused(run, capsys, arguments, problem):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert problem in capsys.readouterr().err


def test_unknown_concepts_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="there is no preset 'sphinx'"):
        bench.main(["--model", "m", "--output", str(tmp_path), "--concepts", "sphinx"])


def test_the_papers_models_run_four_steps_without_guidance_unless_told_otherwise():
    options = bench.parse(["--model", "FLUX.1-schnell", "--output", "o"])
    assert (options.steps, options.guidance_scale) == (4, 0)
    assert bench.parse(["--model", "SDXL-Lightning", "--output", "o", "--steps", "8"]).steps == 8
    assert bench.parse(["--model", "./mine", "--output", "o"]).steps is None


def test_flux_is_steered_at_all_double_blocks_and_the_first_fifteen_single_ones():
    flux = FluxTransformer2DModel(
        in_channels=4, num_layers=3, num_single_layers=18, attention_head_dim=8, num_attention_heads=1,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    found = find_sites({"transformer": flux}, bench.MODELS["FLUX.1-schnell"].sites)
    double = {f"transformer.transformer_blocks.{i}:{stream}" for i in range(3) for stream in ("image", "text")}
    single = {f"transformer.single_transformer_blocks.{i}:{stream}" for i in range(15) for stream in ("image", "text")}
    assert set(found) == double | single


def test_the_lightning_unet_takes_the_place_of_the_base_models(tmp_path, monkeypatch):
    class Pipeline(ACTMixin, StableDiffusionXLPipeline):
        """SDXL with act maps."""

    monkeypatch.setattr(pipelines, "StableDiffusionXLACTPipeline", Pipeline, raising=False)
    sdxl().save_pretrained(tmp_path / "base")
    lightning = sdxl(seed=1).unet
    save_file(lightning.state_dict(), tmp_path / "lightning.safetensors")
    pipe = bench.load_sdxl_lightning("cpu", torch.float32, str(tmp_path / "base"), tmp_path / "lightning.safetensors")
    assert all(torch.equal(pipe.unet.state_dict()[name], value) for name, value in lightning.state_dict().items())
    assert isinstance(pipe.scheduler, EulerDiscreteScheduler)
    pipe.set_progress_bar_config(disable=True)
    images = draw(pipe, ["a cat"], Sampling(4, 0.0))
    assert images.shape == (1, 16, 16, 3)
    assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert not pipe.do_classifier_free_guidance


def sdxl(seed=0):
    """A tiny SDXL."""
    parts = tiny_models.components(seed)
    tokens = parts["tokenizer"]
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=4 * 6 + 32,
    )
    config = tiny_models.text_encoder(len(tokens)).config
    config.projection_dim = 32
    return StableDiffusionXLPipeline(
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tokens,
        tokenizer_2=tokens,
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
        add_watermarker=False,
    )
