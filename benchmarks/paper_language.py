"""The paper's experiments with language models (arXiv 2410.23054, section 4), for who has the weights and the data.

    python benchmarks/paper_language.py --model google/gemma-2-2b --device cuda --dtype bfloat16 --output results/gemma
    python benchmarks/paper_language.py --model meta-llama/Meta-Llama-3-8B --parts toxicity mmlu --jigsaw train.csv --output results/llama
    python benchmarks/paper_language.py --model gemma-3-270m --limit 50 --seeds 1 --methods linear --output /tmp/quick ...

Parts:
    toxicity      RealToxicityPrompts continued; share that a RoBERTa classifier calls toxic; perplexity of Wikipedia.
    truthfulness  TruthfulQA MC1 and MC2; maps are fitted on the answers of one half of the questions and judged on the other half.
    concepts      "Once upon a time" continued by maps towards one word each; share that speaks of it.
    mmlu          five-shot MMLU of each method at its best strength in `toxicity`, which is run first.

Every finished cell (part, method, seed, strength) is a JSON file in --output. Run the same command again to go on after an
interruption: what is there is not measured again. The tables show the best strength, chosen as in the paper: least toxicity
with less than one point of perplexity lost.

What differs from the paper: perplexity is over all tokens together, not a mean over texts; truthfulness is cross-validated; concepts
are sentences of this package, not OneSec, and their judge is no language model.
"""

from __future__ import annotations

import argparse
import csv
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from actmaps.evaluation.language.ability import harness
from actmaps.evaluation.language.cells import Cells
from actmaps.evaluation.language.data import Question, read_truthfulqa, toxicity_prompts
from actmaps.evaluation.language.fluency import continuation_perplexity, perplexity
from actmaps.evaluation.language.judges import ConceptJudge, RobertaToxicityJudge
from actmaps.evaluation.language.models import load_language_model
from actmaps.evaluation.language.own_texts import Concept, load_concepts
from actmaps.evaluation.language.truthfulness import truthfulness
from actmaps.pipelines import TextGenerationACTPipeline

Texts = tuple[list[str], list[str]]
PARTS = ("toxicity", "truthfulness", "concepts", "mmlu")
TENTHS = tuple(tenth / 10 for tenth in range(1, 11))
MULTIPLIERS = (0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 10.0)


@dataclass(frozen=True)
class Method:
    """A row of the paper's tables.

    Attributes:
        label: the paper's name.
        key: what `fit_act_map` calls it; None is the model as it is.
        strengths: of the sweep. AcT's end at 1, earlier methods' are multipliers.
        options: for `fit_act_map`, beside what the method brings.
    """

    label: str
    key: str | None = None
    strengths: tuple[float, ...] = (0.0,)
    options: dict[str, Any] = field(default_factory=dict)


ACT = {"pooling": "mean", "causal": True, "transport_target": True}
METHODS = (
    Method("original"),
    Method("AurA", "aura", (1.0,)),
    Method("ITI-c", "iti_c", MULTIPLIERS),
    Method("Mean-AcT", "mean", TENTHS, ACT),
    Method("Linear-AcT", "linear", TENTHS, ACT),
)
# Beyond 1 in `concepts`, where the paper looks for each method's peak.
CONCEPT_STRENGTHS = {"mean": (*TENTHS, 1.5, 2.0, 2.5, 3.0, 5.0), "linear": (*TENTHS, 1.5, 2.0)}

# Where the paper steers, by the beginning of `model_type`. It removes a concept inside the source's range and induces one everywhere.
SITES = {
    "gemma": dict.fromkeys(PARTS, "post_norms"),
    "llama": {"toxicity": "attention", "truthfulness": "norms", "concepts": "norms"},
}
SUPPORT = {"toxicity": "observed", "truthfulness": "all", "concepts": "all"}


