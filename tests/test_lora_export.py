"""The LoRA file: which weights it changes, by how much, under which names, and what does not fit into it."""

import json
import re

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import tiny_models
from actmaps.maps import ActMap, ActMapMetadata, AffineMap, fold
from actmaps.maps.lora_file import save_as_lora

NORM = "unet.down_blocks.0.attentions.0.transformer_blocks.0.norm1"
TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CLIP_SIZES = {"vocab_size": 20, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def strong_map(**units):
    """A map that moves every unit, by site."""
    generator = torch.Generator().manual_seed(0)
    draws = {site: torch.randn(2, count, generator=generator) for site, count in units.items()}
    metadata = ActMapMetadata(name="ink", rows="cond", window=(0.0, 0.6), costs=dict.fromkeys(units, (2.0, 1.0)))
    return ActMap({site: AffineMap(1 + 0.3 * draw[0], draw[1]) for site, draw in draws.items()}, metadata)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return tiny_models.unet()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "loras" / "ink.safetensors"


def clip(width):
    return CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_SIZES, hidden_size=width, projection_dim=4))


def flux():
    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=6, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def sd3():
    return SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
        caption_projection_dim=16, pooled_projection_dim=6, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip


def t5():
    return T5EncoderModel(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


# What it holds


def test_the_differences_are_those_that_folding_makes(unet, path):
    act_map = strong_map(**{NORM: 16, "unet.conv_norm_out": 16, "unet.conv_in": 16})
    assert save_as_lora(act_map, unet, path, 0.7) == ()
    differences, weights = load_file(path), {name: value.clone() for name, value in unet.state_dict().items()}
    assert all(value.dtype == torch.float32 for value in differences.values())
    names = {"diff": "weight", "diff_b": "bias"}
    with fold(unet, act_map, 0.7):
        for module in ("down_blocks.0.attentions.0.transformer_blocks.0.norm1", "conv_norm_out", "conv_in"):
            for ending, name in names.items():
                difference = differences.pop(f"lora_unet_{module.replace('.', '_')}.{ending}")
                before, after = (state[f"{module}.{name}"] for state in (weights, unet.state_dict()))
                torch.testing.assert_close(before + difference, after, rtol=1e-6, atol=1e-6)
    assert not differences


def test_the_model_is_left_as_it_is(unet, path):
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    save_as_lora(strong_map(**{NORM: 16}), unet, path)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_differences_grow_in_proportion_to_the_strength(unet, path):
    """So the strength in the program that loads the file is one of the map."""
    act_map = strong_map(**{NORM: 16, "unet.conv_in": 16})
    save_as_lora(act_map, unet, path)
    full = load_file(path)
    save_as_lora(act_map, unet, path, -0.25)
    for name, part in load_file(path).items():
        torch.testing.assert_close(part, -0.25 * full[name], rtol=1e-4, atol=1e-6)


def test_half_precision_models_are_exported_in_full(unet, path):
    half = tiny_models.unet().half()
    act_map = strong_map(**{"unet.conv_norm_out": 16})
    save_as_lora(act_map, half, path, 1e-4)
    expected = 1e-4 * (act_map["unet.conv_norm_out"].scale - 1) * half.conv_norm_out.weight.float()
    torch.testing.assert_close(
        load_file(path)["lora_unet_conv_norm_out.diff"], expected.detach(), rtol=1e-2, atol=1e-7
    )


def test_it_says_what_it_came_from_and_is_no_act_map(unet, path):
    save_as_lora(strong_map(**{NORM: 16}), unet, path, 0.7)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    origin = json.loads(metadata["actmaps_export"])
    assert metadata["format"] == "pt"
    assert (origin["name"], origin["strength"], origin["sites"]) == ("ink", 0.7, [NORM])
    assert (origin["rows"], origin["window"]) == ("cond", [0.0, 0.6])
    assert "costs" not in origin
    with pytest.raises(ValueError, match="is a safetensors file but no act map"):
        ActMap.load(path)


# What it calls the weights


@pytest.mark.parametrize(
    ("component", "make", "site", "units", "key"),
    [
        ("unet", tiny_models.unet, "mid_block.resnets.0.norm1", 32, "lora_unet_mid_block_resnets_0_norm1"),
        ("transformer", flux, "transformer_blocks.0.norm1", 16, "transformer.transformer_blocks.0.norm1.linear"),
        ("transformer", flux, "single_transformer_blocks.0.norm", 16, "transformer.single_transformer_blocks.0.norm.linear"),
        ("transformer", flux, "transformer_blocks.0.ff.net.2", 16, "transformer.transformer_blocks.0.ff.net.2"),
        ("transformer", sd3, "transformer_blocks.0.norm1", 16, "transformer.transformer_blocks.0.norm1.linear"),
        ("text_encoder", lambda: clip(8), "final_layer_norm", 8, "text_encoders.clip_l.transformer.text_model.final_layer_norm"),
        ("text_encoder", lambda: clip(1024), "final_layer_norm", 1024, "text_encoders.clip_h.transformer.text_model.final_layer_norm"),
        ("text_encoder_2", lambda: clip(8), "final_layer_norm", 8, "text_encoders.clip_g.transformer.text_model.final_layer_norm"),
    ],
)  # fmt: skip
def test_names_are_those_that_comfyui_reads(component, make, site, units, key, path):
    save_as_lora(strong_map(**{f"{component}.{site}": units}), {component: make()}, path)
    assert set(load_file(path)) == {f"{key}.diff", f"{key}.diff_b"}


@pytest.mark.parametrize(
    ("component", "make", "site", "key"),
    [
        ("text_encoder_2", t5, "encoder.final_layer_norm", "text_encoders.t5xxl.transformer.encoder.final_layer_norm.diff"),
        ("text_encoder_2", lambda: clip(8), "text_projection", "text_encoders.clip_g.transformer.text_projection.diff"),
    ],
)  # fmt: skip
def test_scales_need_no_bias(component, make, site, key, path):
    units = 4 if "projection" in site else 8
    act_map = ActMap({f"{component}.{site}": AffineMap(torch.full((units,), 2.0), torch.zeros(units))})
    model = make()
    save_as_lora(act_map, {component: model}, path)
    torch.testing.assert_close(load_file(path), {key: model.get_submodule(site).weight.detach()})


# What does not fit


@pytest.mark.parametrize(
    ("make", "site", "units", "reason"),
    [
        (tiny_models.unet, TO_Q, 16, "it has no bias for the map's shift"),
        (flux, "transformer.transformer_blocks.0.attn.to_q", 16, "a part of a larger layer"),
        (flux, "transformer.single_transformer_blocks.0.proj_mlp", 64, "a part of a larger layer"),
        (flux, "transformer.norm_out", 16, "keeps its rows in another order"),
        (sd3, "transformer.transformer_blocks.0.norm1_context", 16, "keeps its rows in another order"),
        (sd3, "transformer.transformer_blocks.0.norm2", 16, "it has no weight to fold into"),
        (t5, "text_encoder.encoder.final_layer_norm", 8, "it has no bias for the map's shift"),
        (lambda: nn.Sequential(nn.LayerNorm(8)), "model.0", 8, "has names for a Sequential"),
    ],
)
def test_what_does_not_fit_is_named_and_no_file_appears(make, site, units, reason, path):
    model = make()
    with pytest.raises(ValueError, match=rf"1 sites do not fit into a LoRA file:\s+{re.escape(site)}.*: .*{reason}"):
        save_as_lora(strong_map(**{site: units}), model, path)
    with pytest.raises(ValueError, match="nothing of act map 'ink' at strength 1 can be exported"):
        save_as_lora(strong_map(**{site: units}), model, path, partial=True)
    assert not path.parent.exists()


def test_partial_leaves_out_what_does_not_fit(unet, path):
    assert save_as_lora(strong_map(**{TO_Q: 16, NORM: 16}), unet, path, partial=True) == (TO_Q,)
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_norm1"
    assert set(load_file(path)) == {f"{key}.diff", f"{key}.diff_b"}


def test_other_files_and_strength_zero_are_refused(unet, path):
    with pytest.raises(ValueError, match=r"LoRA files are \.safetensors files, got 'ink\.ckpt'"):
        save_as_lora(strong_map(**{NORM: 16}), unet, path.with_suffix(".ckpt"))
    with pytest.raises(ValueError, match="at strength 0 can be exported"):
        save_as_lora(strong_map(**{NORM: 16}), unet, path, 0.0)
