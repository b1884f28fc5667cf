"""Does it steer? The demo model, judged by its judges, on subjects and seeds that no map was fitted on.

    python benchmarks/steering_quality.py                 # all three tables, about an hour on two cores
    python benchmarks/steering_quality.py styles --subjects 16
    python benchmarks/steering_quality.py ablation --json results.json   # resumes where it stopped

Tables:
    styles    every style at strengths 0 to 1.5, beside the style in the prompt
    ablation  one change at a time from the defaults: method, sites, pooling, timesteps, rows, spatial rule, ...
    negation  concepts that the prompt names and the map removes, beside the negative prompt and a prompt without the concept
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import actmaps.demo as demo
from actmaps.demo.dataset import known_concepts
from actmaps.evaluation.images import (
    STRENGTHS,
    Sampling,
    Scores,
    as_row,
    draw,
    monotonicity,
    score_concept,
    score_style,
)
from actmaps.maps.presets import load_preset

FIT_PROMPTS = 32

# One change at a time from the defaults of fit_act_map; the last row is the paper's published setting for images.
ABLATION: dict[str, dict[str, Any]] = {
    "defaults": {},
    "method mean": {"method": "mean"},
    "method gaussian": {"method": "gaussian"},
    "sites text encoder": {"sites": "text_encoder"},
    "sites text encoder, U-Net": {"sites": ["text_encoder", "unet"]},
    "pooling mean": {"pooling": "mean"},
    "pooling mean, method mean": {"pooling": "mean", "method": "mean"},
    "window 0 to .3": {"window": (0.0, 0.3)},
    "window 0 to 1": {"window": (0.0, 1.0)},
    "timesteps 1 (pure noise)": {"timesteps": [0.0]},
    "timesteps 8": {"timesteps": 8},
    "latents own": {"latents": "own"},
    "latents source": {"latents": "source"},
    "rows both": {"rows": "both"},
    "spatial shift": {"spatial": "shift"},
    "transport target": {"transport_target": True},
    "not causal": {"causal": False},
    "support observed": {"support": "observed"},
    "as published": {
        "pooling": "mean",
        "timesteps": [0.0],
        "window": (0.0, 1.0),
        "spatial": "shift",
        "transport_target": True,
    },
}
ABLATION_STYLES = ("pop art", "pencil sketch", "black and white icon")
ABLATION_STRENGTHS = (0.5, 0.75, 1.0)

# What the negation presets recommend: the words are removed where they are read, and what is left where it is drawn.
NEGATION = {"sites": ["text_encoder", "unet"]}

# Colours are fitted on shapes and judged on things.
SHAPES = ("circle", "square", "heart", "triangle pointed up", "book", "small diamond")
THINGS = (
    "rose", "automobile", "balloon", "backpack", "bird", "butterfly", "fish", "tulip", "umbrella", "sailboat", "house",
    "teacup without handle", "envelope", "rocket", "key", "bell",
)  # fmt: skip


@dataclass(frozen=True)
class Negation:
    """A concept that the prompt asks for and a map takes away.

    Attributes:
        phrase: adds the concept to a subject.
        negative: the words of the negative prompt.
        fitted, judged: subjects to fit and to judge on.
    """

    phrase: str
    negative: str
    fitted: tuple[str, ...]
    judged: tuple[str, ...]


def negations() -> dict[str, Negation]:
    """Three accessories, by their presets, and three colours."""
    found = {}
    for word in ("hat", "sunglasses", "crown"):
        subjects = load_preset(f"demo-no-{word}").subjects
        wearers = [c.label for c in known_concepts() if word in c.accessories and c.split == "train"]
        judged = tuple(label for label in wearers if label not in subjects)
        found[word] = Negation(
            f"{{}} with {'sunglasses' if word == 'sunglasses' else f'a {word}'}", word, subjects, judged
        )
    for colour in ("red", "blue", "green"):
        found[colour] = Negation(f"{colour} {{}}", colour, SHAPES, THINGS)
    return found


class Bench:
    """The model, its judges, the subjects, and the rows measured so far."""

    def __init__(self, subjects: int, sampling: Sampling, results: Path | None) -> None:
        self.pipe = demo.load_pipeline()
        self.pipe.set_progress_bar_config(disable=True)
        self.judges = demo.load_judges()
        self.sampling = sampling
        self.results = results
        self.rows: dict[str, Any] = json.loads(results.read_text()) if results and results.exists() else {}
        self._subjects = subjects
        self._drawn: dict[str, Any] = {}
        self.console = Console(width=160)

    def subjects(self, fitted: tuple[str, ...]) -> list[str]:
        """Subjects that the model knows and the map was not fitted on."""
        return self.sample([subject for subject in demo.subjects("train") if subject not in fitted])

    def sample(self, subjects: Sequence[str], count: int | None = None) -> list[str]:
        """A seeded draw of at most `count` subjects."""
        return random.Random(0).sample(list(subjects), min(count or self._subjects, len(subjects)))

    def drawn(self, prompts: list[str], **options: Any) -> Any:
        """Pictures without a map, drawn once however often they are asked for."""
        key = json.dumps([prompts, options])
        if key not in self._drawn:
            self._drawn[key] = draw(self.pipe, prompts, self.sampling, **options)
        return self._drawn[key]

    def row(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row `key`, measured unless it is known, and stored at once."""
        if key not in self.rows:
            start = time.monotonic()
            self.rows[key] = measure()
            self.console.log(f"{key}: {time.monotonic() - start:.0f} s")
            if self.results:
                temporary = self.results.with_suffix(".tmp")
                temporary.write_text(json.dumps(self.rows, indent=1))
                temporary.replace(self.results)
        return self.rows[key]

    def steered(
        self,
        prompts: tuple[list[str], list[str]],
        asked: list[str],
        judge: Callable[[Any], Scores],
        strengths: tuple[float, ...],
        options: dict[str, Any],
    ) -> dict[str, Any]:
        """Scores by strength of a map fitted on `prompts`, on the pictures `asked` for."""
        start = time.monotonic()
        act_map = self.pipe.fit_act_map(*prompts, progress=False, **options)
        seconds = time.monotonic() - start
        self.pipe.load_act_map(act_map, "map")
        try:
            scores = {}
            for strength in strengths:
                images = (
                    draw(self.pipe, asked, self.sampling, act_strength=strength) if strength else self.drawn(asked)
                )
                scores[str(strength)] = as_row(judge(images))
        finally:
            self.pipe.delete_act_maps("map")
        return {"fit_seconds": round(seconds, 1), "by_strength": scores}