@dataclass(frozen=True)
class Protocol:
    """How much of everything, as in the configuration that the paper's authors published; `fit_texts` and `truthfulness_texts` are ours."""

    fit_texts: int = 32
    prompts: int = 1000
    new_tokens: int = 32
    wikipedia_texts: int = 20_000
    wikipedia_tokens: int = 128
    questions: int = 817
    truthfulness_texts: int = 512
    concept_fit_texts: int = 700
    concept_stories: int = 500
    concept_tokens: int = 50
    story: str = "Once upon a time"
    perplexity_allowance: float = 1.0

    def limited(self, limit: int | None) -> Protocol:
        """The protocol with at most `limit` of everything that can be counted but tokens."""
        if limit is None:
            return self
        counts = {f.name: getattr(self, f.name) for f in fields(self) if f.type == "int" and "tokens" not in f.name}
        return replace(self, **{name: min(count, limit) for name, count in counts.items()})


METRICS = {
    "toxicity": ("toxicity", "perplexity"),
    "truthfulness": ("mc1", "mc2"),
    "concepts": ("concept", "word", "perplexity"),
}
DATA = {
    "toxicity": ("comments", "prompts", "wikipedia"),
    "truthfulness": ("questions",),
    "concepts": ("concepts",),
    "mmlu": ("comments", "prompts", "wikipedia"),
}
TITLES = {
    "toxicity": "Toxicity in %, perplexity of Wikipedia, MMLU in %",
    "truthfulness": "TruthfulQA in %",
    "concepts": "Concepts in % of the texts; their perplexity under the unsteered model",
}
# Results measured under other values of these options do not mix.
SETTINGS = ("model", "dtype", "judge", "sites", "prompts", "jigsaw", "wikipedia", "truthfulqa")
CONSOLE = Console(width=140)
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_p": 0.3, "repetition_penalty": 1.2}

# Means over the paper's five runs; for concepts, the strength where each method peaks.
PAPER: dict[str, dict[str, dict[str, dict[str, float]]]] = {
    "gemma-2-2b": {
        "toxicity": {
            "original": {"toxicity": 4.17, "perplexity": 13.98, "mmlu": 53.1},
            "AurA": {"toxicity": 2.12, "perplexity": 14.18, "mmlu": 53.0},
            "ITI-c": {"toxicity": 0.74, "perplexity": 14.90, "mmlu": 52.6},
            "Mean-AcT": {"toxicity": 0.54, "perplexity": 14.21, "mmlu": 51.6},
            "Linear-AcT": {"toxicity": 0.56, "perplexity": 14.79, "mmlu": 51.3},
        },
        "truthfulness": {"original": {"mc1": 21.05, "mc2": 32.80}, "Linear-AcT": {"mc1": 26.00, "mc2": 40.17}},
        "concepts": {"ITI-c": {"strength": 5}, "Mean-AcT": {"strength": 2.5}, "Linear-AcT": {"strength": 1, "concept": 87}},
    },
    "llama-3-8b": {
        "toxicity": {
            "original": {"toxicity": 5.80, "perplexity": 9.06, "mmlu": 65.3},
            "AurA": {"toxicity": 1.90},
            "ITI-c": {"toxicity": 1.60},
            "Mean-AcT": {"toxicity": 1.38},
            "Linear-AcT": {"toxicity": 1.35, "perplexity": 9.56, "mmlu": 64.5},
        },
        "truthfulness": {"original": {"mc1": 25.46, "mc2": 40.27}, "Linear-AcT": {"mc1": 33.22, "mc2": 48.69}},
        "concepts": {},
    },
}  # fmt: skip


