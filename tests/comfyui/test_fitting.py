"""Fitting on real ComfyUI, and maps that both libraries share."""

import comfy.model_management
import numpy as np
import pytest
import torch

from actmaps import ActMap, find_sites
from actmaps.nodes.fit import ACTFitMap, ACTPresetPrompts, summary
from actmaps.nodes.fitting import Fit, Sampling, _chunks
from actmaps.nodes.inspection import ACTInspectMap
from actmaps.nodes.steering import AppliedMap, steered_clip, steered_model
from runs import hooks, instance_forwards, sample, strong_map

SOURCE = ["red apple", "cat face", "house", "green tree"]
TARGET = [f"{subject}, neon sign" for subject in SOURCE]
LATENT = {"samples": torch.zeros(1, 4, 8, 8)}


def node(demo, source=SOURCE, target=TARGET, **options):
    model, clip, _ = demo
    defaults = {
        "name": "neon", "sites": "denoiser", "method": "linear", "timesteps": 2, "start_percent": 0.0, "end_percent": 0.6,
        "seed": 0, "steps": 4, "cfg": 4.0,
    }  # fmt: skip
    with torch.inference_mode():
        return ACTFitMap.execute(
            model=model,
            clip=clip,
            latent_image=LATENT,
            source_prompts="\n".join(source),
            target_prompts="\n".join(target),
            **{**defaults, **options},
        ).result


@pytest.fixture(scope="module")
def fitted(demo):
    return node(demo)[0]


def test_all_norms_of_the_denoiser_are_fitted_under_their_canonical_names(fitted, pipeline):
    assert set(fitted) == set(find_sites({"unet": pipeline.unet}))
    assert next(iter(fitted)) == "unet.down_blocks.0.resnets.0.norm1"
    assert list(fitted)[-1] == "unet.conv_norm_out"
    data = fitted.metadata
    assert (data.n_source, data.n_target, data.timesteps, data.window) == (4, 4, (0.0, 0.25), (0.0, 0.6))
    before, after = (sum(cost[i] for cost in data.costs.values()) for i in (0, 1))
    assert after < 0.5 * before


def test_a_map_fitted_here_steers_diffusers_and_the_reverse(demo, fitted, pipeline, tmp_path):
    model, clip, _ = demo
    fitted.save(tmp_path / "neon.safetensors")
    name = pipeline.load_act_map(tmp_path / "neon.safetensors")
    options = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "latent"}
    pictures = {
        strength: pipeline(
            "red apple", act_strength=strength, generator=torch.Generator().manual_seed(0), **options
        ).images
        for strength in (0.0, 1.0)
    }
    assert (pictures[1.0] - pictures[0.0]).abs().mean() > 0.05
    pipeline.delete_act_maps(name)
    theirs = pipeline.fit_act_map(
        SOURCE, TARGET, timesteps=2, num_inference_steps=4, guidance_scale=4.0, progress=False
    )
    plain, steered = sample(model, clip), sample(steered_model(model, AppliedMap(theirs)), clip)
    assert (steered.latents - plain.latents).abs().mean() > 0.05


def test_both_libraries_fit_the_same_map_on_pure_noise(demo, pipeline):
    """At the first noise level both see the same latents, but for the last digits of the schedule."""
    ours, _ = node(demo, timesteps=1, end_percent=1.0, positions=4096)
    theirs = pipeline.fit_act_map(
        SOURCE, TARGET, timesteps=[0.0], window=(0.0, 1.0), num_inference_steps=4, positions=None, progress=False
    )
    assert list(ours) == list(theirs)
    for site in ours:
        torch.testing.assert_close(ours[site].scale, theirs[site].scale, rtol=0.05, atol=0.05)
        torch.testing.assert_close(ours[site].shift, theirs[site].shift, rtol=0.05, atol=0.05)


def test_the_same_seed_gives_the_same_map_and_another_one_another(demo, fitted):
    again, other = node(demo)[0], node(demo, seed=1)[0]
    assert all(torch.equal(again[site].scale, fitted[site].scale) for site in fitted)
    assert all(torch.equal(again[site].shift, fitted[site].shift) for site in fitted)
    # Before the first cross-attention both prompt sets look alike on the same latents, whatever the seed.
    same = [site for site in fitted if torch.equal(other[site].shift, fitted[site].shift)]
    assert all(site.startswith("unet.down_blocks.0.") and not fitted[site].shift.any() for site in same)
    assert len(same) < 10


