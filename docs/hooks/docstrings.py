"""Docstrings of this project as griffe reads them: several attributes in one entry, and a single example."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ATTRIBUTES = re.compile(r"^Attributes:\n(?:(?: .*)?\n?)+", re.MULTILINE)
_SEVERAL_NAMES = re.compile(r"^    (\w+(?:, \w+)+):", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Keep the names of `one, other: ...` together and add their types; read `Example` as `Examples`."""
        if obj.docstring is None:
            return

        def entry(several: re.Match[str]) -> str:
            names = several[1].split(", ")
            types = dict.fromkeys(str(getattr(obj.members.get(name), "annotation", None) or "Any") for name in names)
            together = ",\N{NO-BREAK SPACE}".join(names)  # behind a space the type begins
            return f"    {together} ({' | '.join(types)}):"

        text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        obj.docstring.value = _ATTRIBUTES.sub(lambda section: _SEVERAL_NAMES.sub(entry, section[0]), text)
