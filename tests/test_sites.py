"""Sites: names, patterns, order, channel axes, and how outputs are read and written."""

import pytest
import torch
from torch import nn

import tiny_models
from actmaps.maps import find_sites
from actmaps.maps.sites import match_sites, read_activations, resolve

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


# Reading


@pytest.mark.parametrize("output", [None, 3.5, {"a": 1}])
def test_what_is_no_tensor_is_refused_by_name(output):
    place = resolve({"m": nn.Sequential(nn.Identity())}, ["m.0"], "it")["m.0"]
    with pytest.raises(ValueError, match=r"m\.0 puts out .*, not a tensor; choose another site"):
        read_activations(place, output, "m.0")


def test_an_absent_stream_is_refused_by_name():
    block = JointTransformerBlock(text=False)
    place = resolve({"m": nn.Sequential(block)}, ["m.0:text"], "it")["m.0:text"]
    with pytest.raises(ValueError, match=r"m\.0:text puts out NoneType, not a tensor"):
        read_activations(place, block(torch.ones(1)), "m.0:text")
