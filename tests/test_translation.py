"""Translation of names without ComfyUI: tables of weights and trees of modules as ComfyUI has them."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import actmaps


@pytest.fixture(scope="module")
def translation():
    """The module alone: its package imports ComfyUI."""
    path = Path(actmaps.__file__).parent / "nodes" / "translation.py"
    spec = importlib.util.spec_from_file_location("actmaps.nodes_apart.translation", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


def tree(**modules):
    """Modules by path, in which two underscores stand for a dot."""
    root = nn.Module()
    for path, module in modules.items():
        *levels, last = path.split("__")
        parent = root
        for level in levels:
            if level not in parent._modules:
                parent.add_module(level, nn.Module())
            parent = parent._modules[level]
        parent.add_module(last, module)
    return root


def test_a_module_is_translated_with_its_weight(translation):
    root = tree(img_in=nn.Linear(2, 3))
    table = {"x_embedder.weight": "img_in.weight", "x_embedder.bias": "img_in.bias"}
    places = translation.translated("transformer", root, table, {})
    assert list(places) == ["transformer.x_embedder"]
    assert places["transformer.x_embedder"].module is root.img_in


def test_weights_called_scale_count_and_bare_parameters_do_not(translation):
    root = tree(norm__query_norm=nn.LayerNorm(2), block=nn.Linear(1, 1))
    table = {"attn.norm_q.weight": "norm.query_norm.scale", "scale_shift_table": "block.scale_shift_table"}
    assert list(translation.translated("transformer", root, table, {})) == ["transformer.attn.norm_q"]


def test_a_part_of_a_fused_projection_is_a_slice_of_its_channels(translation):
    root = tree(qkv=nn.Linear(2, 6))
    table = {f"to_{name}.weight": ("qkv.weight", (0, 2 * i, 2)) for i, name in enumerate("qkv")}
    places = translation.translated("transformer", root, table, {})
    x = torch.arange(12.0).view(1, 2, 6)
    assert {site: place.read(x).tolist() for site, place in places.items()} == {
        "transformer.to_q": [[[0, 1], [6, 7]]],
        "transformer.to_k": [[[2, 3], [8, 9]]],
        "transformer.to_v": [[[4, 5], [10, 11]]],
    }


def test_a_rearranged_weight_has_no_place(translation):
    root = tree(modulation=nn.Linear(2, 4))
    table = {"norm_out.linear.weight": ("modulation.weight", None, lambda weight: weight.flip(0))}
    assert translation.translated("transformer", root, table, {}) == {}


@pytest.mark.parametrize("ours", ["absent", "identity"])
def test_what_the_model_lacks_has_no_place(translation, ours):
    root = tree(identity=nn.Identity())
    assert translation.translated("unet", root, {"conv_shortcut.weight": f"{ours}.weight"}, {}) == {}


def test_kin_are_found_beside_a_translated_module(translation):
    part = translation.Part
    kin = {
        (".ff.net.2", ".mlp.2"): {
            ".norm2": part(".norm"),
            ":image": part("", 0),
            ":text": part("", 1),
            ".none": part(".x"),
        }
    }
    root = tree(twin__0__norm=nn.LayerNorm(2), twin__0__mlp__2=nn.Linear(2, 2), twin__1__norm=nn.LayerNorm(2))
    table = {f"blocks.{i}.ff.net.2.weight": f"twin.{i}.mlp.2.weight" for i in range(2)}
    places = translation.translated("transformer", root, table, kin)
    # The second block lacks the module from which the others are found.
    assert set(places) == {f"transformer.blocks.0{suffix}" for suffix in (".ff.net.2", ".norm2", ":image", ":text")}
    block = root.twin._modules["0"]
    assert places["transformer.blocks.0.norm2"].module is block.norm
    streams = [places[f"transformer.blocks.0:{stream}"] for stream in ("image", "text")]
    assert [(place.module, place.entry) for place in streams] == [(block, 0), (block, 1)]


def test_children_come_before_their_parents_and_inner_names_before_outer_ones(translation):
    """A block may put out what its last layer does; a map on both must move the layer first."""
    part = translation.Part
    root = tree(block__norm=nn.LayerNorm(2), block__proj=nn.Linear(2, 2))
    table = {"layers.0.attn.to_out.0.weight": "block.proj.weight", "layers.0.norm.weight": "block.norm.weight"}
    kin = {(".attn.to_out.0", ".proj"): {":image": part(""), ".attn:image": part(".proj")}}
    places = translation.translated("transformer", root, table, kin)
    assert [site.removeprefix("transformer.layers.0") for site in places] == [
        ".norm", ".attn.to_out.0", ".attn:image", ":image"
    ]  # fmt: skip


def test_convolutions_and_comfyuis_blocks_have_channels_first(translation):
    kind = type("ResBlock", (nn.Module,), {})
    root = tree(conv=nn.Conv2d(2, 3, 1), block=kind(), linear=nn.Linear(2, 3))
    table = {f"{name}.weight": f"{name}.weight" for name in ("conv", "block", "linear")}
    places = translation.translated("unet", root, table, {})
    x = torch.zeros(1, 3, 4, 4)
    assert {site: place.channel_dim(x) for site, place in places.items()} == {
        "unet.conv": 1, "unet.block": 1, "unet.linear": -1
    }  # fmt: skip


def test_streams_in_one_sequence_are_told_apart_by_the_number_of_text_tokens(translation):
    root = tree(single_blocks__0__linear2=nn.Linear(2, 2), single_blocks__0__pre_norm=nn.LayerNorm(2))
    table = {"single_transformer_blocks.0.proj_out.weight": "single_blocks.0.linear2.weight"}
    places = translation.translated("transformer", root, table, translation._FLUX)
    x = torch.arange(5.0).view(1, 5, 1)
    text, image = (places[f"transformer.single_transformer_blocks.0:{stream}"] for stream in ("text", "image"))
    token = translation.text_tokens.set(2)
    assert text.read(x).flatten().tolist() == [0, 1]
    assert image.read(x).flatten().tolist() == [2, 3, 4]
    translation.text_tokens.reset(token)
    with pytest.raises(RuntimeError, match=r"set translation\.text_tokens"):
        image.read(x)


def test_norms_of_wan_change_their_numbers(translation):
    layers = {f"blocks__0__{name}": nn.LayerNorm(2) for name in ("norm1", "norm2", "norm3")}
    root = tree(**layers, blocks__0__ffn__2=nn.Linear(2, 2), blocks__0__self_attn__q=nn.Linear(2, 2))
    places = translation.translated("transformer", root, translation.wan_to_diffusers(root), translation._WAN)
    block = root.blocks._modules["0"]
    expected = {"norm1": block.norm1, "norm2": block.norm3, "norm3": block.norm2, "attn1.to_q": block.self_attn.q}
    assert {name: places[f"transformer.blocks.0.{name}"].module for name in expected} == expected


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        (["clip_l"], {"clip_l": 1}),
        (["clip_l", "clip_g"], {"clip_l": 1, "clip_g": 2}),
        (["t5xxl", "clip_l"], {"clip_l": 1, "t5xxl": 2}),
        (["clip_g", "clip_l", "t5xxl"], {"clip_l": 1, "clip_g": 2, "t5xxl": 3}),
        (["clip_l", "llama"], {"llama": 1, "clip_l": 2}),
        (["clip_l", "clip_g", "t5xxl", "llama"], {"clip_l": 1, "clip_g": 2, "t5xxl": 3, "llama": 4}),
        (["t5xxl"], {"t5xxl": 1}),
        (["qwen25_7b"], {"qwen25_7b": 1}),
    ],
)
def test_text_encoders_count_as_in_diffusers(translation, slots, expected):
    names = {slot: "text_encoder" if number == 1 else f"text_encoder_{number}" for slot, number in expected.items()}
    assert translation.encoder_names(slots) == names


@pytest.mark.parametrize(
    ("kind", "path", "site"),
    [
        ("CLIPTextModel", "text_model__encoder__norm", "text_encoder.encoder.norm"),
        ("T5", "encoder__final_layer_norm", "text_encoder.encoder.final_layer_norm"),
        ("Llama2", "model__norm", "text_encoder.norm"),
        ("Qwen25_7BVLI", "model__norm", "text_encoder.model.language_model.norm"),
    ],
)
def test_text_encoders_have_the_levels_of_transformers(translation, kind, path, site):
    transformer = tree(**{path: nn.LayerNorm(2)})
    transformer.__class__ = type(kind, (nn.Module,), {})
    places = translation.places_of_encoder("text_encoder", transformer)
    assert [name for name, place in places.items() if place.is_norm] == [site]


@pytest.mark.parametrize("path", ["text_model__embeddings__token_embedding", "shared", "model__embed_tokens"])
def test_embeddings_have_no_place(translation, path):
    places = translation.places_of_encoder("text_encoder", tree(**{path: nn.Embedding(2, 2)}))
    assert not any(isinstance(place.module, nn.Embedding) for place in places.values())
