"""Strengths as users type them into a text field: curves over the run, and factors for blocks of a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from math import isfinite
from typing import cast

from ..maps.sites import closest
from .strength import Schedule, parts_of, strength_curve

_CURVE = 'points "percent:factor" such as "0:1.2, 0.5:0.8, 0.6:0"'
_BLOCKS = 'lines "beginning of site names: factor" such as "unet.up_blocks: 0.5"'


def parse_curve(text: str) -> Schedule:
    """The curve through points "percent:factor", set apart by commas or lines; "0:1.2, 0.5:0.8, 0.6:0" for example.

    Percents are fractions of the run, from 0 to 1. See `strength_curve` for what lies between the points and beyond them.

    Raises:
        ValueError: naming the point that is malformed, outside of the run or there twice, or if there is none.
    """
    points: dict[float, float] = {}
    for entry, percent, factor in _entries(text, "strength_curve", _CURVE):
        at = _number(percent)
        if at is None:
            raise ValueError(f"strength_curve: {percent!r} in {entry!r} is no number; write {_CURVE}")
        if not 0 <= at <= 1:
            raise ValueError(
                f"strength_curve: {entry!r} is outside of the run, which goes from 0 to 1; write {_CURVE}"
            )
        if at in points:
            raise ValueError(f"strength_curve: {entry!r} is a second point at {at:g}; for a jump, write two close by")
        points[at] = factor
    if not points:
        raise ValueError(f"strength_curve has no point; write {_CURVE}")
    return strength_curve(points)


def parse_block_strengths(text: str, sites: Collection[str]) -> dict[str, float]:
    """{site: factor} for all of `sites`, from lines "unet.up_blocks: 0.5" with beginnings of their names.

    The longest beginning counts, and 1 for sites that none fits.

    Raises:
        ValueError: naming the line that is malformed or there twice, or with which no name of `sites` begins.
    """
    beginnings = {site[: end.start()] for site in sites for end in re.finditer(r"[.:]|$", site)}
    factors: dict[str, float] = {}
    for entry, name, factor in _entries(text, "block_strengths", _BLOCKS):
        if name not in beginnings:
            raise ValueError(
                f"block_strengths: no site of the map begins with {name!r}; closest: {closest(name, sorted(beginnings))}"
            )
        if name in factors:
            raise ValueError(f"block_strengths: {entry!r} is a second factor for {name!r}; leave one of them")
        factors[name] = factor
    return {site: cast(float, factor) for group, factor in parts_of(factors, sites) for site in group}


def _entries(text: str, field: str, expected: str) -> Iterator[tuple[str, str, float]]:
    """(entry, what stands before its last colon, the number behind it) of each entry of `text`."""
    for entry in filter(None, map(str.strip, re.split(r"[,\n]", text))):
        key, colon, value = entry.rpartition(":")
        factor = _number(value)
        if not colon:
            raise ValueError(f"{field}: {entry!r} has no colon; write {expected}")
        if factor is None:
            raise ValueError(f"{field}: {value.strip()!r} in {entry!r} is no number; write {expected}")
        yield entry, key.strip(), factor


def _number(text: str) -> float | None:
    """The finite number that `text` is, if it is one."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if isfinite(number) else None
