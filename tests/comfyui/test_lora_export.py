"""Exported maps in ComfyUI: its own LoRA loader steers as the map itself does."""

import logging

import comfy.lora
import comfy.sd
import pytest
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from safetensors.torch import load_file
from twins import ALL

from actmaps.maps import ActMap, AffineMap, fold, steer
from actmaps.maps.lora_file import save_as_lora
from actmaps.nodes.apply import ACTApplyMap
from runs import encode, sample, strong_map

CPU = torch.device("cpu")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lora.safetensors"


def relative(found, expected):
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())


def modules_of(pipeline):
    return {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}


# The demo model


def test_the_stock_loader_steers_as_the_apply_node_does(demo, pipeline, path, caplog):
    model, clip, _ = demo
    act_map = strong_map(model, clip)
    assert {site.split(".")[0] for site in act_map} == {"unet", "text_encoder"}
    by_node = ACTApplyMap.execute(model, act_map, 0.7, 0.7, 0.0, 1.0, "both", clip=clip).args
    steered, plain = sample(*by_node).latents, sample(model, clip).latents

    assert save_as_lora(act_map, modules_of(pipeline), path, 0.7) == ()
    with caplog.at_level(logging.WARNING):
        by_lora = comfy.sd.load_lora_for_models(model, clip, load_file(path), 1.0, 1.0)
    assert not caplog.records
    assert relative(plain, steered) > 0.1
    assert relative(encode(by_lora[1], "red apple")[0][0], encode(by_node[1], "red apple")[0][0]) < 1e-5
    assert relative(sample(*by_lora).latents, steered) < 1e-4
    # Nothing of it remains.
    assert torch.equal(sample(model, clip).latents, plain)


def test_the_strength_of_the_loader_is_that_of_the_map(demo, pipeline, path):
    model, clip, _ = demo
    act_map = strong_map(model, clip)
    save_as_lora(act_map, modules_of(pipeline), path)
    for strengths in ((0.5, 1.0), (-0.3, 0.4)):
        steered = sample(*ACTApplyMap.execute(model, act_map, *strengths, 0.0, 1.0, "both", clip=clip).args)
        by_lora = comfy.sd.load_lora_for_models(model, clip, load_file(path), *strengths)
        assert relative(sample(*by_lora).latents, steered.latents) < 1e-4


# All families of models: those sites that fit into a LoRA file

SITES = {
    "sd15": r"unet\..*(norm\d?|conv_norm_out|conv\d?|conv_shortcut|proj_in|to_out\.0|net\.2|linear_2)",
    "sdxl": r"unet\..*(norm\d?|conv_norm_out|conv\d?|conv_shortcut|proj_in|to_out\.0|net\.2|linear_2)",
    "flux": r"transformer\..*(blocks\.\d\.norm|norm1|norm1_context|to_out\.0|to_add_out|net\.2|linear_\d|x_embedder|proj_out)",
    "sd3": r"transformer\..*(blocks\.\d\.norm1|blocks\.0\.norm1_context|to_out\.0|to_add_out|net\.2|linear_\d|pos_embed\.proj|proj_out)",
    "clip_l": r"text_encoder\..*(norm\d?|fc\d|[qkv]_proj|out_proj)",
    "clip_g": r"text_encoder_2\..*(norm\d?|fc\d|[qkv]_proj|out_proj)",
}  # fmt: skip


def units_of(module):
    weight = (module.linear if hasattr(module, "linear") else module).weight
    return weight.shape[1 if hasattr(module, "linear") else 0]


def map_of(pair, sites):
    generator = torch.Generator().manual_seed(0)
    maps = {}
    for site in sites:
        units = units_of(pair.theirs[site].module)
        draw = torch.randn(2, units, generator=generator)
        maps[site] = AffineMap(1 + 0.1 * draw[0], 0.1 * draw[1])
    return ActMap(maps)


def by_stock_loader(pair, state):
    """The run in ComfyUI with a LoRA file loaded, and how many weights it changes."""
    patcher = ModelPatcher(pair.model, CPU, CPU)
    if isinstance(pair.model, BaseModel):
        patcher, _ = comfy.sd.load_lora_for_models(patcher, None, state, 1.0, 1.0)
    else:
        patcher.add_patches(comfy.lora.load_lora(state, comfy.lora.model_lora_keys_clip(pair.model, {})))
    patcher.patch_model()
    try:
        with torch.no_grad():
            return pair.run_ours(), len(patcher.patches)
    finally:
        patcher.unpatch_model()


@pytest.mark.parametrize("name", SITES)
def test_every_family_is_steered_by_the_stock_loader(name, path, caplog):
    pair = ALL[name]()
    act_map = map_of(pair, ActMap({site: AffineMap.identity(1) for site in pair.theirs}).select(SITES[name]))
    components = {act_map.components[0]: pair.component}
    with torch.no_grad():
        plain = pair.run_theirs()
        with steer(components, act_map):
            steered = pair.run_theirs()
        with fold(components, act_map):
            folded = pair.run_theirs()
    assert relative(plain, steered) > 0.05
    assert relative(folded, steered) < 1e-5

    assert save_as_lora(act_map, components, path) == ()
    state = load_file(path)
    with caplog.at_level(logging.WARNING):
        by_lora, patched = by_stock_loader(pair, state)
    assert patched == len(state)
    assert not caplog.records
    assert relative(by_lora, folded) < 1e-4
    with torch.no_grad():
        assert relative(pair.run_ours(), plain) < 1e-4


def test_scales_of_t5_are_read(path):
    """Its norms have no bias, so that scales alone fit into the file."""
    pair = ALL["t5"]()
    sites = [site for site in pair.theirs if site.endswith("layer_norm")]
    act_map = ActMap({site: AffineMap(affine.scale, torch.zeros(32)) for site, affine in map_of(pair, sites).items()})
    component = {act_map.components[0]: pair.component}
    with torch.no_grad(), fold(component, act_map):
        folded = pair.run_theirs()
    save_as_lora(act_map, component, path)
    by_lora, patched = by_stock_loader(pair, load_file(path))
    assert patched == len(sites)
    assert relative(by_lora, folded) < 1e-4
