"""What the commands of the command line share: how they print, report errors, and read their options."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from PIL import Image

    from .pipelines import TextGenerationACTPipeline

DEMO = "demo"
DEMO_SAMPLING: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 4.0}

console = Console()
error_console = Console(stderr=True)


def say(text: str, **style: Any) -> None:
    """Print text with rich markup, without breaking long paths."""
    console.print(text, soft_wrap=True, highlight=False, **style)


@contextmanager
def readable_errors(debug: bool) -> Iterator[None]:
    """Turn an error into one red line and exit code 1; with `debug` let it through with its traceback."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, (ValueError, OSError, MemoryError, TypeError)):
            message = f"unexpected {type(error).__name__}: {message} (--debug shows where it comes from)"
        error_console.print(f"[bold red]error:[/] [red]{escape(message)}[/]", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from None


def examples(*lines: str) -> str:
    """An epilog with example commands, one per line."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"[green]$[/green] actmaps {line}" for line in lines)])


def option(*names: str, help: str, panel: str = "Options", **settings: Any) -> Any:  # noqa: A002 (Typer's word)
    """An option whose help stands under a panel's heading."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **settings)


# Options of several commands -----------------------------------------------------------------------------------------

SAMPLING, MACHINE = "Sampling", "Machine"
Steps = Annotated[int | None, option(panel=SAMPLING, help="Sampling steps. Default: the model's; 20 for the demo.")]
Guidance = Annotated[float | None, option(panel=SAMPLING, help="Default: the pipeline's; 4 for the demo.")]
Height = Annotated[int | None, option(panel=SAMPLING, help="Pixels. Default: the model's.")]
Width = Annotated[int | None, option(panel=SAMPLING, help="Pixels. Default: the model's.")]
Seed = Annotated[int, option(panel=SAMPLING, help="Of all random draws; equal seeds give equal results.")]
Device = Annotated[str | None, option(panel=MACHINE, help="cpu, cuda, mps ... Default: a GPU if there is one.")]
DType = Annotated[
    str | None, option(panel=MACHINE, help="float32, float16 or bfloat16. Default: float16 on CUDA, else float32.")
]
Debug = Annotated[bool, option("--debug", panel=MACHINE, help="Show where an error comes from.", show_default=False)]

# Reading options -----------------------------------------------------------------------------------------------------


def given(**options: Any) -> dict[str, Any]:
    """The options that have a value, so that the others keep the defaults of what they are passed to."""
    return {key: value for key, value in options.items() if value is not None}


def parse_number(text: str, what: str) -> float:
    """A number; ValueError names `what` should be one."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{what} must be a number, got {text!r}") from None


def parse_sites(patterns: list[str] | None) -> str | list[str] | None:
    """One pattern with the signs of a regular expression is one; everything else is names and ends of names."""
    if patterns and len(patterns) == 1 and re.search(r"[\\*+?|()\[\]^$]", patterns[0]):
        return patterns[0]
    return patterns or None


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty; ValueError if there is none."""
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} has no prompt; write one per line")
    return prompts


def check_picture(path: Path) -> None:
    """Raise ValueError unless the name ends like a picture's."""
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{path.name!r} has no ending of a picture file; use .png")


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture, its folder too."""
    check_picture(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def load_language_model(model: str, device: str | None, dtype: str | None) -> TextGenerationACTPipeline:
    """The pipeline of a language model; what transformers says while loading it is kept quiet."""
    import transformers

    from .evaluation.language.models import load_language_pipeline

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return load_language_pipeline(model, device, dtype)


def load_image_model(model: str, device: str | None, dtype: str | None = None) -> Any:
    """The bundled demo model, or any diffusers model, as a pipeline with act maps."""
    import diffusers
    import torch
    import transformers

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = getattr(torch, dtype or ("float16" if place.startswith("cuda") else "float32"), None)
    if precision not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"--dtype must be float32, float16 or bfloat16, got {dtype!r}")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the libraries' own affairs
        if model == DEMO:
            from .demo import load_pipeline

            for library in (diffusers, transformers):
                library.utils.logging.disable_progress_bar()
            pipe = load_pipeline(place)
        else:
            from .pipelines import load_act_pipeline

            pipe = load_act_pipeline(model, dtype=precision).to(place)
    pipe.set_progress_bar_config(leave=False)
    return pipe


def sampling_options(model: str, steps: int | None, guidance_scale: float | None) -> dict[str, Any]:
    """Steps and guidance as given, for the demo model with its own defaults."""
    sampling = given(num_inference_steps=steps, guidance_scale=guidance_scale)
    return DEMO_SAMPLING | sampling if model == DEMO else sampling
