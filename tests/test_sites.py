"""Sites: names, patterns, order, channel axes, and how outputs are read and written."""

from collections import namedtuple

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection
from transformers.modeling_outputs import BaseModelOutput

import tiny_models
from actmaps.maps import find_sites
from actmaps.maps.sites import (
    as_components,
    channel_dim,
    evaluating,
    is_norm,
    match_sites,
    read_output,
    replace_output,
    resolve,
    site_modules,
    unit_count,
)

NAMES = [
    "unet.down.norm1",
    "unet.down.xnorm1",
    "unet.up.norm1",
    "unet.up.norm2",
    "unet.block:image",
    "unet.block:text",
]


class Swapped(nn.Module):
    """Registers its layers in the opposite order of their use, and never uses one of them."""

    def __init__(self):
        super().__init__()
        self.last, self.first, self.unused = nn.LayerNorm(4), nn.LayerNorm(4), nn.LayerNorm(4)
        self.drop, self.batch = nn.Dropout(0.5), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.last(self.drop(self.batch(self.first(x))))


class JointTransformerBlock(nn.Module):
    """Returns (text, image), as SD3's blocks do."""

    def __init__(self, text=True):
        super().__init__()
        self.text = text

    def forward(self, x):
        return (x + 1 if self.text else None), x


# Patterns


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (r"unet\.down\..*", NAMES[:2]),
        (r".*norm\d", NAMES[:4]),
        (["norm1"], [NAMES[0], NAMES[2]]),
        (["up.norm2", "down.norm1"], [NAMES[0], NAMES[3]]),
        (("unet.down.xnorm1",), [NAMES[1]]),
        (["block"], NAMES[4:]),
        (["unet.block"], NAMES[4:]),
        (["block:text"], [NAMES[5]]),
        (r".*:image", [NAMES[4]]),
    ],
)
def test_patterns_are_suffix_lists_or_full_match_expressions(patterns, expected):
    assert match_sites(NAMES, patterns) == expected


def test_a_pattern_that_matches_nothing_lists_the_closest_names():
    with pytest.raises(
        ValueError, match=r"'unet\.dwn\.norm1' is not in the model; closest: unet\.down\.norm1, unet\.down"
    ):
        match_sites(NAMES, ["norm2", "unet.dwn.norm1"])
    with pytest.raises(ValueError, match=r"site pattern 'norm1' matches no site; closest: .*norm1"):
        match_sites(NAMES, "norm1")  # an expression must match the whole name


def test_malformed_and_empty_patterns_are_refused():
    with pytest.raises(ValueError, match=r"site pattern 'unet\.\(' is not a regular expression"):
        match_sites(NAMES, "unet.(")
    with pytest.raises(ValueError, match="list of site patterns is empty; use None"):
        match_sites(NAMES, [])


# Finding


def test_by_default_all_normalisation_layers_are_sites():
    unet = tiny_models.unet()
    norms = {f"unet.{n}" for n, m in unet.named_modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))}
    assert set(find_sites(unet)) == norms
    assert len(norms) > 20


def test_with_an_example_sites_come_in_execution_order_and_unreached_ones_are_left_out():
    model = Swapped()
    assert find_sites(model, ["last", "first", "unused"]) == ["model.last", "model.first", "model.unused"]
    for example in (torch.ones(2, 4), {"x": torch.ones(2, 4)}, lambda: model(torch.ones(2, 4))):
        assert find_sites(model, ["last", "first", "unused"], example=example) == ["model.first", "model.last"]


def test_in_a_unet_execution_order_is_not_registration_order():
    unet = tiny_models.unet()
    example = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": torch.randn(1, 5, 32),
    }
    order = find_sites(unet, example=example)
    assert sorted(order) == sorted(find_sites(unet))
    assert order != find_sites(unet)
    assert order[0] == "unet.down_blocks.0.resnets.0.norm1"
    assert order[-1] == "unet.conv_norm_out"


