"""The command line: fit, look at, combine and try out act maps.

Everything heavy (torch, diffusers) is imported inside the commands, so that help appears at once.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from . import __version__
from .cli_eval import eval_app
from .cli_options import (
    DEMO,
    DEMO_SAMPLING,
    MACHINE,
    SAMPLING,
    Debug,
    Device,
    DType,
    Guidance,
    Height,
    Seed,
    Steps,
    Width,
    check_picture,
    console,
    examples,
    given,
    load_image_model,
    load_language_model,
    option,
    parse_number,
    parse_sites,
    read_prompts,
    readable_errors,
    sampling_options,
    save_picture,
    say,
)
from .cli_ranks import joined_ranks

if TYPE_CHECKING:
    from .maps import ActMap
    from .maps.presets import Preset

# What the demo draws: subjects that the small model draws recognisably. No map is fitted on them; most faces and the
# melon were held out of the model's training too.
DEMO_SUBJECTS = {
    "style": (
        "smiling face with a hat",
        "slightly smiling face with sunglasses",
        "grinning face with a crown",
        "cat with sunglasses",
        "monkey with a crown",
        "blue square",
    ),
    "negation": ("smiling face", "slightly smiling face", "enraged face", "pouting cat", "worried face", "melon"),
}

app = typer.Typer(
    name="actmaps",
    help="Activation Transport maps: steer text-to-image and language models without training.",
    epilog="Start with [bold]actmaps demo[/bold], which needs nothing but this package.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(eval_app)

Model = Annotated[str, option("--model", "-m", help="A diffusers folder, the name of a hub repository, or 'demo'.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"actmaps {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


# Commands ------------------------------------------------------------------------------------------------------------


@app.command(
    epilog=examples("demo", "demo --style demo-pixel-art -o pixels", "demo --subject ring --subject scarf --seed 1")
)
def demo(
    output: Annotated[Path, option("--output", "-o", help="Folder for maps and pictures.")] = Path("actmaps-demo"),
    style: Annotated[str, option(help="Style preset to bring in; 'actmaps presets' lists them.")] = "demo-pop-art",
    negation: Annotated[str, option(help="Negation preset: what to take away.")] = "demo-no-hat",
    subject: Annotated[list[str] | None, option(help="What to draw; repeat it for more rows.")] = None,
    count: Annotated[int, option(help="Prompts per side to fit on.")] = 32,
    seed: Seed = 0,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Fit a style and a negation on the bundled model, and draw what they do at growing strength."""
    with readable_errors(debug):
        from .evaluation.sweep import preset_sweep
        from .maps.presets import load_preset

        started = perf_counter()
        chosen = [load_preset(style), load_preset(negation)]
        pipe = load_image_model(DEMO, device)
        for preset in chosen:
            say(f"\n[bold]{preset.name}[/]  {escape(preset.description)}")
            act_map = pipe.fit_preset(preset, count=count, seed=seed, **DEMO_SAMPLING)
            act_map.save(output / f"{preset.name}.safetensors")
            subjects = subject or DEMO_SUBJECTS.get(preset.kind, DEMO_SUBJECTS["style"])
            # Seeds that the fit has not seen.
            picture = preset_sweep(pipe, preset, act_map, subjects, seed=seed + 10_000, **DEMO_SAMPLING)
            save_picture(picture, output / f"{preset.name}.png")
        say(f"\nDone in {perf_counter() - started:.0f} s. [bold]Look at the pictures:[/]")
        for preset in chosen:
            say(f"  [cyan]{output / preset.name}.png[/]   (map: {preset.name}.safetensors)")
        file = output / f"{chosen[0].name}.safetensors"
        say("\nNext, with a prompt of your own, and a look inside the map:")
        say(f'  actmaps sweep --map {file} --prompt "a fox with a crown" --strengths 0,0.5,1,1.5 -o fox.png')
        say(f"  actmaps inspect {file} --plot map.png")


