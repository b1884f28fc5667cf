"""AffineMap: strength, application, inverse, composition, support."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actmaps.maps import AffineMap
from actmaps.maps.affine import transport

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
finite = st.floats(-8, 8, width=32)
slopes = st.floats(0.125, 8, width=32)


@st.composite
def affine_maps(draw, channels=3):
    scale = draw(st.lists(slopes, min_size=channels, max_size=channels))
    shift = draw(st.lists(finite, min_size=channels, max_size=channels))
    return AffineMap(torch.tensor(scale), torch.tensor(shift))


def activations(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(x):
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def test_apply_moves_every_unit_by_its_own_map():
    affine = AffineMap(torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1.0, 5.0, 0.5]))
    x = torch.tensor([[1.0, 1.0, 1.0], [-3.0, 2.0, 4.0]])
    assert affine.apply(x).tolist() == [[3.0, 5.0, -0.5], [-5.0, 5.0, -3.5]]


def test_apply_at_half_strength_is_halfway():
    affine = AffineMap(torch.tensor([3.0]), torch.tensor([2.0]))
    assert affine.apply(torch.tensor([[4.0]]), strength=0.5).item() == 9.0  # halfway from 4 to 14


@pytest.mark.parametrize(("strength", "expected"), [(-1.0, -6.0), (2.0, 24.0)])
def test_strength_outside_zero_one_extrapolates(strength, expected):
    affine = AffineMap(torch.tensor([3.0]), torch.tensor([2.0]))
    assert affine.apply(torch.tensor([[4.0]]), strength).item() == expected


@pytest.mark.parametrize(("shape", "dim"), [((2, 3), 1), ((2, 5, 3), -1), ((2, 3, 4, 4), 1), ((2, 4, 2, 3), 3)])
def test_units_lie_along_the_channel_dim(shape, dim):
    affine = AffineMap(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 2.0]))
    x = activations(*shape)
    moved = affine.apply(x, channel_dim=dim)
    for unit in range(3):
        expected = x.select(dim, unit) * (unit + 1) + unit
        torch.testing.assert_close(moved.select(dim, unit), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strength_zero_keeps_every_bit(dtype):
    x = torch.tensor([[0.0, -0.0, torch.inf], [-torch.inf, torch.nan, 1e-7]], dtype=dtype)
    affine = AffineMap(torch.tensor([2.0, 0.0, 3.0]), torch.tensor([1.0, 1.0, 1.0]))
    assert torch.equal(bits(affine.apply(x, strength=0.0)), bits(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_keeps_dtype_and_shape(dtype):
    moved = AffineMap.identity(4).apply(activations(2, 3, 4, dtype=dtype))
    assert (moved.dtype, moved.shape) == (dtype, (2, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype):
    scale, shift, x = activations(64, seed=1), activations(64, seed=2), activations(8, 64, seed=3, dtype=dtype)
    expected = torch.addcmul(shift, scale, x.float()).to(dtype)
    assert torch.equal(AffineMap(scale, shift).apply(x), expected)


@given(affine_maps())
def test_at_one_is_the_map_itself_and_at_zero_the_identity(affine):
    assert torch.equal(affine.at(1.0).scale, affine.scale)
    assert torch.equal(affine.at(1.0).shift, affine.shift)
    assert torch.equal(affine.at(0.0).scale, torch.ones(3))
    assert torch.equal(affine.at(0.0).shift, torch.zeros(3))


def test_at_one_keeps_tiny_scales():
    affine = AffineMap(torch.tensor([1e-9]), torch.tensor([0.0]))
    assert affine.at(1.0).scale.item() == pytest.approx(1e-9)


@given(affine_maps(), st.floats(-2, 2))
def test_strength_interpolates_between_x_and_the_moved_x(affine, strength):
    x = activations(5, 3)
    expected = (1 - strength) * x + strength * affine.apply(x)
    torch.testing.assert_close(affine.apply(x, strength), expected, rtol=1e-5, atol=1e-4)


@given(affine_maps())
def test_inverse_undoes_the_map(affine):
    x = activations(5, 3)
    torch.testing.assert_close(affine.inverse().apply(affine.apply(x)), x, rtol=1e-4, atol=1e-3)


@given(affine_maps(), affine_maps())
def test_then_applies_the_other_map_last(first, second):
    x = activations(5, 3)
    expected = second.apply(first.apply(x))
    torch.testing.assert_close(first.then(second).apply(x), expected, rtol=1e-4, atol=1e-3)


@given(affine_maps(), affine_maps(), affine_maps())
def test_then_is_associative(a, b, c):
    left, right = a.then(b).then(c), a.then(b.then(c))
    torch.testing.assert_close(left.scale, right.scale, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(left.shift, right.shift, rtol=1e-4, atol=1e-2)


@given(affine_maps())
def test_then_inverse_is_the_identity(affine):
    both = affine.then(affine.inverse())
    torch.testing.assert_close(both.scale, torch.ones(3), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both.shift, torch.zeros(3), rtol=1e-5, atol=1e-3)


def test_inverse_names_the_units_of_scale_zero():
    with pytest.raises(ValueError, match=r"units \[1\] have scale 0"):
        AffineMap(torch.tensor([1.0, 0.0]), torch.zeros(2)).inverse()


def test_inverse_carries_the_support_to_the_target_side():
    affine = AffineMap(
        torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([3.0, 2.0])
    )
    inverse = affine.inverse()
    assert inverse.lower.tolist() == [1.0, -2.0]
    assert inverse.upper.tolist() == [7.0, -1.0]


def test_support_is_inclusive_and_keeps_the_rest():
    affine = AffineMap(torch.tensor([1.0]), torch.tensor([10.0]), torch.tensor([-1.0]), torch.tensor([1.0]))
    below, above = (torch.nextafter(torch.tensor(v), torch.tensor(2 * v)).item() for v in (-1.0, 1.0))
    x = torch.tensor([[below], [-1.0], [0.0], [1.0], [above], [torch.nan]])
    assert affine.apply(x)[:5, 0].tolist() == [below, 9.0, 10.0, 11.0, above]
    assert affine.apply(x)[5].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_extreme_samples_lie_inside_their_own_support(dtype):
    x = activations(100, 1, dtype=dtype) / 3
    low, high = x.float().amin(0), x.float().amax(0)
    moved = AffineMap(torch.ones(1), torch.full((1,), 8.0), low, high).apply(x)
    assert (moved > x + 7).all()


def test_then_keeps_the_first_support_and_refuses_a_second():
    bounded = AffineMap(torch.ones(1), torch.ones(1), torch.zeros(1), torch.ones(1))
    both = bounded.then(AffineMap(torch.tensor([2.0]), torch.tensor([0.0])))
    assert (both.lower.item(), both.upper.item()) == (0.0, 1.0)
    with pytest.raises(ValueError, match="cannot fold a map with a support behind another"):
        AffineMap.identity(1).then(bounded)


def test_shift_rule_moves_all_positions_by_what_the_map_gives_at_their_mean():
    x = torch.tensor([[[[0.0, 2.0], [4.0, 6.0]]]])  # mean 3, moved by 2 * 3 + 1 - 3 = 4
    moved = transport(x, torch.tensor([2.0]), torch.tensor([1.0]), channel_dim=1, spatial="shift")
    assert moved.flatten().tolist() == [4.0, 6.0, 8.0, 10.0]


def test_shift_rule_tests_the_support_at_the_mean():
    x = torch.tensor([[[[0.0, 6.0]], [[10.0, 20.0]]]])  # means 3 and 15
    one = torch.ones(2)
    moved = transport(x, one, 5 * one, 2 * one, 4 * one, channel_dim=1, spatial="shift")
    assert moved.flatten().tolist() == [5.0, 11.0, 10.0, 20.0]


def test_shift_rule_leaves_tokens_to_the_map():
    x = activations(2, 5, 3)
    scale, shift = torch.tensor([2.0, 3.0, 4.0]), torch.ones(3)
    assert torch.equal(transport(x, scale, shift, spatial="shift"), transport(x, scale, shift))


def test_maps_are_stored_as_float32():
    affine = AffineMap(torch.ones(2, dtype=torch.float64, requires_grad=True), torch.zeros(2, dtype=torch.float16))
    assert (affine.scale.dtype, affine.shift.dtype) == (torch.float32, torch.float32)
    assert not affine.scale.requires_grad


def test_identity_has_the_asked_number_of_units():
    identity = AffineMap.identity(4)
    assert (identity.channels, identity.scale.tolist(), identity.shift.tolist()) == (4, [1.0] * 4, [0.0] * 4)


def test_to_moves_all_parts():
    bounded = AffineMap(torch.ones(1), torch.ones(1), torch.zeros(1), torch.ones(1)).to("cpu")
    assert (bounded.scale.item(), bounded.shift.item(), bounded.lower.item(), bounded.upper.item()) == (1, 1, 0, 1)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (([1.0], [0.0, 1.0]), r"shift has shape \(2,\), expected \(1,\)"),
        (([[1.0]], [[0.0]]), r"scale has shape \(1, 1\)"),
        (([torch.nan], [0.0]), "scale has entries that are not finite"),
        (([1.0], [torch.inf]), "shift has entries that are not finite"),
        (([1.0], [0.0], [0.0]), "a support needs both bounds"),
        (([1.0], [0.0], [1.0], [0.0]), "lower exceeds upper"),
    ],
)
def test_inconsistent_parts_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        AffineMap(*map(torch.tensor, parts))


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_another_number_of_units_is_refused(strength):
    with pytest.raises(ValueError, match="the map has 3 units, x has 4 along dim -1"):
        AffineMap.identity(3).apply(torch.zeros(2, 4), strength)
    with pytest.raises(ValueError, match="cannot compose maps of 3 and 4 units"):
        AffineMap.identity(3).then(AffineMap.identity(4))


def test_larger_strengths_move_further():
    affine = AffineMap(torch.tensor([0.5]), torch.tensor([3.0]))
    moves = [(affine.apply(torch.ones(1, 1), s) - 1).item() for s in (0.0, 0.25, 0.5, 1.0, 1.5)]
    assert all(one < other for one, other in pairwise(moves))
