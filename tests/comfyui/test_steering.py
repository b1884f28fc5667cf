"""Steering MODEL and CLIP on real ComfyUI: what it does, and that nothing of it remains."""

import gc
import weakref

import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper

from actmaps.maps import ActMap, steer
from actmaps.nodes.apply import ACTApplyMap, ACTBlendMaps
from actmaps.nodes.demo_model import load_demo_model
from actmaps.nodes.steering import AppliedMap, _kept, steered_clip, steered_model
from actmaps.nodes.translation import denoiser_places
from runs import SUBJECT, hooks, instance_forwards, sample, strong_map


@pytest.fixture(scope="module")
def model(demo):
    return demo[0]


@pytest.fixture(scope="module")
def clip(demo):
    return demo[1]


@pytest.fixture(scope="module")
def act_map(model):
    return strong_map(model)


@pytest.fixture(scope="module")
def plain(model, clip):
    return sample(model, clip)


@pytest.fixture(scope="module")
def steered(model, clip, act_map):
    return sample(steered_model(model, AppliedMap(act_map)), clip)


def lora(model, clip, strength=1.0):
    """MODEL and CLIP with a LoRA on some layers of both."""
    generator = torch.Generator().manual_seed(5)
    state = {}
    layers = {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (64, 128),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q": (192, 192),
    }
    for name, (out, into) in layers.items():
        state[f"{name}.lora_down.weight"] = torch.randn(4, into, generator=generator)
        state[f"{name}.lora_up.weight"] = 0.1 * torch.randn(out, 4, generator=generator)
        state[f"{name}.alpha"] = torch.tensor(4.0)
    return comfy.sd.load_lora_for_models(model, clip, state, strength, strength)


# What it does


def test_a_map_changes_the_picture_and_strength_zero_changes_no_bit(model, clip, act_map, plain, steered):
    assert (steered.latents - plain.latents).abs().mean() > 0.1
    zero = sample(steered_model(model, AppliedMap(act_map, 0.0)), clip)
    assert torch.equal(zero.latents, plain.latents)


def test_it_steers_as_hooks_on_the_same_places_do(model, clip, act_map, steered):
    with steer(denoiser_places(model.model), act_map) as steering:
        steering.rows = torch.tensor([0.0, 1.0])  # ComfyUI runs the negative conditioning first
        by_hooks = sample(model, clip)
    torch.testing.assert_close(by_hooks.latents, steered.latents, rtol=1e-5, atol=1e-5)


def test_positive_rows_are_steered_and_negative_ones_are_not(model, clip, act_map, plain):
    """At guidance g the first step is uncond + g (cond - uncond): two guidance scales tell the two apart."""
    positive, both = (steered_model(model, AppliedMap(act_map, rows=rows)) for rows in ("positive", "both"))
    runs = {
        (name, g): sample(m, clip, cfg=g, steps=1).latents
        for name, m in {"plain": model, "positive": positive, "both": both}.items()
        for g in (2.0, 7.0)
    }
    uncond = {name: (7 * runs[name, 2.0] - 2 * runs[name, 7.0]) / 5 for name in ("plain", "positive", "both")}
    torch.testing.assert_close(uncond["positive"], uncond["plain"], rtol=1e-3, atol=1e-2)
    assert (uncond["both"] - uncond["plain"]).abs().mean() > 0.05