@app.command(
    epilog=examples(
        "fit --model demo --preset demo-pixel-art -o pixel-art.safetensors",
        "fit --model ./my-model --source plain.txt --target ink.txt -o ink.safetensors",
        "fit --model user/sd15 --preset my-style --sites unet --timesteps 0,0.5 -o my-style.safetensors",
        "fit --model ./llama --source rude.txt --target kind.txt --sites post_norms -o kind.safetensors",
    )
)
def fit(
    output: Annotated[Path, option("--output", "-o", help="The map, a .safetensors file.")],
    model: Model = DEMO,
    name: Annotated[str | None, option(help="Stored in the map. Default: the preset's name or the file's.")] = None,
    preset: Annotated[str | None, option(panel="Prompts", help="A preset: its name or a .toml file.")] = None,
    subjects: Annotated[
        str | None, option(panel="Prompts", help="For the preset: a list of subjects, by name or .txt file.")
    ] = None,
    count: Annotated[int | None, option(panel="Prompts", help="For the preset: draw only so many subjects.")] = None,
    source: Annotated[
        Path | None, option(panel="Prompts", help="Instead of a preset: a file of prompts, one per line, as they are.")
    ] = None,
    target: Annotated[
        Path | None, option(panel="Prompts", help="With --source: a file of prompts as they should be.")
    ] = None,
    sites: Annotated[
        list[str] | None,
        option(
            panel="Method",
            help="unet, transformer, text_encoder, norms, post_norms, attention, mlp, blocks, the end of "
            "a module's name, or a regular expression; repeat it for several. Default: the preset's advice, else normalisation layers.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        option(
            panel="Method",
            help="linear, mean or gaussian; for language models also actadd, caa, repe, east, iti_m, iti_c, aura, det_zero.",
        ),
    ] = None,
    pooling: Annotated[
        str | None, option(panel="Method", help="none (every position is a sample), mean, last, max or min.")
    ] = None,
    positions: Annotated[
        str | None, option(panel="Method", help="With pooling none: positions per prompt and site, or 'all'.")
    ] = None,
    support: Annotated[
        str | None, option(panel="Method", help="all, observed, or two quantiles such as 0.01,0.99.")
    ] = None,
    timesteps: Annotated[
        str | None, option(panel="Method", help="How many, or fractions of the run such as 0,0.3; 0 is pure noise.")
    ] = None,
    window: Annotated[
        str | None, option(panel="Method", help="Part of the run in which the map acts, such as 0,0.4.")
    ] = None,
    latents: Annotated[
        str | None,
        option(panel="Method", help="own: each prompt's sampling run; source, target: that set's for both."),
    ] = None,
    rows: Annotated[
        str | None, option(panel="Method", help="cond steers conditional rows only, both all rows.")
    ] = None,
    spatial: Annotated[
        str | None, option(panel="Method", help="affine moves every pixel by the map, shift all by one constant.")
    ] = None,
    at_once: Annotated[
        bool,
        option("--at-once", panel="Method", help="Fit all sites on the unsteered model.", show_default=False),
    ] = False,
    transport_target: Annotated[
        bool,
        option("--transport-target", panel="Method", help="Move targets too while fitting.", show_default=False),
    ] = False,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    height: Height = None,
    width: Width = None,
    seed: Seed = 0,
    batch_size: Annotated[
        int | None, option(panel=MACHINE, help="Prompts per forward; fewer need less memory.")
    ] = None,
    device: Device = None,
    dtype: DType = None,
    debug: Debug = False,
) -> None:
    """Fit a map from prompts as they are to prompts as they should be.

    Start it by 'torchrun --nproc-per-node N -m actmaps fit' to let N processes share the prompts.
    """
    with readable_errors(debug), joined_ranks(device) as (device, first):
        from .evaluation.language.models import is_language_model
        from .evaluation.tables import summary_table
        from .maps.presets import load_preset, load_subjects

        if output.suffix != ".safetensors":
            raise ValueError(f"--output must end in .safetensors, got {output.name!r}")
        files = [path for path in (source, target) if path is not None]
        if len(files) != (0 if preset else 2):
            raise ValueError("give the prompts either by --preset or by both --source and --target")
        if files and (subjects or count):
            raise ValueError("--subjects and --count go with --preset; prompt files are taken as they are")
        chosen = load_preset(preset) if preset else None
        if chosen is not None and chosen.models:
            say(f"[dim]Preset {chosen.name} is meant for {escape(chosen.models)}.[/]")
        prompts = [read_prompts(path) for path in files]
        options = given(
            sites=parse_sites(sites),
            method=method,
            pooling=pooling,
            support=_parse_support(support),
            timesteps=_parse_timesteps(timesteps),
            window=_parse_window(window),
            latents=latents,
            rows=rows,
            spatial=spatial,
            causal=False if at_once else None,
            transport_target=transport_target or None,
            height=height,
            width=width,
            batch_size=batch_size,
            seed=seed,
            progress=None if first else False,
        )
        if positions is not None:
            options["positions"] = None if positions == "all" else int(parse_number(positions, "--positions"))
        started = perf_counter()
        pipe: Any
        if is_language_model(model):
            for_images = ("timesteps", "window", "latents", "rows", "spatial", "height", "width")
            unfit = [f"--{name}" for name in for_images if name in options]
            unfit += [name for name, value in (("--preset", chosen), ("--steps", steps), ("--guidance-scale", guidance_scale)) if value]  # fmt: skip
            if unfit:
                raise ValueError(f"{model} is a language model; {', '.join(unfit)} are for image models")
            pipe = load_language_model(model, device, dtype)
        else:
            pipe = load_image_model(model, device, dtype)
            options |= sampling_options(model, steps, guidance_scale)
        if chosen is not None:
            act_map = pipe.fit_preset(chosen, load_subjects(subjects) if subjects else None, count, **options)
        else:
            act_map = pipe.fit_act_map(*prompts, **options)
        if chosen is None or name is not None:
            act_map = _with_metadata(act_map, name=name or output.stem)
        if first:
            act_map.save(output)
        console.print(summary_table(act_map))
        say(f"\nFitted in {perf_counter() - started:.0f} s: [cyan]{output}[/]")
        command = "generate" if is_language_model(model) else "sweep"
        say(f'Try it: actmaps {command} --model {model} --map {output} --prompt "..."')


