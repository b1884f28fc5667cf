"""Presets: named pairs of prompt sets, as TOML files, that a map can be fitted on.

A preset says how to write a source and a target prompt for any subject, and what is known to work: sites, support and
strength per architecture. Nothing in a preset is executed; templates know the placeholders `{subject}` and `{tags}` only.
Needs neither torch nor a model.
"""

from __future__ import annotations

import difflib
import os
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KINDS = ("style", "negation", "concept")
BUILT_IN = Path(__file__).parent
DEMO_PREFIX = "demo-"  # of the presets that are made of the words that the demo model knows
DEFAULT_SUBJECTS = "captions"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}|[{}]")
_MISSING = object()


@dataclass(frozen=True)
class PromptTemplates:
    """How the prompts of one side are written.

    Attributes:
        templates: sentences with `{subject}`, and `{tags}` where the tags go.
        tags: words for the concept, the most telling first.
        first_tags: how many of the first tags every prompt gets.
        random_tags: how many of the others are drawn for each prompt.
    """

    templates: tuple[str, ...]
    tags: tuple[str, ...] = ()
    first_tags: int = 0
    random_tags: int = 0

    def __post_init__(self) -> None:
        for template in self.templates:
            found = [match[1] for match in _PLACEHOLDER.finditer(template)]
            if "subject" not in found:
                raise ValueError(
                    f"templates has {template!r} without {{subject}}; put {{subject}} where the subject goes"
                )
            if unknown := [place for place in found if place not in ("subject", "tags")]:
                shown = "a single brace" if unknown[0] is None else f"{{{unknown[0]}}}"
                raise ValueError(f"templates has {template!r} with {shown}; only {{subject}} and {{tags}} are known")
            if ("tags" in found) != bool(self.tags):
                problem = "tags go with {tags}" if self.tags else "there are no tags"
                raise ValueError(f"templates has {template!r}, but {problem}; use both or none")
        count = self.first_tags + self.random_tags
        if min(self.first_tags, self.random_tags) < 0 or (self.tags and count == 0) or count > len(self.tags):
            raise ValueError(
                f"tags has {len(self.tags)} entries, first_tags {self.first_tags} and random_tags {self.random_tags} "
                "take some of them for each prompt; take at least one and at most all"
            )

    def write(self, subjects: Sequence[str], rng: random.Random) -> list[str]:
        """One prompt per subject. Templates and tags come from shuffled decks, so that each is used about equally often."""
        templates, drawn = _deal(self.templates, rng), _deal(self.tags[self.first_tags :], rng)
        prompts = []
        for subject in subjects:
            tags = dict.fromkeys(self.tags[: self.first_tags])
            while len(tags) < self.first_tags + self.random_tags:
                tags[next(drawn)] = None
            prompts.append(_fill(next(templates), {"subject": subject, "tags": ", ".join(tags)}))
        return prompts


@dataclass(frozen=True)
class Recommendation:
    """What works on one architecture: `sites` and `support` as `fit_map` takes them, and the `strength` to start with."""

    sites: str | tuple[str, ...] | None = None
    strength: float = 1.0
    support: str | tuple[float, float] = "all"

    def __post_init__(self) -> None:
        support = self.support
        if isinstance(support, str):
            valid = support in ("all", "observed")
        else:
            valid = (
                len(support) == 2
                and all(type(q) in (int, float) for q in support)
                and 0 <= support[0] < support[1] <= 1
            )
        if not valid:
            raise ValueError(f'support is {support!r}; use "all", "observed" or quantiles such as [0.01, 0.99]')


