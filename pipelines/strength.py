"""What users may give as a strength, and what it means for one part of a map at one step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from numbers import Real
from typing import TypeAlias

Schedule: TypeAlias = Callable[[int, int], float]
# One number, a schedule (step, steps) -> number, or one number per prompt of the batch ...
PartStrength: TypeAlias = "float | Schedule | Sequence[float]"
# ... for the whole map, or by component or the beginning of site names ("unet", "unet.up_blocks.1").
Strength: TypeAlias = "PartStrength | Mapping[str, PartStrength]"


def strength_curve(points: Mapping[float, float]) -> Schedule:
    """A strength that follows straight lines through points of the sampling run, for `act_strength` and `set_act_maps`.

    Args:
        points: {fraction of the run: strength}; 0 is the first step, 1 the end. Before the first and after the last point the
            strength stays as it is there.

    Raises:
        ValueError: without points, or for fractions outside [0, 1].

    Example:
        >>> pipe("a fox", act_strength=strength_curve({0: 1.2, 0.5: 0.8, 0.6: 0}))
    """
    if not points or not all(0 <= fraction <= 1 for fraction in points):
        raise ValueError(f"points must map fractions of the run, 0 to 1, to strengths; got {points!r}")
    ordered = sorted((float(fraction), float(strength)) for fraction, strength in points.items())

    def strength_at(step: int, steps: int) -> float:
        fraction = step / steps
        if fraction <= ordered[0][0]:
            return ordered[0][1]
        for (start, first), (end, last) in pairwise(ordered):
            if fraction <= end:
                return first + (last - first) * (fraction - start) / (end - start)
        return ordered[-1][1]

    return strength_at


def strength_window(start: float, end: float, strength: float = 1.0) -> Schedule:
    """A strength that holds from `start` up to `end`, fractions of the sampling run, and is 0 before and after.

    Raises:
        ValueError: unless 0 <= start < end <= 1.
    """
    if not 0 <= start < end <= 1:
        raise ValueError(f"a window needs 0 <= start < end <= 1, got {start} and {end}")
    return lambda step, steps: strength if start <= step / steps < end else 0.0


def check_strength(strength: Strength, name: str, sites: Iterable[str]) -> None:
    """Raise TypeError or ValueError unless `strength` is one for the map `name`, which has `sites`."""
    if isinstance(strength, Mapping):
        sites = list(sites)
        for key, part in strength.items():
            if not any(_begins(site, key) for site in sites):
                components = dict.fromkeys(site.split(".")[0] for site in sites)
                raise ValueError(
                    f"act map {name!r} has no component {key!r}, only {', '.join(components)}, and no site whose name begins so"
                )
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


def parts_of(strength: Strength, sites: Iterable[str]) -> list[tuple[list[str], PartStrength]]:
    """`sites` in groups of equal strength. In a dict the longest name counts, and 1 for what it leaves out, as in diffusers' LoRA."""
    if not isinstance(strength, Mapping):
        return [(list(sites), strength)]
    groups: dict[str, list[str]] = {}
    for site in sites:
        key = max((key for key in strength if _begins(site, key)), key=len, default="")
        groups.setdefault(key, []).append(site)
    return [(group, strength.get(key, 1.0)) for key, group in groups.items()]


def _begins(site: str, name: str) -> bool:
    return site == name or site.startswith((f"{name}.", f"{name}:"))
