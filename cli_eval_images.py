"""`actmaps eval images`: what a map does to pictures, as a CLIP sees it."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from .cli_options import (
    MACHINE,
    Debug,
    Device,
    DType,
    Guidance,
    Height,
    Seed,
    Steps,
    Width,
    console,
    examples,
    given,
    load_image_model,
    option,
    parse_number,
    read_prompts,
    readable_errors,
    sampling_options,
    save_picture,
    say,
)

if TYPE_CHECKING:
    import numpy as np

    from .evaluation.asking import Comparison
    from .evaluation.images import Sampling
    from .evaluation.language.report import Report
    from .maps import ActMap
    from .maps.presets import Preset
    from .pipelines import ACTMixin

EXAMPLES = examples(
    "eval images --preset demo-pop-art -o pop-art",
    "eval images -m user/sdxl --map anime.safetensors --prompts captions.txt --count 100 -o anime",
    "eval images -m user/sd15 --preset no-pink-elephant --clip google/siglip-base-patch16-224 -o elephant",
)
MAP, OUTPUT = "Map", "Output"
SHOWN = 6  # rows of the grid
FRESH = 10_000  # added to the seed: noise that no fit has seen


def images(
    output: Annotated[Path, option("--output", "-o", panel=OUTPUT, help="Folder for figures, grid, plot and map.")],
    model: Annotated[
        str, option("--model", "-m", help="A diffusers folder, the name of a hub repository, or 'demo'.")
    ] = "demo",
    map_files: Annotated[
        list[str] | None,
        option("--map", panel=MAP, metavar="FILE", help="A map; repeat it to measure several, one after another."),
    ] = None,
    preset: Annotated[
        str | None,
        option(panel=MAP, help="Without --map: the preset to fit on. With it: what it does. Default: the map's own."),
    ] = None,
    method: Annotated[str, option(panel=MAP, help="To fit by: linear, mean or gaussian.")] = "linear",
    fit_count: Annotated[int, option(panel=MAP, help="Prompts per side to fit on.", min=1)] = 32,
    concept: Annotated[
        str | None, option(help='CLIP is asked for "A picture of CONCEPT.". Default: the preset\'s first tag.')
    ] = None,
    prompts: Annotated[
        Path | None,
        option(help="What to draw, one per line. Default: subjects of the preset; it is fitted on others."),
    ] = None,
    count: Annotated[int, option(help="How many of them to draw.", min=1)] = 16,
    strengths: Annotated[str, option(help="One row each.")] = "0,0.25,0.5,0.75,1",
    clip: Annotated[
        str | None,
        option(help="The judge: a CLIP or SigLIP, folder or hub name. Default: openai/clip-vit-large-patch14."),
    ] = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    height: Height = None,
    width: Width = None,
    seed: Seed = 0,
    batch_size: Annotated[int, option(panel=MACHINE, help="Pictures at once; fewer need less memory.", min=1)] = 8,
    device: Device = None,
    dtype: DType = None,
    debug: Debug = False,
) -> None:
    """Whether the style arrives or the unwanted thing goes, and what is left of the prompt and the picture."""
    with readable_errors(debug):
        from .evaluation.asking import comparisons, concept_words
        from .evaluation.clip import DEFAULT_CLIP, ClipJudge
        from .evaluation.images import Sampling
        from .evaluation.language.report import Report
        from .maps import ActMap
        from .pipelines.loader import model_name

        levels = [parse_number(part, "every strength") for part in strengths.split(",")]
        maps = [ActMap.load(path) for path in map_files or ()]
        chosen = _preset_of(maps, preset, concept)
        words = concept or concept_words(chosen)
        to_fit, subjects = _split(chosen, prompts, 0 if maps else fit_count, count, seed)
        judge = ClipJudge.from_pretrained(clip or DEFAULT_CLIP, device)
        pipe = load_image_model(model, device, dtype)
        sampling = sampling_options(model, steps, guidance_scale)
        if not maps:
            say(f"[dim]Fitting on {len(to_fit)} pairs of prompts[/]")
            options = given(height=height, width=width) | sampling | {"method": method, "seed": seed}
            maps = [pipe.fit_preset(chosen, to_fit, batch_size=batch_size, **options)]
            maps[0].save(output / f"{chosen.name}.safetensors")
        elif prompts is None:
            say(
                "[dim]Drawing subjects of the preset, on some of which the map may have been fitted; --prompts takes others[/]"
            )
        about = {"model": model, "clip": clip or DEFAULT_CLIP, "concept": words, "prompts": subjects, "seed": seed}
        title = f"“{words}” in pictures of {model_name(model, model)}, {len(subjects)} prompts"
        report = Report(title, _COLUMNS, about)
        drawing = Sampling(
            num_inference_steps=sampling.get("num_inference_steps"),
            guidance_scale=sampling.get("guidance_scale"),
            seed=seed + FRESH,
            batch_size=batch_size,
            call_options=given(height=height, width=width),
        )
        asked = chosen.judge_prompts(subjects, seed)
        drawn = _draw_all(pipe, maps, levels, asked, comparisons(chosen, subjects, words, seed), drawing)
        unsteered = judge.embed_images(drawn[0].pictures)
        for column in drawn:
            scores = judge.scores(judge.embed_images(column.pictures), subjects, words, unsteered)
            row = {"label": _label(column), "map": column.map_name, "strength": column.strength}
            report.rows.append(row | asdict(scores))
        console.print(report.table())
        if chosen.kind == "negation" and not getattr(pipe, "do_classifier_free_guidance", False):
            say("[dim]Without classifier-free guidance there is no negative prompt to compare with.[/]")
        _write(report, drawn, asked, output)


_COLUMNS = {
    "": "label",
    "share": "share:.0%",
    "probability": "probability:.2f",
    "CLIPScore": "clip_score:.3f",
    "relative": "relative_clip_score:.0%",
    "image similarity": "image_similarity:.2f",
}


def _preset_of(maps: list[ActMap], name: str | None, concept: str | None) -> Preset:
    """What the maps are to do: the preset of that name, else the one they were fitted on, else the style `concept`."""
    from .maps.presets import Preset, PromptTemplates, load_preset

    fitted_on = sorted({preset for act_map in maps for preset in act_map.metadata.presets})
    if name is not None:
        return load_preset(name)
    if len(fitted_on) == 1:
        return load_preset(fitted_on[0])
    if maps and concept is not None:
        tagged = PromptTemplates(("{subject}, {tags}",), (concept,), 1)
        return Preset(concept, "style", PromptTemplates(("{subject}",)), tagged)
    if maps:
        raise ValueError("the maps do not tell one preset that they were fitted on; say by --concept what they bring in, or give --preset")  # fmt: skip
    raise ValueError("give --map, or --preset to fit a map on")


def _split(preset: Preset, prompts: Path | None, fit_count: int, count: int, seed: int) -> tuple[list[str], list[str]]:
    """Subjects to fit on, and others to judge on."""
    subjects = list(preset.subjects)
    if prompts is None and not subjects:
        raise ValueError("this map comes with no list of subjects; give --prompts")
    random.Random(seed).shuffle(subjects)
    judged = read_prompts(prompts)[:count] if prompts is not None else subjects[:count]
    others = [subject for subject in subjects if subject not in judged][:fit_count]
    if fit_count and not others:
        raise ValueError(f"preset {preset.name!r} has {len(subjects)} subjects, none is left to fit on; lower --count")
    return others, judged


@dataclass
class _Drawn:
    """The pictures of one row of the report, a column of the grid; without a map, or a strength, it is a comparison."""

    column: str
    pictures: np.ndarray
    map_name: str | None = None
    strength: float | None = None


def _draw_all(
    pipe: ACTMixin,
    maps: list[ActMap],
    strengths: list[float],
    prompts: list[str],
    compared: dict[str, Comparison],
    sampling: Sampling,
) -> list[_Drawn]:
    """Unsteered pictures, those of every map at every strength, and what prompting alone gives, in this order."""
    from .evaluation.images import draw

    drawn = [_Drawn("0\nunsteered", draw(pipe, prompts, sampling), strength=0.0)]
    for act_map in maps:
        name = pipe.load_act_map(act_map, f"{len(drawn)}")
        for strength in (level for level in strengths if level != 0):
            column = f"{strength:g}\n{act_map.metadata.name}" if len(maps) > 1 else f"{strength:g}"
            pictures = draw(pipe, prompts, sampling, act_strength=strength)
            drawn.append(_Drawn(column, pictures, act_map.metadata.name, strength))
        pipe.delete_act_maps(name)
    guided = getattr(pipe, "do_classifier_free_guidance", False)
    for label, comparison in compared.items():
        negative = comparison.negative_prompt
        if negative is None or guided:
            drawn.append(_Drawn(label, draw(pipe, comparison.prompts, sampling, negative_prompt=negative)))
    return drawn


def _label(drawn: _Drawn) -> str:
    """Of a row of the table."""
    words = drawn.column.replace("\n", " ")
    if drawn.map_name is None:
        return words.removeprefix("0 ")
    return f"strength {words}"


def _write(report: Report, drawn: list[_Drawn], prompts: list[str], output: Path) -> None:
    """The figures as JSON, the first pictures as a grid, and a plot over the strength."""
    from PIL import Image

    from .evaluation.grid import draw_grid
    from .evaluation.language.report import plot_report

    names = list(dict.fromkeys(column.map_name for column in drawn if column.map_name is not None))
    report.save(output / "figures.json")
    grid = draw_grid(
        [[Image.fromarray(column.pictures[row]) for column in drawn] for row in range(min(SHOWN, len(prompts)))],
        prompts[:SHOWN],
        [column.column for column in drawn],
        title=report.title,
        subtitle="Every row keeps its seed.",
        heading="strength of the map",
        apart=sum(column.strength is None for column in drawn),
        apart_heading="for comparison",
    )
    save_picture(grid, output / "grid.png")
    # Every map's line begins at the unsteered pictures.
    rows = [row | {"map": name} for name in names for row in report.rows if row["map"] == name or row["strength"] == 0]
    panels = {
        "share": ["share"],
        "relative CLIPScore": ["relative_clip_score"],
        "image similarity": ["image_similarity"],
    }
    plot = plot_report(replace(report, rows=rows), "strength", panels, group="map")
    save_picture(plot, output / "plot.png")
    say(f"\nWrote figures.json, grid.png and plot.png into [cyan]{output}[/]")
