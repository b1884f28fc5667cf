"""One call of a pipeline with its active maps armed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..maps import ActMap, Steering, steer
from ..maps.hooks import before_call
from .denoiser_inputs import DenoiserInputs
from .guidance import Branches
from .strength import PartStrength, Strength, parts_of


@dataclass
class ArmedPart:
    """Some sites of one component of one map, armed for a call at a strength of their own."""

    component: str
    steering: Steering
    strength: PartStrength
    cond_only: bool = False
    window: tuple[float, float] = (0.0, 1.0)
    mask: Tensor | None = None

    @property
    def by_picture(self) -> bool:
        """Whether every picture of the batch has a strength or a mask of its own."""
        by_prompt = not callable(self.strength) and not isinstance(self.strength, Real)
        return by_prompt or (self.mask is not None and len(self.mask) > 1)

    def set(self, step: int, steps: int, conditional: Sequence[bool] = (True,)) -> None:
        """Set strength and rows for a step; `conditional` tells of each equal part of the batch whether it is."""
        strength: Any = self.strength
        rows = None
        if not self.window[0] <= step / steps < self.window[1]:
            strength = 0.0
        elif callable(strength):
            strength = float(strength(step, steps))
        elif not isinstance(strength, Real):
            rows, strength = torch.tensor(strength, dtype=torch.float32), 1.0
        factors = torch.tensor([float(part or not self.cond_only) for part in conditional])
        if not factors.any():
            strength, rows = 0.0, None
        elif rows is not None:
            rows = torch.outer(factors, rows).flatten()
        elif not factors.all():
            rows = factors
        self.steering.strength, self.steering.rows = strength, rows
        if self.mask is not None and len(self.mask) > 1:
            self.steering.mask = self.mask.repeat(len(conditional), 1, 1, 1)


def armed_parts(components: Mapping[str, nn.Module], act_map: ActMap, strength: Strength) -> Iterator[ArmedPart]:
    """Arm `act_map` on `components`, in parts of one component and one strength each."""
    for component in act_map.components:
        of_component = [site for site in act_map if site.startswith(f"{component}.")]
        for sites, own in parts_of(strength, of_component):
            part = act_map if len(sites) == len(act_map) else act_map.select(sites)
            yield ArmedPart(component, steer(components, part), own)


class SteeredCall:
    """Arms maps on the components of a pipeline and keeps strength and rows right from step to step.

    Args:
        components: {component name: module} of the pipeline.
        denoisers: names of the components that run once or more per step, in alternation where there are several.
        maps: {map: strength}, applied in this order.
        branches: tells which rows of the denoisers' batches are conditional.
        planned_steps: how many steps the run is asked for; the text encoders' schedules see it.
        steps: tells how many steps the run has, once it is under way.
        window: the part of the run in which the maps act on the denoisers, in place of each map's own.
        mask: where in the pictures they act on the denoisers, (B or 1, 1, H, W).
    """

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        denoisers: Sequence[str],
        maps: Mapping[ActMap, Strength],
        branches: Branches,
        planned_steps: int,
        steps: Callable[[], int],
        window: tuple[float, float] | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self._branches, self._steps, self._planned_steps = branches, steps, planned_steps
        self._step, self._timestep, self._call = -1, None, 0
        self._encoded = 0
        self._armed: list[ArmedPart] = []
        self._undo = ExitStack()
        try:
            for name in denoisers:
                _check_block_caches(name, components[name], [site for act_map in maps for site in act_map])
            for act_map, strength in maps.items():
                for armed in armed_parts(components, act_map, strength):
                    self._undo.callback(armed.steering.remove)
                    self._armed.append(armed)
                    armed.cond_only = act_map.metadata.rows == "cond"
                    if armed.component in denoisers:  # a text encoder runs once, before the first step
                        armed.window = act_map.metadata.window if window is None else window
                        armed.mask = armed.steering.mask = mask
            self._encoders = [armed for armed in self._armed if armed.component not in denoisers]
            self._denoising = [armed for armed in self._armed if armed.component in denoisers]
            for armed in self._encoders:
                armed.set(0, planned_steps)
            for name in denoisers:
                self._undo.callback(before_call(components[name], partial(self._before_denoiser, components[name])))
            self._undo.enter_context(branches.listening())
        except BaseException:
            self.remove()
            raise

    @property
    def steers_encoders(self) -> bool:
        """Whether a map acts on a component other than the denoisers."""
        return bool(self._encoders)

    def encodes_negative_prompt(self) -> bool:
        """For pipelines that encode prompt and negative prompt one after the other: is it the turn of the second?"""
        self._encoded += 1
        return self._encoded > 1

    @contextmanager
    def for_negative_prompt(self) -> Iterator[None]:
        """Pause, on the text encoders, the maps that steer conditional rows only."""
        for armed in self._encoders:
            armed.set(0, self._planned_steps, conditional=(False,))
        try:
            yield
        finally:
            for armed in self._encoders:
                armed.set(0, self._planned_steps)

    def _before_denoiser(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        inputs = DenoiserInputs.of(module, args, kwargs)
        if _same(inputs.timestep, self._timestep):
            self._call += 1
        else:
            self._step, self._timestep, self._call = self._step + 1, inputs.timestep, 0
        conditional: Sequence[bool] = (True,)
        if any(armed.cond_only or armed.by_picture for armed in self._denoising):
            conditional = self._branches.conditional(inputs.rows, self._call)
        for armed in self._denoising:
            armed.set(self._step, self._steps(), conditional)
            if isinstance(inputs.latents, Tensor):
                armed.steering.load(inputs.latents.device)  # for compiled models, which may have moved

    def remove(self) -> None:
        """Restore the components."""
        self._undo.close()

    def __enter__(self) -> SteeredCall:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _same(timestep: Any, last: Any) -> bool:
    """Whether the denoiser is called again for the same step; only values are compared, since tensors are made anew."""
    if timestep is last:
        return timestep is not None
    if last is None or timestep is None:
        return False
    one, other = (t.flatten()[0] if isinstance(t, Tensor) else t for t in (timestep, last))
    return bool(one == other)


# Hooks of the caches that skip whole blocks: FirstBlockCache, MagCache, SeaCache.
_SKIPS_BLOCKS = re.compile(r"(fbc|mag_cache|sea_cache)\w*_block\w*")


def _check_block_caches(name: str, denoiser: nn.Module, sites: Sequence[str]) -> None:
    """Raise ValueError if a cache skips blocks whose outputs are moved: behind every skipped block they would be moved again."""
    moved = {site.split(":")[0] for site in sites}
    for path, module in denoiser.named_modules():
        site = f"{name}.{path.removeprefix('_orig_mod.')}"
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        if site in moved and any(_SKIPS_BLOCKS.fullmatch(hook) for hook in hooks):
            raise ValueError(
                f"{site} is a block that the {name}'s cache skips, and an active act map moves what it puts out: the map would act "
                f'several times over. Call {name}.disable_cache(), or use a map that was fitted with sites="norms"'
            )