def test_the_batch_size_changes_nothing_but_rounding(demo, fitted):
    single = node(demo, batch_size=1)[0]
    for site in fitted:
        torch.testing.assert_close(single[site].shift, fitted[site].shift, rtol=1e-2, atol=1e-2)


def test_maps_are_of_use_outside_of_inference_mode(fitted):
    assert not any(affine.scale.is_inference() or affine.shift.is_inference() for affine in fitted.values())


def test_fitting_leaves_the_model_as_it_was(demo):
    model, clip, _ = demo
    before = sample(model, clip).latents
    node(demo, sites="text encoder and denoiser")
    assert hooks(model) == 0
    assert instance_forwards(model) == []
    assert torch.equal(sample(model, clip).latents, before)


def test_text_encoder_and_denoiser_are_fitted_one_after_the_other(demo):
    both, report = node(demo, sites="text encoder and denoiser")
    alone, _ = node(demo, sites="text encoder")
    assert both.components == ("text_encoder", "unet")
    assert alone.components == ("text_encoder",)
    for site in alone:
        torch.testing.assert_close(both[site].shift, alone[site].shift)
    assert "4 source and 4 target prompts" in report
    # The denoiser is fitted on what the steered text encoder tells it, which is not what the plain one does.
    assert not torch.allclose(both["unet.conv_norm_out"].shift, node(demo)[0]["unet.conv_norm_out"].shift, atol=1e-3)


def test_prompts_of_different_lengths_and_numbers(demo):
    long = ", ".join(["green tree"] * 12)
    act_map, _ = node(demo, source=[*SOURCE, long], target=[*TARGET[:2], f"{long}, neon sign"])
    assert (act_map.metadata.n_source, act_map.metadata.n_target) == (5, 3)


def test_prompts_are_batched_by_token_length(demo):
    _, clip, _ = demo
    long = ", ".join(["green tree"] * 12)
    encoded = [Fit._encode(clip, text) for text in ("red apple", long, "cat face", "house")]
    chunks = list(_chunks(encoded, 2))
    assert [chunk.indices for chunk in chunks] == [[0, 2], [3], [1]]
    assert [chunk.conditioning[0][0].shape[:2] for chunk in chunks] == [
        (2, 24),
        (1, 24),
        (1, chunks[2].conditioning[0][0].shape[1]),
    ]


def test_weights_in_prompts_are_taken_literally(demo):
    _, clip, _ = demo
    weighted, plain = Fit._encode(clip, "(red:1.5) apple"), Fit._encode(clip, "red apple")
    assert not torch.equal(weighted[0][0], plain[0][0])
    tokens = clip.tokenize("(red:1.5) apple", disable_weights=True)
    assert {weight for chunk in tokens["l"] for _, weight in chunk} == {1.0}


@pytest.mark.parametrize("after", [3, 30, 60])
def test_an_interrupt_ends_the_fit_and_leaves_nothing(demo, after):
    model, clip, _ = demo
    before = sample(model, clip).latents
    reports = []

    def report(fraction):
        reports.append(fraction)
        if len(reports) == after:
            comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()

    fit = Fit(model, clip, Sampling(torch.zeros(1, 8, 8, 8), steps=4), timesteps=2, report=report)
    with torch.inference_mode(), pytest.raises(comfy.model_management.InterruptProcessingException):
        fit.run(SOURCE, TARGET, "text encoder and denoiser", "", "x")
    assert len(reports) == after
    assert reports == sorted(reports)
    assert hooks(model) == 0
    assert torch.equal(sample(model, clip).latents, before)


def test_progress_runs_from_nothing_to_all(demo):
    model, clip, _ = demo
    reports = []
    fit = Fit(model, clip, Sampling(torch.zeros(1, 8, 8, 8), steps=4), timesteps=2, report=reports.append)
    with torch.inference_mode():
        fit.run(SOURCE, TARGET, "denoiser", "", "x")
    assert reports == sorted(reports)
    assert 0 < reports[0] <= 0.2
    assert reports[-1] == pytest.approx(1.0)


