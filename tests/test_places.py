"""Places: names of sites, channel axes, and how outputs are read and written."""

from collections import namedtuple

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection
from transformers.modeling_outputs import BaseModelOutput

import tiny_models
from actmaps.maps import find_sites
from actmaps.maps.places import Place, as_components, evaluating, find_places, is_norm


class JointTransformerBlock(nn.Module):
    """Returns (text, image), as SD3's blocks do."""

    def __init__(self, text=True):
        super().__init__()
        self.text = text

    def forward(self, x):
        return (x + 1 if self.text else None), x


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
    names = find_places({"text_encoder": CLIPTextModelWithProjection(config)})
    assert "text_encoder.encoder.layers.0.layer_norm1" in names
    assert set(find_sites(tiny_models.text_encoder(20))) >= set(find_sites(CLIPTextModelWithProjection(config)))


def test_lora_changes_no_name():
    plain, adapted = tiny_models.unet(), tiny_models.unet()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), adapted)
    assert set(find_places({"unet": adapted})) == set(find_places({"unet": plain}))
    to_q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert find_places({"unet": adapted})[to_q].unit_count == 16


def test_only_lora_parts_are_left_out():
    model = nn.ModuleDict({"flora_1": nn.Identity(), "my_base_layers": nn.Identity(), "lora_A": nn.Identity()})
    assert list(find_places({"model": model})) == ["model.flora_1", "model.my_base_layers"]


def test_compiling_changes_no_name():
    plain = nn.Sequential(nn.Sequential(nn.GroupNorm(2, 4)), nn.GroupNorm(2, 4))
    names = list(find_places({"model": plain}))
    plain[0], plain[1] = (torch.compile(part, backend="eager") for part in plain)
    compiled = find_places({"model": torch.compile(plain, backend="eager")})
    assert list(compiled) == names == ["model.0", "model.0.0", "model.1"]
    place = compiled["model.1"]
    assert place.module is plain[1]
    assert place.is_norm
    assert (place.unit_count, place.channel_dim(torch.ones(1, 4, 2, 2))) == (4, 1)


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
    place = find_places({"m": nn.Sequential(module)})["m.0"]
    assert place.channel_dim(torch.zeros(shape)) == dim
    assert place.unit_count == units


def test_unit_counts_agree_with_what_a_unet_puts_out():
    unet = tiny_models.unet()
    counted = {}

    def count(site, place, output):
        x = place.read(output)
        if isinstance(x, torch.Tensor) and place.unit_count is not None:
            counted[site] = (place.unit_count, x.shape[place.channel_dim(x)])

    for site, place in find_places(unet).items():
        place.module.register_forward_hook(lambda _m, _a, output, s=site, p=place: count(s, p, output))
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


# Reading and writing outputs

A, B = torch.ones(1), torch.zeros(1)
Pair = namedtuple("Pair", ["first", "second"])


@pytest.mark.parametrize("output", [A, (A, B), [A, B], Pair(A, B), (A, None, 3)])
def test_the_first_tensor_is_read_and_replaced(output):
    place = Place(nn.Identity())
    assert place.read(output) is A
    new = torch.full((1,), 7.0)
    replaced = place.write(output, new)
    assert type(replaced) is type(output)
    assert place.read(replaced) is new
    if not isinstance(output, torch.Tensor):
        assert tuple(replaced)[1:] == tuple(output)[1:]
        assert output[0] is A


def test_model_outputs_are_copied():
    place = Place(nn.Identity())
    output = BaseModelOutput(last_hidden_state=A, attentions=(B,))
    replaced = place.write(output, B)
    assert place.read(output) is A
    assert replaced.last_hidden_state is B
    assert replaced[0] is B
    assert replaced.attentions == (B,)


def test_streams_are_read_and_replaced_by_name():
    block = JointTransformerBlock()
    places = find_places({"m": nn.Sequential(block)})
    assert list(places) == ["m.0:text", "m.0:image"]
    output = block(torch.tensor([5.0]))
    assert places["m.0:image"].read(output).item() == 5
    assert places["m.0:text"].read(output).item() == 6
    text, image = places["m.0:image"].write(output, A)
    assert (text.item(), image.item()) == (6, 1)


def test_one_of_several_fused_projections_is_read_and_replaced():
    keys = Place(nn.Linear(2, 6), units=slice(2, 4))
    output = torch.arange(12.0).view(1, 2, 6)
    assert keys.unit_count == 2
    assert keys.read(output).tolist() == [[[2, 3], [8, 9]]]
    replaced = keys.write(output, torch.zeros(1, 2, 2))
    assert replaced.tolist() == [[[0, 1, 0, 0, 4, 5], [6, 7, 0, 0, 10, 11]]]
    assert output[0, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_one_of_several_concatenated_streams_is_read_and_replaced():
    image = Place(nn.Identity(), tokens=lambda: slice(1, None))
    output = torch.arange(6.0).view(1, 3, 2)
    assert image.read(output).tolist() == [[[2, 3], [4, 5]]]
    assert image.write(output, torch.zeros(1, 2, 2)).tolist() == [[[0, 1], [0, 0], [0, 0]]]


def test_a_part_of_an_entry_is_replaced_in_place_of_the_entry():
    place = Place(nn.Identity(), entry=1, units=slice(0, 1), channels_first=True)
    first, second = torch.zeros(1, 2, 1, 1), torch.ones(1, 2, 1, 1)
    replaced = place.write((first, second), torch.full((1, 1, 1, 1), 5.0))
    assert replaced[0] is first
    assert replaced[1].flatten().tolist() == [5.0, 1.0]
    assert second.flatten().tolist() == [1.0, 1.0]


def test_evaluating_restores_every_mode():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    inside = []

    def use():
        with evaluating([model]):
            inside.extend(module.training for module in model.modules())
            raise ValueError("a wrong turn")

    with pytest.raises(ValueError, match="a wrong turn"):
        use()
    assert inside == [False, False, False]
    assert [module.training for module in model.modules()] == [True, True, False]