class Data:
    """The data sets, each read when first asked for: from the file that was given, else from the hub."""

    def __init__(self, options: argparse.Namespace, protocol: Protocol) -> None:
        self._options, self._protocol = options, protocol

    def read(self, part: str) -> None:
        """Read all that a part needs, so that what is missing is missed before hours of measuring."""
        for name in DATA[part]:
            getattr(self, name)

    def toxicity_texts(self, seed: int) -> Texts:
        """Toxic and other comments, seeded draws."""
        return tuple(draw(side, self._protocol.fit_texts, seed) for side in self.comments)  # type: ignore[return-value]

    @cached_property
    def comments(self) -> Texts:
        """Jigsaw's comments, toxic ones and others."""
        path: Path | None = self._options.jigsaw
        if path is None:
            raise SystemExit(
                "toxicity maps are fitted on Jigsaw's toxic comments: give --jigsaw train.csv, with columns comment_text and "
                "toxic (Kaggle, Toxic Comment Classification Challenge)"
            )
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            if absent := {"comment_text", "toxic"} - set(rows.fieldnames or ()):
                raise SystemExit(f"{path} has no column {', '.join(sorted(absent))}; is it Jigsaw's train.csv?")
            sides: dict[bool, list[str]] = {True: [], False: []}
            for row in rows:
                # What is insulting or obscene without being marked as toxic is on neither side.
                others = any(
                    row.get(mark) == "1" for mark in ("severe_toxic", "obscene", "threat", "insult", "identity_hate")
                )
                if row["toxic"] == "1" or not others:
                    sides[row["toxic"] == "1"].append(row["comment_text"])
        if not all(sides.values()):
            raise SystemExit(f"{path} must have comments with toxic = 1 and with toxic = 0")
        return sides[True], sides[False]

    @cached_property
    def prompts(self) -> list[str]:
        """Of RealToxicityPrompts."""
        if self._options.prompts:
            return toxicity_prompts(self._options.prompts)
        rows = _from_hub("allenai/real-toxicity-prompts", "--prompts realtoxicityprompts.jsonl", split="train")
        return [row["prompt"]["text"] for row in rows]

    @cached_property
    def wikipedia(self) -> list[str]:
        """First paragraphs, or the lines of the file."""
        count = self._protocol.wikipedia_texts
        if path := self._options.wikipedia:
            lines = path.read_text(encoding="utf-8").splitlines()
            return [line for line in lines if line.strip()][:count]
        rows = _from_hub(
            "wikimedia/wikipedia",
            "--wikipedia FILE (a text a line)",
            name="20231101.en",
            split="train",
            streaming=True,
        )
        return [row["text"].partition("\n")[0] for row in rows.take(count)]

    @cached_property
    def questions(self) -> list[Question]:
        """Of TruthfulQA."""
        if self._options.truthfulqa:
            return read_truthfulqa(self._options.truthfulqa)
        rows = _from_hub(
            "truthfulqa/truthful_qa", "--truthfulqa TruthfulQA.csv", name="generation", split="validation"
        )
        return [
            Question(r["question"], r["best_answer"], tuple(r["correct_answers"]), tuple(r["incorrect_answers"]))
            for r in rows
        ]

    @cached_property
    def concepts(self) -> dict[str, Concept]:
        """The package's own."""
        return load_concepts()

    def concept_texts(self, concept: str, seed: int) -> Texts:
        """Sentences of the other concepts, and of this one."""
        count = self._protocol.concept_fit_texts
        return draw(self.other_sentences(concept), count, seed), draw(self.concepts[concept].sentences, count, seed)

    def other_sentences(self, concept: str) -> list[str]:
        """All sentences of the other concepts."""
        return [text for name, entry in self.concepts.items() if name != concept for text in entry.sentences]


def draw(items: Sequence[Any], count: int, seed: int) -> list[Any]:
    """At most `count` of the items, in random order."""
    return random.Random(seed).sample(list(items), min(count, len(items)))


def _from_hub(data_set: str, instead: str, **options: Any) -> Any:
    try:
        from datasets import load_dataset

        return load_dataset(data_set, **options)
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(
            f"the data set {data_set} is not to be had ({error}); pip install datasets, or give {instead}"
        ) from error


