"""Results as a table for the terminal, Markdown, JSON and a picture."""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image
    from rich.table import Table

Row = dict[str, Any]


@dataclass
class Report:
    """Rows of results under one title.

    Attributes:
        title: what was measured.
        columns: of the table: {heading: key of a row}, with a format behind a colon, such as "toxic": "share:.1%".
        about: what a reader must know of the run: model, texts, seeds, machine, date.
        rows: {key: value}; keys that no column shows are for the JSON file.
    """

    title: str
    columns: Mapping[str, str]
    about: Row = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.about = {"date": date.today().isoformat(), "machine": machine(), **self.about}

    def table(self) -> Table:
        """For the terminal."""
        from ..tables import plain_table

        table = plain_table(self.title, *self.columns, numbers=len(self.columns) - 1)
        for row in self.rows:
            table.add_row(*self._cells(row))
        return table

    def markdown(self) -> str:
        """For a page of documentation."""
        lines = [" | ".join(self.columns), " | ".join(["---"] + ["---:"] * (len(self.columns) - 1))]
        lines += [" | ".join(self._cells(row)) for row in self.rows]
        return "\n".join(f"| {line} |" for line in lines)

    def save(self, path: str | Path) -> None:
        """Write a JSON file, complete or not at all."""
        write_json(path, asdict(self))

    def _cells(self, row: Row) -> Iterator[str]:
        for key in self.columns.values():
            name, _, spec = key.partition(":")
            value = row.get(name)
            missing = value is None or (isinstance(value, float) and math.isnan(value))
            yield "" if missing else format(value, spec)


def flattened(scores: Any) -> Row:
    """The fields of a dataclass of scores as one row; entries of dicts get names such as `share.profanity`."""
    row: Row = {}
    for name, value in asdict(scores).items():
        if isinstance(value, dict):
            row |= {f"{name}.{key}": entry for key, entry in value.items()}
        else:
            row[name] = value
    return row


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` to `path` through a temporary file beside it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(suffix=".json.tmp", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def machine() -> str:
    """Processor, cores and threads of this machine."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()}, {name}"
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


_WIDE = 100  # from which ratio of largest to smallest an axis is logarithmic


def plot_report(report: Report, x: str, panels: Mapping[str, Sequence[str]], group: str = "") -> Image.Image:
    """Draw columns of a report over another one, such as the strength.

    Args:
        report: rows without a number under `x` are left out.
        x: key of the horizontal axis.
        panels: {label of a panel's axis: keys of the lines in it}.
        group: key by which rows form lines of their own, such as the method; "" for one line per key.

    Returns:
        An RGB picture, panels side by side.
    """
    from ..plots import COLOURS, FAINT, as_picture, new_figure

    figure = new_figure(80 + 520 * len(panels), 420)
    figure.suptitle(report.title, x=0.012, ha="left", fontsize=12, color=FAINT)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    rows = [row for row in report.rows if isinstance(row.get(x), (int, float))]
    for ax, (label, keys) in zip(axes, panels.items(), strict=True):
        lines = [(key, name) for name in dict.fromkeys(row.get(group, "") for row in rows) for key in keys]
        for number, (key, name) in enumerate(lines):
            points = [(row[x], row[key]) for row in rows if row.get(group, "") == name and row.get(key) is not None]
            shown = name or key.rpartition(".")[2].replace("_", " ")
            ax.plot(
                *zip(*points, strict=True), marker="o", markersize=4, color=COLOURS[number % len(COLOURS)], label=shown
            )
        values = [row[key] for row in rows for key in keys if row.get(key) is not None]
        if values and min(values) > 0 and max(values) > _WIDE * min(values):
            ax.set_yscale("log")
        ax.set_xlabel(x)
        ax.set_ylabel(label)
        if len(lines) > 1:
            ax.legend(frameon=False, fontsize=9)
    return as_picture(figure)
