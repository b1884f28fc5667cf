"""What all nodes share: the type of maps, their menu, and the parts of schemas that only newer versions of ComfyUI know."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from comfy_api.latest import io

CATEGORY = "AcT Maps"
ActMapType = io.Custom("ACT_MAP")

InputT = TypeVar("InputT", bound=io.Input)


def schema(node_id: str, display_name: str, *, search_aliases: list[str], **fields: Any) -> io.Schema:
    """The schema of a node in our menu; `search_aliases` are left out where the version has none."""
    if "search_aliases" in inspect.signature(io.Schema).parameters:
        fields["search_aliases"] = search_aliases
    return io.Schema(node_id=node_id, display_name=display_name, category=CATEGORY, **fields)


def advanced(widget: InputT) -> InputT:
    """`widget` shown among the advanced inputs, where the frontend keeps those apart."""
    widget.extra_dict = {**(widget.extra_dict or {}), "advanced": True}
    return widget


def strength(name: str, tooltip: str, default: float = 1.0) -> io.Float.Input:
    """A slider for how much of a map is applied."""
    return io.Float.Input(
        name, default=default, min=-1.0, max=2.0, step=0.05, display_mode=io.NumberDisplay.slider, tooltip=tooltip
    )


def percent(name: str, tooltip: str, default: float) -> io.Float.Input:
    """A slider for a place in the sampling run."""
    return io.Float.Input(
        name, default=default, min=0.0, max=1.0, step=0.01, display_mode=io.NumberDisplay.slider, tooltip=tooltip
    )
