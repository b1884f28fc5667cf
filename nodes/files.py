"""ACTLoadMap, ACTSaveMap, and the folder of act maps."""

from __future__ import annotations

import re
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..maps import ActMap
from .schema import ActMapType, schema

FOLDER = "act_maps"
# Maps that the bundled workflows use.
_BUNDLED = Path(__file__).parents[1] / "workflows" / "maps"
# A file name on every system: no drive, no control characters, nothing that a shell or Windows reserves.
_NAME = re.compile(r'[^<>:"|?*\\/\x00-\x1f]+')


def register_folder() -> None:
    """Let ComfyUI know models/act_maps and the bundled maps. Repeated calls change nothing."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir, FOLDER)), is_default=True)
    folder_paths.add_model_folder_path(FOLDER, str(_BUNDLED))
    folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")


def map_path(name: str) -> Path:
    """The file of the map called `name`, which may stand in a subfolder.

    Raises:
        ValueError: if there is no such map, or the name leads out of the folders of act maps.
    """
    for folder in map(Path, folder_paths.get_folder_paths(FOLDER)):
        path = folder / name
        if "\x00" not in name and path.suffix == ".safetensors" and _within(path, folder) and path.is_file():
            return path
    raise ValueError(
        f"there is no act map {name!r}; put the .safetensors file into {Path(folder_paths.models_dir, FOLDER)} and refresh"
    )


def save_path(name: str, overwrite: bool) -> Path:
    """Where to save a map called `name`: a free name is chosen unless `overwrite`.

    Raises:
        ValueError: if the name is no file name, or leads out of the folder of act maps.
    """
    folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
    parts = name.strip().removesuffix(".safetensors").split("/")
    usable = all(_NAME.fullmatch(part) and part.strip(" .") == part for part in parts)
    path = folder.joinpath(*parts[:-1], f"{parts[-1]}.safetensors") if usable else folder
    if not usable or not _within(path, folder):
        raise ValueError(
            f"{name!r} is no name for an act map: use letters, digits, spaces, - and _, with / for subfolders of {FOLDER}"
        )
    number = 2
    while not overwrite and path.exists():
        path = path.with_name(f"{parts[-1]}_{number}.safetensors")
        number += 1
    return path


def _within(path: Path, folder: Path) -> bool:
    """Whether `path`, links followed, lies in `folder`."""
    return path.resolve().is_relative_to(folder.resolve())


class ACTLoadMap(io.ComfyNode):
    """Reads a map from models/act_maps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ACTLoadMap",
            "Load AcT Map",
            description="Load an act map from models/act_maps.",
            search_aliases=["open act map", "activation transport"],
            inputs=[
                io.Combo.Input(
                    "map_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A .safetensors file in models/act_maps, saved here or made with diffusers.",
                )
            ],
            outputs=[ActMapType.Output("act_map", display_name="ACT_MAP", tooltip="The map, for Apply AcT Map.")],
        )

    @classmethod
    def fingerprint_inputs(cls, map_name: str) -> str:
        """Changes when the file does, so that it is read again."""
        status = map_path(map_name).stat()
        return f"{status.st_mtime_ns} {status.st_size}"

    @classmethod
    def execute(cls, map_name: str) -> io.NodeOutput:
        return io.NodeOutput(ActMap.load(map_path(map_name)))


class ACTSaveMap(io.ComfyNode):
    """Writes a map into models/act_maps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ACTSaveMap",
            "Save AcT Map",
            description="Save an act map into models/act_maps, for Load AcT Map, for diffusers, and to share.",
            search_aliases=["store act map", "export act map"],
            is_output_node=True,
            inputs=[
                ActMapType.Input("act_map", tooltip="From Fit or Blend AcT Map."),
                io.String.Input("filename", default="my_style", tooltip="Name of the file; a / makes a subfolder."),
                io.Boolean.Input(
                    "overwrite", default=False, tooltip="Replace a file of that name instead of numbering the new one."
                ),
            ],
            outputs=[io.String.Output("path", display_name="path", tooltip="The file that was written.")],
        )

    @classmethod
    def execute(cls, act_map: ActMap, filename: str, overwrite: bool) -> io.NodeOutput:
        path = save_path(filename, overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        act_map.save(path)
        return io.NodeOutput(str(path), ui={"text": [f"Saved {path.name}, {path.stat().st_size / 1024:.0f} kB"]})
