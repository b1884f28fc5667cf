"""Writes the page of the command line from the commands themselves: their help, options and examples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mkdocs.structure.files import File
from rich.text import Text
from typer.main import get_command

from actmaps.cli import app

PAGE = "reference/command-line.md"


def on_files(files: Any, config: Any) -> Any:
    """Add the page."""
    lines = ["# Command line", "", *_command(get_command(app), "actmaps")]
    files.append(File.generated(config, PAGE, content="\n".join(lines)))
    return files


def _command(command: Any, name: str) -> Iterator[str]:
    """The lines of a command, and of its subcommands."""
    if name != "actmaps":
        yield f"## `{name}`"
    yield from ("", _plain(command.help), "")
    subcommands = getattr(command, "commands", {})
    options = [] if subcommands else [part for part in command.params if part.name != "help"]
    if options:
        yield from ("| | | default |", "|---|---|---|")
    for panel in dict.fromkeys(_panel(part) for part in options):
        yield f"| **{panel}** | | |"
        yield from (_row(part) for part in options if _panel(part) == panel)
    yield ""
    if not subcommands and command.epilog:
        shown = [line for line in _plain(command.epilog).splitlines() if line.startswith("$ ")]
        yield from ("```console", *shown, "```", "")
    for subname, subcommand in subcommands.items():
        yield from _command(subcommand, f"{name} {subname}")


def _panel(part: Any) -> str:
    return getattr(part, "rich_help_panel", None) or ("Arguments" if part.param_type_name == "argument" else "Options")


def _row(part: Any) -> str:
    names = part.metavar or part.name if part.param_type_name == "argument" else ", ".join(part.opts)
    default = "required" if part.required else "" if part.default in (None, False) else f"`{part.default}`"
    cells = (f"`{names}`", _plain(part.help), default)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _plain(text: str | None) -> str:
    """Help without the terminal's markup, and safe from Markdown's."""
    return Text.from_markup(text or "").plain.strip().replace("<", "&lt;").replace("{", "&#123;")