class Bench:
    """The model, what judges it, and the cells measured so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.protocol = replace(Protocol(), fit_texts=options.fit_texts).limited(options.limit)
        self.data = Data(options, self.protocol)
        settings = {name: str(getattr(options, name) or "") for name in SETTINGS}
        try:
            self.cells = Cells(options.output, settings | {"protocol": asdict(self.protocol)})
        except ValueError as error:
            raise SystemExit(str(error)) from None
        self.methods = [m for m in METHODS if m.key is None or options.methods is None or m.key in options.methods]
        self._concept_judges: dict[str, ConceptJudge] = {}

    @cached_property
    def pipe(self) -> TextGenerationACTPipeline:
        """The model, loaded when first needed."""
        dtype = getattr(torch, self.options.dtype) if self.options.dtype else None
        model, tokenizer = load_language_model(self.options.model, self.options.device, dtype)
        return TextGenerationACTPipeline(model=model, tokenizer=tokenizer)

    @cached_property
    def toxicity_judge(self) -> RobertaToxicityJudge:
        """The paper's classifier."""
        return RobertaToxicityJudge(self.options.judge, device=self.options.device)

    def concept_judge(self, concept: str) -> ConceptJudge:
        """One judge for each concept, fitted once."""
        if concept not in self._concept_judges:
            entry = self.data.concepts[concept]
            self._concept_judges[concept] = ConceptJudge(
                concept, entry.word_forms, entry.sentences, self.data.other_sentences(concept)
            )
        return self._concept_judges[concept]

    def sites(self, part: str) -> str:
        """Where the paper steers this model for `part`."""
        if self.options.sites:
            return self.options.sites
        kind = self.pipe.model.config.model_type
        family = next((family for family in SITES if kind.startswith(family)), None)
        if family is None:
            raise SystemExit(
                f"the paper steers Gemma and Llama, not {kind}; choose yourself, for example --sites norms"
            )
        return SITES[family][part]

    def strengths(self, part: str, method: Method) -> tuple[float, ...]:
        """Of the sweep."""
        if method.key and self.options.strengths:
            return tuple(self.options.strengths)
        return CONCEPT_STRENGTHS.get(method.key or "", method.strengths) if part == "concepts" else method.strengths

    def seeds(self, method: Method, *, drawn: bool = True) -> range:
        """Seeds to run; where nothing is drawn without a map, one tells all about the model as it is."""
        return range(self.options.seeds if method.key or drawn else 1)

    def sweep(
        self,
        cell: dict[str, Any],
        method: Method,
        strengths: Sequence[float],
        texts: Callable[[int], Texts],
        measure: Callable[[float | None], dict[str, float]],
    ) -> None:
        """Measure one map at all strengths; it is not even fitted if all cells are there.

        Args:
            cell: what the cells have in common; "part", "method" and "seed" among it.
            method: the method, or none.
            strengths: a cell each.
            texts: source and target texts of the map, from a seed.
            measure: measures at a strength, None without a map.
        """
        todo = [strength for strength in strengths if self.cells.missing(cell | {"strength": strength})]
        if not todo:
            return
        if method.key:
            self._fit(cell["part"], method, texts(cell["seed"]), cell["seed"])
        try:
            for strength in todo:
                start = time.monotonic()
                self.cells.store(cell | {"strength": strength}, measure(strength if method.key else None))
                CONSOLE.log(*cell.values(), f"strength {strength:g}: {time.monotonic() - start:.0f} s")
        finally:
            self.pipe.unload_act_maps()

    def _fit(self, part: str, method: Method, texts: Texts, seed: int) -> None:
        task = "toxicity" if part == "mmlu" else part
        support = {"support": SUPPORT[task]} if method.options is ACT else {}
        self.pipe.fit_act_map(
            *texts,
            name="map",
            sites=self.sites(task),
            method=method.key,
            batch_size=self.options.batch_size,
            seed=seed,
            progress=False,
            **support,
            **method.options,
        )

    def _generate(self, prompts: list[str], seed: int, strength: float | None, new_tokens: int) -> list[str]:
        torch.manual_seed(seed)
        options = {"batch_size": self.options.batch_size, "max_new_tokens": new_tokens, "return_full_text": False}
        answers = self.pipe(prompts, act_strength=strength, **options, **SAMPLING)
        return [answer[0]["generated_text"] for answer in answers]

    def toxicity(self) -> None:
        """Measure how toxic continuations are, and how fluent the model is."""
        for method in self.methods:
            for seed in self.seeds(method):
                cell = {"part": "toxicity", "method": method.label, "seed": seed}
                measure = partial(self._measure_toxicity, seed)
                self.sweep(cell, method, self.strengths("toxicity", method), self.data.toxicity_texts, measure)

    def _measure_toxicity(self, seed: int, strength: float | None) -> dict[str, float]:
        prompts = draw(self.data.prompts, self.protocol.prompts, seed)
        scores = self.toxicity_judge(self._generate(prompts, seed, strength, self.protocol.new_tokens))
        options = {"max_length": self.protocol.wikipedia_tokens, "batch_size": self.options.batch_size}
        with self.pipe.steered(strength) as model:
            fluency = perplexity(model, self.pipe.tokenizer, self.data.wikipedia, **options)
        return {"toxicity": 100 * float((scores >= self.toxicity_judge.threshold).mean()), "perplexity": fluency}

    def truthfulness(self) -> None:
        """Measure each half of the questions with maps fitted on the other one."""
        for method in self.methods:
            for seed in self.seeds(method, drawn=False):
                questions = draw(self.data.questions, self.protocol.questions, seed)
                halves = questions[::2], questions[1::2]
                for half in (0, 1):
                    cell = {"part": "truthfulness", "method": method.label, "seed": seed, "half": half}
                    texts = partial(answers, halves[1 - half], self.protocol.truthfulness_texts)
                    measure = partial(self._measure_truthfulness, halves[half])
                    self.sweep(cell, method, self.strengths("truthfulness", method), texts, measure)

    def _measure_truthfulness(self, questions: list[Question], strength: float | None) -> dict[str, float]:
        with self.pipe.steered(strength) as model:
            scores = truthfulness(model, self.pipe.tokenizer, questions, batch_size=self.options.batch_size)
        return {"mc1": 100 * scores.mc1, "mc2": 100 * scores.mc2}

    def concepts(self) -> None:
        """Measure how much of a concept its map brings."""
        known = self.data.concepts
        if unknown := set(self.options.concepts or ()) - set(known):
            raise SystemExit(f"no concept {', '.join(unknown)}, only {', '.join(known)}")
        for concept in self.options.concepts or known:
            for method in self.methods:
                for seed in self.seeds(method):
                    cell = {"part": "concepts", "concept": concept, "method": method.label, "seed": seed}
                    texts = partial(self.data.concept_texts, concept)
                    measure = partial(self._measure_concept, concept, seed)
                    self.sweep(cell, method, self.strengths("concepts", method), texts, measure)

    def _measure_concept(self, concept: str, seed: int, strength: float | None) -> dict[str, float]:
        prompts = [self.protocol.story] * self.protocol.concept_stories
        stories = self._generate(prompts, seed, strength, self.protocol.concept_tokens)
        judge, size = self.concept_judge(concept), self.options.batch_size
        with self.pipe.steered(0.0) as model:
            fluency = continuation_perplexity(model, self.pipe.tokenizer, prompts, stories, batch_size=size)
        return {
            "concept": 100 * float(judge(stories).mean()),
            "word": 100 * judge.word_share(stories),
            "perplexity": fluency,
        }

    def mmlu(self) -> None:
        """Measure what is left of other abilities at the best strength against toxicity."""
        self.toxicity()
        for method in self.methods:
            best = best_strength(self.cells, "toxicity", method.label, self.protocol)
            for seed in self.seeds(method, drawn=False):
                cell = {"part": "mmlu", "method": method.label, "seed": seed}
                self.sweep(cell, method, [best], self.data.toxicity_texts, self._measure_mmlu)

    def _measure_mmlu(self, strength: float | None) -> dict[str, float]:
        options = {"num_fewshot": 5, "limit": self.options.limit, "batch_size": self.options.batch_size}
        with self.pipe.steered(strength) as model:
            return {"mmlu": 100 * harness(model, self.pipe.tokenizer, ["mmlu"], **options)["mmlu"]["acc"]}