@app.command(
    epilog=examples(
        'sweep --map pixel-art.safetensors --prompt "red apple" --prompt "blue car" -o grid.png',
        'sweep --map ink=ink.safetensors --map gold=gold.safetensors -p "a fox" --strengths 0,1,1.5 -o fox.png',
        'sweep -m ./model --map anime.safetensors -p "a street" --compare "{prompt}, anime" -o street.png',
    )
)
def sweep(
    map_files: Annotated[
        list[str],
        option("--map", metavar="[NAME=]FILE", help="A map; repeat it for several, drawn one after another."),
    ],
    prompt: Annotated[list[str], option("--prompt", "-p", help="What to draw; repeat it for more rows.")],
    model: Model = DEMO,
    output: Annotated[Path, option("--output", "-o", help="The picture.")] = Path("grid.png"),
    strengths: Annotated[str, option(help="One column each.")] = "0,0.25,0.5,0.75,1",
    together: Annotated[bool, option("--together", help="Apply all maps at once.", show_default=False)] = False,
    compare: Annotated[
        str | None, option(help="A last column for this prompt without map, such as '{prompt}, watercolor'.")
    ] = None,
    cell: Annotated[int, option(help="Longer side of each picture in the grid, in pixels.", min=16)] = 160,
    negative_prompt: Annotated[str | None, option(panel=SAMPLING, help="Of every picture.")] = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    height: Height = None,
    width: Width = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: DType = None,
    debug: Debug = False,
) -> None:
    """Draw prompts at growing strength of a map, as one labelled grid."""
    with readable_errors(debug):
        from .evaluation.grid import draw_grid
        from .evaluation.sweep import strength_labels, strength_sweep
        from .maps import ActMap

        columns = [parse_number(part, "every strength") for part in strengths.split(",")]
        maps = {map_name: ActMap.load(path) for map_name, path in map(_split_name, map_files)}
        if len(maps) < len(map_files):
            raise ValueError("two maps have the same name; write --map NAME=FILE with different names")
        if compare is not None and "{prompt}" not in compare:
            raise ValueError('--compare needs {prompt} where the prompt goes, such as "{prompt}, watercolor"')
        check_picture(output)
        pipe = load_image_model(model, device, dtype)
        negative = None if negative_prompt is None else [negative_prompt] * len(prompt)
        options = given(height=height, width=width, negative_prompt=negative)
        options |= sampling_options(model, steps, guidance_scale)
        for map_name, act_map in maps.items():
            pipe.load_act_map(act_map, map_name)
        rows, labels = [], []
        groups = [list(maps)] if together else [[map_name] for map_name in maps]
        for names in groups:
            pipe.set_act_maps(names)
            rows += strength_sweep(pipe, prompt, columns, seed=seed, **options)
            labels += [text if len(groups) == 1 else f"{text}\n{names[0]}" for text in prompt]
        column_labels = strength_labels(columns)
        if compare is not None:
            asked = [compare.replace("{prompt}", text) for text in prompt]
            extra = strength_sweep(pipe, asked, [0.0], seed=seed, **options)
            rows = [row + more for row, more in zip(rows, extra * len(groups), strict=True)]
            column_labels.append(f"{compare.replace('{prompt}', '...')}\nin the prompt")
        picture = draw_grid(
            rows,
            labels,
            column_labels,
            title=f"Act map “{'” + “'.join(maps)}”" if len(groups) == 1 else "Act maps",
            heading="strength of the map",
            apart=len(column_labels) - len(columns),
            apart_heading="for comparison",
            cell=cell,
        )
        save_picture(picture, output)
        say(f"Wrote [cyan]{output}[/]")


