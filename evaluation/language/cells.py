"""Results of long measurements, cell by cell, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .report import write_json


class Cells:
    """The results on disk: one JSON file for each finished cell, and the settings that they were measured under.

    Args:
        folder: where they lie.
        settings: what all cells have in common.

    Raises:
        ValueError: if the folder holds results of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._folder = folder
        path, settings = folder / "settings.json", json.loads(json.dumps(settings))
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if other := [key for key in settings if before.get(key) != settings[key]]:
                raise ValueError(
                    f"{folder} holds results measured with {other[0]} = {before.get(other[0])}, not {settings[other[0]]}; "
                    "give another --output, or the same settings"
                )
        else:
            write_json(path, settings)

    def path(self, cell: dict[str, Any]) -> Path:
        """Where the result of a cell lies, or will lie."""
        *folders, name = (
            f"{key}-{value:g}" if isinstance(value, float | int) else value for key, value in cell.items()
        )
        return self._folder.joinpath(*folders, f"{name}.json")

    def missing(self, cell: dict[str, Any]) -> bool:
        """Whether the cell is yet to be measured."""
        return not self.path(cell).exists()

    def store(self, cell: dict[str, Any], found: dict[str, float]) -> None:
        """Keep what a cell found."""
        write_json(self.path(cell), cell | found)

    def of(self, part: str, **wanted: Any) -> list[dict[str, Any]]:
        """The finished cells of a part whose fields are those wanted."""
        rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((self._folder / part).rglob("*.json"))]
        return [row for row in rows if all(row[key] == value for key, value in wanted.items())]
