"""The texts that this package brings for fitting and judging maps, all written for it."""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXTS = Path(__file__).parent / "texts"


@dataclass(frozen=True)
class Concept:
    """A concept: its name, words that betray it, and sentences about it."""

    name: str
    word_forms: tuple[str, ...]
    sentences: tuple[str, ...]


def own_texts(name: str) -> list[str]:
    """One of the lists of texts: "neutral" (no concept of ours), "openers" (beginnings of texts) or "polite" (nothing toxic)."""
    return (TEXTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def own_statements() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Answers that are untrue and true to the same 160 questions, as (untruthful, truthful).

    Each is a context and a text for `fit_act_map`, in the layout of TruthfulQA: the question with "A:" on a line of its own, and the answer.
    """
    with (TEXTS / "statements.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [_context_and_answer(row["untruthful"]) for row in rows], [
        _context_and_answer(row["truthful"]) for row in rows
    ]


def _context_and_answer(statement: str) -> tuple[str, str]:
    question, _, answer = statement.partition(" A: ")
    return f"{question}\nA:", f" {answer}"


def load_concepts(path: str | Path | None = None) -> dict[str, Concept]:
    """Concepts by name from a TOML file: a table per concept with the lists `word_forms` and `sentences`.

    Args:
        path: by default the seven concepts of this package.

    Raises:
        ValueError: naming the file, and the concept that lacks a list.
    """
    file = TEXTS / "concepts.toml" if path is None else Path(path)
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is no TOML file: {error}") from None
    concepts = {}
    for name, table in tables.items():
        lists = [table.get(key) if isinstance(table, dict) else None for key in ("word_forms", "sentences")]
        if not all(isinstance(texts, list) and texts and all(isinstance(t, str) for t in texts) for texts in lists):
            raise ValueError(f"{file}: concept {name!r} needs the lists word_forms and sentences, with texts in them")
        concepts[name] = Concept(name, *(tuple(texts) for texts in lists if texts))
    if not concepts:
        raise ValueError(f"{file} has no concept: write a table per concept, such as [football]")
    return concepts
