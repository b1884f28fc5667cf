"""Estimators of the steering methods before AcT, which are special cases of its affine form (paper, table 1).

As in `estimators`, source samples (n, C) and target samples (m, C) give an `AffineMap` of C units. Units that a method leaves
alone get the identity; `AffineMap.unit_mask` tells which.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .affine import AffineMap
from .estimators import check_samples, mean, unit_blocks


def actadd(source: Tensor, target: Tensor) -> AffineMap:
    """ActAdd (Turner et al., arXiv 2308.10248): the difference of one contrast pair.

    Raises:
        ValueError: unless there is one sample on each side.
    """
    check_samples(source, target, 1, "actadd")
    if len(source) != 1 or len(target) != 1:
        raise ValueError(
            f"method 'actadd' takes one pair of prompts, got {len(source)} source and {len(target)} target samples; "
            "give one prompt on each side and a pooling other than 'none', or use method='caa'"
        )
    return mean(source, target)


def repe(source: Tensor, target: Tensor) -> AffineMap:
    """RePE (Zou et al., arXiv 2310.01405): shift along the first principal direction of the paired differences.

    The differences target_i - source_i are not centred, as if each pair came in both orders. Strength 1 moves by their mean along
    the direction, which also orients it.

    Raises:
        ValueError: unless source and target have equally many samples, pair by pair.
    """
    check_samples(source, target, 1, "repe")
    if len(source) != len(target):
        raise ValueError(
            f"method 'repe' needs pairs, got {len(source)} source and {len(target)} target samples; give equally many "
            "prompts, one target per source, and a pooling other than 'none'"
        )
    differences = target.double() - source.double()
    direction = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    shift = (differences.mean(0) @ direction) * direction
    return AffineMap(torch.ones_like(shift), shift)


def east(source: Tensor, target: Tensor, weights: Tensor | None = None) -> AffineMap:
    """EAST (Rahn et al., arXiv 2406.00244): shift by the weighted mean of the target.

    Args:
        source: used for its shape only.
        target: (m, C).
        weights: (m,), not negative: in the publication the entropy of what the model does next. None weighs all alike.

    Raises:
        ValueError: for weights of another number, negative or all zero.
    """
    check_samples(source, target, 1, "east")
    weights = torch.ones(len(target)) if weights is None else weights
    weights = weights.to(target.device, torch.float64)
    if weights.shape != (len(target),) or (weights < 0).any() or weights.sum() == 0:
        raise ValueError(
            f"method 'east' needs one weight for each of the {len(target)} target samples, not negative and not all "
            f"zero; got {len(weights)} from {float(weights.min()):g} to {float(weights.max()):g}; pool to one sample per prompt"
        )
    shift = weights @ target.double() / weights.sum()
    return AffineMap(torch.ones_like(shift), shift)


def iti_c(source: Tensor, target: Tensor, inverse_regularization: float = 1.0) -> AffineMap:
    """ITI with a classifier's direction (Li et al., arXiv 2306.03341): shift along the normal of a linear classifier.

    The classifier is the logistic regression of target against source that scikit-learn fits by default. Strength 1 moves by one
    standard deviation, along the normal, of all samples.
    """
    check_samples(source, target, 1, "iti_c")
    samples = torch.cat([source, target]).double()
    labels = torch.cat([torch.zeros(len(source)), torch.ones(len(target))]).to(samples)
    normal = _logistic_regression(samples, labels, inverse_regularization)
    length = normal.norm()
    direction = normal / length if length > 0 else normal
    shift = (samples @ direction).std(correction=0) * direction
    return AffineMap(torch.ones_like(shift), shift)


def aura(source: Tensor, target: Tensor) -> AffineMap:
    """AurA (Suau et al., arXiv 2407.12824): dampens units by how well they tell source from target.

    scale = 1 - 2 (AUROC - 1/2) where the unit's AUROC of source against target exceeds 1/2, else 1; no shift.
    """
    check_samples(source, target, 1, "aura")
    scale = 1 - 2 * (auroc(source, target) - 0.5).clamp_min(0)
    return AffineMap(scale, torch.zeros_like(scale))


def det_zero(source: Tensor, target: Tensor, threshold: float = 0.8) -> AffineMap:
    """Det-zero (Suau et al., arXiv 2110.02802): expert units of the source always put out their mean over the target.

    Args:
        source, target: (n, C) and (m, C).
        threshold: units whose average precision for source against target exceeds it are experts.
    """
    check_samples(source, target, 1, "det_zero")
    expert = average_precision(source, target) > threshold
    target_mean = target.mean(0, dtype=torch.float64)
    return AffineMap(torch.where(expert, 0.0, 1.0), torch.where(expert, target_mean, 0.0))


def auroc(positive: Tensor, negative: Tensor) -> Tensor:
    """Area under the ROC curve (C,) of every unit, of samples (n, C) against (m, C); ties count half."""
    parts = []
    for high, low in unit_blocks(positive, negative):
        below, up_to = _counts_below(low, high), _counts_below(low, high, right=True)
        parts.append((below + up_to).double().mean(-1) / (2 * low.shape[1]))
    return torch.cat(parts)


def average_precision(positive: Tensor, negative: Tensor) -> Tensor:
    """Average precision (C,) of every unit, of samples (n, C) against (m, C): sum over thresholds of precision x gain in recall."""
    parts = []
    for high, low in unit_blocks(positive, negative):
        true = high.shape[1] - _counts_below(high, high)
        false = low.shape[1] - _counts_below(low, high)
        parts.append((true / (true + false).double()).mean(-1))
    return torch.cat(parts)


def _counts_below(ordered: Tensor, values: Tensor, *, right: bool = False) -> Tensor:
    """How many of the sorted `ordered` (C, m) lie below each of `values` (C, n), or with `right` at most at it."""
    return torch.searchsorted(ordered, values.contiguous(), right=right)


def _logistic_regression(samples: Tensor, labels: Tensor, inverse_regularization: float) -> Tensor:
    """The weights (C,) that minimise 1/2 |w|^2 + inverse_regularization * sum of logistic losses, with a free intercept.

    Newton's method with step halving. With fewer samples than units it works in the span of the samples, where w lies.
    """
    basis = None
    if samples.shape[0] < samples.shape[1]:
        basis, triangle = torch.linalg.qr(samples.t())
        samples = triangle.t()
    design = torch.cat([samples, torch.ones_like(samples[:, :1])], dim=1)
    penalty = torch.ones_like(design[0])
    penalty[-1] = 0

    def loss(weights: Tensor) -> Tensor:
        logits = design @ weights
        logistic = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        return 0.5 * (penalty * weights.square()).sum() + inverse_regularization * logistic

    weights = torch.zeros_like(penalty)
    present = loss(weights)
    for _ in range(100):
        p = torch.sigmoid(design @ weights)
        gradient = penalty * weights + inverse_regularization * design.t() @ (p - labels)
        curvature = design.t() @ (design * (p * (1 - p))[:, None])
        hessian = torch.diag(penalty + 1e-12) + inverse_regularization * curvature
        step = torch.linalg.solve(hessian, gradient)
        if gradient @ step < 1e-12 * (1 + present):
            break
        size = 1.0
        while (moved := loss(weights - size * step)) > present and size > 1e-8:
            size /= 2
        weights, present = weights - size * step, moved
    return weights[:-1] if basis is None else basis @ weights[:-1]
