"""Masks for pipelines: where in the picture maps act."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_pipelines
from actmaps.maps import ActMap, ActMapMetadata, AffineMap
from actmaps.pipelines import act_pipeline_class
from actmaps.pipelines.picture_mask import picture_mask
from tiny_pipelines import ARCHITECTURES

NORM_OUT = "unet.conv_norm_out"


def left_half(height=16, width=16):
    mask = torch.zeros(height, width)
    mask[:, : width // 2] = 1
    return mask


def as_picture(mask):
    return Image.fromarray((mask.numpy() * 255).astype(np.uint8))


@pytest.mark.parametrize(
    "given",
    [
        left_half(),
        left_half()[None, None],
        left_half().bool(),
        left_half().numpy(),
        (left_half() * 255).byte().numpy(),
        as_picture(left_half()),
        as_picture(left_half()).convert("RGB"),
        [as_picture(left_half())],
    ],
)
def test_masks_come_as_pictures_arrays_and_tensors(given):
    assert torch.equal(picture_mask(given, None), left_half()[None, None])


def test_a_mask_is_brought_to_the_size_of_the_picture():
    assert torch.equal(picture_mask(left_half(64, 128), (8, 16))[0, 0], left_half(8, 16))


def test_one_mask_for_each_picture():
    masks = picture_mask([as_picture(left_half()), as_picture(1 - left_half(32, 32))], (16, 16))
    assert torch.equal(masks[:, 0], torch.stack([left_half(), 1 - left_half()]))


@pytest.mark.parametrize(("mask", "message"), [(torch.zeros(4), "shape"), (torch.full((4, 4), 2.0), "between 0")])
def test_other_masks_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        picture_mask(mask, None)


@pytest.fixture
def pipe():
    return tiny_pipelines.build("sd", act_pipeline_class("StableDiffusionPipeline"))


def shift(by, window=(0.0, 1.0)):
    values = torch.zeros(16)
    values[0] = by
    return ActMap({NORM_OUT: AffineMap(torch.ones(16), values)}, ActMapMetadata(name=f"by {by}", window=window))


def first_channel(pipe, **options):
    """What the last norm puts out in its first unit for the conditional rows of the first step: (pictures, h, w)."""
    seen = []
    handle = pipe.unet.conv_norm_out.register_forward_hook(lambda *args: seen.append(args[-1].clone()))
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    pipe(["a fox", "a cat"], num_inference_steps=1, output_type="latent", generator=generators, **options)
    handle.remove()
    return seen[0][-2:, 0]


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_a_map_acts_where_the_mask_is_white(pipe, guidance_scale):
    plain = first_channel(pipe, guidance_scale=guidance_scale)
    pipe.load_act_map(shift(3.0))
    moved = first_channel(pipe, guidance_scale=guidance_scale, act_mask=as_picture(left_half(64, 64))) - plain

    torch.testing.assert_close(moved[:, :, :4], torch.full_like(moved[:, :, :4], 3.0))
    assert torch.equal(moved[:, :, 4:], torch.zeros_like(moved[:, :, 4:]))


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_every_picture_has_a_mask_of_its_own(pipe, guidance_scale):
    plain = first_channel(pipe, guidance_scale=guidance_scale)
    pipe.load_act_map(shift(3.0))
    masks = torch.stack([left_half(), 1 - left_half()])
    moved = first_channel(pipe, guidance_scale=guidance_scale, act_mask=masks) - plain

    expected = 3 * torch.stack([left_half(8, 8), 1 - left_half(8, 8)])
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux-dev", "pixart-sigma", "sana", "qwen-image"])
def test_masks_on_other_architectures(name):
    """A map that acts nowhere leaves the picture as it is; one that acts on a half changes it less than one that acts everywhere."""
    architecture = ARCHITECTURES[name]
    pipe = tiny_pipelines.build(name, act_pipeline_class(architecture.pipeline))
    size = {"height": 64, "width": 64}
    options = architecture.call | architecture.guided | size
    pipe.fit_act_map(
        ["a cat", "a dog"], ["a cat, ink", "a dog, ink"], name="ink", num_inference_steps=2, window=(0, 1), progress=False,
        call_options=architecture.call | size, timesteps=1,
    )  # fmt: skip

    def generate(**more):
        generator = torch.Generator().manual_seed(0)
        return pipe("a fox", num_inference_steps=2, output_type="latent", generator=generator, **options, **more)[
            0
        ].clone()

    plain = generate(act_strength=0)
    assert torch.equal(generate(act_mask=torch.zeros(64, 64)), plain)
    half, whole = (
        (generate(act_mask=mask) - plain).square().sum() for mask in (left_half(64, 64), torch.ones(64, 64))
    )
    assert 0 < half < whole


def test_streams_that_join_text_and_picture_otherwise_are_refused_by_name():
    pipe = tiny_pipelines.build("lumina-2", act_pipeline_class("Lumina2Pipeline"))
    options = ARCHITECTURES["lumina-2"].call
    pipe.fit_act_map(["a cat"], ["a dog"], name="ink", num_inference_steps=2, progress=False, call_options=options)
    with pytest.raises(ValueError, match=r"transformer.layers.0.* finds no positions of the picture"):
        pipe("a fox", num_inference_steps=2, output_type="latent", act_mask=torch.ones(32, 32), **options)