@pytest.mark.parametrize("cfg", [1.0, 7.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_guidance_scale_and_batch_size(model, clip, act_map, cfg, batch):
    steered = steered_model(model, AppliedMap(act_map))
    run = sample(steered, clip, cfg=cfg, batch=batch)
    first = sample(steered, clip, cfg=cfg, batch=1)
    assert run.latents.shape[0] == batch
    torch.testing.assert_close(run.latents[:1], first.latents, rtol=1e-3, atol=1e-2)
    assert not torch.allclose(run.latents, sample(model, clip, cfg=cfg, batch=batch).latents, atol=1e-2)


def test_prompts_of_different_token_lengths(model, clip, act_map):
    """Then ComfyUI calls the model once per conditioning; the same rows must be steered."""
    negative = ", ".join(["ugly"] * 40)
    lengths = [len(clip.tokenize(text)["l"]) for text in (SUBJECT, negative)]
    assert lengths == [1, 2] or lengths[0] != lengths[1]
    steered = steered_model(model, AppliedMap(act_map))
    runs = {
        (name, g): sample(m, clip, negative=negative, cfg=g, steps=1).latents
        for name, m in {"plain": model, "steered": steered}.items()
        for g in (2.0, 7.0)
    }
    uncond = {name: (7 * runs[name, 2.0] - 2 * runs[name, 7.0]) / 5 for name in ("plain", "steered")}
    torch.testing.assert_close(uncond["steered"], uncond["plain"], rtol=1e-3, atol=1e-2)
    assert (runs["steered", 7.0] - runs["plain", 7.0]).abs().mean() > 0.1


def test_a_map_acts_in_its_part_of_the_run_only(model, clip, act_map, plain):
    late = sample(steered_model(model, AppliedMap(act_map, start_percent=0.5)), clip)
    assert [torch.equal(a, b) for a, b in zip(late.steps, plain.steps, strict=True)] == [True, True, True, False]
    assert not torch.equal(late.latents, plain.latents)
    early = sample(steered_model(model, AppliedMap(act_map, end_percent=0.5)), clip)
    assert [torch.equal(a, b) for a, b in zip(early.steps, plain.steps, strict=True)] == [True, False, False, False]
    whole = sample(steered_model(model, AppliedMap(act_map)), clip)
    assert torch.equal(early.steps[2], whole.steps[2])
    assert not torch.equal(early.steps[3], whole.steps[3])


def test_chained_maps_apply_in_the_order_of_the_chain(model, clip, act_map):
    other = strong_map(model, seed=1)
    chained = steered_model(steered_model(model, AppliedMap(act_map, 0.5)), AppliedMap(other, 0.7))
    with steer(denoiser_places(model.model), {act_map: 0.5, other: 0.7}) as steering:
        steering.rows = torch.tensor([0.0, 1.0])
        by_hooks = sample(model, clip)
    torch.testing.assert_close(sample(chained, clip).latents, by_hooks.latents, rtol=1e-5, atol=1e-5)


def test_the_same_map_twice_acts_twice(model, clip, act_map, steered):
    twice = steered_model(steered_model(model, AppliedMap(act_map, 0.5)), AppliedMap(act_map, 0.5))
    once = steered_model(model, AppliedMap(act_map, 0.5))
    assert not torch.allclose(sample(twice, clip).latents, sample(once, clip).latents, atol=1e-3)


# That nothing remains


def test_branches_are_bit_equal_to_runs_alone_in_every_order(model, clip, act_map, plain, steered):
    other = steered_model(model, AppliedMap(strong_map(model, seed=1)))
    alone = sample(other, clip)
    branches = {
        "plain": (model, plain),
        "steered": (steered_model(model, AppliedMap(act_map)), steered),
        "other": (other, alone),
    }
    for order in (("plain", "steered", "other"), ("steered", "plain", "other"), ("other", "steered", "plain")) * 2:
        for name in order:
            branch, expected = branches[name]
            assert torch.equal(sample(branch, clip).latents, expected.latents), (order, name)
    assert instance_forwards(model) == []
    assert hooks(model) == 0


class Stop(Exception):
    pass


def test_nothing_is_left_after_an_exception_within_the_model(model, clip, act_map, plain):
    branch = steered_model(model, AppliedMap(act_map))
    block = model.model.diffusion_model.middle_block[0]

    def fail(*_):
        raise Stop

    handle = block.register_forward_hook(fail)
    try:
        with pytest.raises(Stop):
            sample(branch, clip)
    finally:
        handle.remove()
    assert instance_forwards(model) == []
    assert torch.equal(sample(model, clip).latents, plain.latents)


def test_nothing_is_left_after_an_interrupt(model, clip, act_map, plain, steered):
    branch = steered_model(model, AppliedMap(act_map))

    def interrupt(_step):
        comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(branch, clip, at_step=interrupt)
    assert instance_forwards(model) == []
    assert torch.equal(sample(model, clip).latents, plain.latents)
    assert torch.equal(sample(branch, clip).latents, steered.latents)


def test_a_clone_that_goes_out_of_use_leaves_nothing(model, clip, act_map, plain, steered):
    branch = steered_model(model, AppliedMap(act_map))
    sample(branch, clip)
    reference = weakref.ref(branch)
    del branch
    gc.collect()
    assert reference() is None
    assert torch.equal(sample(model, clip).latents, plain.latents)
    assert torch.equal(sample(steered_model(model, AppliedMap(act_map)), clip).latents, steered.latents)


def test_a_model_that_goes_out_of_use_is_collected():
    model, clip, _ = load_demo_model()
    sample(steered_model(model, AppliedMap(strong_map(model))), clip, steps=1)
    reference = weakref.ref(model.model)
    assert reference() in _kept
    comfy.model_management.unload_all_models()
    del model, clip
    gc.collect()
    assert reference() is None


def test_steering_the_original_of_a_steered_model_is_not_seen_by_the_clone(model, clip, act_map, steered):
    branch = steered_model(model, AppliedMap(act_map))
    steered_model(branch, AppliedMap(strong_map(model, seed=1)))
    assert torch.equal(sample(branch, clip).latents, steered.latents)


# Together with what else patches models


def test_lora_before_and_after_are_the_same(model, clip, act_map, steered):
    before = lora(steered_model(model, AppliedMap(act_map)), clip)
    patched, clip_after = lora(model, clip)
    after = steered_model(patched, AppliedMap(act_map))
    one, other = sample(*before), sample(after, clip_after)
    assert torch.equal(one.latents, other.latents)
    assert not torch.allclose(one.latents, steered.latents, atol=1e-2)
    assert torch.equal(sample(steered_model(model, AppliedMap(act_map)), clip).latents, steered.latents)


def test_a_forward_that_someone_else_patched_goes_on_working(model, clip, act_map):
    name = "diffusion_model.input_blocks.1.0.in_layers.0"
    module = model.get_model_object(name)
    patched = model.clone()
    original = type(module).forward

    def halved(x):
        return 0.5 * original(module, x)

    patched.add_object_patch(f"{name}.forward", halved)
    both = sample(steered_model(patched, AppliedMap(act_map)), clip)
    sample(model, clip)  # takes the patch off
    module.forward = halved
    with steer(denoiser_places(model.model), act_map, rows=torch.tensor([0.0, 1.0])):
        expected = sample(model, clip)
    del module.forward
    torch.testing.assert_close(both.latents, expected.latents, rtol=1e-5, atol=1e-5)


def compiled(model):
    clone = model.clone()
    set_torch_compile_wrapper(clone, backend="eager")
    return clone


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_model_obeys_maps_put_on_before_and_after(model, clip, act_map, plain, steered):
    base = compiled(model)
    before = compiled(steered_model(model, AppliedMap(act_map)))
    after = steered_model(base, AppliedMap(act_map))
    for _ in range(2):
        for branch, expected in ((base, plain), (after, steered), (before, steered), (base, plain)):
            torch.testing.assert_close(sample(branch, clip).latents, expected.latents, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_model_is_not_compiled_again_for_another_strength(model, clip, act_map):
    base = compiled(model)
    sample(steered_model(base, AppliedMap(act_map, 0.5)), clip, steps=2)
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for strength in (0.6, 0.7, 0.8):
        compiled_run = sample(steered_model(base, AppliedMap(act_map, strength)), clip, steps=2)
        eager = sample(steered_model(model, AppliedMap(act_map, strength)), clip, steps=2)
        torch.testing.assert_close(compiled_run.latents, eager.latents, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames


def test_only_one_wrapper_stands_on_a_model_however_many_maps(model, act_map):
    chained = steered_model(steered_model(model, AppliedMap(act_map)), AppliedMap(act_map))
    assert len(chained.get_wrappers(WrappersMP.APPLY_MODEL, "actmaps")) == 1
    assert len(model.get_wrappers(WrappersMP.APPLY_MODEL, "actmaps")) == 0


# Masks


def left_half(pictures=1):
    mask = torch.zeros(pictures, 64, 64)
    mask[..., :32] = 1
    return mask


def test_a_mask_limits_the_change_to_a_region(model, clip, act_map, plain):
    branches = [
        apply(model, act_map, mask=mask, rows="both")[0]
        for mask in (left_half(), 1 - left_half(), torch.zeros(1, 5, 5))
    ]
    left, right, nowhere = (sample(branch, clip, steps=1).latents for branch in branches)
    one_step = sample(model, clip, steps=1).latents
    half = one_step.shape[-1] // 2
    for run, inside, outside in (
        (left, slice(None, half), slice(half, None)),
        (right, slice(half, None), slice(None, half)),
    ):
        change = (run - one_step).abs()
        assert change[..., inside].mean() > 1.5 * change[..., outside].mean()
    assert torch.equal(nowhere, one_step)


def test_a_mask_of_ones_is_no_mask_and_masks_do_not_stay(model, clip, act_map, steered):
    masked = sample(apply(model, act_map, mask=torch.ones(1, 100, 80))[0], clip)
    assert torch.equal(masked.latents, steered.latents)
    sample(apply(model, act_map, mask=left_half())[0], clip, steps=1)
    assert torch.equal(sample(apply(model, act_map)[0], clip).latents, steered.latents)


def test_each_picture_of_a_batch_may_have_a_mask_of_its_own(model, clip, act_map):
    masks = torch.cat([left_half(), torch.zeros(1, 64, 64), torch.ones(1, 64, 64)])
    several = sample(apply(model, act_map, mask=masks)[0], clip, batch=3, steps=1).latents
    plain, steered = (sample(m, clip, batch=3, steps=1).latents for m in (model, apply(model, act_map)[0]))
    torch.testing.assert_close(several[1], plain[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(several[2], steered[2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(several[0], steered[0], atol=1e-2)


def test_two_maps_share_a_picture(model, clip, act_map):
    """Each side of the chain sees its own mask, whatever the other's."""
    other = strong_map(model, seed=1)
    (first,) = apply(model, act_map, mask=left_half())[:1]
    (both,) = apply(first, other, mask=torch.zeros(1, 8, 8))[:1]
    expected = sample(first, clip, steps=2)
    torch.testing.assert_close(sample(both, clip, steps=2).latents, expected.latents)


# Strengths over the run


def test_a_curve_of_one_throughout_is_no_curve(model, clip, act_map, steered):
    for curve in ("0:1", "0:1, 0.3:1, 1:1", ""):
        assert torch.equal(sample(apply(model, act_map, strength_curve=curve)[0], clip).latents, steered.latents)


def test_a_curve_multiplies_the_strength(model, clip, act_map):
    by_curve, _ = apply(model, act_map, strength_model=0.8, strength_curve="0:0.5")
    by_strength, _ = apply(model, act_map, strength_model=0.4)
    assert torch.equal(sample(by_curve, clip).latents, sample(by_strength, clip).latents)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2"])
@pytest.mark.parametrize("percent", [0.25, 0.5])
def test_a_curve_that_falls_to_zero_ends_where_end_percent_does(model, clip, act_map, sampler, percent):
    by_curve, _ = apply(model, act_map, strength_curve=f"0:1, {percent - 0.0001:g}:1, {percent}:0")
    by_end, _ = apply(model, act_map, end_percent=percent)
    expected = sample(by_end, clip, sampler=sampler).latents
    assert torch.equal(sample(by_curve, clip, sampler=sampler).latents, expected)
    assert not torch.equal(sample(apply(model, act_map)[0], clip, sampler=sampler).latents, expected)


@pytest.mark.parametrize(
    ("sampler", "places"),
    [("euler", [0, 0.25, 0.5, 0.75]), ("heun", [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75])],
)
def test_a_curve_is_read_at_the_place_of_each_call(model, clip, act_map, sampler, places):
    read = []

    def curve(step, steps):
        read.append(step / steps)
        return 1.0

    sample(steered_model(model, AppliedMap(act_map, curve=curve)), clip, sampler=sampler)
    assert read == pytest.approx(places, abs=2e-3)


def test_a_curve_does_not_act_outside_of_the_part_of_the_run(model, clip, act_map):
    whole = sample(apply(model, act_map, end_percent=0.5)[0], clip)
    longer = sample(apply(model, act_map, end_percent=0.5, strength_curve="0.5:1, 0.6:2")[0], clip)
    assert torch.equal(longer.latents, whole.latents)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_model_is_not_compiled_again_along_a_curve(model, clip, act_map):
    base = compiled(model)
    sample(steered_model(base, AppliedMap(act_map)), clip)
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    falling = {"strength_curve": "0:1.2, 1:0.2"}
    run = sample(apply(base, act_map, **falling)[0], clip)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames
    torch.testing.assert_close(
        run.latents, sample(apply(model, act_map, **falling)[0], clip).latents, rtol=1e-4, atol=1e-4
    )


# Strengths of blocks


def test_a_block_at_zero_is_a_map_without_its_sites(model, clip, act_map, steered):
    rest = act_map.select(exclude=r"unet\.up_blocks\..*")
    by_block = sample(apply(model, act_map, block_strengths="unet.up_blocks: 0")[0], clip).latents
    assert torch.equal(by_block, sample(apply(model, rest)[0], clip).latents)
    assert not torch.equal(by_block, steered.latents)


def test_one_factor_for_all_sites_multiplies_both_strengths(model, clip):
    both = strong_map(model, clip)
    halved = apply(model, both, clip, block_strengths="unet: 0.5\ntext_encoder: 0.5")
    plain = apply(model, both, clip, strength_model=0.5, strength_clip=0.5)
    runs = [sample(m, c, negative_clip=clip).latents for m, c in (halved, plain)]
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-4)
    assert torch.equal(embeddings(apply(model, both, clip, block_strengths="text_encoder: 0")[1]), embeddings(clip))


def test_blocks_at_one_are_the_map_itself_and_all_at_zero_the_models_themselves(model, clip, act_map, steered):
    ones, _ = apply(model, act_map, block_strengths="unet: 1\nunet.up_blocks: 1")
    assert torch.equal(sample(ones, clip).latents, steered.latents)
    assert apply(model, act_map, clip, block_strengths="unet: 0") == (model, clip)


def test_misspelt_strengths_are_refused_by_the_node(model, act_map):
    with pytest.raises(ValueError, match=r"begins with 'unet\.upblocks'; closest: unet\.up_blocks"):
        apply(model, act_map, block_strengths="unet.upblocks: 0.5")
    with pytest.raises(ValueError, match="'60:0' is outside of the run"):
        apply(model, act_map, strength_curve="60:0")


# Text encoders


def embeddings(clip, text=SUBJECT):
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0]


def test_a_steered_clip_moves_embeddings_and_leaves_the_original_alone(clip):
    act_map = strong_map(clip=clip)
    before = embeddings(clip)
    moved = steered_clip(clip, act_map, 1.0)
    first = embeddings(moved)
    assert (first - before).abs().mean() > 0.05
    for _ in range(2):
        assert torch.equal(embeddings(clip), before)
        assert torch.equal(embeddings(moved), first)
    assert torch.equal(embeddings(steered_clip(clip, act_map, 0.0)), before)


def test_a_steered_clip_equals_hooks_on_the_same_places(clip):
    from actmaps.nodes.translation import encoder_places

    one, other = strong_map(clip=clip), strong_map(clip=clip, seed=1)
    chained = steered_clip(steered_clip(clip, one, 0.5), other, 0.8)
    places = {site: p for found in encoder_places(clip.cond_stage_model).values() for site, p in found.items()}
    with steer(places, {one: 0.5, other: 0.8}):
        expected = embeddings(clip)
    torch.testing.assert_close(embeddings(chained), expected, rtol=1e-5, atol=1e-5)


def test_long_and_weighted_prompts_are_steered(clip):
    moved = steered_clip(clip, strong_map(clip=clip), 1.0)
    for text in ("(red:1.4) apple", ", ".join(["red apple"] * 20)):
        assert embeddings(moved, text).shape == embeddings(clip, text).shape
        assert (embeddings(moved, text) - embeddings(clip, text)).abs().mean() > 0.05


def test_lora_on_a_steered_clip(model, clip):
    moved = steered_clip(clip, strong_map(clip=clip), 1.0)
    expected = embeddings(moved)
    _, patched = lora(model, moved)
    assert torch.equal(embeddings(patched), expected)  # this LoRA has no layer of the text encoder


# The nodes


def apply(model, act_map, clip=None, **options):
    defaults = {
        "strength_model": 1.0,
        "strength_clip": 1.0,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "rows": "positive",
    }
    return ACTApplyMap.execute(model=model, clip=clip, act_map=act_map, **{**defaults, **options}).result


def test_the_node_steers_model_and_clip_each_at_its_own_strength(model, clip):
    both = strong_map(model, clip)
    steered, encoder = apply(model, both, clip, strength_model=0.5, strength_clip=0.3)
    expected = sample(
        steered_model(model, AppliedMap(both.select(r"unet\..*"), 0.5)),
        steered_clip(clip, both, 0.3),
        negative_clip=clip,
    )
    assert torch.equal(sample(steered, encoder, negative_clip=clip).latents, expected.latents)


def test_strength_zero_gives_the_models_themselves(model, clip):
    assert apply(model, strong_map(model, clip), clip, strength_model=0.0, strength_clip=0.0) == (model, clip)


def test_sites_that_the_model_lacks_are_listed(model, clip, act_map):
    foreign = ActMap({**act_map, "unet.up_blocks.3.resnets.0.norm1": act_map["unet.mid_block.resnets.0.norm1"]})
    with pytest.raises(ValueError, match=r"lacks:\n  unet\.up_blocks\.3\.resnets\.0\.norm1\n.*set partial"):
        apply(model, foreign, clip)
    steered, _ = apply(model, foreign, clip, partial=True)
    assert torch.equal(sample(steered, clip).latents, sample(steered_model(model, AppliedMap(act_map)), clip).latents)


def test_a_map_with_nothing_in_common_is_refused_even_partially(model, clip, act_map):
    foreign = ActMap({"transformer.blocks.0.norm1": act_map["unet.mid_block.resnets.0.norm1"]})
    with pytest.raises(ValueError, match="no site in common"):
        apply(model, foreign, clip, partial=True)


def test_a_map_of_another_width_is_refused_when_it_runs(model, clip, act_map):
    site = "unet.mid_block.resnets.0.norm1"
    wide = ActMap({site: act_map["unet.down_blocks.0.resnets.0.norm1"]})
    steered, _ = apply(model, wide, clip)
    with pytest.raises(
        ValueError, match=r"was fitted on 64 units at unet\.mid_block\.resnets\.0\.norm1, this model has 192"
    ):
        sample(steered, clip)


def test_a_map_of_the_text_encoder_needs_clip(model, clip):
    both = strong_map(model, clip)
    with pytest.raises(ValueError, match="They belong to the text encoders: connect CLIP"):
        apply(model, both)
    steered, nothing = apply(model, both, partial=True)
    assert nothing is None
    assert not torch.equal(sample(steered, clip).latents, sample(model, clip).latents)


def test_an_empty_part_of_the_run_is_refused(model, act_map):
    with pytest.raises(ValueError, match=r"start_percent \(0\.6\) must be below end_percent \(0\.6\)"):
        apply(model, act_map, start_percent=0.6, end_percent=0.6)


def test_blending_adds_the_moves_up(model):
    one, other = strong_map(model), strong_map(model, seed=1)
    (blended,) = ACTBlendMaps.execute(map_a=one, weight_a=0.5, map_b=other, weight_b=0.25).result
    site = "unet.mid_block.resnets.0.norm1"
    torch.testing.assert_close(blended[site].shift, 0.5 * one[site].shift + 0.25 * other[site].shift)
    (same,) = ACTBlendMaps.execute(map_a=one, weight_a=0.5, map_b=one, weight_b=0.5).result
    torch.testing.assert_close(same[site].shift, one[site].shift)