def test_tracing_leaves_the_model_as_it_was():
    model = Swapped().train()
    statistics = model.batch.running_mean.clone()
    state = torch.get_rng_state()
    find_sites(model, example=torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    assert model.training
    assert model.drop.training
    assert torch.equal(model.batch.running_mean, statistics)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_failing_example_leaves_no_hook():
    model = Swapped()
    with pytest.raises(RuntimeError):
        find_sites(model, example=torch.ones(2, 5))
    assert not any(module._forward_hooks for module in model.modules())


def test_an_example_that_reaches_no_site_is_refused():
    with pytest.raises(ValueError, match=r"reaches none of the 1 matching sites, for example model\.unused"):
        find_sites(Swapped(), ["unused"], example=torch.ones(2, 4))


def test_a_model_without_norms_must_be_told_its_sites():
    with pytest.raises(ValueError, match="no normalisation layer in model; name the sites"):
        find_sites(nn.Sequential(nn.Linear(2, 2)))
    assert find_sites(nn.Sequential(nn.Linear(2, 2)), ["0"]) == ["model.0"]


def test_several_components_need_a_function_as_example():
    components = {"a": Swapped(), "b": Swapped()}
    assert find_sites(components, ["a.first", "b.last"]) == ["a.first", "b.last"]
    with pytest.raises(ValueError, match="example must be a function"):
        find_sites(components, example=torch.ones(2, 4))
    order = find_sites(components, ["first"], example=lambda: [components[name](torch.ones(2, 4)) for name in "ba"])
    assert order == ["b.first", "a.first"]


def test_streams_are_sites_of_their_own():
    model = nn.Sequential(JointTransformerBlock())
    assert find_sites(model, ["0"]) == ["model.0:text", "model.0:image"]
    assert find_sites(model, ["0:image"], example=torch.ones(1)) == ["model.0:image"]


# Names


def test_components_are_named_after_the_architecture():
    assert list(as_components(tiny_models.unet())) == ["unet"]
    assert list(as_components(tiny_models.text_encoder(20))) == ["text_encoder"]
    assert list(as_components(nn.Identity())) == ["model"]
    assert list(as_components({"prior": nn.Identity()})) == ["prior"]


def test_components_must_be_modules():
    with pytest.raises(TypeError, match=r"component 'vae' is a str, not a torch\.nn\.Module"):
        as_components({"vae": "model"})
    with pytest.raises(ValueError, match="no model component given"):
        as_components({})


def test_text_encoders_have_the_same_names_with_and_without_the_text_model_level():
    config = CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, projection_dim=4
    )
    names = site_modules({"text_encoder": CLIPTextModelWithProjection(config)})
    assert "text_encoder.encoder.layers.0.layer_norm1" in names
    assert set(find_sites(tiny_models.text_encoder(20))) >= set(find_sites(CLIPTextModelWithProjection(config)))


def test_lora_changes_no_name():
    plain, adapted = tiny_models.unet(), tiny_models.unet()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), adapted)
    assert set(site_modules({"unet": adapted})) == set(site_modules({"unet": plain}))
    to_q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert unit_count(site_modules({"unet": adapted})[to_q]) == 16


def test_only_lora_parts_are_left_out():
    model = nn.ModuleDict({"flora_1": nn.Identity(), "my_base_layers": nn.Identity(), "lora_A": nn.Identity()})
    assert list(site_modules({"model": model})) == ["model.flora_1", "model.my_base_layers"]


def test_compiling_changes_no_name():
    plain = nn.Sequential(nn.Sequential(nn.GroupNorm(2, 4)), nn.GroupNorm(2, 4))
    names = list(site_modules({"model": plain}))
    plain[0], plain[1] = (torch.compile(part, backend="eager") for part in plain)
    compiled = site_modules({"model": torch.compile(plain, backend="eager")})
    assert list(compiled) == names == ["model.0", "model.0.0", "model.1"]
    assert compiled["model.1"] is plain[1]
    assert is_norm(compiled["model.1"])
    assert (unit_count(compiled["model.1"]), channel_dim(compiled["model.1"], torch.ones(1, 4, 2, 2))) == (4, 1)


# Axes and units


@pytest.mark.parametrize(
    ("module", "shape", "dim", "units"),
    [
        (nn.Conv2d(2, 6, 1), (1, 6, 4, 4), 1, 6),
        (nn.Conv1d(2, 6, 1), (1, 6, 4), 1, 6),
        (nn.ConvTranspose2d(2, 6, 1), (1, 6, 4, 4), 1, 6),
        (nn.GroupNorm(2, 6), (1, 6, 4, 4), 1, 6),
        (nn.GroupNorm(2, 6), (1, 6), -1, 6),
        (nn.LayerNorm(6), (1, 4, 6), -1, 6),
        (nn.LayerNorm(6), (1, 4, 2, 6), -1, 6),
        (nn.RMSNorm(6), (1, 4, 6), -1, 6),
        (nn.Linear(2, 6), (1, 4, 6), -1, 6),
        (nn.Identity(), (1, 4, 6), -1, None),
    ],
)
def test_convolutional_outputs_count_units_along_dim_1(module, shape, dim, units):
    assert channel_dim(module, torch.zeros(shape)) == dim
    assert unit_count(module) == units