@app.command(
    epilog=examples(
        'generate --model gemma-3-270m --map kind.safetensors --prompt "I told him that"',
        'generate -m ./llama --map kind.safetensors -p "You are" --strengths 0,1 --tokens 60 --greedy',
    )
)
def generate(
    model: Annotated[
        str,
        option(
            "--model", "-m", help="A language model: gemma-3-270m, smollm2-135m-instruct, a folder, or a hub name."
        ),
    ],
    map_files: Annotated[list[str], option("--map", metavar="FILE", help="A map; several act together.")],
    prompt: Annotated[list[str], option("--prompt", "-p", help="What to continue; repeat it for more.")],
    strengths: Annotated[str, option(help="One continuation each.")] = "0,0.5,1",
    tokens: Annotated[int, option(help="How long continuations are.", min=1)] = 40,
    greedy: Annotated[
        bool, option("--greedy", panel=SAMPLING, help="Always take the likeliest token.", show_default=False)
    ] = False,
    seed: Seed = 0,
    device: Device = None,
    dtype: DType = None,
    debug: Debug = False,
) -> None:
    """Let a language model continue prompts at growing strength of a map."""
    with readable_errors(debug):
        from .evaluation.language.generation import continuations
        from .evaluation.tables import plain_table
        from .maps import ActMap

        levels = [parse_number(part, "every strength") for part in strengths.split(",")]
        maps = [ActMap.load(file) for file in map_files]
        pipe = load_language_model(model, device, dtype)
        for number, act_map in enumerate(maps):
            pipe.load_act_map(act_map, f"{number}")
        options: dict[str, Any] = {"do_sample": False} if greedy else {}
        found = [
            continuations(pipe, prompt, act_strength=level, max_new_tokens=tokens, seed=seed, progress=True, **options)
            for level in levels
        ]
        for number, text in enumerate(prompt):
            table = plain_table(escape(text), "strength", "continuation")
            for level, texts in zip(levels, found, strict=True):
                table.add_row(f"{level:g}", escape(" ".join(texts[number].split())))
            console.print(table)


@app.command(
    epilog=examples("inspect map.safetensors", "inspect map.safetensors --plot map.png", "inspect user/map --all")
)
def inspect(
    map_file: Annotated[
        str, typer.Argument(metavar="MAP", help="A .safetensors file, a folder, or a hub repository.")
    ],
    plot: Annotated[Path | None, option(help="Also draw the map into this picture file.")] = None,
    top: Annotated[int, option(help="How many sites and units to list.", min=1)] = 10,
    all_sites: Annotated[bool, option("--all", help="List every site.", show_default=False)] = False,
    debug: Debug = False,
) -> None:
    """Show where a map acts, how strongly, and how it was fitted."""
    with readable_errors(debug):
        from .evaluation.plots import plot_map
        from .evaluation.tables import site_table, summary_table, unit_table
        from .maps import ActMap

        if plot is not None:
            check_picture(plot)
        act_map = ActMap.load(map_file)
        console.print(
            summary_table(act_map), site_table(act_map, None if all_sites else top), unit_table(act_map, top)
        )
        if plot is not None:
            save_picture(plot_map(act_map), plot)
            say(f"\nWrote [cyan]{plot}[/]")


