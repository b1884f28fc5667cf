"""One call of a pipeline with its active maps armed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..maps import ActMap, Steering, steer
from .strength import ComponentStrength, Strength, component_strength


@dataclass
class ArmedComponent:
    """One component of one map, armed for a call."""

    component: str
    steering: Steering
    strength: ComponentStrength
    cond_only: bool = False
    window: tuple[float, float] = (0.0, 1.0)

    def set(self, step: int, steps: int, guided: bool = False) -> None:
        """Set strength and rows for a step; `guided` says that the batch is [unconditional, conditional]."""
        strength, rows = self.strength, None
        if not self.window[0] <= step / steps < self.window[1]:
            strength = 0.0
        elif callable(strength):
            strength = float(strength(step, steps))
        elif not isinstance(strength, (int, float)):
            rows, strength = torch.tensor(strength, dtype=torch.float32), 1.0
        if guided and self.cond_only:
            cond = torch.ones(1) if rows is None else rows
            rows = torch.cat([torch.zeros_like(cond), cond])
        elif guided and rows is not None:
            rows = torch.cat([rows, rows])
        self.steering.strength, self.steering.rows = strength, rows


class SteeredCall:
    """Arms maps on the components of a pipeline and keeps strength and rows right from step to step.

    Args:
        components: {component name: module} of the pipeline.
        denoiser: name of the component that runs once or more per step.
        maps: {map: strength}, applied in this order.
        planned_steps: how many steps the run is asked for; the text encoders' schedules see it.
        guided: tells whether the denoiser's batch is now [unconditional, conditional].
        steps: tells how many steps the run has, once it is under way.
    """

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        denoiser: str,
        maps: Mapping[ActMap, Strength],
        planned_steps: int,
        guided: Callable[[], bool],
        steps: Callable[[], int],
    ) -> None:
        self._denoiser = components[denoiser]
        self._guided, self._steps = guided, steps
        self._step, self._timestep = -1, None
        self._armed: list[ArmedComponent] = []
        try:
            for act_map, strength in maps.items():
                for component in act_map.components:
                    part = act_map.select(rf"{component}\..*")
                    own = component_strength(strength, component)
                    steering = steer(components, part)
                    # A text encoder runs once, before the first step: the window is the denoiser's.
                    window = act_map.metadata.window if component == denoiser else (0.0, 1.0)
                    self._armed.append(
                        ArmedComponent(component, steering, own, act_map.metadata.rows == "cond", window)
                    )
        except BaseException:
            self.remove()
            raise
        self._encoders = [armed for armed in self._armed if armed.component != denoiser]
        self._denoising = [armed for armed in self._armed if armed.component == denoiser]
        self._planned_steps = planned_steps
        for armed in self._encoders:
            armed.set(0, planned_steps, guided=False)
        self._handle = self._denoiser.register_forward_pre_hook(self._before_denoiser, with_kwargs=True)

    @property
    def steers_encoders(self) -> bool:
        """Whether a map acts on a component other than the denoiser."""
        return bool(self._encoders)

    @contextmanager
    def without_cond_only(self) -> Iterator[None]:
        """Pause, on the text encoders, the maps that steer conditional rows only: for encoding the negative prompt."""
        paused = [armed for armed in self._encoders if armed.cond_only]
        for armed in paused:
            armed.steering.strength = 0.0
        try:
            yield
        finally:
            for armed in paused:
                armed.set(0, self._planned_steps, guided=False)

    def _before_denoiser(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = args[1] if len(args) > 1 else kwargs.get("timestep")
        if not _same(timestep, self._timestep):
            self._step, self._timestep = self._step + 1, timestep
            for armed in self._denoising:
                armed.set(self._step, self._steps(), self._guided())

    def remove(self) -> None:
        """Restore the components."""
        if hasattr(self, "_handle"):
            self._handle.remove()
        for armed in self._armed:
            armed.steering.remove()

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