@dataclass(frozen=True)
class Preset:
    """Two ways to write prompts about the same subjects: `source` as the model is asked now, `target` as it should answer.

    Attributes:
        kind: "style" (induce a look), "negation" (remove something) or "concept" (add something).
        models: which models it is meant for, for people.
        subjects: the subjects that `prompts` uses when none are given.
        judge: how the prompts are written that a fitted map is judged on; None takes `source`.
        recommended: by architecture, the stem of the diffusers pipeline's name ("StableDiffusionXL"), or "default".
    """

    name: str
    kind: str
    source: PromptTemplates
    target: PromptTemplates
    description: str = ""
    licence: str = ""
    models: str = ""
    subjects: tuple[str, ...] = ()
    judge: PromptTemplates | None = None
    recommended: Mapping[str, Recommendation] = field(default_factory=dict)

    def prompts(
        self, subjects: Sequence[str] | None = None, seed: int = 0, count: int | None = None
    ) -> tuple[list[str], list[str]]:
        """One source and one target prompt per subject, in the order of the subjects; equal for equal seeds.

        Args:
            subjects: what the prompts are about; None takes the preset's own list.
            seed: of the draw of subjects, templates and tags.
            count: draw only this many of the subjects.

        Raises:
            ValueError: for an empty list of subjects, one string in place of a list, or a count that the list cannot give.
        """
        chosen = self._chosen(subjects, seed, count)
        return self.source.write(chosen, _rng(seed, "source")), self.target.write(chosen, _rng(seed, "target"))

    def judge_prompts(
        self, subjects: Sequence[str] | None = None, seed: int = 0, count: int | None = None
    ) -> list[str]:
        """The prompts to draw with a fitted map, about the same subjects as `prompts` for the same arguments.

        Of a negation these may name the thing only to say that it must not be there, which models tend to draw all the same.
        """
        chosen = self._chosen(subjects, seed, count)
        if self.judge is None:
            return self.source.write(chosen, _rng(seed, "source"))
        return self.judge.write(chosen, _rng(seed, "judge"))

    def _chosen(self, subjects: Sequence[str] | None, seed: int, count: int | None) -> Sequence[str]:
        """The subjects that prompts are about; the errors are those of `prompts`."""
        if isinstance(subjects, str):
            raise ValueError(f"subjects must be a list of strings, got the string {subjects!r}; put it in a list")
        chosen = self.subjects if subjects is None else subjects
        if not chosen:
            raise ValueError(f"preset {self.name!r} got no subject; give at least one, or None for its own list")
        if count is not None:
            if not 1 <= count <= len(chosen):
                raise ValueError(
                    f"preset {self.name!r} has {len(chosen)} subjects, cannot draw {count}; give more subjects"
                )
            drawn = _rng(seed, "subjects").sample(range(len(chosen)), count)
            chosen = [chosen[index] for index in sorted(drawn)]
        return chosen

    def recommendation(self, architecture: str = "default") -> Recommendation:
        """The recommendation for an architecture such as "StableDiffusionXL", else the default one."""
        return self.recommended.get(architecture) or self.recommended.get("default") or Recommendation()


def user_folder() -> Path:
    """Where a user's own presets are looked for: $ACTMAPS_PRESETS, or ~/.config/actmaps/presets."""
    return Path(os.environ.get("ACTMAPS_PRESETS") or Path.home() / ".config" / "actmaps" / "presets")


def list_presets() -> list[str]:
    """Names of all presets, the user's and the built-in ones, sorted, those of the demo model last."""
    names = {path.stem for folder in _folders() for path in folder.glob("*.toml")}
    return sorted(names, key=lambda name: (name.startswith(DEMO_PREFIX), name))


def list_subjects() -> list[str]:
    """Names of all subject lists, sorted."""
    return sorted({path.stem for folder in _folders() for path in folder.glob("*.txt")})


def load_preset(name_or_path: str | PathLike[str]) -> Preset:
    """Read a preset by name (a user's preset hides a built-in one of the same name) or from a .toml file.

    Raises:
        ValueError: for an unknown name (lists the closest), or a file that is no valid preset (names file, key and remedy).
        FileNotFoundError: if a path leads nowhere.
    """
    text = os.fspath(name_or_path)
    if text.endswith(".toml") or not _NAME.fullmatch(text):
        path = Path(text)
        if not path.is_file():
            raise FileNotFoundError(f"there is no preset file {text!r}; `actmaps presets` lists the presets by name")
        return _read(path)
    return _read(_find(text, ".toml", "preset", list_presets()))


def load_subjects(name_or_path: str | PathLike[str], beside: Path | None = None) -> tuple[str, ...]:
    """Read a list of subjects, one per line (# starts a comment), by name or from a .txt file.

    Args:
        name_or_path: "emoji", or a path that ends in .txt.
        beside: a folder that is searched first.

    Raises:
        ValueError: for an unknown name, a repeated subject, or an empty list.
        FileNotFoundError: if a path leads nowhere.
    """
    text = os.fspath(name_or_path)
    if text.endswith(".txt") or not _NAME.fullmatch(text):
        path = Path(text)
        if not path.is_file():
            raise FileNotFoundError(f"there is no subject list {text!r}")
    elif beside is not None and (beside / f"{text}.txt").is_file():
        path = beside / f"{text}.txt"
    else:
        path = _find(text, ".txt", "subject list", list_subjects())
    lines = [line.split("#")[0].strip() for line in _text(path).splitlines()]
    subjects = [line for line in lines if line]
    if not subjects:
        raise ValueError(f"{path} lists no subject; write one per line")
    if repeated := sorted({subject for subject in subjects if subjects.count(subject) > 1}):
        raise ValueError(f"{path} lists {', '.join(map(repr, repeated[:3]))} more than once; every subject once")
    return tuple(subjects)


def _rng(seed: int, use: str) -> random.Random:
    """A generator of its own for every use, so that one draw does not depend on another."""
    return random.Random(f"{seed}/{use}")


def _folders() -> tuple[Path, Path]:
    return user_folder(), BUILT_IN