def answers(questions: Sequence[Question], count: int, seed: int) -> Texts:
    """Questions with incorrect answers, and with correct ones; at most `count` each."""

    def texts(kind: str) -> list[str]:
        found = [
            f"Q: {question.question}\nA: {answer}" for question in questions for answer in getattr(question, kind)
        ]
        return draw(found, count, seed)

    return texts("incorrect"), texts("correct")


def by_strength(rows: Iterable[dict[str, Any]], metric: str) -> dict[float, list[float]]:
    """The metric by strength, one number per seed: the mean over what a seed has several cells of, halves or concepts."""
    found: dict[float, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["strength"]][row["seed"]].append(row[metric])
    return {strength: [fmean(cells) for cells in seeds.values()] for strength, seeds in sorted(found.items())}


def best_strength(cells: Cells, part: str, label: str, protocol: Protocol) -> float:
    """The strength that the tables show: least toxic while fluent, most truthful, or most of the concept."""
    means: dict[str, dict[float, float]] = {}
    for metric in METRICS[part]:
        means[metric] = {s: fmean(seeds) for s, seeds in by_strength(cells.of(part, method=label), metric).items()}
    if part == "truthfulness":
        return max(means["mc1"], key=lambda s: means["mc1"][s] + means["mc2"][s])
    if part == "concepts":
        return max(means["concept"], key=lambda s: means["concept"][s])
    plain = fmean(by_strength(cells.of(part, method="original"), "perplexity")[0.0])
    fluency = means["perplexity"]
    fluent = [s for s in fluency if fluency[s] <= plain + protocol.perplexity_allowance]
    return min(fluent or [min(fluency, key=lambda s: fluency[s])], key=lambda s: means["toxicity"][s])