def test_fitting_on_a_steered_model_is_refused(demo):
    model, clip, vae = demo
    steered = steered_model(model, AppliedMap(strong_map(model, name="ink")))
    with pytest.raises(ValueError, match="MODEL is steered by 'ink': a map is fitted on the plain model"):
        node((steered, clip, vae))
    with pytest.raises(ValueError, match="CLIP is steered"):
        node((model, steered_clip(clip, strong_map(clip=clip), 1.0), vae))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": []}, "source_prompts is empty: write at least one prompt, one per line"),
        ({"target": ["", "  "]}, "target_prompts is empty"),
        ({"sites": "pattern"}, "site_pattern is empty: write a regular expression"),
        ({"sites": "pattern", "site_pattern": "unet.nothing"}, "matches no site; closest:"),
        ({"start_percent": 0.6, "end_percent": 0.6}, "start_percent must be below end_percent"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(demo, options, message):
    with pytest.raises(ValueError, match=message):
        node(demo, **options)


def test_sites_by_pattern(demo):
    act_map, _ = node(demo, sites="pattern", site_pattern=r"unet\..*attn2")
    assert act_map.select(["attn2"]).keys() == act_map.keys()
    assert len(act_map) >= 4


def test_every_option_is_recorded(demo):
    act_map, _ = node(demo, method="mean", pooling="mean", support="observed", rows="both", latents="own", seed=3)
    data = act_map.metadata
    assert (data.method, data.pooling, data.support, data.rows, data.latents, data.seed) == (
        "mean", "mean", "observed", "both", "own", 3
    )  # fmt: skip
    assert all(torch.equal(affine.scale, torch.ones_like(affine.scale)) for affine in act_map.values())


def test_the_report_says_what_was_done(demo):
    _, report = node(demo)
    assert report.startswith("fitted in ")
    for part in ("neon", "4 source and 4 target prompts", "transport cost", "unet.", "most expensive"):
        assert part in report


# Prompts and pictures of maps


def test_preset_prompts_are_pairs_about_the_same_subjects():
    source, target = ACTPresetPrompts.execute(preset="demo-neon-sign", subjects="", count=8, seed=0).result
    assert len(source.splitlines()) == len(target.splitlines()) == 8
    assert all("neon" in line for line in target.splitlines())
    assert not any("neon" in line for line in source.splitlines())
    own, _ = ACTPresetPrompts.execute(preset="demo-neon-sign", subjects="zebra\n\n quilt ", count=32, seed=0).result
    assert ["zebra" in own.splitlines()[0], "quilt" in own.splitlines()[1]] == [True, True]


def test_a_general_preset_writes_captions_and_is_offered_before_those_of_the_demo_model():
    options = ACTPresetPrompts.define_schema().inputs[0].options
    assert options[0] == "anime"
    assert all(name.startswith("demo-") for name in options[options.index("demo-black-and-white-icon") :])
    source, target = ACTPresetPrompts.execute(preset="anime", subjects="", count=0, seed=0).result
    assert len(source.splitlines()) == len(target.splitlines()) >= 240
    assert all(", anime, " in line for line in target.splitlines())


@pytest.mark.parametrize("preset", ["../demo-neon-sign", "/etc/passwd", "demo-neon-sign.toml", "none"])
def test_a_preset_is_a_name_and_no_path(preset):
    with pytest.raises(ValueError, match="there is no preset"):
        ACTPresetPrompts.execute(preset=preset, subjects="", count=8, seed=0)


def test_a_map_is_plotted(fitted):
    plot, text = ACTInspectMap.execute(act_map=fitted).result
    assert plot.ndim == 4
    assert plot.shape[3] == 3
    assert plot.dtype == torch.float32
    assert 0 <= plot.min() < plot.max() <= 1
    assert np.unique(plot.numpy().reshape(-1, 3), axis=0).shape[0] > 10
    assert text == summary(fitted)


def test_a_map_is_immutable_under_fitting_more(demo, fitted):
    assert isinstance(fitted, ActMap)
    shift = fitted["unet.conv_norm_out"].shift.clone()
    node(demo, seed=5)
    assert torch.equal(fitted["unet.conv_norm_out"].shift, shift)
