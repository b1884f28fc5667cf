"""The file format: one safetensors file per map, readable without this package.

Tensors `<site>.scale`, `<site>.shift` and, with a support, `<site>.lower`, `<site>.upper`, all float32 of shape (C,).
String metadata: `format` = "pt" and `actmaps`, a JSON object with `format_version`, the order of the `sites`, their unit
counts, and the fields of `ActMapMetadata`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .act_map import ActMap, ActMapMetadata
from .affine import AffineMap

FORMAT_VERSION = 1
DEFAULT_FILENAME = "act_map.safetensors"
_PARTS = ("scale", "shift", "lower", "upper")
_KINDS: dict[str, tuple[type, ...]] = {  # of metadata whose default does not tell
    "positions": (int, NoneType),
    "support": (str, tuple),
    "recommended_strength": (float, int),
}
MAX_BYTES = 2**30  # two hundred times the map of all norms of SDXL


def save(act_map: ActMap, path: str | PathLike[str]) -> None:
    """Write `act_map` to `path`. The file appears complete or not at all.

    Raises:
        ValueError: if `path` does not end in .safetensors.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"act maps are .safetensors files, got {path.name!r}")
    tensors = {}
    for site, affine in act_map.items():
        for part in _PARTS:
            if (values := getattr(affine, part)) is not None:
                tensors[f"{site}.{part}"] = values.cpu().contiguous().clone()
    header = {
        "format_version": FORMAT_VERSION,
        "sites": {site: affine.channels for site, affine in act_map.items()},
        **asdict(act_map.metadata),
    }
    write_tensors(path, tensors, {"format": "pt", "actmaps": json.dumps(header)})


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, which appears complete or not at all."""
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, which takes its place when the block succeeds and is removed when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(suffix=f"{path.suffix}.tmp", dir=path.parent)
    os.close(descriptor)
    try:
        yield Path(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path_or_hub_id: str | PathLike[str], *, filename: str | None = None, revision: str | None = None) -> ActMap:
    """Read a map.

    Args:
        path_or_hub_id: a file, a folder that holds one, or the id of a hub repository ("user/name").
        filename: file inside the folder or repository; default `act_map.safetensors`.
        revision: branch, tag or commit of the repository.

    Raises:
        FileNotFoundError: if there is no such file or repository.
        ValueError: if the file is damaged, no act map, of a newer format, or inconsistent; the message names what is wrong.
    """
    path = _local_path(path_or_hub_id, filename, revision)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than an act map can have; is it a model?")
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(path, file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); download or save it again") from None
    return ActMap(_maps(path, header, tensors), _metadata(path, header))


def _local_path(path_or_hub_id: str | PathLike[str], filename: str | None, revision: str | None) -> Path:
    path = Path(path_or_hub_id)
    if path.is_dir():
        found = path / (filename or DEFAULT_FILENAME)
        if not found.is_file():
            held = ", ".join(sorted(file.name for file in path.glob("*.safetensors"))) or "no .safetensors file"
            raise FileNotFoundError(f"folder {path} has no {found.name}; it has {held}")
        return found
    if path.is_file():
        return path
    name = str(path_or_hub_id)
    if (
        isinstance(path_or_hub_id, PathLike)
        or name.endswith(".safetensors")
        or name.count("/") != 1
        or name[0] in "./~"
    ):
        raise FileNotFoundError(f"there is no act map file {path}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    filename = filename or DEFAULT_FILENAME
    try:
        return Path(hf_hub_download(name, filename, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        wanted = f"{filename} of revision {revision}" if revision else filename
        raise FileNotFoundError(
            f"{name!r} is no local file and could not be had from the hub ({wanted}): {error}"
        ) from error


def _header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if "actmaps" not in metadata:
        raise ValueError(
            f"{path} is a safetensors file but no act map (its metadata lacks 'actmaps'); is it a LoRA or a model?"
        )
    try:
        header = json.loads(metadata["actmaps"])
    except json.JSONDecodeError as error:
        raise ValueError(f"the metadata of {path} is damaged ({error})") from None
    if not isinstance(header, dict) or "format_version" not in header:
        raise ValueError(f"the metadata of {path} is damaged: it has no 'format_version'")
    if header["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has act map format {header['format_version']}, this version reads {FORMAT_VERSION}; update actmaps"
        )
    sites = header.get("sites")
    if not isinstance(sites, dict) or not sites or not all(type(count) is int for count in sites.values()):
        raise ValueError(f"the metadata of {path} is damaged: 'sites' must map site names to unit counts")
    return header


def _maps(path: Path, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, AffineMap]:
    maps = {}
    for site, channels in header["sites"].items():
        scale, shift, lower, upper = (tensors.pop(f"{site}.{part}", None) for part in _PARTS)
        if scale is None or shift is None:
            raise ValueError(f"{path} lacks scale or shift of {site}")
        if scale.shape != (channels,):
            raise ValueError(f"{path}: {site} has shape {tuple(scale.shape)}, its metadata says {channels} units")
        if any(part is not None and part.dtype is not torch.float32 for part in (scale, shift, lower, upper)):
            raise ValueError(f"{path}: {site} is not stored in float32")
        try:
            maps[site] = AffineMap(scale, shift, lower, upper)
        except ValueError as error:
            raise ValueError(f"{path}: {site}: {error}") from None
    if tensors:
        raise ValueError(f"{path} has tensors that belong to no site, for example {next(iter(tensors))}")
    return maps


def _metadata(path: Path, header: dict[str, Any]) -> ActMapMetadata:
    """The known fields; JSON lists become tuples. Fields that later versions add are ignored.

    Raises:
        ValueError: if a field has another type than its default.
    """
    defaults = ActMapMetadata()
    values: dict[str, Any] = {}
    for field in fields(ActMapMetadata):
        if field.name not in header:
            continue
        value = header[field.name]
        value = tuple(value) if isinstance(value, list) else value
        kinds = _KINDS.get(field.name, (type(getattr(defaults, field.name)),))
        if type(value) not in kinds:
            raise ValueError(f"the metadata of {path} is damaged: {field.name!r} is {value!r}")
        values[field.name] = value
    costs = values.get("costs", {})
    if not all(isinstance(cost, list) and len(cost) == 2 for cost in costs.values()):
        raise ValueError(f"the metadata of {path} is damaged: 'costs' must map sites to pairs")
    values["costs"] = {site: tuple(cost) for site, cost in costs.items()}
    return ActMapMetadata(**values)