def _find(name: str, suffix: str, what: str, known: list[str]) -> Path:
    for folder in _folders():
        if (path := folder / f"{name}{suffix}").is_file():
            return path
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"closest: {', '.join(near)}" if near else f"known: {', '.join(known)}"
    raise ValueError(f"there is no {what} {name!r} ({hint}); your own go into {user_folder()}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None


def _fill(template: str, values: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def _deal(deck: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Deal the cards of a deck in random order, shuffling anew whenever it is used up."""
    while deck:
        yield from rng.sample(deck, len(deck))


# Reading -------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Preset:
    try:
        document = tomllib.loads(_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    table = _Table(path, document)
    name = table.text("name")
    if name != path.stem or not _NAME.fullmatch(name):
        raise table.error(
            f"name is {name!r}, the file is called {path.stem!r}; use one name (letters, digits, - and _)"
        )
    kind = table.text("kind")
    if kind not in KINDS:
        raise table.error(f"kind is {kind!r}; use one of {', '.join(KINDS)}")
    preset = Preset(
        name=name,
        kind=kind,
        description=table.text("description"),
        licence=table.text("licence"),
        models=table.text("models", ""),
        source=_templates(table.table("source")),
        target=_templates(table.table("target")),
        subjects=_subjects(table),
        judge=None if table.take("judge", (dict,), None) is None else _templates(table.table("judge")),
        recommended=_recommendations(table.table("recommended", {})),
    )
    table.refuse_others()
    return preset


def _templates(table: _Table) -> PromptTemplates:
    templates, tags = table.texts("templates"), table.texts("tags", ())
    first = table.take("first_tags", (int,), 0)
    drawn = table.take("random_tags", (int,), 1 if len(tags) > first else 0)
    table.refuse_others()
    try:
        return PromptTemplates(templates, tags, first, drawn)
    except ValueError as error:
        raise table.error(str(error)) from None


def _subjects(table: _Table) -> tuple[str, ...]:
    value = table.take("subjects", (str, list), DEFAULT_SUBJECTS)
    if isinstance(value, list):
        return table.texts("subjects")
    try:
        return load_subjects(value, beside=table.path.parent)
    except (ValueError, FileNotFoundError) as error:
        raise table.error(f"subjects cannot be read: {error}") from None


def _recommendations(table: _Table) -> dict[str, Recommendation]:
    return {architecture: _recommendation(table.table(architecture)) for architecture in table.values}


def _recommendation(table: _Table) -> Recommendation:
    sites, support = table.take("sites", (str, list), None), table.take("support", (str, list), "all")
    strength = float(table.take("strength", (int, float), 1.0))
    if isinstance(sites, list):
        sites = table.texts("sites")
    table.refuse_others()
    try:
        return Recommendation(sites, strength, tuple(support) if isinstance(support, list) else support)
    except ValueError as error:
        raise table.error(str(error)) from None


@dataclass
class _Table:
    """A TOML table that is read key by key; every error names the file and the key."""

    path: Path
    values: Mapping[str, Any]
    prefix: str = ""
    known: set[str] = field(default_factory=set)

    def error(self, problem: str) -> ValueError:
        """`problem` begins with the key."""
        return ValueError(f"preset {self.path}: {self.prefix}{problem}")

    def take(self, key: str, kinds: tuple[type, ...], default: Any = _MISSING) -> Any:
        """The value of a key, of one of `kinds`; a key without default is required."""
        self.known.add(key)
        if key not in self.values:
            if default is _MISSING:
                raise self.error(f"{key} is missing; add it ({_kind_words(kinds)})")
            return default
        value = self.values[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.error(f"{key} is {value!r}; it must be {_kind_words(kinds)}")
        return value

    def text(self, key: str, default: Any = _MISSING) -> str:
        value = self.take(key, (str,), default).strip()
        if not value and key in self.values:
            raise self.error(f"{key} is empty; write something")
        return value

    def texts(self, key: str, default: Any = _MISSING) -> tuple[str, ...]:
        values = self.take(key, (list,), default)
        if values is default:
            return default
        if not values or not all(isinstance(value, str) and value.strip() for value in values):
            raise self.error(f"{key} is {values!r}; it must be a list of texts, at least one and none empty")
        if len(set(values)) < len(values):
            raise self.error(f"{key} is {values!r}; every entry once")
        return tuple(values)

    def table(self, key: str, default: Any = _MISSING) -> _Table:
        return _Table(self.path, self.take(key, (dict,), default), f"{self.prefix}{key}.")

    def refuse_others(self) -> None:
        """Raise for keys that were never asked for, most often misspelt ones."""
        for key in self.values:
            if key not in self.known:
                near = difflib.get_close_matches(key, self.known, n=1)
                remedy = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(self.known))}"
                raise self.error(f"{key} is no key of a preset; {remedy}")


def _kind_words(kinds: tuple[type, ...]) -> str:
    words = {str: "a text", list: "a list", dict: "a table", int: "a whole number", float: "a number"}
    return " or ".join(dict.fromkeys(words[kind] for kind in kinds if not (kind is int and float in kinds)))