def test_unit_counts_agree_with_what_a_unet_puts_out():
    unet = tiny_models.unet()
    counted = {}

    def count(module, _args, output):
        if isinstance(output, torch.Tensor) and unit_count(module) is not None:
            counted[id(module)] = (unit_count(module), output.shape[channel_dim(module, output)])

    for module in unet.modules():
        if not isinstance(module, type(unet)):
            module.register_forward_hook(count)
    unet(torch.randn(1, 4, 8, 8), 1, encoder_hidden_states=torch.randn(1, 5, 32))
    assert len(counted) > 80
    assert all(named == found for named, found in counted.values())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(
            (name, True)
            for name in ("LayerNorm", "GroupNorm", "RMSNorm", "BatchNorm2d", "LlamaRMSNorm", "FP32LayerNorm")
        ),
        *((name, False) for name in ("Linear", "AdaLayerNormZero", "Normalize", "xLayerNorm")),
    ],
)
def test_norms_are_told_by_class_name(name, expected):
    assert is_norm(type(name, (nn.Module,), {})()) == expected


# Resolving


def test_missing_sites_name_their_owner_and_what_is_close():
    model = nn.ModuleDict({"norm1": nn.LayerNorm(2)})
    with pytest.raises(
        ValueError, match=r"act map 'x' has 1 of 2 sites that this model \(unet: ModuleDict\) lacks"
    ) as error:
        resolve({"unet": model}, ["unet.norm1", "unet.norm9"], "act map 'x'")
    assert "for example unet.norm9 (closest here: unet.norm1)" in str(error.value)


def test_a_stream_that_a_block_lacks_is_refused():
    with pytest.raises(ValueError, match=r"Identity has no stream 'image' \(one output\)"):
        resolve({"m": nn.Sequential(nn.Identity())}, ["m.0:image"], "it")
    with pytest.raises(ValueError, match=r"JointTransformerBlock has no stream 'audio' \(text, image\)"):
        resolve({"m": nn.Sequential(JointTransformerBlock())}, ["m.0:audio"], "it")


# Reading and writing outputs

A, B = torch.ones(1), torch.zeros(1)
Pair = namedtuple("Pair", ["first", "second"])


@pytest.mark.parametrize("output", [A, (A, B), [A, B], Pair(A, B), (A, None, 3)])
def test_the_first_tensor_is_read_and_replaced(output):
    assert read_output(nn.Identity(), output, "m.x") is A
    new = torch.full((1,), 7.0)
    replaced = replace_output(nn.Identity(), output, "m.x", new)
    assert type(replaced) is type(output)
    assert read_output(nn.Identity(), replaced, "m.x") is new
    if not isinstance(output, torch.Tensor):
        assert tuple(replaced)[1:] == tuple(output)[1:]
        assert output[0] is A


def test_model_outputs_are_copied():
    output = BaseModelOutput(last_hidden_state=A, attentions=(B,))
    replaced = replace_output(nn.Identity(), output, "m.x", B)
    assert read_output(nn.Identity(), output, "m.x") is A
    assert replaced.last_hidden_state is B
    assert replaced[0] is B
    assert replaced.attentions == (B,)


def test_streams_are_read_and_replaced_by_name():
    block = JointTransformerBlock()
    output = block(torch.tensor([5.0]))
    assert read_output(block, output, "m.x:image").item() == 5
    assert read_output(block, output, "m.x:text").item() == 6
    text, image = replace_output(block, output, "m.x:image", A)
    assert (text.item(), image.item()) == (6, 1)


@pytest.mark.parametrize("output", [None, 3.5, {"a": 1}])
def test_what_is_no_tensor_is_refused_by_name(output):
    with pytest.raises(ValueError, match=r"m\.x puts out .*, not a tensor; choose another site"):
        read_output(nn.Identity(), output, "m.x")


def test_an_absent_stream_is_refused_by_name():
    block = JointTransformerBlock(text=False)
    with pytest.raises(ValueError, match=r"m\.x:text puts out NoneType, not a tensor"):
        read_output(block, block(A), "m.x:text")


def test_evaluating_restores_every_mode():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    inside = []

    def use():
        with evaluating({"m": model}):
            inside.extend(module.training for module in model.modules())
            raise ValueError("a wrong turn")

    with pytest.raises(ValueError, match="a wrong turn"):
        use()
    assert inside == [False, False, False]
    assert [module.training for module in model.modules()] == [True, True, False]
