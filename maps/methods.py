"""All methods by name: AcT's own maps and the earlier methods that its affine form holds, each with the conventions it came with."""

from __future__ import annotations

from dataclasses import dataclass

from .earlier_methods import actadd, aura, det_zero, east, iti_c, repe
from .estimators import Estimator, gaussian, linear, mean


@dataclass(frozen=True)
class Method:
    """An estimator and how it is used unless the user says otherwise.

    Attributes:
        name: what `fit_map(method=...)` calls it.
        estimator: from samples (n, C) and (m, C) to an `AffineMap`.
        pooling: see `pooling.samples`.
        causal: whether each site is fitted on what the maps before it leave.
        support: where the map acts; see `fit_map`. Which units it moves is in the map (`AffineMap.unit_mask`).
        strength: "transport" interpolates between the activation (0) and its image (1); "multiplier" scales a shift whose best
            size must be searched for, often well above 1; "dampening" goes from the activation (0) to its published form (1).
        source: where it is from.
        per_unit: whether the map of a unit depends on the samples of that unit alone, so that processes may share the units.
    """

    name: str
    estimator: Estimator
    pooling: str
    causal: bool
    strength: str
    source: str
    support: str | tuple[float, float] = "all"
    per_unit: bool = False


def _methods(*methods: Method) -> dict[str, Method]:
    return {method.name: method for method in methods}


METHODS: dict[str, Method] = _methods(
    Method("linear", linear, "none", True, "transport", "AcT, arXiv 2410.23054, equation 6", per_unit=True),
    Method("mean", mean, "none", True, "transport", "AcT, arXiv 2410.23054, section 3.3", per_unit=True),
    Method("gaussian", gaussian, "none", True, "transport", "optimal transport between Gaussians", per_unit=True),
    Method("actadd", actadd, "last", False, "multiplier", "arXiv 2308.10248", per_unit=True),
    Method("caa", mean, "last", False, "multiplier", "arXiv 2312.06681", per_unit=True),
    Method("repe", repe, "last", False, "multiplier", "arXiv 2310.01405"),
    Method("east", east, "last", False, "multiplier", "arXiv 2406.00244", per_unit=True),
    Method("iti_m", mean, "last", False, "multiplier", "arXiv 2306.03341, mass mean shift", per_unit=True),
    Method("iti_c", iti_c, "last", False, "multiplier", "arXiv 2306.03341, classifier's normal"),
    Method("aura", aura, "max", False, "dampening", "arXiv 2407.12824", per_unit=True),
    Method("det_zero", det_zero, "max", False, "dampening", "arXiv 2110.02802", per_unit=True),
)

ESTIMATORS: dict[str, Estimator] = {name: method.estimator for name, method in METHODS.items()}

# Those that transport a distribution: what image models are steered with.
TRANSPORTS = tuple(name for name, method in METHODS.items() if method.strength == "transport")


def as_method(method: str | Method) -> Method:
    """The method of that name. Raises ValueError for unknown names."""
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method]
