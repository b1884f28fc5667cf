"""The guider for modular diffusers gives what the ordinary pipeline with maps gives."""

from __future__ import annotations

import diffusers
import pytest
import torch

import tiny_pipelines
from actmaps import ACTGuidance
from actmaps.maps import ActMap, ActMapMetadata, AffineMap
from actmaps.pipelines import act_pipeline_class

SIZE = {"height": 16, "width": 16}
NEGATIVE = "ugly"


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipelines.build("sdxl", act_pipeline_class("StableDiffusionXLPipeline"))


@pytest.fixture(scope="module", params=["cond", "both"])
def act_map(request, pipe):
    prompts = ["a cat", "a dog"], ["a cat, ink", "a dog, ink"]
    return pipe.fit_act_map(*prompts, rows=request.param, num_inference_steps=4, progress=False, **SIZE)


def modular(pipe, guider):
    blocks = diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
    known = {
        name: part for name, part in pipe.components.items() if name in blocks.component_names and part is not None
    }
    blocks.update_components(**known, guider=guider)
    blocks.set_progress_bar_config(disable=True)
    return blocks


def generate(blocks):
    return blocks(
        prompt="a fox",
        negative_prompt=NEGATIVE,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        output="images",
        **SIZE,
    )


def ordinary(pipe, act_map, strength):
    name = pipe.load_act_map(act_map, "guided", strength=strength)
    try:
        return pipe(
            "a fox",
            negative_prompt=NEGATIVE,
            num_inference_steps=4,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **SIZE,
        ).images
    finally:
        pipe.delete_act_maps(name)


def test_the_guider_steers_as_the_pipeline_does(pipe, act_map):
    steered = generate(modular(pipe, ACTGuidance(act_map, 0.8, guidance_scale=5.0)))

    torch.testing.assert_close(steered, ordinary(pipe, act_map, 0.8), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(steered, ordinary(pipe, act_map, 0.0), rtol=1e-3, atol=1e-4)
    assert not any("forward" in vars(module) for module in pipe.unet.modules())


def test_strength_zero_is_plain_guidance(pipe, act_map):
    plain = generate(modular(pipe, diffusers.ClassifierFreeGuidance(guidance_scale=5.0)))

    assert torch.equal(generate(modular(pipe, ACTGuidance(act_map, 0.0, guidance_scale=5.0))), plain)


def test_the_map_acts_in_its_window(pipe, act_map):
    guider = ACTGuidance(act_map, guidance_scale=5.0, window=(0.25, 0.5))
    steered_steps = []
    pipe.unet.conv_norm_out.register_forward_pre_hook(
        lambda module, _args: steered_steps.append((guider._step, "forward" in vars(module)))
    )
    generate(modular(pipe, guider))

    both = act_map.metadata.rows == "both"
    assert steered_steps[-8:] == [(step, step == 1 and (call == 0 or both)) for step in range(4) for call in range(2)]


def test_a_copy_keeps_the_map(act_map):
    guider = ACTGuidance(act_map, 0.5, guidance_scale=5.0).new(guidance_scale=3.0)

    assert (guider.act_map, guider.strength, guider.guidance_scale) == (act_map, 0.5, 3.0)


def test_a_map_of_text_encoders_alone_is_refused():
    only_text = ActMap({"text_encoder.final_layer_norm": AffineMap.identity(4)}, ActMapMetadata(name="ink"))
    with pytest.raises(ValueError, match="'ink' acts on text_encoder only; a guider steers the denoiser"):
        ACTGuidance(only_text)
