"""Loading act maps into a pipeline, with methods named as those for LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..maps import ActMap, Folded, fold, steer
from ..maps.files import DEFAULT_FILENAME
from .strength import Strength, check_strength, parts_of


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
        self._check_new(name)
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
        self._check_not_fused("choose others")
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
        self._check_not_fused("delete any")
        for name in [names] if isinstance(names, str) else list(names):
            self._act_map(name)
            del self._act_maps[name]
            self._act_strengths.pop(name, None)

    def unload_act_maps(self) -> None:
        """Forget all maps."""
        self._check_not_fused("unload any")
        self._act_maps.clear()
        self._act_strengths.clear()

    def enable_act(self) -> None:
        """Apply the active maps again after `disable_act`."""
        self.__dict__["_act_enabled"] = True

    def disable_act(self) -> None:
        """Apply no map until `enable_act`; maps and strengths stay as they are."""
        self._check_not_fused("disable them")
        self.__dict__["_act_enabled"] = False

    def fuse_act(
        self, strength: float | Mapping[str, Any] | None = None, *, partial: bool = False, everywhere: bool = False
    ) -> None:
        """Fold the active maps into the weights, as `fuse_lora` does with a LoRA: steering then costs nothing.

        Weights are the same for all rows, tokens and steps. Maps that are made for some of them only, those with `rows="cond"`, a
        `window`, or a `scope`, therefore steer otherwise than by hooks once they are fused: both rows of classifier-free
        guidance, in every step. While maps are fused, calls do not steer by them again, and maps cannot be changed.

        Args:
            strength: None takes the strengths as set; a number holds for every active map; a dict {map name: strength} changes
                some. A strength is a number, or a dict of numbers by component.
            partial: leave sites that do not fold to hooks, which stay on the model until `unfuse_act`.
            everywhere: fuse also those maps that are made for some rows, tokens or steps only.

        Raises:
            ValueError: if no map is active or some are fused already; if a strength is a function or by prompt; if a map acts on
                some rows, tokens or steps only, unless `everywhere`; if sites do not fold, unless `partial`. See `actmaps.fold`.
        """
        self._check_not_fused("fuse again")
        maps = self._act_maps_for(strength)
        if not maps:
            raise ValueError("no act map is active; load one, or choose with set_act_maps")
        parts: dict[ActMap, float] = {}
        for act_map, of_map in maps.items():
            narrow = self._act_narrowed_to(act_map)
            if narrow and not everywhere:
                raise ValueError(
                    f"act map {act_map.metadata.name!r} acts on {' and '.join(narrow)} only, and weights act on all rows, tokens "
                    "and steps: fuse_act(everywhere=True) accepts that, or do not fuse it"
                )
            for sites, number in parts_of(of_map, act_map):
                if callable(number) or isinstance(number, Sequence):
                    raise ValueError(
                        f"the strength of act map {act_map.metadata.name!r} at {sites[0]} is "
                        f"{'a function' if callable(number) else 'given by prompt'}; weights take one number: fuse_act(strength=1.0)"
                    )
                parts[act_map.select(sites)] = float(number)
        self.__dict__["_act_folded"] = fold(self._act_modules, parts, partial=partial)
        self.__dict__["_act_fused_maps"] = tuple(maps)

    def unfuse_act(self) -> None:
        """Take the fused maps out of the weights, which are then bit for bit as before; without fused maps it does nothing."""
        folded: Folded | None = self.__dict__.get("_act_folded")
        if folded is not None:
            folded.unfold()
        self.__dict__["_act_folded"], self.__dict__["_act_fused_maps"] = None, ()

    def _act_narrowed_to(self, act_map: ActMap) -> list[str]:
        """What a map acts on in a call, where that is not all of it."""
        made, narrow = act_map.metadata, []
        if made.rows == "cond":
            narrow.append("the conditional rows of classifier-free guidance")
        if made.window != (0.0, 1.0) and not all(part.startswith("text_encoder") for part in act_map.components):
            narrow.append(f"the part {made.window[0]:g} to {made.window[1]:g} of the sampling steps")
        return narrow

    @property
    def _act_fused(self) -> tuple[ActMap, ...]:
        """The maps that are fused."""
        return self.__dict__.get("_act_fused_maps", ())

    def _check_new(self, name: str | None) -> None:
        """Raise ValueError unless a map may be loaded under `name`; None is never loaded."""
        if name is None:
            return
        self._check_not_fused("load another one")
        if name in self._act_maps:
            raise ValueError(f"an act map named {name!r} is already loaded; choose another name or delete it first")

    def _check_not_fused(self, wish: str) -> None:
        if self._act_fused:
            names = ", ".join(repr(name) for name, act_map in self._act_maps.items() if act_map in self._act_fused)
            raise ValueError(f"act maps are fused ({names}): call unfuse_act() before you {wish}")

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
        """The active maps with their strengths for one call, less those that are fused."""
        fused = {name for name, act_map in self._act_maps.items() if act_map in self._act_fused}
        strengths = {name: self._act_strengths[name] for name in self.get_active_act_maps() if name not in fused}
        if isinstance(act_strength, Mapping):
            for name in act_strength:
                self._act_map(name)
                if name in fused:
                    self._check_not_fused("give them another strength")
            strengths.update(act_strength)
        elif act_strength is not None:
            self._check_not_fused("give them another strength")
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
