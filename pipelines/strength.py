"""What users may give as a strength, and what it means for one component at one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import TypeAlias

Schedule: TypeAlias = Callable[[int, int], float]
# One number, a schedule (step, steps) -> number, or one number per prompt of the batch ...
ComponentStrength: TypeAlias = "float | Schedule | Sequence[float]"
# ... for the whole map, or by component.
Strength: TypeAlias = "ComponentStrength | Mapping[str, ComponentStrength]"


def check_strength(strength: Strength, name: str, components: Sequence[str]) -> None:
    """Raise TypeError or ValueError unless `strength` is one; `components` are those of the map `name`."""
    if isinstance(strength, Mapping):
        unknown = [key for key in strength if key not in components]
        if unknown:
            raise ValueError(f"act map {name!r} has no component {unknown[0]!r}, only {', '.join(components)}")
        for part in strength.values():
            check_strength(part, name, ())
    elif callable(strength) or isinstance(strength, Real):
        return
    elif (
        not isinstance(strength, Sequence)
        or isinstance(strength, str)
        or not all(isinstance(s, Real) for s in strength)
    ):
        raise TypeError(
            f"the strength of act map {name!r} must be a number, a function (step, steps) -> number, numbers per prompt, or a "
            f"dict of these by component; got {strength!r}"
        )


def component_strength(strength: Strength, component: str) -> ComponentStrength:
    """The part of `strength` for one component; a component that a dict leaves out has 1, as LoRA weights in diffusers."""
    return strength.get(component, 1.0) if isinstance(strength, Mapping) else strength
