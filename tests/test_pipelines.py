"""The pipeline: maps armed per call, rows and strengths kept apart, nothing left behind."""

from __future__ import annotations

import logging

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers import StableDiffusionPipeline
from peft import LoraConfig

import tiny_models
from actmaps.maps import ActMap, ActMapMetadata, AffineMap
from actmaps.pipelines import StableDiffusionACTPipeline, act_pipeline_class

SOURCE = ["a cat", "a dog", "a house"]
TARGET = ["a cat, ink", "a dog, ink", "a tree, ink", "a car, ink"]
NORM_OUT = "unet.conv_norm_out"


@pytest.fixture
def pipe():
    pipe = StableDiffusionACTPipeline(**tiny_models.components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fit(pipe, name="ink", sites=("text_encoder", "unet"), **options):
    options["sites"] = sites
    return pipe.fit_act_map(SOURCE, TARGET, name=name, num_inference_steps=4, progress=False, **options)


def generate(pipe, prompts=("a cat", "a dog"), steps=3, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    options = {"generator": generators, **options}
    return pipe(list(prompts), num_inference_steps=steps, output_type="latent", **options).images


def shift_map(site, channels, shift, name="shift", **modes):
    """A map that moves the first unit of one site only, so that it is no constant over channels."""
    by = torch.zeros(channels)
    by[0] = shift
    return ActMap({site: AffineMap(torch.ones(channels), by)}, ActMapMetadata(name=name, **modes))


def outputs_of(pipe, path, **options):
    """Outputs of a module of the U-Net, one per step."""
    seen = []
    handle = pipe.unet.get_submodule(path).register_forward_hook(lambda *a: seen.append(a[-1].clone()))
    generate(pipe, **options)
    handle.remove()
    return seen


def hook_count(pipe):
    modules = [*pipe.unet.modules(), *pipe.text_encoder.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in modules)


def test_strength_zero_is_the_plain_pipeline_bit_for_bit(pipe):
    fit(pipe)
    plain = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)

    assert torch.equal(generate(pipe, act_strength=0), generate(plain))
    assert not torch.equal(generate(pipe), generate(plain))
    assert hook_count(pipe) == 0


def test_a_map_between_equal_prompt_sets_is_the_identity(pipe):
    act_map = pipe.fit_act_map(SOURCE, SOURCE, num_inference_steps=4, progress=False)

    # The same noise within a pair and the same positions: source and target are the same samples.
    for affine in act_map.values():
        torch.testing.assert_close(affine.scale, torch.ones_like(affine.scale))
        torch.testing.assert_close(affine.shift, torch.zeros_like(affine.shift))


@pytest.mark.parametrize("rows", ["cond", "both"])
def test_the_fit_depends_on_the_seed_and_not_on_the_batch_size(pipe, rows):
    one, many, other = (
        pipe.fit_act_map(SOURCE, TARGET, num_inference_steps=4, rows=rows, progress=False, **options)
        for options in ({"batch_size": 1}, {"batch_size": 8}, {"batch_size": 8, "seed": 1})
    )

    for site in one:
        torch.testing.assert_close(one[site].scale, many[site].scale, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(one[site].shift, many[site].shift, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(many[NORM_OUT].shift, other[NORM_OUT].shift, atol=1e-3)


def test_sites_come_in_execution_order_over_both_components(pipe):
    act_map = fit(pipe)

    assert act_map.components == ("text_encoder", "unet")
    sites = list(act_map)
    # A U-Net registers attentions before resnets, and runs them after.
    assert sites.index("unet.down_blocks.0.resnets.0.norm1") < sites.index("unet.down_blocks.0.attentions.0.norm")
    assert sites[-1] == NORM_OUT
    assert act_map.metadata.n_source == 3
    assert act_map.metadata.n_target == 4
    assert act_map.metadata.architecture == {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel"}


@pytest.mark.parametrize("side", ["source", "target"])
def test_both_sides_can_look_at_the_runs_of_one(pipe, side):
    seen = []
    handle = pipe.unet.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    act_map = fit(pipe, sites="unet.conv_norm_out", latents=side, batch_size=4)
    handle.remove()

    source, target = seen[-2:]  # the two fitting forwards, two of four steps lie in the window
    assert torch.equal(source, target[: len(source)])
    assert act_map.metadata.latents == side


def test_text_encoder_sites_alone_need_no_sampling(pipe):
    calls = []
    handle = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    act_map = fit(pipe, sites="text_encoder")
    handle.remove()

    assert not calls
    assert act_map.components == ("text_encoder",)
    assert act_map.metadata.timesteps == ()


def test_the_first_timestep_alone_takes_one_step_of_sampling(pipe):
    seen = []
    handle = pipe.unet.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    fit(pipe, timesteps=[0.0], latents="own", sites="unet", batch_size=3, guidance_scale=1.0)
    handle.remove()

    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    assert torch.equal(seen[0], noise)  # source prompts
    assert torch.equal(seen[1], noise)  # target prompts start from the same noise
    assert len(seen) == 3 + 3  # three micro-batches recorded, three fitted


def test_a_negative_prompt_counts_for_every_prompt_of_the_fit(pipe):
    """It leads the recorded run elsewhere, so another map comes out; an empty one is what is there without."""
    options = {"sites": "unet", "guidance_scale": 4.0, "timesteps": [0.5], "batch_size": 2}
    plain, empty, other = (
        fit(pipe, name=None, call_options=call_options, **options)[NORM_OUT].shift
        for call_options in (None, {"negative_prompt": ""}, {"negative_prompt": "a red car"})
    )
    assert torch.equal(plain, empty)
    assert not torch.allclose(plain, other)


@pytest.mark.parametrize("rows", ["cond", "both"])
def test_rows_of_guidance(pipe, rows):
    before = outputs_of(pipe, "conv_norm_out", steps=1)[0]
    pipe.load_act_map(shift_map(NORM_OUT, 16, 3.0, rows=rows))
    after = outputs_of(pipe, "conv_norm_out", steps=1)[0]

    uncond, cond = (after - before).chunk(2)
    torch.testing.assert_close(cond[:, 0], torch.full_like(cond[:, 0], 3.0))
    torch.testing.assert_close(uncond[:, 0], torch.full_like(uncond[:, 0], 0.0 if rows == "cond" else 3.0))
    assert torch.equal(before.chunk(2)[0], after.chunk(2)[0]) == (rows == "cond")


def test_all_rows_are_steered_without_guidance(pipe):
    before = outputs_of(pipe, "conv_norm_out", steps=1, guidance_scale=1.0)[0]
    pipe.load_act_map(shift_map(NORM_OUT, 16, 3.0))
    after = outputs_of(pipe, "conv_norm_out", steps=1, guidance_scale=1.0)[0]

    torch.testing.assert_close(after[:, 0] - before[:, 0], torch.full_like(before[:, 0], 3.0))


@pytest.mark.parametrize("rows", ["cond", "both"])
def test_the_negative_prompt_is_steered_only_by_maps_for_both_rows(pipe, rows):
    embeds = []
    pipe.unet.register_forward_pre_hook(
        lambda _m, _a, kwargs: embeds.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    generate(pipe, steps=1, negative_prompt=["ugly", "blurry"])
    pipe.load_act_map(shift_map("text_encoder.final_layer_norm", 32, 3.0, rows=rows))
    generate(pipe, steps=1, negative_prompt=["ugly", "blurry"])

    (negative, positive), (steered_negative, steered_positive) = (e.chunk(2) for e in embeds)
    torch.testing.assert_close(steered_positive[..., 0], positive[..., 0] + 3)
    assert torch.equal(steered_negative, negative) == (rows == "cond")


@pytest.mark.parametrize("rows", ["cond", "both"])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_strengths_per_prompt_are_not_mixed_up(pipe, rows, guidance_scale):
    fit(pipe, rows=rows)
    options = {"guidance_scale": guidance_scale, "num_images_per_prompt": 2, "generator": None}
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mixed = generate(pipe, latents=noise, act_strength=[0.25, 1.0], **options)

    for strength, images in ((0.25, slice(0, 2)), (1.0, slice(2, 4))):
        alone = generate(pipe, latents=noise, act_strength=strength, **options)
        torch.testing.assert_close(mixed[images], alone[images], rtol=1e-3, atol=1e-3)


def test_a_schedule_sees_every_step_once(pipe):
    pipe.load_act_map(shift_map(NORM_OUT, 16, 3.0))
    seen = []

    def only_first(step, steps):
        seen.append((step, steps))
        return 1.0 if step == 0 else 0.0

    plain = outputs_of(pipe, "conv_norm_out", act_strength=0)
    outputs = outputs_of(pipe, "conv_norm_out", act_strength=only_first)

    assert seen == [(0, 3), (1, 3), (2, 3)]
    assert not torch.equal(outputs[0], plain[0])
    latest = outputs_of(pipe, "conv_norm_out", act_strength=lambda step, steps: float(step == steps - 1))
    assert torch.equal(latest[0], plain[0])
    assert torch.equal(latest[1], plain[1])
    assert not torch.equal(latest[2], plain[2])


def test_a_map_acts_on_the_denoiser_in_its_window_only(pipe):
    pipe.load_act_map(shift_map(NORM_OUT, 16, 3.0, window=(0.25, 0.75)), "middle")
    plain = outputs_of(pipe, "conv_norm_out", act_strength=0, steps=4, guidance_scale=1.0)
    steered = outputs_of(pipe, "conv_norm_out", steps=4, guidance_scale=1.0)

    assert torch.equal(steered[0], plain[0])
    torch.testing.assert_close(steered[1][:, 0], plain[1][:, 0] + 3)
    # The last step starts from other latents; without the map it gives what the plain pipeline gives for those.
    act_map = fit(pipe, "ink", window=(0.0, 0.5))
    assert act_map.metadata.window == (0.0, 0.5)
    assert act_map.metadata.timesteps == (0.0, 0.125, 0.25, 0.375)


def test_strengths_by_component_and_by_name(pipe):
    fit(pipe, "ink")
    fit(pipe, "pen", seed=5)
    pipe.set_act_maps(["ink", "pen"], [{"unet": 0.0, "text_encoder": 0.0}, 0.5])
    expected = generate(pipe)

    pipe.set_act_maps("pen", 0.5)
    assert torch.equal(generate(pipe), expected)
    pipe.set_act_maps(["ink", "pen"])
    assert torch.equal(generate(pipe, act_strength={"ink": 0.0, "pen": 0.5}), expected)


def test_two_maps_apply_in_the_order_given(pipe):
    double = ActMap({NORM_OUT: AffineMap(2 * torch.ones(16), torch.zeros(16))}, ActMapMetadata(name="double"))
    pipe.load_act_map(double)
    pipe.load_act_map(shift_map(NORM_OUT, 16, 3.0))
    before = outputs_of(pipe, "conv_norm_out", act_strength=0, steps=1, guidance_scale=1.0)[0][:, 0]

    pipe.set_act_maps(["double", "shift"])
    torch.testing.assert_close(outputs_of(pipe, "conv_norm_out", steps=1, guidance_scale=1.0)[0][:, 0], 2 * before + 3)
    pipe.set_act_maps(["shift", "double"])
    torch.testing.assert_close(
        outputs_of(pipe, "conv_norm_out", steps=1, guidance_scale=1.0)[0][:, 0], 2 * (before + 3)
    )


def test_bookkeeping(pipe):
    fit(pipe, "ink")
    pipe.load_act_map(shift_map(NORM_OUT, 16, 1.0), "bright")

    assert pipe.get_list_act_maps() == {"text_encoder": ["ink"], "unet": ["ink", "bright"]}
    assert pipe.get_active_act_maps() == ["ink", "bright"]
    pipe.set_act_maps("bright")
    assert pipe.get_active_act_maps() == ["bright"]
    pipe.disable_act()
    assert pipe.get_active_act_maps() == []
    assert torch.equal(generate(pipe), generate(pipe, act_strength=0))
    pipe.enable_act()
    pipe.delete_act_maps("bright")
    assert pipe.get_active_act_maps() == []
    assert pipe.get_list_act_maps() == {"text_encoder": ["ink"], "unet": ["ink"]}
    pipe.unload_act_maps()
    assert pipe.get_list_act_maps() == {}


def test_save_and_load_give_the_same_images(pipe, tmp_path):
    fit(pipe, "ink")
    expected = generate(pipe)
    path = pipe.save_act_map(tmp_path / "maps", "ink")

    fresh = StableDiffusionACTPipeline(**pipe.components, requires_safety_checker=False)
    fresh.set_progress_bar_config(disable=True)
    assert fresh.load_act_map(path) == "ink"
    assert torch.equal(generate(fresh), expected)


def test_maps_are_no_part_of_the_saved_pipeline_and_do_not_pass_through_from_pipe(pipe, tmp_path):
    fit(pipe)
    plain = generate(pipe, act_strength=0)
    pipe.save_pretrained(tmp_path)
    reloaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    sibling = StableDiffusionPipeline.from_pipe(pipe, dtype=torch.float32)
    steered_sibling = StableDiffusionACTPipeline.from_pipe(sibling, dtype=torch.float32)

    for other in (reloaded, sibling, steered_sibling):
        other.set_progress_bar_config(disable=True)
        torch.testing.assert_close(generate(other), plain)
    assert sibling.unet is pipe.unet
    assert steered_sibling.get_list_act_maps() == {}


def test_a_failing_call_leaves_nothing_behind(pipe):
    fit(pipe)
    plain = generate(pipe, act_strength=0)

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, callback_on_step_end=fail)
    assert hook_count(pipe) == 0
    assert torch.equal(generate(pipe, act_strength=0), plain)
    pipe.unet.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        fit(pipe, "other")
    assert hook_count(pipe) == 1  # the failing hook itself
    assert "other" not in pipe.get_active_act_maps()
    assert pipe._progress_bar_config == {"disable": True}


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_loaded_before_or_after(pipe, when):
    lora = LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    sites = ["attn2.to_q", "conv_norm_out"]
    torch.manual_seed(1)
    if when == "before":
        pipe.unet.add_adapter(lora)
    act_map = fit(pipe, sites=sites)
    if when == "after":
        pipe.unet.add_adapter(lora)

    assert not any("base_layer" in site for site in act_map)
    site = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    pipe.set_act_maps([])
    path = site.removeprefix("unet.")
    before = outputs_of(pipe, path, steps=1, guidance_scale=1.0)[0]
    pipe.load_act_map(ActMap({site: act_map[site]}, ActMapMetadata(name="query")))
    after = outputs_of(pipe, path, steps=1, guidance_scale=1.0)[0]
    # The map acts behind the LoRA layer, on the output that the rest of the network sees.
    torch.testing.assert_close(after, act_map[site].apply(before), rtol=1e-4, atol=1e-4)


def test_steering_composes_with_offload_hooks_of_accelerate(pipe):
    fit(pipe)
    expected = generate(pipe)
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))

    torch.testing.assert_close(generate(pipe), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_fitted_in_float32_and_steered_in_their_own_type(dtype):
    pipe = StableDiffusionACTPipeline(**tiny_models.components()).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    act_map = fit(pipe)
    steered = generate(pipe)

    assert all(affine.scale.dtype == torch.float32 for affine in act_map.values())
    assert steered.dtype == dtype
    assert torch.isfinite(steered).all()
    assert not torch.equal(steered, generate(pipe, act_strength=0))


def test_prompt_embeds_make_text_encoder_maps_inert_with_a_warning(pipe, caplog):
    pipe.load_act_map(shift_map("text_encoder.final_layer_norm", 32, 3.0))
    embeds, negative = pipe.encode_prompt(["a cat", "a dog"], "cpu", 1, True)
    options = {
        "prompt_embeds": embeds,
        "negative_prompt_embeds": negative,
        "num_inference_steps": 1,
        "output_type": "latent",
    }
    noise = torch.randn(2, 4, 8, 8)

    plain = pipe(latents=noise, act_strength=0, **options).images
    with caplog.at_level(logging.WARNING):
        steered = pipe(latents=noise, **options).images
    assert torch.equal(plain, steered)
    assert "prompt_embeds are given" in caplog.text


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda p: fit(p, "ink"), "already loaded"),
        (
            lambda p: p.load_act_map(shift_map(NORM_OUT, 99, 1.0)),
            "fitted on 99 units at unet.conv_norm_out, this model has 16",
        ),
        (
            lambda p: p.load_act_map(shift_map("unet.mid_block.norm9", 16, 1.0)),
            "lacks, for example unet.mid_block.norm9",
        ),
        (lambda p: p.load_act_map(shift_map("transformer.norm", 16, 1.0)), "made for another model"),
        (lambda p: p.set_act_maps("inc"), "no act map named 'inc' is loaded; loaded: ink"),
        (lambda p: p.set_act_maps(["ink"], [1.0, 2.0]), "1 names and 2 strengths"),
        (lambda p: p.set_act_maps("ink", {"vae": 1.0}), "has no component 'vae', only text_encoder, unet"),
        (lambda p: generate(p, act_strength={"pen": 1.0}), "no act map named 'pen'"),
        (lambda p: generate(p, act_strength=[1.0, 0.5, 0.0]), "no multiple of the 3 row strengths"),
        (lambda p: p.delete_act_maps("pen"), "no act map named 'pen'"),
        (lambda p: p.fit_act_map([], TARGET), "source_prompts is empty"),
        (lambda p: p.fit_act_map(SOURCE, TARGET, call_options={"frames": 3}), "takes no 'frames'; it takes callback"),
        (lambda p: p.fit_act_map(SOURCE, "ink"), "target_prompts is one string"),
        (lambda p: p.fit_act_map(SOURCE, [None]), r"target_prompts\[0\] is NoneType"),
        (lambda p: p.fit_act_map(SOURCE, TARGET, rows="uncond"), "rows must be one of cond, both"),
        (lambda p: p.fit_act_map(SOURCE, TARGET, latents="mine"), "latents must be one of own, source, target"),
        (lambda p: p.fit_act_map(SOURCE, TARGET, timesteps=[1.0]), "fractions of the run"),
        (lambda p: p.fit_act_map(SOURCE, TARGET, window=(0.5, 0.5)), "window must be two fractions"),
        (lambda p: p.fit_act_map(SOURCE, TARGET, timesteps=0), "timesteps must be at least 1"),
        (lambda p: p.fit_act_map(SOURCE, TARGET, sites=["unet.conv_norm_ou"]), "closest: unet.conv_norm_out"),
    ],
)
def test_errors_name_the_culprit_and_the_remedy(pipe, action, message):
    fit(pipe, "ink")
    with pytest.raises(ValueError, match=message):
        action(pipe)
    assert hook_count(pipe) == 0


def test_a_pipeline_without_prompts_is_refused():
    kind = act_pipeline_class("DDPMPipeline")
    pipe = kind(
        diffusers.UNet2DModel(
            8,
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=4,
        ),
        diffusers.DDPMScheduler(),
    )
    with pytest.raises(ValueError, match="DDPMACTPipeline takes no prompt"):
        pipe.fit_act_map(SOURCE, TARGET)


def test_a_strength_of_another_type_is_refused(pipe):
    fit(pipe)
    with pytest.raises(TypeError, match="must be a number, a function"):
        pipe.set_act_maps("ink", {"unet": "strong"})