def styles(bench: Bench, wanted: list[str]) -> None:
    table = _table(
        "Styles, default settings", "style", STRENGTHS, "prompt", "1/prompt", "content", "recognised", "Spearman"
    )
    measured: list[dict[str, Any]] = []
    for style in wanted:
        preset = load_preset(f"demo-{style.replace(' ', '-')}")
        subjects = bench.subjects(preset.subjects)

        def judge(images: Any, subjects: list[str] = subjects, style: str = style) -> Scores:
            return score_style(bench.judges, images, subjects, style)

        def measure(
            preset: Any = preset, subjects: list[str] = subjects, style: str = style, judge: Any = judge
        ) -> dict:
            prompted = judge(bench.drawn([f"{subject}, {style}" for subject in subjects]))
            row = bench.steered(preset.prompts(count=FIT_PROMPTS), subjects, judge, STRENGTHS, {})
            row["by_strength"]["prompt"] = as_row(prompted)
            return row

        measured.append(bench.row(f"styles / {style}", measure))
        _style_row(table, style, [measured[-1]])
    table.add_section()
    _style_row(table, "mean", measured)
    bench.console.print(table)
    bench.console.print(
        "prompt: style in the prompt, no map; 1/prompt: share at strength 1 over the share that the prompt reaches"
    )
    bench.console.print(
        "content: similarity to the subject relative to unsteered, at strength .5 / .75 / 1 / style in the prompt"
    )
    bench.console.print(
        "recognised: subject among the five most similar of all, unsteered / strength .75 / 1 / style in the prompt"
    )
    bench.console.print("Spearman: rank correlation of strength (0 to 1) and mean probability of the style")


def _style_row(table: Table, label: str, rows: list[dict[str, Any]]) -> None:
    """Add a row of means over `rows`."""

    def mean(key: str, strength: str) -> float:
        return fmean(row["by_strength"][strength][key] for row in rows)

    prompt = mean("share", "prompt")
    inside = [s for s in STRENGTHS if s <= 1]
    order = [monotonicity(inside, [row["by_strength"][str(s)]["probability"] for s in inside]) for row in rows]
    table.add_row(
        label,
        *[_percent(mean("share", str(s))) for s in STRENGTHS],
        _percent(prompt),
        _percent(mean("share", "1.0") / max(prompt, 1e-9)),
        " / ".join(_percent(mean("content", s) / mean("content", "0.0")) for s in ("0.5", "0.75", "1.0", "prompt")),
        " / ".join(_percent(mean("recognised", s)) for s in ("0.0", "0.75", "1.0", "prompt")),
        f"{fmean(order):.2f}",
    )


