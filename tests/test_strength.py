"""Strengths over the run, and over the parts of a map."""

from __future__ import annotations

import pytest
import torch

import tiny_models
from actmaps import StableDiffusionACTPipeline, strength_curve, strength_window
from actmaps.maps import ActMap, ActMapMetadata, AffineMap
from actmaps.pipelines.strength import parts_of

SITES = ["text_encoder.final_layer_norm", "unet.down_blocks.0.resnets.0.norm1", "unet.down_blocks.1.resnets.0.norm1", "unet.conv_norm_out"]  # fmt: skip


def test_a_curve_follows_straight_lines_and_holds_its_ends():
    curve = strength_curve({0.2: 1.0, 0.6: 0.5, 0.8: 0.0})

    assert [curve(step, 10) for step in (0, 2, 4, 6, 7, 8, 9)] == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])


def test_a_curve_of_one_point_is_constant():
    assert [strength_curve({0.5: 0.7})(step, 4) for step in range(4)] == [0.7] * 4


def test_a_window_begins_with_its_start_and_ends_before_its_end():
    window = strength_window(0.25, 0.75, 0.8)

    assert [window(step, 4) for step in range(4)] == [0.0, 0.8, 0.8, 0.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: strength_curve({}), "points must map fractions"),
        (lambda: strength_curve({1.5: 1.0}), "points must map fractions"),
        (lambda: strength_window(0.6, 0.6), "0 <= start < end <= 1"),
    ],
)
def test_malformed_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_longest_name_decides_and_what_is_left_out_has_one():
    parts = parts_of({"unet": 0.5, "unet.down_blocks.1": 0.0}, SITES)

    assert parts == [([SITES[0]], 1.0), ([SITES[1], SITES[3]], 0.5), ([SITES[2]], 0.0)]


def test_names_end_with_a_dot_or_a_stream():
    sites = ["transformer.blocks.1:image", "transformer.blocks.10:image"]

    assert parts_of({"transformer.blocks.1": 0.0}, sites) == [([sites[0]], 0.0), ([sites[1]], 1.0)]


@pytest.fixture
def pipe():
    pipe = StableDiffusionACTPipeline(**tiny_models.components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", num_inference_steps=4, output_type="latent", generator=generator, **options).images


def fitted(pipe):
    return pipe.fit_act_map(["a cat", "a dog"], ["a cat, ink", "a dog, ink"], name="ink", num_inference_steps=4, progress=False)  # fmt: skip


def test_blocks_have_strengths_of_their_own(pipe):
    act_map = fitted(pipe)
    pipe.set_act_maps("ink", {"unet": 0.6, "unet.up_blocks": 0.0})
    by_block = generate(pipe)

    without = [site for site in act_map if not site.startswith("unet.up_blocks")]
    pipe.load_act_map(act_map.select(without), "rest")
    pipe.set_act_maps("rest", 0.6)
    assert torch.equal(generate(pipe), by_block)
    assert torch.equal(generate(pipe, act_strength={"rest": {"unet": 0.6}}), by_block)


def test_a_block_that_the_map_lacks_is_refused_by_name(pipe):
    fitted(pipe)
    with pytest.raises(ValueError, match=r"has no component 'unet.side_blocks', only unet, and no site"):
        pipe.set_act_maps("ink", {"unet.side_blocks": 0.0})


def test_the_window_of_a_call_takes_the_place_of_the_maps_own(pipe):
    by = torch.zeros(16)
    by[0] = 3.0
    site = "unet.conv_norm_out"
    early = ActMap({site: AffineMap(torch.ones(16), by)}, ActMapMetadata(name="early", window=(0.0, 0.25)))
    pipe.load_act_map(early)

    whole = generate(pipe, act_window=(0.0, 1.0))
    assert not torch.equal(whole, generate(pipe))
    assert torch.equal(generate(pipe, act_window=(0.0, 0.25)), generate(pipe))
    pipe.unload_act_maps()
    pipe.load_act_map(ActMap(early, ActMapMetadata(name="always")))
    assert torch.equal(generate(pipe), whole)
    assert torch.equal(generate(pipe, act_strength=strength_window(0, 0.25)), generate(pipe, act_window=(0, 0.25)))
    with pytest.raises(ValueError, match="act_window must be two fractions"):
        generate(pipe, act_window=(0.5, 0.5))
