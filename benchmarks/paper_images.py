"""The paper's experiments with images (arXiv 2410.23054, section 5), for who has the weights.

    python benchmarks/paper_images.py --model SDXL-Lightning --device cuda --output results/lightning
    python benchmarks/paper_images.py --model FLUX.1-schnell --captions coco.txt --output results/flux
    python benchmarks/paper_images.py --model ./my-sd15 --steps 20 --limit 8 --seeds 1 --methods linear --output /tmp/quick

Styles: six maps from captions to captions with the style's tags; judged on captions alone. Negations: three maps from captions with
"a pink elephant in plain view" and the like to captions alone; judged on captions with "without a pink elephant". Every strength draws
the same prompts from the same seeds, which no map was fitted on.

A CLIP tells the share of pictures that are likelier "A picture of X." than "A picture of something.", the cosine of picture and original
caption (CLIPScore) also relative to the unsteered pictures, and the cosine of picture and unsteered picture.

Every finished cell (concept, method, seed, strength) is a JSON file in --output, beside the embeddings of its pictures and the first few
of the pictures. Run the same command again to go on after an interruption: what is there is not drawn again. In --output/pictures is a grid and
an animation for each concept and method.

What differs from the paper: docs/paper-images.md.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from actmaps.cli_options import load_image_model, read_prompts
from actmaps.evaluation.animation import save_animation, strength_frames
from actmaps.evaluation.asking import comparisons, concept_words
from actmaps.evaluation.clip import DEFAULT_CLIP, ClipJudge
from actmaps.evaluation.grid import draw_grid
from actmaps.evaluation.images import Sampling, draw_batches
from actmaps.evaluation.language.cells import Cells
from actmaps.evaluation.language.report import Report, plot_report
from actmaps.evaluation.sweep import strength_labels
from actmaps.maps import ActMap
from actmaps.maps.presets import Preset, load_preset, load_subjects

# What the maps are to bring in or take away, and how CLIP is asked for it.
CONCEPTS = {
    "anime": "anime",
    "art-nouveau": "art nouveau",
    "cyberpunk": "cyberpunk",
    "impressionism": "impressionism",
    "sketch": "sketch",
    "watercolor": "watercolor",
    "no-pink-elephant": "a pink elephant",
    "no-gorilla": "a gorilla",
    "no-white-bear": "a white bear",
}


@dataclass(frozen=True)
class Method:
    """A row of the paper's figures.

    Attributes:
        label: the paper's name.
        key: what `fit_act_map` calls it.
        strengths: of the sweep, rising. AcT's end at 1, ITI-c's are multipliers.
        options: for `fit_act_map`, beside what all maps share.
    """

    label: str
    key: str
    strengths: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    options: dict[str, Any] = field(default_factory=dict)


# As in the paper: maps are fitted on means over tokens and pixels at the first step, and act all through the run.
SHARED = {"timesteps": [0.0], "window": (0.0, 1.0), "pooling": "mean", "spatial": "shift"}
CAUSAL = {"causal": True, "transport_target": True}
METHODS = (
    Method("Linear-AcT", "linear", options=CAUSAL),
    Method("Mean-AcT", "mean", options=CAUSAL),
    Method("ITI-c", "iti_c", (0.5, 1.0, 2.0, 3.0, 5.0)),
)
UNSTEERED, FORBIDDEN = "unsteered", "negative prompt"
PROMPTED = {"styles": "in the prompt", "negations": "left out of the prompt"}


@dataclass(frozen=True)
class PaperModel:
    """A model that the paper steers.

    Attributes:
        load: from device and dtype to the pipeline.
        sites: where the paper steers it (section 5).
        dtype: on a GPU.
        steps: of sampling. Both models are distilled and run without guidance.
        call_options: for the pipeline's call.
    """

    load: Callable[[str, torch.dtype], Any]
    sites: str
    dtype: str
    steps: int = 4
    guidance_scale: float = 0.0
    call_options: dict[str, Any] = field(default_factory=dict)


def load_sdxl_lightning(
    device: str,
    dtype: torch.dtype,
    base: str = "stabilityai/stable-diffusion-xl-base-1.0",
    checkpoint: str | Path | None = None,
) -> Any:
    """SDXL with the U-Net of SDXL-Lightning for 4 steps, as its model card loads it.

    Args:
        device, dtype: where and how it computes.
        base: folder or hub name of SDXL.
        checkpoint: file of the U-Net's weights; default the hub's.
    """
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
    from huggingface_hub import hf_hub_download

    from actmaps.pipelines import StableDiffusionXLACTPipeline

    file = checkpoint or hf_hub_download("ByteDance/SDXL-Lightning", "sdxl_lightning_4step_unet.safetensors")
    unet: Any = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base, subfolder="unet")).to(dtype)
    unet.load_state_dict(load_file(file))
    variant = None if Path(base).is_dir() else "fp16"
    pipe = StableDiffusionXLACTPipeline.from_pretrained(base, unet=unet, dtype=dtype, variant=variant)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    return pipe.to(device)


def load_flux_schnell(device: str, dtype: torch.dtype) -> Any:
    """FLUX.1-schnell."""
    from actmaps.pipelines import FluxACTPipeline

    return FluxACTPipeline.from_pretrained("black-forest-labs/FLUX.1-schnell", dtype=dtype).to(device)


MODELS = {
    "SDXL-Lightning": PaperModel(load_sdxl_lightning, "unet", "float16"),  # all its normalisation layers
    # Both streams of all double blocks and of the first 15 single blocks; later ones spoil pictures.
    "FLUX.1-schnell": PaperModel(
        load_flux_schnell,
        r"transformer\.(transformer_blocks\.\d+|single_transformer_blocks\.(\d|1[0-4])):(image|text)",
        "bfloat16",
        call_options={"max_sequence_length": 256},
    ),
}

# What the paper reports, read off its text and figures: {model: {part: {(method, strength): {metric: value}}}}.
PAPER: dict[str, dict[str, dict[tuple[str, float], dict[str, float]]]] = {
    "SDXL-Lightning": {
        "styles": {
            (UNSTEERED, 0.0): {"share": 12, "relative_clip_score": 100},
            ("Linear-AcT", 1.0): {"share": 95, "relative_clip_score": 80},
        }
    }
}
TITLES = {
    "styles": "Styles brought in: share should rise, the rest stay high",
    "negations": "Concepts taken away: share should fall, CLIPScore stay high (in the paper AcT keeps more of it than ITI-c)",
}
METRICS = {
    "share": "share %",
    "probability": "probability %",
    "clip_score": "CLIPScore",
    "relative_clip_score": "relative %",
    "image_similarity": "image similarity",
}
IN_PERCENT = ("share", "probability", "relative_clip_score")

# Results measured under other values of these options do not mix.
SETTINGS = ("model", "dtype", "clip", "captions", "sites", "steps", "guidance_scale", "height", "width", "fit_captions", "judged_captions", "limit", "keep")  # fmt: skip
FRESH = 10_000  # from the seeds of the noise of a fit to those of what is drawn, and on to the next run's
CONSOLE = Console(width=150)

Cell = dict[str, Any]


class Bench:
    """The model, its judge, and the cells measured so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.paper_model = MODELS.get(options.model)
        settings = {name: str(value) if (value := getattr(options, name)) is not None else "" for name in SETTINGS}
        try:
            self.cells = Cells(options.output, settings)
            self.presets = [load_preset(name) for name in options.concepts]
        except (ValueError, FileNotFoundError) as error:
            raise SystemExit(str(error)) from None
        self.methods = [method for method in METHODS if method.key in options.methods]
        if options.strengths:
            self.methods = [replace(m, strengths=tuple(sorted(options.strengths))) for m in self.methods]

    @cached_property
    def pipe(self) -> Any:
        """The model, loaded when first needed."""
        device, dtype = self.options.device, self.options.dtype
        if self.paper_model:
            pipe = self.paper_model.load(
                device, getattr(torch, dtype or ("float32" if device == "cpu" else self.paper_model.dtype))
            )
        else:
            pipe = load_image_model(self.options.model, device, dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def judge(self) -> ClipJudge:
        """The judge, loaded when first needed."""
        return ClipJudge.from_pretrained(self.options.clip, self.options.device)

    @cached_property
    def captions(self) -> list[str]:
        """All captions, each once: the file's, else the package's."""
        if self.options.captions is None:
            return list(load_subjects("captions"))
        return list(dict.fromkeys(read_prompts(self.options.captions)))

    def sampling(self, seed: int) -> Sampling:
        """How the pictures of a run are drawn."""
        options = self.options
        size = {name: value for name in ("height", "width") if (value := getattr(options, name))}
        more = self.paper_model.call_options if self.paper_model else {}
        noise = FRESH * (2 * seed + 1)
        return Sampling(options.steps, options.guidance_scale, noise, options.batch_size, size | more)

    def split(self, seed: int) -> tuple[list[str], list[str]]:
        """Captions to fit on and others to judge on: as many as asked for, or else what half of all captions gives."""
        options, shuffled = self.options, random.Random(seed).sample(self.captions, len(self.captions))
        limit = options.limit or len(shuffled)
        fitted = min(options.fit_captions, limit, len(shuffled) // 2)
        judged = min(options.judged_captions, limit, len(shuffled) - fitted)
        return shuffled[:fitted], shuffled[fitted : fitted + judged]

    def run(self) -> None:
        """Measure what is not measured yet, and draw the pictures of the first run."""
        for seed in range(self.options.seeds):
            for preset in self.presets:
                concept = Concept(self, preset, seed, *self.split(seed))
                concept.measure()
                if seed == 0:
                    concept.show()


@dataclass
class Concept:
    """One concept in one run: its prompts, its maps, and its cells.

    Attributes:
        bench: what all concepts share.
        preset: how prompts are written.
        seed: of the run.
        fitted, judged: captions.
    """

    bench: Bench
    preset: Preset
    seed: int
    fitted: list[str]
    judged: list[str]

    @property
    def part(self) -> str:
        """Of the tables."""
        return "negations" if self.preset.kind == "negation" else "styles"

    @property
    def words(self) -> str:
        """What CLIP is asked for."""
        return CONCEPTS.get(self.preset.name) or concept_words(self.preset)

    @cached_property
    def prompts(self) -> list[str]:
        """What is drawn with the maps."""
        return self.preset.judge_prompts(self.judged, self.seed)

    def cell(self, method: str, strength: float = 0.0) -> Cell:
        """The name of a cell."""
        return {"part": self.part, "concept": self.preset.name, "method": method, "seed": self.seed, "strength": strength}  # fmt: skip

    def measure(self) -> None:
        """Measure the unsteered model, prompting, and every method at every strength."""
        self._measure(self.cell(UNSTEERED), self.prompts)
        for comparison in comparisons(self.preset, self.judged, self.words, self.seed).values():
            if comparison.negative_prompt is None:
                self._measure(self.cell(PROMPTED[self.part]), comparison.prompts)
            elif self.bench.options.guidance_scale is None or self.bench.options.guidance_scale > 1:
                self._measure(self.cell(FORBIDDEN), self.prompts, negative_prompt=comparison.negative_prompt)
        for method in self.bench.methods:
            missing = [s for s in method.strengths if self.bench.cells.missing(self.cell(method.label, s))]
            if not missing:
                continue
            self.bench.pipe.load_act_map(self._map(method), "map")
            try:
                for strength in missing:
                    self._measure(self.cell(method.label, strength), self.prompts, act_strength=strength)
            finally:
                self.bench.pipe.delete_act_maps("map")

    def _map(self, method: Method) -> ActMap:
        """The map of a method, fitted once; it lies beside the method's cells."""
        file = self.bench.cells.path(self.cell(method.label)).with_name("map.safetensors")
        if file.exists():
            return ActMap.load(file)
        bench, asked, start = self.bench, self.bench.options, time.monotonic()
        advice = self.preset.recommendation(type(bench.pipe).__name__.replace("ACTPipeline", ""))
        options = {
            **SHARED,
            **method.options,
            "sites": asked.sites or advice.sites,
            "num_inference_steps": asked.steps,
            "guidance_scale": asked.guidance_scale,
            "height": asked.height,
            "width": asked.width,
            "offload": asked.offload or None,
        }
        if self.part == "negations" and method.options is CAUSAL:
            options["support"] = "observed"  # AcT removes inside the source's range and induces everywhere (section 3)
        act_map = bench.pipe.fit_act_map(
            *self.preset.prompts(self.fitted, self.seed),
            method=method.key,
            seed=FRESH * 2 * self.seed,
            batch_size=asked.batch_size,
            progress=False,
            **{name: value for name, value in options.items() if value is not None},
        )
        act_map.save(file)
        CONSOLE.log(self.preset.name, method.label, f"fitted in {time.monotonic() - start:.0f} s")
        return act_map

    def _measure(self, cell: Cell, prompts: list[str], **how: Any) -> None:
        """Measure a cell, unless it is there."""
        if not self.bench.cells.missing(cell):
            return
        start = time.monotonic()
        seen = self._drawn(cell, prompts, **how)
        unsteered = load_file(self._embeddings(self.cell(UNSTEERED)))["embeddings"]
        scores = asdict(self.bench.judge.scores(seen, self.judged, self.words, unsteered))
        figures = {name: 100 * value if name in IN_PERCENT else value for name, value in scores.items()}
        self.bench.cells.store(cell, figures)
        CONSOLE.log(*cell.values(), f"{time.monotonic() - start:.0f} s")

    def _drawn(self, cell: Cell, prompts: list[str], **how: Any) -> torch.Tensor:
        """The embeddings of a cell's pictures, which are drawn unless they are there; the first ones are kept."""
        file, keep = self._embeddings(cell), self.bench.options.keep
        if file.exists():
            return load_file(file)["embeddings"]
        seen, count = [], 0
        for pictures in draw_batches(self.bench.pipe, prompts, self.bench.sampling(self.seed), **how):
            seen.append(self.bench.judge.embed_images(pictures))
            for picture in pictures[: max(keep - count, 0)]:
                save_whole(Image.fromarray(picture).save, file.with_suffix("") / f"{count:03d}.png")
                count += 1
        embeddings = torch.cat(seen)
        save_whole(lambda path: save_file({"embeddings": embeddings}, path), file)
        return embeddings

    def _embeddings(self, cell: Cell) -> Path:
        """Where those of a cell's pictures lie, beside a folder of the pictures. Styles share what is drawn from captions alone."""
        if cell["method"] == UNSTEERED and self.prompts == self.judged:
            cell = {**cell, "concept": "captions"}
        return self.bench.cells.path(cell).with_suffix(".safetensors")

    def show(self) -> None:
        """Draw a grid and an animation for each method out of the pictures that were kept."""
        plain, prompted = self._kept(self.cell(UNSTEERED)), self._kept(self.cell(PROMPTED[self.part]))
        folder = self.bench.options.output / "pictures" / self.preset.name
        for method in self.bench.methods:
            title, strengths = f"{self.preset.name.replace('-', ' ')}, {method.label}", (0.0, *method.strengths)
            columns = [plain, *(self._kept(self.cell(method.label, strength)) for strength in method.strengths)]
            grid = draw_grid(
                list(zip(*columns, prompted, strict=True)),
                self.prompts[: len(plain)],
                [*strength_labels(strengths), f"“{self.words}”\n{PROMPTED[self.part]}"],
                title=title,
                subtitle="Every row keeps its seed.",
                heading="strength of the map",
                apart=1,
                apart_heading="for comparison",
                cell=256,
            )
            save_whole(grid.save, folder / f"{method.label}.png")
            frames = strength_frames(list(zip(*columns, strict=True))[:4], strengths, title=title)
            save_whole(partial(save_animation, frames), folder / f"{method.label}.gif")

    def _kept(self, cell: Cell) -> list[Image.Image]:
        paths = sorted(self._embeddings(cell).with_suffix("").glob("[0-9]*.png"))
        return [Image.open(path).convert("RGB") for path in paths]


def save_whole(save: Callable[[Path], Any], path: Path) -> None:
    """Write a file under a temporary name with the same ending, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".unfinished-{path.name}")
    save(temporary)
    os.replace(temporary, path)


def overview(cells: Cells, part: str, model: str, methods: Sequence[Method]) -> Report:
    """Every method at every strength, mean over concepts, beside what the paper reports."""
    paper = PAPER.get(model, {}).get(part, {})
    columns = {"": "method", "strength": "strength:g"}
    for metric, heading in METRICS.items():
        columns[heading] = f"{metric}_shown"
        if any(metric in published for published in paper.values()):
            columns[f"paper: {heading}"] = f"{metric}_paper:.0f"
    report = Report(TITLES[part], columns, {"model": model})
    for method, strength in _rows(part, methods):
        if not (rows := cells.of(part, method=method, strength=strength)):
            continue
        row: dict[str, Any] = {"method": method, "strength": strength or None}
        for metric in METRICS:
            seeds = by_seed(rows, metric)
            row |= {metric: fmean(seeds), f"{metric}_shown": _shown(seeds, metric)}
        row |= {f"{metric}_paper": value for metric, value in paper.get((method, strength), {}).items()}
        report.rows.append(row)
    return report


def by_concept(cells: Cells, part: str, methods: Sequence[Method]) -> Report:
    """The share of every concept, mean over runs."""
    concepts = dict.fromkeys(row["concept"] for row in cells.of(part))
    report = Report(
        "Share of pictures in %", {"": "method", "strength": "strength:g"} | {c: f"{c}:.0f" for c in concepts}
    )
    for method, strength in _rows(part, methods):
        row: dict[str, Any] = {"method": method, "strength": strength or None}
        for concept in concepts:
            if found := cells.of(part, method=method, strength=strength, concept=concept):
                row[concept] = fmean(by_seed(found, "share"))
        if len(row) > 2:
            report.rows.append(row)
    return report


def by_seed(rows: Iterable[Cell], metric: str) -> list[float]:
    """One number per run: the mean over its concepts."""
    found: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        found[row["seed"]].append(row[metric])
    return [fmean(values) for _, values in sorted(found.items())]


def _rows(part: str, methods: Sequence[Method]) -> list[tuple[str, float]]:
    """Method and strength of each row of the tables."""
    plain = [(label, 0.0) for label in (UNSTEERED, PROMPTED[part], FORBIDDEN)]
    return [*plain, *((method.label, strength) for method in methods for strength in method.strengths)]


def _shown(seeds: list[float], metric: str) -> str:
    digits = 1 if metric in IN_PERCENT else 3
    return f"{fmean(seeds):.{digits}f}" + (f" ± {stdev(seeds):.{digits}f}" if len(seeds) > 1 else "")


def plot(report: Report, methods: Sequence[Method]) -> Image.Image:
    """Share and what is kept over the strength, a line per method, each from the unsteered pictures on."""
    plain = next(row for row in report.rows if row["method"] == UNSTEERED)
    rows = [plain | {"method": method.label, "strength": 0.0} for method in methods]
    rows += [row for row in report.rows if row["strength"]]
    panels = {METRICS[metric]: [metric] for metric in ("share", "relative_clip_score", "image_similarity")}
    return plot_report(replace(report, rows=rows), "strength", panels, group="method")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    bench = Bench(options)
    bench.run()
    for part in TITLES:
        if bench.cells.of(part):
            report = overview(bench.cells, part, options.model, bench.methods)
            report.save(options.output / f"{part}.json")
            save_whole(plot(report, bench.methods).save, options.output / "pictures" / f"{part}.png")
            CONSOLE.print(report.table(), by_concept(bench.cells, part, bench.methods).table())
    CONSOLE.print(f"\nMean ± standard deviation over runs. Every cell, grids and animations: {options.output}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help=f"{', '.join(MODELS)}, a diffusers folder, or a hub id")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the results; an interrupted run goes on there"
    )
    parser.add_argument(
        "--concepts", nargs="+", default=list(CONCEPTS), help="presets, by name or .toml file; default: the paper's"
    )
    parser.add_argument("--captions", type=Path, help="a file, one per line, such as COCO's; default: the package's")
    parser.add_argument("--methods", nargs="+", choices=[m.key for m in METHODS], default=[m.key for m in METHODS])
    parser.add_argument("--strengths", nargs="+", type=float, help="above 0, instead of each method's own")
    parser.add_argument("--seeds", type=int, default=1, help="runs, each with captions and noise of its own")
    parser.add_argument("--fit-captions", type=int, default=64, help="to fit on; all are held in memory at once")
    parser.add_argument("--judged-captions", type=int, default=512, help="others, to judge on")
    parser.add_argument("--limit", type=int, help="at most so many captions of both, to try things out")
    parser.add_argument("--keep", type=int, default=6, help="pictures of each cell to keep")
    parser.add_argument("--clip", default=DEFAULT_CLIP, help="the judge: a CLIP or SigLIP, folder or hub id")
    parser.add_argument("--sites", help="a pattern; default: the paper's, for other models the preset's")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--guidance-scale", type=float, help="default: the model's own")
    parser.add_argument("--height", type=int, help="pixels; default: the model's own")
    parser.add_argument("--width", type=int, help="pixels; default: the model's own")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--offload", action="store_true", help="while fitting keep what waits in host memory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: float32 on the CPU, else the model's own"
    )
    options = parser.parse_args(arguments)
    if options.keep < 1:
        parser.error("--keep must be at least 1: grids and animations are made of what is kept")
    if options.strengths and min(options.strengths) <= 0:
        parser.error("--strengths must be above 0; strength 0 is always there, as the unsteered model")
    if model := MODELS.get(options.model):
        options.sites = options.sites or model.sites
        options.steps = options.steps or model.steps
        options.guidance_scale = model.guidance_scale if options.guidance_scale is None else options.guidance_scale
    return options


if __name__ == "__main__":
    main()