@app.command(
    epilog=examples(
        "blend neon.safetensors=0.5 pixel-art.safetensors=0.7 -o neon-pixels.safetensors",
        "blend ink.safetensors=1 photo.safetensors=-0.5 --name inkier -o inkier.safetensors",
    )
)
def blend(
    weighted: Annotated[list[str], typer.Argument(metavar="MAP=WEIGHT...", help="Maps, and how much of each.")],
    output: Annotated[Path, option("--output", "-o", help="The blended map, a .safetensors file.")],
    name: Annotated[str | None, option(help="Stored in the map. Default: weights and names.")] = None,
    debug: Debug = False,
) -> None:
    """Combine maps into one, each at its own weight."""
    with readable_errors(debug):
        from .maps import ActMap

        weights: dict[ActMap, float] = {}
        for item in weighted:
            path, _, weight = item.rpartition("=")
            if not path:
                raise ValueError(f"got {item!r} without a weight; write {item}=0.5")
            weights[ActMap.load(path)] = parse_number(weight, f"the weight of {path}")
        blended = ActMap.blend(weights)
        if name is not None:
            blended = _with_metadata(blended, name=name)
        blended.save(output)
        say(f"Wrote [cyan]{output}[/]: {escape(blended.metadata.name)}")


@app.command(
    epilog=examples(
        "push ink.safetensors user/ink --base-model user/sd15 --picture grid.png",
        'push ink.safetensors user/ink --private --sample "a fox in the snow" --sample "a harbor"',
        "push ink.safetensors user/ink --picture grid.png --folder ./ink",
    )
)
def push(
    map_file: Annotated[str, typer.Argument(metavar="MAP", help="A .safetensors file or a folder.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="The hub repository, made if need be: user/name.")],
    picture: Annotated[Path | None, option(help="Shown on the model card, for example a grid of 'sweep'.")] = None,
    base_model: Annotated[str | None, option(help="Hub name of the model that the map was fitted on.")] = None,
    sample: Annotated[
        list[str] | None, option(help="A prompt to try, for the model card; repeat it for more.")
    ] = None,
    private: Annotated[
        bool, option("--private", help="Of a new repository: only you can see it.", show_default=False)
    ] = False,
    message: Annotated[str | None, option(help="Of the commit.")] = None,
    folder: Annotated[
        Path | None, option(help="Upload nothing: write what would be uploaded into this folder.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Share a map on the hub, with a model card that says how to use it. Log in first: 'hf auth login'."""
    with readable_errors(debug):
        from .maps import ActMap
        from .maps.hub import push_to_hub, save_repository

        act_map = ActMap.load(map_file)
        shown: dict[str, Any] = {"picture": picture, "base_model": base_model, "samples": sample or ()}
        if folder is not None:
            paths = save_repository(act_map, folder, repo_id, **shown)
            say("Wrote " + ", ".join(f"[cyan]{path}[/]" for path in paths))
            return
        say(f"Uploaded: {push_to_hub(act_map, repo_id, **shown, private=private, commit_message=message)}")


@app.command(
    epilog=examples(
        "export pop-art.safetensors -o ComfyUI/models/loras/pop-art.safetensors",
        "export anime.safetensors -m ./model --strength 0.8 -o anime-lora.safetensors",
    )
)
def export(
    map_file: Annotated[
        str, typer.Argument(metavar="MAP", help="A .safetensors file, a folder, or a hub repository.")
    ],
    output: Annotated[Path, option("--output", "-o", help="The LoRA file, a .safetensors file.")],
    model: Model = DEMO,
    strength: Annotated[float, option(help="Of the map; the LoRA's own strength multiplies it.")] = 1.0,
    partial: Annotated[
        bool, option("--partial", help="Leave out sites that cannot be exported.", show_default=False)
    ] = False,
    debug: Debug = False,
) -> None:
    """Write a map as a LoRA file, for ComfyUI without this package."""
    with readable_errors(debug):
        from .maps import ActMap
        from .maps.lora_file import save_as_lora

        act_map = ActMap.load(map_file)
        pipe = load_image_model(model, "cpu", "float32")
        left_out = save_as_lora(act_map, pipe._act_modules, output, strength, partial=partial)
        say(f"Wrote [cyan]{output}[/], for {escape(model)}: a LoRA acts on all rows and in every step")
        if left_out:
            say(f"[yellow]{len(left_out)} sites are left out:[/] {escape(', '.join(left_out))}")


@app.command(epilog=examples("presets", "presets watercolor", "presets ./my-style.toml --count 20 --seed 1"))
def presets(
    name: Annotated[str | None, typer.Argument(help="Show this preset: its name or a .toml file.")] = None,
    count: Annotated[int, option(help="How many of its prompts to show.", min=1)] = 8,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """List the prompt presets, or show what one of them writes."""
    with readable_errors(debug):
        from .evaluation.tables import plain_table
        from .maps.presets import KINDS, list_presets, load_preset, user_folder

        if name is not None:
            _show_preset(load_preset(name), count, seed)
            return
        groups: dict[tuple[str, str], list[Preset]] = {}
        problems = []
        for entry in list_presets():
            try:
                preset = load_preset(entry)
                groups.setdefault((preset.kind, preset.models), []).append(preset)
            except ValueError as error:
                problems.append(str(error))
        for (kind, models), members in sorted(groups.items(), key=lambda group: KINDS.index(group[0][0])):
            table = plain_table(
                f"{kind.capitalize()}s" + (f", for {escape(models)}" if models else ""), "preset", "what it does"
            )
            for preset in members:
                table.add_row(preset.name, escape(preset.description))
            console.print(table)
        say(f"\n[dim]'actmaps presets NAME' shows prompts. Your own presets go into {user_folder()}[/]")
        if problems:
            raise ValueError("; ".join(problems))


def _show_preset(preset: Preset, count: int, seed: int) -> None:
    from .evaluation.tables import plain_table

    say(f"[bold]{preset.name}[/] ({preset.kind})  {escape(preset.description)}")
    for architecture, advice in preset.recommended.items():
        sites = "as by default" if advice.sites is None else advice.sites
        say(f"[dim]{architecture}:[/] strength {advice.strength:g}, support {advice.support}, sites {sites}")
    if preset.models:
        say(f"[dim]meant for:[/] {escape(preset.models)}")
    count = min(count, len(preset.subjects))
    columns = dict(zip(("source", "target"), preset.prompts(seed=seed, count=count), strict=True))
    if preset.judge is not None:
        columns["judged on"] = preset.judge_prompts(seed=seed, count=count)
    table = plain_table(f"{count} of its {len(preset.subjects)} prompts", *columns)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*map(escape, row))
    console.print(table)


# What the commands share ---------------------------------------------------------------------------------------------


def _with_metadata(act_map: ActMap, **changes: Any) -> ActMap:
    from .maps import ActMap

    return ActMap(act_map, replace(act_map.metadata, **changes))


def _split_name(text: str) -> tuple[str, str]:
    """Name and file of "NAME=FILE"; a file alone is named after itself."""
    name, equals, path = text.partition("=")
    return (name, path) if equals else (Path(text).stem, text)


def _parse_support(text: str | None) -> str | tuple[float, ...] | None:
    if text is None or "," not in text:
        return text
    return tuple(parse_number(part, "every quantile of --support") for part in text.split(","))


def _parse_timesteps(text: str | None) -> int | tuple[float, ...] | None:
    """A count, or fractions; "0" is the fraction."""
    if text is None:
        return None
    if text.isdigit() and text != "0":
        return int(text)
    return tuple(parse_number(part, "every timestep") for part in text.split(","))


def _parse_window(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    ends = tuple(parse_number(part, "every end of --window") for part in text.split(","))
    if len(ends) != 2:
        raise ValueError(f"--window takes a start and an end such as 0,0.4, got {text!r}")
    return ends


def main() -> None:
    """Entry point of the command."""
    app(prog_name="actmaps")
