"""ActMap: an immutable mapping of sites, its selection, inverse, pruning and blending."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actmaps.maps import ActMap, ActMapMetadata, AffineMap


def affine(scale, shift, *bounds):
    return AffineMap(torch.tensor(scale), torch.tensor(shift), *map(torch.tensor, bounds))


@pytest.fixture
def act_map():
    return ActMap(
        {
            "text_encoder.layers.0.norm1": affine([1.0, 2.0], [0.5, 0.0]),
            "unet.down.norm1": affine([3.0], [0.0]),
            "unet.up.norm1": affine([1.0], [-4.0]),
            "unet.up.norm2": affine([1.0], [0.0]),
        },
        ActMapMetadata(name="anime", costs={"unet.down.norm1": (2.0, 1.0), "unet.up.norm1": (4.0, 0.0)}),
    )


def test_it_is_a_mapping_in_execution_order(act_map):
    assert list(act_map) == [
        "text_encoder.layers.0.norm1",
        "unet.down.norm1",
        "unet.up.norm1",
        "unet.up.norm2",
    ]
    assert len(act_map) == 4
    assert act_map["unet.down.norm1"].scale.item() == 3
    assert "unet.mid" not in act_map
    with pytest.raises(KeyError):
        act_map["unet.mid"]


def test_it_cannot_be_changed(act_map):
    with pytest.raises(TypeError):
        act_map["unet.down.norm1"] = AffineMap.identity(1)
    with pytest.raises(AttributeError):
        act_map.metadata.name = "other"


def test_it_does_not_follow_the_dict_that_it_came_from():
    maps = {"unet.a": AffineMap.identity(1)}
    act_map = ActMap(maps)
    maps["unet.b"] = AffineMap.identity(1)
    assert list(act_map) == ["unet.a"]


def test_it_is_compared_and_hashed_by_identity():
    one, other = (ActMap({"unet.a": AffineMap.identity(1)}) for _ in range(2))
    assert one == one
    assert one != other
    assert {one: 1, other: 2}[one] == 1


def test_it_needs_a_site():
    with pytest.raises(ValueError, match="at least one site"):
        ActMap({})


def test_repr_and_components(act_map):
    assert repr(act_map) == "ActMap('anime', 4 sites, 5 units, method='linear')"
    assert act_map.components == ("text_encoder", "unet")


@pytest.mark.parametrize(
    ("include", "exclude", "kept"),
    [
        (None, None, 4),
        (["norm1"], None, 3),
        (r"unet\..*", None, 3),
        (["unet.up.norm1"], None, 1),
        (None, ["norm1"], 1),
        (r"unet\..*", r".*\.up\..*", 1),
    ],
)
def test_select_keeps_matching_sites_in_order(act_map, include, exclude, kept):
    selected = act_map.select(include, exclude)
    assert len(selected) == kept
    assert list(selected) == [site for site in act_map if site in selected]
    assert all(selected[site] is act_map[site] for site in selected)


def test_select_keeps_the_costs_of_its_sites(act_map):
    assert act_map.select(["up.norm1"]).metadata.costs == {"unet.up.norm1": (4.0, 0.0)}


def test_select_refuses_what_matches_nothing(act_map):
    with pytest.raises(ValueError, match=r"'normal1' is not in the model; closest: .*norm1"):
        act_map.select(["normal1"])
    with pytest.raises(ValueError, match="no site of act map 'anime' remains"):
        act_map.select(["norm1"], exclude=r".*")


def test_inverse_is_site_by_site(act_map):
    inverse = act_map.inverse()
    assert inverse["text_encoder.layers.0.norm1"].scale.tolist() == [1.0, 0.5]
    assert inverse["unet.up.norm1"].shift.item() == 4.0
    assert inverse.metadata.name == "inverse of anime"
    assert inverse.metadata.costs == {}


def test_inverse_names_the_site_of_a_scale_of_zero():
    with pytest.raises(ValueError, match=r"unet\.a: units \[0\] have scale 0"):
        ActMap({"unet.a": affine([0.0], [1.0])}).inverse()


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (0.2, {"unet.up.norm1": [True]}),
        (0.4, {"unet.down.norm1": [True], "unet.up.norm1": [True]}),
        (0.6, {"text_encoder.layers.0.norm1": [False, True], "unet.down.norm1": [True], "unet.up.norm1": [True]}),
        (1e-9, {"unet.up.norm1": [True]}),
    ],
)
def test_prune_keeps_the_units_that_move_most(act_map, keep, kept):
    pruned = act_map.prune(keep)
    assert {site: ((m.scale != 1) | (m.shift != 0)).tolist() for site, m in pruned.items()} == kept


def test_prune_of_everything_changes_nothing(act_map):
    pruned = act_map.prune(1.0)
    assert all(torch.equal(pruned[site].scale, act_map[site].scale) for site in act_map)


def test_prune_keeps_exactly_the_fraction_among_equal_units():
    equal = ActMap({"unet.a": affine([1.0] * 10, [2.0] * 10)})
    assert equal.prune(0.3)["unet.a"].shift.count_nonzero() == 3


@pytest.mark.parametrize("keep", [0, -0.5, 1.01, float("nan")])
def test_prune_wants_a_fraction(act_map, keep):
    with pytest.raises(ValueError, match=r"keep is the fraction of units to keep, in \(0, 1\]"):
        act_map.prune(keep)


@given(weight=st.floats(-2, 2))
def test_blend_of_one_map_is_that_map_at_its_weight(weight):
    act_map = ActMap({"unet.a": affine([3.0], [2.0])})
    blended = ActMap.blend({act_map: weight})["unet.a"]
    assert blended.scale.item() == pytest.approx(1 + 2 * weight, abs=1e-6)
    assert blended.shift.item() == pytest.approx(2 * weight)


def test_blend_adds_displacements_and_takes_missing_sites_as_identity():
    one = ActMap({"unet.a": affine([3.0], [2.0])}, ActMapMetadata(name="one"))
    other = ActMap({"unet.a": affine([0.5], [-1.0]), "unet.b": affine([2.0], [6.0])}, ActMapMetadata(name="other"))
    blended = ActMap.blend({one: 0.5, other: 1.0})
    assert (blended["unet.a"].scale.item(), blended["unet.a"].shift.item()) == (1.5, 0.0)  # 1 + .5 * 2 - 1 * .5
    assert (blended["unet.b"].scale.item(), blended["unet.b"].shift.item()) == (2.0, 6.0)
    assert blended.metadata.name == "0.5 one + 1 other"


def test_blend_keeps_an_equal_support():
    bounded = affine([1.0], [1.0], [0.0], [1.0])
    one, other = ActMap({"unet.a": bounded}), ActMap({"unet.a": affine([1.0], [2.0], [0.0], [1.0])})
    blended = ActMap.blend({one: 1.0, other: 1.0})["unet.a"]
    assert (blended.shift.item(), blended.lower.item(), blended.upper.item()) == (3.0, 0.0, 1.0)


def test_blend_refuses_what_one_map_cannot_hold():
    plain = ActMap({"unet.a": affine([1.0], [1.0])})
    with pytest.raises(ValueError, match="at least one map"):
        ActMap.blend({})
    with pytest.raises(ValueError, match=r"unet\.a has 1 units in one map, 2 in another"):
        ActMap.blend({plain: 1, ActMap({"unet.a": AffineMap.identity(2)}): 1})
    with pytest.raises(ValueError, match=r"different supports at unet\.a"):
        ActMap.blend({plain: 1, ActMap({"unet.a": affine([1.0], [1.0], [0.0], [1.0])}): 1})
    with pytest.raises(ValueError, match="different spatial rules"):
        ActMap.blend({plain: 1, ActMap(dict(plain), ActMapMetadata(spatial="shift")): 1})
