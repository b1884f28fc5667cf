"""Loading act maps into a pipeline, with methods named as those for LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..maps import ActMap, steer
from ..maps.files import DEFAULT_FILENAME
from .strength import Strength, check_strength


class ActMapLoaderMixin:
    """What all pipelines with act maps share: which maps are loaded, which are active, and how strong they are."""

    if TYPE_CHECKING:

        @property
        def _act_modules(self) -> dict[str, nn.Module]:
            """The networks of the pipeline by component name, which each kind of pipeline tells."""

    @property
    def _act_maps(self) -> dict[str, ActMap]:
        return self.__dict__.setdefault("_act_maps_by_name", {})

    @property
    def _act_strengths(self) -> dict[str, Strength]:
        """Strengths of the active maps, in the order in which they apply."""
        return self.__dict__.setdefault("_act_strengths_by_name", {})

    def load_act_map(
        self,
        act_map: ActMap | str | PathLike[str],
        adapter_name: str | None = None,
        *,
        strength: Strength = 1.0,
        **hub_options: Any,
    ) -> str:
        """Load a map and make it active beside those already active.

        Args:
            act_map: an `ActMap`, a file, a folder, or the id of a hub repository.
            adapter_name: name to call it by; default the name in its metadata.
            strength: see `set_act_maps`.
            **hub_options: `filename` and `revision`, see `ActMap.load`.

        Returns:
            The name under which it is loaded.

        Raises:
            ValueError: if the name is taken, the file is damaged, or the map was made for another model.
            FileNotFoundError: if there is no such map.
        """
        if not isinstance(act_map, ActMap):
            act_map = ActMap.load(act_map, **hub_options)
        name = adapter_name or act_map.metadata.name
        if name in self._act_maps:
            raise ValueError(
                f"an act map named {name!r} is already loaded; give another adapter_name or delete it first"
            )
        check_strength(strength, name, act_map)
        steer(self._act_modules, act_map).remove()  # raises if the map does not fit this model
        self._act_maps[name] = act_map
        self._act_strengths[name] = strength
        return name

    def set_act_maps(self, names: str | Sequence[str], strengths: Strength | Sequence[Strength] = 1.0) -> None:
        """Choose the active maps, in the order in which they apply, and their strengths; all others become inactive.

        Args:
            names: one name or several.
            strengths: one for all or a list with one per name. A strength is a number, a function (step, steps) -> number, or
                a dict of these by component, in which left out components count as 1.

        Raises:
            ValueError: for unknown names or components, or unequal numbers of names and strengths.
        """
        names = [names] if isinstance(names, str) else list(names)
        if isinstance(strengths, Sequence):
            if len(strengths) != len(names):
                raise ValueError(f"got {len(names)} names and {len(strengths)} strengths")
            by_name = dict(zip(names, strengths, strict=True))
        else:
            by_name = dict.fromkeys(names, strengths)
        for name, strength in by_name.items():
            check_strength(strength, name, self._act_map(name))
        self._act_strengths.clear()
        self._act_strengths.update(by_name)

    def get_active_act_maps(self) -> list[str]:
        """Names of the active maps, in the order in which they apply; empty while `disable_act` holds."""
        return list(self._act_strengths) if self.__dict__.get("_act_enabled", True) else []

    def get_list_act_maps(self) -> dict[str, list[str]]:
        """Names of all loaded maps by component, as `get_list_adapters` gives them for LoRA."""
        by_component: dict[str, list[str]] = {}
        for name, act_map in self._act_maps.items():
            for component in act_map.components:
                by_component.setdefault(component, []).append(name)
        return by_component

    def delete_act_maps(self, names: str | Sequence[str]) -> None:
        """Forget maps. Raises ValueError for unknown names."""
        for name in [names] if isinstance(names, str) else list(names):
            self._act_map(name)
            del self._act_maps[name]
            self._act_strengths.pop(name, None)

    def unload_act_maps(self) -> None:
        """Forget all maps."""
        self._act_maps.clear()
        self._act_strengths.clear()

    def enable_act(self) -> None:
        """Apply the active maps again after `disable_act`."""
        self.__dict__["_act_enabled"] = True

    def disable_act(self) -> None:
        """Apply no map until `enable_act`; maps and strengths stay as they are."""
        self.__dict__["_act_enabled"] = False

    def save_act_map(
        self, save_directory: str | PathLike[str], adapter_name: str, *, filename: str = DEFAULT_FILENAME
    ) -> Path:
        """Write a loaded map into a folder, which `load_act_map` and `ActMap.load` read; returns the file."""
        path = Path(save_directory, filename)
        self._act_map(adapter_name).save(path)
        return path

    def _act_map(self, name: str) -> ActMap:
        if name not in self._act_maps:
            raise ValueError(f"no act map named {name!r} is loaded; loaded: {', '.join(self._act_maps) or 'none'}")
        return self._act_maps[name]

    def _act_maps_for(self, act_strength: Any) -> dict[ActMap, Strength]:
        """The active maps with their strengths for one call."""
        strengths = {name: self._act_strengths[name] for name in self.get_active_act_maps()}
        if isinstance(act_strength, Mapping):
            for name in act_strength:
                self._act_map(name)
            strengths.update(act_strength)
        elif act_strength is not None:
            strengths = dict.fromkeys(strengths, act_strength)
        for name, strength in strengths.items():
            check_strength(strength, name, self._act_maps[name])
        return {self._act_maps[name]: strength for name, strength in strengths.items()}


def model_name(name_or_path: str, default: str) -> str:
    """What a map says of the model that it was fitted on: a hub name, or of a folder its name only, not where it lies."""
    return (Path(name_or_path).name if Path(name_or_path).is_dir() else name_or_path) or default


def as_prompts(prompts: Iterable[str], side: str) -> list[str]:
    """`prompts` as a list.

    Raises:
        ValueError: if it is a single string, empty, or holds something else than text.
    """
    if isinstance(prompts, str):
        raise ValueError(f"{side}_prompts is one string; give a list of prompts")
    prompts = list(prompts)
    if not prompts:
        raise ValueError(f"{side}_prompts is empty; give at least one prompt")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"{side}_prompts[{index}] is {type(prompt).__name__}, not text")
    return prompts
