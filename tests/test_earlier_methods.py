"""The methods before AcT against closed forms, scikit-learn, and what their publications say."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actmaps.maps import ESTIMATORS, METHODS, AffineMap
from actmaps.maps.earlier_methods import auroc, average_precision, det_zero, east, iti_c, repe

EARLIER = [name for name, method in METHODS.items() if method.strength != "transport"]
everyone = pytest.mark.parametrize("method", EARLIER)


def normal(n, channels=3, mean=0.0, std=1.0, seed=0):
    return torch.randn(n, channels, generator=torch.Generator().manual_seed(seed)) * std + mean


def column(*values):
    return torch.tensor(values, dtype=torch.float32)[:, None]


def assert_close(one, other, tolerance=1e-5):
    torch.testing.assert_close(one.double(), torch.as_tensor(other).double(), rtol=tolerance, atol=tolerance)


# Closed forms


@pytest.mark.parametrize("method", ["caa", "iti_m"])
def test_mean_shifts_carry_mean_to_mean(method):
    source, target = normal(20), normal(30, mean=2, seed=1)
    affine = ESTIMATORS[method](source, target)
    assert (affine.scale == 1).all()
    assert_close(affine.shift, target.mean(0) - source.mean(0))


def test_actadd_is_the_difference_of_one_pair():
    affine = ESTIMATORS["actadd"](torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 0.0]]))
    assert (affine.scale.tolist(), affine.shift.tolist()) == ([1, 1], [3, -2])


def test_repe_finds_the_direction_along_which_pairs_differ():
    direction = torch.tensor([0.6, 0.0, 0.8])
    source = normal(200)
    target = source + direction * normal(200, 1, mean=2.0, std=0.5, seed=1) + 0.05 * normal(200, seed=2)
    shift = repe(source, target).shift
    assert_close(shift / shift.norm(), direction, 0.02)
    assert shift.norm().item() == pytest.approx(2.0, abs=0.1)


def test_repe_points_from_source_to_target():
    source, target = normal(10), normal(10, mean=1, seed=1)
    assert_close(repe(target, source).shift, -repe(source, target).shift)


def test_east_is_the_mean_of_the_target_weighted():
    target = torch.tensor([[1.0, 10.0], [4.0, 20.0]])
    assert_close(east(target, target).shift, [2.5, 15.0])
    assert_close(east(target, target, torch.tensor([1.0, 3.0])).shift, [3.25, 17.5])


def test_aura_dampens_by_how_well_a_unit_tells_the_sets_apart():
    # AUROC 1 (all of the source above), 3/4, 1/2 (the same), and 0 (all below, which is not dampened)
    source = torch.tensor([[3.0, 1.0, 1.0, 0.0], [4.0, 3.0, 2.0, 0.5]])
    target = torch.tensor([[1.0, 0.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    affine = ESTIMATORS["aura"](source, target)
    assert affine.scale.tolist() == [0.0, 0.5, 1.0, 1.0]
    assert (affine.shift == 0).all()
    assert affine.unit_mask.tolist() == [True, True, False, False]


def test_det_zero_sets_expert_units_to_their_mean_over_the_target():
    source = torch.tensor([[3.0, 1.0], [4.0, 2.0]])
    target = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    affine = det_zero(source, target)
    assert affine.unit_mask.tolist() == [True, False]
    assert affine.apply(torch.tensor([[7.0, 7.0]])).tolist() == [[1.5, 7.0]]
    assert det_zero(source, target, threshold=0.4).unit_mask.all()


# Against scikit-learn


@pytest.mark.parametrize(("n", "m", "channels"), [(40, 60, 5), (15, 10, 80), (30, 30, 59)])
def test_iti_c_has_the_direction_of_scikit_learns_classifier(n, m, channels):
    linear_model = pytest.importorskip("sklearn.linear_model", reason="needs scikit-learn: pip install -e .[test]")
    source, target = normal(n, channels), normal(m, channels, mean=0.3, std=1.2, seed=1)
    samples, labels = torch.cat([source, target]).double().numpy(), [0] * n + [1] * m
    fitted = linear_model.LogisticRegression(tol=1e-10, max_iter=10_000).fit(samples, labels)
    direction = fitted.coef_[0] / np.linalg.norm(fitted.coef_[0])
    affine = iti_c(source, target)
    assert (affine.scale == 1).all()
    assert_close(affine.shift, direction * (samples @ direction).std(), 1e-4)


def test_iti_c_copes_with_sets_that_a_plane_parts():
    affine = iti_c(column(0.0, 1.0), column(100.0, 101.0))
    assert affine.shift.item() == pytest.approx(np.std([0, 1, 100, 101]), rel=1e-6)


with_ties = st.integers(0, 2**31).map(lambda seed: normal(4 + seed % 20, 3, seed=seed).mul(2).round())


@given(with_ties, with_ties)
def test_auroc_and_average_precision_are_scikit_learns(positive, negative):
    metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn: pip install -e .[test]")
    labels, values = [1] * len(positive) + [0] * len(negative), torch.cat([positive, negative]).numpy()
    assert_close(auroc(positive, negative), [metrics.roc_auc_score(labels, values[:, u]) for u in range(3)])
    expected = [metrics.average_precision_score(labels, values[:, u]) for u in range(3)]
    assert_close(average_precision(positive, negative), expected)


# All of them


@pytest.mark.parametrize("method", [name for name in EARLIER if name not in ("iti_c", "repe")])
def test_units_are_solved_one_by_one(method):
    n = 1 if method == "actadd" else 12
    source, target, order = normal(n, 4), normal(n, 4, mean=1, seed=1), [2, 0, 3, 1]
    together, alone = ESTIMATORS[method](source, target), ESTIMATORS[method](source[:, order], target[:, order])
    assert_close(together.scale[order], alone.scale)
    assert_close(together.shift[order], alone.shift)


@everyone
def test_strength_scales_what_the_method_does(method):
    n = 1 if method == "actadd" else 12
    affine = ESTIMATORS[method](normal(n), normal(n, mean=-1, seed=1))
    x = normal(5, seed=2)
    one, half = affine.apply(x) - x, affine.apply(x, 0.5) - x
    assert_close(half, one / 2)
    if METHODS[method].strength == "multiplier":
        assert_close(affine.apply(x, 4.0) - x, 4 * one)


@everyone
@pytest.mark.parametrize("side", ["source", "target"])
def test_activations_that_are_not_finite_are_refused(method, side):
    both = {"source": normal(1), "target": normal(1)}
    both[side][0, 1] = torch.nan
    with pytest.raises(ValueError, match=f"the {side} activations have NaN"):
        ESTIMATORS[method](both["source"], both["target"])


@everyone
def test_an_empty_set_is_refused(method):
    with pytest.raises(ValueError, match="the target set is empty"):
        ESTIMATORS[method](normal(1), normal(0))


def test_pairs_are_asked_for_where_they_are_needed():
    with pytest.raises(ValueError, match="'actadd' takes one pair of prompts, got 2 source and 1 target"):
        ESTIMATORS["actadd"](normal(2), normal(1))
    with pytest.raises(ValueError, match="'repe' needs pairs, got 2 source and 3 target"):
        ESTIMATORS["repe"](normal(2), normal(3))


@pytest.mark.parametrize("weights", [torch.ones(2), -torch.ones(3), torch.zeros(3)])
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(ValueError, match="'east' needs one weight for each of the 3 target samples"):
        east(normal(3), normal(3), weights)


def test_a_unit_mask_names_the_units_that_move():
    affine = AffineMap(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([0.0, 0.0, 3.0]))
    assert affine.unit_mask.tolist() == [False, True, True]


# Conventions


def test_every_method_says_how_it_is_used():
    assert set(METHODS) == {
        *("linear", "mean", "gaussian", "actadd", "caa", "repe", "east", "iti_m", "iti_c", "aura", "det_zero")
    }
    assert {name: METHODS[name].pooling for name in EARLIER} == {
        **dict.fromkeys(["actadd", "caa", "repe", "east", "iti_m", "iti_c"], "last"),
        **dict.fromkeys(["aura", "det_zero"], "max"),
    }
    assert not any(METHODS[name].causal for name in EARLIER)