def ablation(bench: Bench, wanted: list[str]) -> None:
    table = Table(
        title="One change at a time, each at its best strength: style share · content relative to unsteered @ strength"
    )
    for head in ("setting", *wanted, "mean share", "mean content", "score"):
        table.add_column(head, justify="left" if head == "setting" else "right")
    baselines = {}
    for style in wanted:
        preset = load_preset(f"demo-{style.replace(' ', '-')}")
        subjects = bench.subjects(preset.subjects)

        def base(style: str = style, subjects: list[str] = subjects) -> dict[str, Any]:
            plain = score_style(bench.judges, bench.drawn(subjects), subjects, style)
            styled = bench.drawn([f"{subject}, {style}" for subject in subjects])
            return {"0.0": as_row(plain), "prompt": as_row(score_style(bench.judges, styled, subjects, style))}

        baselines[style] = bench.row(f"baseline / {style}", base)
    for label in ("0.0", "prompt"):
        _ablation_row(table, label, {style: {label: baselines[style][label]} for style in wanted}, baselines)
    for setting, options in ABLATION.items():
        rows = {}
        for style in wanted:
            preset = load_preset(f"demo-{style.replace(' ', '-')}")
            subjects = bench.subjects(preset.subjects)

            def measure(
                preset: Any = preset, subjects: list[str] = subjects, style: str = style, options: dict = options
            ) -> dict[str, Any]:
                return bench.steered(
                    preset.prompts(count=FIT_PROMPTS),
                    subjects,
                    lambda images: score_style(bench.judges, images, subjects, style),
                    ABLATION_STRENGTHS,
                    options,
                )

            rows[style] = bench.row(f"ablation / {setting} / {style}", measure)["by_strength"]
        _ablation_row(table, setting, rows, baselines)
    bench.console.print(table)


def _ablation_row(table: Table, label: str, rows: dict[str, dict], baselines: dict[str, dict]) -> None:
    """Add a setting, at the strength with the best score per style: the harmonic mean of share and content, each at most 1."""
    cells, best = [], []
    for style, by_strength in rows.items():
        unsteered = baselines[style]["0.0"]["content"]
        rated = {s: (scores["share"], scores["content"] / unsteered) for s, scores in by_strength.items()}
        strength = max(rated, key=lambda s, rated=rated: _score(*rated[s]))
        best.append(rated[strength])
        at = f" @ {float(strength):g}" if len(rated) > 1 else ""
        cells.append(f"{_percent(rated[strength][0])} · {_percent(rated[strength][1])}{at}")
    shares, contents = zip(*best, strict=True)
    score = fmean(_score(*pair) for pair in best)
    name = {"0.0": "unsteered", "prompt": "style in the prompt"}.get(label, label)
    table.add_row(name, *cells, _percent(fmean(shares)), _percent(fmean(contents)), f"{score:.2f}")


def _score(share: float, content: float) -> float:
    share, content = min(share, 1.0), min(max(content, 0.0), 1.0)
    return 2 * share * content / (share + content) if share and content else 0.0


def negation(bench: Bench) -> None:
    strengths = STRENGTHS
    table = _table(
        "Negation: share of pictures that show the concept", "concept", strengths, "neg. prompt", "unasked", "content"
    )
    for word, case in negations().items():
        subjects = bench.sample(case.judged)
        asked = [case.phrase.format(subject) for subject in subjects]

        def judge(images: Any, subjects: list[str] = subjects, asked: list[str] = asked) -> Scores:
            return score_concept(bench.judges, images, subjects, asked)

        def measure(case: Negation = case, judge: Any = judge, asked: list = asked, subjects: list = subjects) -> dict:
            plain = bench.sample(case.fitted, FIT_PROMPTS)
            return {
                "negative prompt": as_row(judge(bench.drawn(asked, negative_prompt=case.negative))),
                "unasked": as_row(judge(bench.drawn(subjects))),
                **bench.steered(([case.phrase.format(s) for s in plain], plain), asked, judge, strengths, NEGATION),
            }

        row = bench.row(f"negation / {word}", measure)
        by = row["by_strength"]
        table.add_row(
            word,
            *[_percent(by[str(s)]["share"]) for s in strengths],
            _percent(row["negative prompt"]["share"]),
            _percent(row["unasked"]["share"]),
            _percent(by["1.0"]["content"] / by["0.0"]["content"]),
        )
    bench.console.print(table)
    bench.console.print(
        "unasked: the prompt without the concept; content: similarity to the subject at strength 1 relative to unsteered"
    )


def _table(title: str, first: str, strengths: tuple[float, ...], *more: str) -> Table:
    table = Table(title=title)
    for head in (first, *(f"{s:g}" for s in strengths), *more):
        table.add_column(head, justify="left" if head == first else "right")
    return table


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=["all", "styles", "ablation", "negation"], default="all")
    parser.add_argument("--styles", nargs="+", help="styles to measure; default all (ablation: three)")
    parser.add_argument("--subjects", type=int, default=48, help="subjects per row")
    parser.add_argument("--steps", type=int, default=12, help="sampling steps")
    parser.add_argument("--json", type=Path, help="store rows here and resume from it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options.subjects, Sampling(num_inference_steps=options.steps), options.json)
    bench.console.print(
        f"{date.today()}, {platform.processor() or platform.machine()}, {options.threads} threads, torch {torch.__version__}; "
        f"{options.subjects} subjects, {options.steps} steps, {FIT_PROMPTS} prompt pairs per fit"
    )
    if options.table in ("all", "ablation"):
        ablation(bench, options.styles or list(ABLATION_STYLES))
    if options.table in ("all", "styles"):
        styles(bench, options.styles or list(demo.STYLES))
    if options.table in ("all", "negation"):
        negation(bench)


if __name__ == "__main__":
    main()
