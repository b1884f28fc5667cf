"""Estimators: closed forms and symmetries."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actmaps.maps import ESTIMATORS, AffineMap
from actmaps.maps.estimators import linear, support_bounds, transport_costs
from actmaps.maps.methods import TRANSPORTS

everyone = pytest.mark.parametrize("method", TRANSPORTS)


def normal(n, channels=3, mean=0.0, std=1.0, seed=0):
    return torch.randn(n, channels, generator=torch.Generator().manual_seed(seed)) * std + mean


def column(*values):
    return torch.tensor(values, dtype=torch.float32)[:, None]


def assert_same(one, other, tolerance=1e-6):
    torch.testing.assert_close(one.scale, other.scale, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(one.shift, other.shift, rtol=tolerance, atol=10 * tolerance)


samples = st.integers(0, 2**31).map(lambda seed: normal(7 + seed % 13, seed=seed))


# Closed forms


def test_linear_finds_the_exact_affine_relation_whatever_the_order():
    source = normal(50)
    scale, shift = torch.tensor([0.5, 2.0, 1.0]), torch.tensor([3.0, -1.0, 0.0])
    target = (source * scale + shift)[torch.randperm(50)]
    assert_same(linear(source, target), AffineMap(scale, shift))


def test_linear_is_least_squares_of_sorted_target_on_sorted_source():
    # sorted and centred: a = -2 -1 3, b = -1 0 1, so slope (2 + 0 + 3) / (4 + 1 + 9)
    affine = linear(column(5.0, 1.0, 0.0), column(4.0, 6.0, 5.0))
    assert affine.scale.item() == pytest.approx(5 / 14)
    assert affine.shift.item() == pytest.approx(5 - 2 * 5 / 14)


def test_linear_never_flips_a_unit():
    source = normal(40)
    assert_same(linear(source, -source), linear(source, (-source).flip(0)))
    assert (linear(source, -source).scale > 0.5).all()


def test_linear_of_unequal_counts_on_paper():
    # quantile functions on the grid 0, 1/3, 1/2, 2/3, 1: a = -1 -1 1 1, b = -3 0 0 3 with weights 2 1 1 2 sixths
    affine = linear(column(0.0, 2.0), column(-2.0, 1.0, 4.0))
    assert affine.scale.item() == pytest.approx(2.0)
    assert affine.shift.item() == pytest.approx(-1.0)


@pytest.mark.parametrize(("n", "m"), [(2, 3), (4, 6), (5, 7), (8, 3), (1000, 999)])
def test_linear_of_unequal_counts_is_linear_of_both_repeated_to_the_same_count(n, m):
    source, target = normal(n, seed=1), normal(m, mean=2, std=3, seed=2)
    count = math.lcm(n, m)
    repeated = linear(source.repeat(count // n, 1), target.repeat(count // m, 1))
    assert_same(linear(source, target), repeated)


def test_exact_quantiles_of_gaussians_give_the_gaussian_map():
    ranks = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    quantiles = (math.sqrt(2) * torch.erfinv(2 * ranks - 1))[:, None]
    source, target = 2 * quantiles + 1, 3 * quantiles - 4
    for method in ("linear", "gaussian"):
        affine = ESTIMATORS[method](source, target)
        assert affine.scale.item() == pytest.approx(1.5, rel=1e-6)
        assert affine.shift.item() == pytest.approx(-5.5, rel=1e-6)


def test_exact_quantiles_of_uniform_and_exponential_give_the_known_slope():
    # uniform on [0, 1] to exponential(1): slope cov(u, -log(1 - u)) / var(u) = (1/4) / (1/12) = 3, shift 1 - 3/2
    ranks = ((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)[:, None]
    affine = linear(ranks, -torch.log1p(-ranks))
    assert affine.scale.item() == pytest.approx(3.0, rel=1e-4)
    assert affine.shift.item() == pytest.approx(-0.5, rel=1e-3)


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_samples_of_gaussians_come_close_to_the_gaussian_map(method):
    affine = ESTIMATORS[method](normal(20_000, mean=1, std=2), normal(15_000, mean=-3, std=0.5, seed=1))
    torch.testing.assert_close(affine.scale, torch.full((3,), 0.25), rtol=0.02, atol=0)
    torch.testing.assert_close(affine.shift, torch.full((3,), -3.25), rtol=0.02, atol=0)


def test_gaussian_matches_mean_and_standard_deviation():
    affine = ESTIMATORS["gaussian"](column(0.0, 2.0), column(1.0, 7.0))
    assert (affine.scale.item(), affine.shift.item()) == (3.0, 1.0)


def test_mean_shifts_by_the_difference_of_means():
    affine = ESTIMATORS["mean"](column(0.0, 1.0, 5.0), column(4.0))
    assert (affine.scale.item(), affine.shift.item()) == (1.0, 2.0)


@everyone
def test_equal_sets_give_the_identity(method):
    source = normal(30)
    assert_same(ESTIMATORS[method](source, source), AffineMap.identity(3))


@everyone
@given(source=samples, target=samples)
def test_mean_is_carried_to_mean(method, source, target):
    affine = ESTIMATORS[method](source, target)
    torch.testing.assert_close(affine.apply(source).mean(0), target.mean(0), rtol=1e-4, atol=1e-5)


# Symmetries


@everyone
@given(source=samples, target=samples, seed=st.integers(0, 1000))
def test_order_of_samples_does_not_matter(method, source, target, seed):
    generator = torch.Generator().manual_seed(seed)
    shuffled = [x[torch.randperm(len(x), generator=generator)] for x in (source, target)]
    assert_same(ESTIMATORS[method](*shuffled), ESTIMATORS[method](source, target))


@everyone
@given(source=samples, target=samples, order=st.permutations(range(3)))
def test_units_are_independent(method, source, target, order):
    together, alone = ESTIMATORS[method](source, target), ESTIMATORS[method](source[:, order], target[:, order])
    assert_same(alone, AffineMap(together.scale[list(order)], together.shift[list(order)]))


coefficients = st.tuples(st.floats(0.1, 10), st.floats(-10, 10))


@everyone
@given(source=samples, target=samples, move=coefficients)
def test_moving_the_target_moves_the_map(method, source, target, move):
    scale, shift = move if method != "mean" else (1.0, move[1])
    moved = AffineMap(torch.full((3,), scale), torch.full((3,), shift))
    expected = ESTIMATORS[method](source, target).then(moved)
    assert_same(ESTIMATORS[method](source, target * scale + shift), expected, 1e-4)


@everyone
@given(source=samples, target=samples, move=coefficients)
def test_moving_the_source_is_undone_by_the_map(method, source, target, move):
    scale, shift = move if method != "mean" else (1.0, move[1])
    undone = AffineMap(torch.full((3,), scale), torch.full((3,), shift)).inverse()
    expected = undone.then(ESTIMATORS[method](source, target))
    assert_same(ESTIMATORS[method](source * scale + shift, target), expected, 1e-4)


@everyone
@given(source=samples, target=samples)
def test_slopes_are_never_negative(method, source, target):
    assert (ESTIMATORS[method](source, target).scale >= 0).all()


@everyone
@given(source=samples, target=samples, times=st.integers(2, 4))
def test_repeating_a_set_changes_nothing(method, source, target, times):
    assert_same(ESTIMATORS[method](source.repeat(times, 1), target), ESTIMATORS[method](source, target), 1e-5)


@settings(deadline=None, max_examples=20)
@given(source=samples, target=samples)
def test_linear_costs_least_of_all_maps_that_keep_the_mean(source, target):
    count = math.lcm(len(source), len(target))
    a, b = (x.repeat(count // len(x), 1).sort(0).values for x in (source, target))

    def cost(affine):
        return (affine.apply(a) - b).square().mean(0)

    best = linear(source, target)
    for change in (-0.05, 0.05):
        other = AffineMap(best.scale + change, best.shift - change * source.mean(0))
        assert (cost(best) <= cost(other)).all()


@everyone
def test_blocks_of_units_give_what_all_units_at_once_give(method, monkeypatch):
    source, target = normal(10, 9), normal(12, 9, mean=1, std=2, seed=1)
    at_once = ESTIMATORS[method](source, target)
    monkeypatch.setattr("actmaps.maps.estimators._BLOCK", 50)  # two units of 22 samples
    in_blocks = ESTIMATORS[method](source, target)
    assert_same(in_blocks, at_once, 1e-7)


# Degenerate units and precision


@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize("constant", [0.0, 1e-30, 0.1, -1234.5, 1e6])
def test_a_dead_unit_is_only_shifted(method, constant):
    source = torch.cat([torch.full((20, 1), constant), normal(20, 1)], dim=1)
    target = normal(20, 2, mean=5)
    affine = ESTIMATORS[method](source, target)
    assert affine.scale[0] == 1
    assert affine.shift[0].item() == pytest.approx(target[:, 0].double().mean().item() - constant, rel=1e-6)
    assert affine.scale[1] != 1


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_a_unit_constant_up_to_rounding_is_dead(method):
    source = 1000 + 1e-4 * normal(20, 1)
    affine = ESTIMATORS[method](source, normal(20, 1, seed=1))
    assert affine.scale.item() == 1


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_a_slope_beyond_1e4_is_shrunk_to_a_shift(method):
    narrow = 0.9e-4 * normal(20, 1)
    assert ESTIMATORS[method](narrow, normal(20, 1)).scale.item() == 1
    assert ESTIMATORS[method](1.2e-4 * normal(20, 1), normal(20, 1)).scale.item() == pytest.approx(1e4 / 1.2, rel=1e-4)


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_a_constant_target_gives_slope_zero(method):
    affine = ESTIMATORS[method](normal(20), torch.full((20, 3), 4.0))
    torch.testing.assert_close(affine.scale, torch.zeros(3), rtol=0, atol=1e-12)
    torch.testing.assert_close(affine.shift, torch.full((3,), 4.0))


@everyone
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_type_is_solved_in_float64(method, dtype):
    source, target = normal(30).to(dtype), normal(40, mean=1).to(dtype)
    expected = ESTIMATORS[method](source.double(), target.double())
    assert torch.equal(ESTIMATORS[method](source, target).scale, expected.scale)
    assert torch.equal(ESTIMATORS[method](source, target).shift, expected.shift)


@everyone
def test_a_large_offset_costs_no_precision(method):
    source = normal(64).double() + 2**12  # exact in float32 up to 2 ** -11
    affine = ESTIMATORS[method](source, source + 3)
    assert_same(affine, AffineMap(torch.ones(3), torch.full((3,), 3.0)), 1e-5)


@everyone
def test_samples_stay_as_they_are(method):
    source, target = normal(10), normal(12, seed=1)
    kept = source.clone(), target.clone()
    ESTIMATORS[method](source, target)
    ESTIMATORS[method](source.double().t().contiguous().t(), target.double())
    assert torch.equal(source, kept[0])
    assert torch.equal(target, kept[1])


@everyone
def test_gradients_are_no_obstacle(method):
    assert not ESTIMATORS[method](normal(5).requires_grad_(), normal(5)).scale.requires_grad


# Refusals


@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize(("n", "m", "side"), [(1, 5, "source"), (5, 1, "target")])
def test_one_sample_has_no_slope(method, n, m, side):
    message = f"method '{method}' needs at least 2 {side} samples, got 1; add prompts, or use method='mean'"
    with pytest.raises(ValueError, match=message):
        ESTIMATORS[method](normal(n), normal(m))


def test_one_sample_suffices_for_the_mean():
    assert ESTIMATORS["mean"](column(1.0), column(3.0)).shift.item() == 2


@everyone
@pytest.mark.parametrize(("n", "m", "side"), [(0, 5, "source"), (5, 0, "target")])
def test_an_empty_set_is_refused(method, n, m, side):
    with pytest.raises(ValueError, match=f"got 0; the {side} set is empty"):
        ESTIMATORS[method](normal(n), normal(m))


@everyone
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", ["source", "target"])
def test_entries_that_are_not_finite_are_refused(method, bad, side):
    both = {"source": normal(5), "target": normal(5)}
    both[side][3, 1] = bad
    with pytest.raises(ValueError, match=f"the {side} activations have NaN or infinite entries"):
        ESTIMATORS[method](both["source"], both["target"])


@everyone
@pytest.mark.parametrize("shapes", [((5, 3), (5, 4)), ((5, 3), (5,)), ((5, 2, 3), (5, 2, 3))])
def test_other_shapes_are_refused(method, shapes):
    with pytest.raises(ValueError, match=r"samples must be \(n, C\) and \(m, C\) with the same C"):
        ESTIMATORS[method](*map(torch.zeros, shapes))


# Support and costs


def test_support_all_has_no_bounds():
    assert support_bounds(normal(5), "all") is None


def test_observed_support_is_the_range_of_the_source():
    low, high = support_bounds(column(3.0, -1.0, 2.0), "observed")
    assert (low.item(), high.item()) == (-1.0, 3.0)


@pytest.mark.parametrize(
    ("quantiles", "bounds"), [((0, 1), (0, 100)), ((0.1, 0.9), (10, 90)), ([0.25, 0.5], (25, 50))]
)
def test_quantile_support_cuts_the_tails(quantiles, bounds):
    source = torch.arange(101.0).flip(0)[:, None].repeat(1, 2)
    low, high = support_bounds(source, quantiles)
    assert (low.tolist(), high.tolist()) == ([bounds[0]] * 2, [bounds[1]] * 2)


@pytest.mark.parametrize("support", ["some", (0.5,), (0.9, 0.1), (-0.1, 1), (0, 1.1), None, 0.5, (0, 0.5, 1)])
def test_other_supports_are_refused(support):
    with pytest.raises(ValueError, match='support must be "all", "observed" or quantiles'):
        support_bounds(normal(5), support)


def test_costs_are_gaussian_wasserstein_distances_before_and_after():
    source, target = column(-1.0, 1.0), column(2.0, 6.0)  # means 0 and 4, deviations 1 and 2
    for fitted, after in (
        (AffineMap.identity(1), 17.0),
        (ESTIMATORS["mean"](source, target), 1.0),
        (ESTIMATORS["gaussian"](source, target), 0.0),
    ):
        assert [cost.tolist() for cost in transport_costs(source, target, fitted)] == [[17.0], [after]]
