"""What a pipeline hands to its denoiser: latents and timestep, which every architecture calls by names of its own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Components of pipelines that run in every step.
DENOISERS = ("unet", "transformer", "transformer_2", "prior", "decoder")

_TIMESTEP = ("timestep", "timesteps", "timestep_ratio", "t")


@dataclass(frozen=True)
class DenoiserInputs:
    """The arguments of one call of a denoiser.

    Attributes:
        arguments: by name.
        latents_name, timestep_name: which of them are the latents, and the timestep.
    """

    arguments: dict[str, Any]
    latents_name: str
    timestep_name: str

    @classmethod
    def of(cls, denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> DenoiserInputs:
        """Raises ValueError where the denoiser takes no timestep."""
        kind: Any = type(getattr(denoiser, "_orig_mod", denoiser))
        names = list(inspect.signature(kind.forward).parameters)[1:]  # without self
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        timestep = next((name for name in _TIMESTEP if name in names), None)
        if timestep is None:
            raise ValueError(f"{type(denoiser).__name__}.forward has no argument {' or '.join(_TIMESTEP)}")
        return cls(arguments, names[0], timestep)

    @property
    def latents(self) -> Any:
        """A tensor with rows in dim 0, or a list with one tensor per row."""
        return self.arguments[self.latents_name]

    @property
    def timestep(self) -> Any:
        """A number, or a tensor: one for all rows, or with rows in dim 0."""
        return self.arguments.get(self.timestep_name)

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.latents.shape[0] if isinstance(self.latents, Tensor) else len(self.latents)

    def last_rows(self, count: int) -> tuple[Tensor, Any]:
        """Latents (count, ...) of the last rows, and the timestep of one row."""
        latents = self.latents[-count:]
        timestep = self.timestep
        if isinstance(timestep, Tensor) and timestep.ndim:
            timestep = timestep[-1]
        return latents if isinstance(latents, Tensor) else torch.stack(list(latents)), timestep

    def replaced(self, latents: Tensor, timestep: Any) -> dict[str, Any]:
        """The arguments with other latents (rows, ...), and with one row's timestep for all rows."""
        if isinstance(timestep, Tensor) and isinstance(self.timestep, Tensor):
            timestep = timestep.expand_as(self.timestep).clone()
        given = latents if isinstance(self.latents, Tensor) else list(latents.unbind())
        return self.arguments | {self.latents_name: given, self.timestep_name: timestep}
