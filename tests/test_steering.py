"""Steering a live model: what it does, and that nothing of it remains."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import tiny_models
from actmaps.maps import ActMap, ActMapMetadata, AffineMap, find_sites, steer

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def affine(scale, shift, *bounds):
    return AffineMap(torch.tensor(scale), torch.tensor(shift), *map(torch.tensor, bounds))


def one_site(scale, shift, *bounds, **metadata):
    return ActMap({"model.0": affine([scale], [shift], *([b] for b in bounds))}, ActMapMetadata(**metadata))


def identity_model(sites=1):
    return nn.Sequential(*(nn.Identity() for _ in range(sites)))


def hooks(model):
    return sum(len(module._forward_hooks) + ("forward" in vars(module)) for module in model.modules())


def random_map(model, prefix, seed=0, **metadata):
    """A strong map on every norm of a model."""
    generator = torch.Generator().manual_seed(seed)
    modules = {f"{prefix}.{name}": module for name, module in model.named_modules()}
    units = {site: modules[site].weight.shape[0] for site in find_sites({prefix: model})}
    return ActMap(
        {
            site: AffineMap(1 + torch.rand(n, generator=generator), torch.randn(n, generator=generator))
            for site, n in units.items()
        },
        ActMapMetadata(**metadata),
    )


def unet_inputs(rows=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    sample, text = (torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, 4, 8, 8), (rows, 5, 32)))
    return {"sample": sample, "timestep": 7, "encoder_hidden_states": text, "return_dict": False}


def run(unet, **inputs):
    with torch.no_grad():
        return unet(**{**unet_inputs(), **inputs})[0]


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return tiny_models.unet()


X = torch.tensor([[1.0], [2.0], [-3.0]])


# What it does


def test_the_output_of_a_site_is_moved_by_its_map():
    model = identity_model()
    with steer(model, one_site(2.0, 1.0)):
        assert model(X).flatten().tolist() == [3.0, 5.0, -5.0]
    with steer(model, one_site(2.0, 1.0), strength=0.5):
        assert model(X).flatten().tolist() == [2.0, 3.5, -4.0]
    with steer(model, one_site(2.0, 1.0), strength=-1.0):
        assert model(X).flatten().tolist() == [-1.0, -1.0, -1.0]  # scale 1 - 1, shift -1


def test_every_site_is_moved_as_by_hand():
    layers = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3), nn.LayerNorm(3))
    act_map = random_map(layers, "model")
    x = torch.randn(4, 3)
    by_hand = layers[0](x)
    for i in (1, 3):
        by_hand = act_map[f"model.{i}"].apply(layers[i](by_hand), 0.7)
        by_hand = layers[2](by_hand) if i == 1 else by_hand
    with steer(layers, act_map, 0.7):
        torch.testing.assert_close(layers(x), by_hand)


def test_units_of_images_lie_in_dim_1():
    model = nn.Sequential(nn.GroupNorm(1, 2, affine=False))
    x = torch.randn(2, 2, 3, 3)
    plain = model(x)
    with steer(model, ActMap({"model.0": affine([1.0, 2.0], [5.0, 0.0])})):
        moved = model(x)
    torch.testing.assert_close(moved, torch.stack([plain[:, 0] + 5, plain[:, 1] * 2], dim=1))


def test_the_spatial_rule_of_the_map_is_followed():
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
    model[0].weight.data.fill_(1.0)
    x = torch.tensor([[[[0.0, 2.0], [4.0, 6.0]]]])
    with torch.no_grad():
        with steer(model, one_site(2.0, 1.0, spatial="affine")):
            assert model(x).flatten().tolist() == [1.0, 5.0, 9.0, 13.0]
        with steer(model, one_site(2.0, 1.0, spatial="shift"), 0.5):
            assert model(x).flatten().tolist() == [2.0, 4.0, 6.0, 8.0]


def test_only_activations_within_the_support_are_moved():
    model = identity_model()
    with steer(model, one_site(1.0, 10.0, 1.0, 2.0)) as steering:
        assert model(X).flatten().tolist() == [11.0, 12.0, -3.0]
        steering.strength = 0.5
        assert model(X).flatten().tolist() == [6.0, 7.0, -3.0]


def test_a_tensor_inside_a_tuple_is_moved():
    class Pair(nn.Module):
        def forward(self, x):
            return x, "state"

    with steer(model := nn.Sequential(Pair()), one_site(1.0, 1.0)):
        moved, state = model(X)
    assert (moved.flatten().tolist(), state) == ([2.0, 3.0, -2.0], "state")


# Strength


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("support", [(), (-0.5, 0.5)])
def test_strength_zero_changes_no_bit(dtype, support):
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-7, 3.0], dtype=dtype)[:, None]
    model = identity_model()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    with steer(model, one_site(3.0, 2.0, *support), strength=0.0):
        assert torch.equal(model(x).view(integer), x.view(integer))
    x = x[~x.isnan()][
        :, None
    ]  # a row at strength 0 beside others passes through arithmetic, which rewrites the bits of NaN
    with steer(model, one_site(3.0, 2.0, *support), rows=torch.zeros(len(x))):
        assert torch.equal(model(x).view(integer), x.view(integer))


def test_strength_zero_is_the_plain_unet_bit_for_bit(unet):
    plain = run(unet)
    with steer(unet, random_map(unet, "unet"), strength=0.0):
        assert torch.equal(run(unet), plain)


def test_strength_can_change_while_steering():
    model = identity_model()
    with steer(model, one_site(1.0, 10.0)) as steering:
        found = []
        for strength in (1.0, 0.25, 0.0, 2, 1.0):
            steering.strength = strength
            assert steering.strength == strength
            found.append(model(X)[0].item())
    assert found == [11.0, 3.5, 1.0, 21.0, 11.0]


def test_full_strength_is_exactly_the_map():
    act_map = one_site(1e-9, 0.0)
    with steer(model := identity_model(), act_map):
        assert torch.equal(model(X), act_map["model.0"].apply(X))


def test_several_maps_with_strengths_of_their_own():
    model, double, add = identity_model(), one_site(2.0, 0.0, name="double"), one_site(1.0, 3.0, name="add")
    with steer(model, {double: 1.0, add: 2.0}, strength=0.5) as steering:
        assert steering.strength == {double: 0.5, add: 1.0}
        assert model(X).flatten().tolist() == [4.5, 6.0, -1.5]
        steering.strength = {double: 1.0}
        assert model(X).flatten().tolist() == [5.0, 7.0, -3.0]
        steering.strength = 0.0
        assert model(X).flatten().tolist() == X.flatten().tolist()
    with steer(model, {add: 1.0, double: 1.0}):
        assert model(X).flatten().tolist() == [8.0, 10.0, 0.0]


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_strengths_must_be_finite(strength):
    model = identity_model()
    with pytest.raises(ValueError, match="the strength of act map 'act_map' must be finite"):
        steer(model, one_site(1.0, 1.0), strength)
    assert hooks(model) == 0


def test_a_map_that_is_not_armed_has_no_strength():
    with (
        steer(identity_model(), one_site(1.0, 1.0)) as steering,
        pytest.raises(ValueError, match="act map 'other' is not armed here"),
    ):
        steering.strength = {one_site(1.0, 1.0, name="other"): 1.0}


# Rows


def test_rows_scale_the_strength_of_each_row():
    model = identity_model()
    with steer(model, one_site(2.0, 1.0), rows=torch.tensor([0.0, 1.0, 0.5])) as steering:
        assert model(X).flatten().tolist() == [1.0, 5.0, -4.0]
        steering.rows = None
        assert model(X).flatten().tolist() == [3.0, 5.0, -5.0]


def test_rows_repeat_over_a_larger_batch():
    """Two rows for a batch of four: the first two are unconditional, the last two conditional."""
    x = torch.zeros(4, 2, 1)
    with steer(model := identity_model(), one_site(1.0, 1.0), rows=torch.tensor([0.0, 1.0])):
        assert model(x)[:, 0, 0].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_rows_that_do_not_fit_are_refused_by_site():
    with (
        steer(model := identity_model(), one_site(1.0, 1.0), rows=torch.ones(2)),
        pytest.raises(ValueError, match=r"model\.0 has 3 rows, which is no multiple of the 2 row strengths"),
    ):
        model(X)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_one_are_exactly_the_map_in_every_precision(dtype):
    x = torch.randn(3, 1).to(dtype)
    model = identity_model()
    with steer(model, one_site(1.3, 0.7)) as steering:
        moved = model(x)
        steering.rows = torch.ones(3, dtype=torch.float64)
        assert torch.equal(model(x), moved)
        assert model(x).dtype == dtype


def test_steered_rows_do_not_touch_the_others(unet):
    plain = run(unet)
    with steer(unet, random_map(unet, "unet"), rows=torch.tensor([0.0, 1.0])):
        steered = run(unet)
    torch.testing.assert_close(steered[0], plain[0], rtol=0, atol=1e-6)
    assert not torch.allclose(steered[1], plain[1], atol=1e-2)


# Composition


def test_live_steerings_compose_in_the_order_in_which_they_were_armed():
    model = identity_model()
    with steer(model, one_site(2.0, 0.0)):
        with steer(model, one_site(1.0, 3.0)):
            assert model(X).flatten().tolist() == [5.0, 7.0, -3.0]
        assert model(X).flatten().tolist() == [2.0, 4.0, -6.0]
    with steer(model, one_site(1.0, 3.0)), steer(model, one_site(2.0, 0.0)):
        assert model(X).flatten().tolist() == [8.0, 10.0, 0.0]


def test_removal_in_any_order():
    model = identity_model()
    first, second, third = (steer(model, one_site(*parts)) for parts in ((2.0, 0.0), (1.0, 3.0), (10.0, 0.0)))
    assert model(X)[0].item() == 50.0
    second.remove()
    assert model(X)[0].item() == 20.0
    first.remove()
    first.remove()
    assert model(X)[0].item() == 10.0
    third.remove()
    assert model(X)[0].item() == 1.0
    assert hooks(model) == 0


def test_the_same_map_armed_twice_acts_twice():
    model, act_map = identity_model(), one_site(2.0, 0.0)
    with steer(model, act_map) as outer, steer(model, act_map) as inner:
        assert model(X)[0].item() == 4.0
        inner.strength = 0.0
        assert model(X)[0].item() == 2.0
        outer.remove()
        assert model(X)[0].item() == 1.0


def test_hidden_states_of_a_text_encoder_are_steered():
    """transformers captures them with hooks of its own, installed at the first use and never removed."""
    torch.manual_seed(0)
    encoder = tiny_models.text_encoder(40)
    ids = torch.randint(0, 38, (2, 6))
    act_map = random_map(encoder, "text_encoder").select([r"final_layer_norm"])
    layer = ActMap({"text_encoder.encoder.layers.0": AffineMap(torch.full((32,), 2.0), torch.arange(32.0))})
    with torch.no_grad():
        plain = encoder(ids, output_hidden_states=True).hidden_states
        with steer(encoder, layer), steer(encoder, act_map):
            output = encoder(ids, output_hidden_states=True)
        again = encoder(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(output.hidden_states[1], layer["text_encoder.encoder.layers.0"].apply(plain[1]))
    assert not torch.allclose(output.hidden_states[2], plain[2])
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


# Restoring


@pytest.mark.parametrize("error", [None, RuntimeError("out of tune"), KeyboardInterrupt()])
def test_the_model_is_restored_bit_for_bit(unet, error):
    plain, state = run(unet), {name: value.clone() for name, value in unet.state_dict().items()}

    def interrupt(*_):
        raise error

    def steered():
        with steer(unet, random_map(unet, "unet")):
            if error is not None:
                handle = unet.conv_norm_out.register_forward_hook(interrupt)
            try:
                assert not torch.equal(run(unet), plain)
            finally:
                if error is not None:
                    handle.remove()

    if error is None:
        steered()
    else:
        with pytest.raises(type(error)):
            steered()
    assert torch.equal(run(unet), plain)
    assert hooks(unet) == 0
    assert list(unet.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())


def test_a_steered_model_has_no_new_parameters_or_modules(unet):
    before = [name for name, _ in unet.named_modules()], list(unet.state_dict())
    with steer(unet, random_map(unet, "unet")):
        assert ([name for name, _ in unet.named_modules()], list(unet.state_dict())) == before


def test_a_deep_copy_of_a_steered_model_is_plain_and_has_weights_of_its_own(unet):
    plain = run(unet)
    with steer(unet, random_map(unet, "unet")):
        steered = run(unet)
        other = copy.deepcopy(unet)
        pickled = pickle.loads(pickle.dumps(unet))
        assert torch.equal(run(other), plain)
        assert torch.equal(run(pickled), plain)
        with torch.no_grad():
            other.conv_out.weight.zero_()
            other.conv_out.bias.zero_()
        assert torch.equal(run(unet), steered)
        assert run(other).abs().max() == 0


def test_a_steered_model_that_goes_out_of_use_is_collected():
    model = identity_model()
    steering = steer(model, one_site(1.0, 1.0))
    gone = weakref.ref(model)
    del model, steering
    gc.collect()
    assert gone() is None


def test_a_steering_without_a_handle_stays_until_its_model_goes():
    model = identity_model()
    steer(model, one_site(1.0, 1.0))
    gc.collect()
    assert model(X)[0].item() == 2.0


# Precision and gradients


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_moved_in_float32_and_rounded_once(dtype):
    model = nn.Sequential(nn.LayerNorm(64)).to(dtype)
    act_map = random_map(model, "model")
    x = torch.randn(8, 64).to(dtype)
    with torch.no_grad(), steer(model, act_map, 0.3):
        moved = model(x)
    at = act_map["model.0"].at(0.3)
    with torch.no_grad():
        assert torch.equal(moved, torch.addcmul(at.shift, at.scale, model(x).float()).to(dtype))


def test_a_model_may_change_its_precision_while_steered():
    model = nn.Sequential(nn.LayerNorm(4))
    x = torch.randn(2, 4)
    with torch.no_grad(), steer(model, random_map(model, "model")):
        full = model(x)
        half = model.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.05)


def test_gradients_flow_through_the_map():
    model, x = identity_model(), X.clone().requires_grad_()
    with steer(model, one_site(3.0, 1.0)):
        model(x).sum().backward()
    assert x.grad.flatten().tolist() == [3.0, 3.0, 3.0]


# Refusals


def test_a_map_for_another_model_is_refused_and_nothing_is_armed():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(8))
    anime = ActMapMetadata(name="anime")
    wide = ActMap({"model.0": AffineMap.identity(4), "model.2": AffineMap.identity(4)}, anime)
    with pytest.raises(ValueError, match=r"act map 'anime' was fitted on 4 units at model\.2, this model has 8 there"):
        steer(model, wide)
    other = ActMap({"model.0": AffineMap.identity(4), "model.7": AffineMap.identity(4)}, anime)
    with pytest.raises(
        ValueError, match=r"act map 'anime' has 1 of 2 sites that this model \(model: Sequential\) lacks"
    ):
        steer(model, {ActMap({"model.0": AffineMap.identity(4)}): 1.0, other: 1.0})
    with pytest.raises(ValueError, match="no act map to steer with"):
        steer(model, {})
    assert hooks(model) == 0


def test_units_that_only_the_forward_tells_are_checked_there():
    model = identity_model()
    with (
        steer(model, ActMap({"model.0": AffineMap.identity(5)})),
        pytest.raises(ValueError, match=r"was fitted on 5 units at model\.0, this model has 1 there \(Identity\)"),
    ):
        model(X)


# Tokens


def test_only_the_chosen_tokens_move():
    x = torch.ones(2, 3, 1)
    with steer(model := identity_model(), one_site(2.0, 1.0), tokens=torch.tensor([[True, False, True]])) as steering:
        assert model(x).flatten().tolist() == [3, 1, 3, 3, 1, 3]
        steering.tokens = torch.tensor([[False, False, True], [True, True, False]])
        assert model(x).flatten().tolist() == [1, 1, 3, 3, 3, 1]
        steering.tokens = None
        assert model(x).flatten().tolist() == [3] * 6


def test_token_masks_repeat_over_beams_and_heads():
    tokens = torch.tensor([[True, False, False], [False, False, True]])
    with steer(model := identity_model(), one_site(1.0, 1.0), tokens=tokens):
        beams = model(torch.zeros(4, 3, 1))[..., 0]
        heads = model(torch.zeros(2, 5, 3, 1))[..., 0]
    assert beams.tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 1]]
    assert torch.equal(heads, tokens[:, None].expand(2, 5, 3).float())


def test_a_token_mask_that_does_not_fit_is_refused_by_site():
    with (
        steer(model := identity_model(), one_site(1.0, 1.0), tokens=torch.ones(1, 4, dtype=torch.bool)),
        pytest.raises(ValueError, match=r"model\.0 has activations of shape \(2, 3, 1\), in which the 4 tokens"),
    ):
        model(torch.zeros(2, 3, 1))