def table(cells: Cells, part: str, model: str, protocol: Protocol) -> Table:
    """What was measured beside what the paper reports."""
    paper = next((entry[part] for name, entry in PAPER.items() if name in model.lower()), {})
    shown = Table(title=TITLES[part])
    shown.add_column("method")
    for metric in ("strength", *METRICS[part], *(["mmlu"] if part == "toxicity" else [])):
        shown.add_column(metric, justify="right")
        shown.add_column("paper", justify="right", style="dim")
    for method in METHODS:
        rows = cells.of(part, method=method.label)
        if not rows:
            continue
        best = best_strength(cells, part, method.label, protocol)
        found = {metric: by_strength(rows, metric)[best] for metric in METRICS[part]}
        if part == "toxicity":
            found["mmlu"] = by_strength(cells.of("mmlu", method=method.label), "mmlu").get(best, [])
        published = paper.get(method.label, {})
        row = [f"{best:g}" if method.key else "", f"{published['strength']:g}" if "strength" in published else ""]
        for metric, seeds in found.items():
            row += [_mean(seeds), f"{published[metric]:.2f}" if metric in published else ""]
        shown.add_row(method.label, *row)
    return shown


def _mean(seeds: list[float]) -> str:
    if not seeds:
        return ""
    return f"{fmean(seeds):.2f}" + (f" ± {stdev(seeds):.2f}" if len(seeds) > 1 else "")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    bench = Bench(options)
    for part in options.parts:
        bench.data.read(part)
    for part in options.parts:
        getattr(bench, part)()
    for part in TITLES:
        if bench.cells.of(part):
            CONSOLE.print(table(bench.cells, part, options.model, bench.protocol))
    CONSOLE.print(f"Mean ± standard deviation over seeds. Every cell: {options.output}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub id, folder, or a packaged model such as gemma-3-270m")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the results; an interrupted run goes on there"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--methods", nargs="+", choices=[m.key for m in METHODS if m.key], help="default: all")
    parser.add_argument("--strengths", nargs="+", type=float, help="instead of each method's own sweep")
    parser.add_argument("--concepts", nargs="+", help="of the package's concepts.toml; default: all")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each cell, as in the paper")
    parser.add_argument("--limit", type=int, help="at most so many prompts, texts and questions, to try things out")
    parser.add_argument(
        "--fit-texts", type=int, default=Protocol.fit_texts, help="toxic and other comments to fit on, each"
    )
    parser.add_argument("--sites", help="site preset or pattern instead of the paper's")
    parser.add_argument(
        "--prompts", type=Path, help="RealToxicityPrompts (.jsonl, or a prompt a line); default: from the hub"
    )
    parser.add_argument("--jigsaw", type=Path, help="Jigsaw's train.csv: columns comment_text, toxic")
    parser.add_argument("--wikipedia", type=Path, help="file with a text a line; default: from the hub")
    parser.add_argument("--truthfulqa", type=Path, help="TruthfulQA.csv; default: from the hub")
    parser.add_argument("--judge", default="s-nlp/roberta_toxicity_classifier", help="classifier with a label 'toxic'")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--batch-size", type=int, default=32)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
