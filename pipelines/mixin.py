"""Act maps on any diffusers pipeline."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from .loader import ActMapLoaderMixin
from .steered_call import SteeredCall
from .strength import Strength

logger = logging.getLogger(__name__)


class ACTMixin(ActMapLoaderMixin):
    """Adds act maps to a `DiffusionPipeline`: `class MyACTPipeline(ACTMixin, MyPipeline)`, without an `__init__`.

    Maps are no components of the pipeline: `save_pretrained` leaves them out, and `from_pipe` does not pass them on. They are
    armed when the pipeline is called and taken off when it returns, so pipelines that share modules never steer each other.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Components and helpers of the pipeline that this is mixed into."""

    # Set by __call__ while the maps are armed.
    _act_call: SteeredCall | None = None

    @property
    def _act_modules(self) -> dict[str, nn.Module]:
        """The components that are networks."""
        return {name: part for name, part in self.components.items() if isinstance(part, nn.Module)}

    @property
    def _act_denoiser(self) -> str:
        return "transformer" if "transformer" in self._act_modules else "unet"

    def __call__(
        self,
        *args: Any,
        act_strength: float | Sequence[float] | Mapping[str, Strength] | Callable[[int, int], float] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the pipeline with its active maps.

        Args:
            *args, **kwargs: as for the pipeline without maps.
            act_strength: for this call only. None takes the strengths as set; a number, a function (step, steps) -> number or
                one number per prompt holds for every active map; a dict {map name: strength} changes some. Text encoders run
                before the first step and take the value of step 0.

        Returns:
            What the pipeline without maps returns. With strength 0 it is bit for bit the same.
        """
        maps = self._act_maps_for(act_strength)
        if not maps:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        if self._act_call is not None:
            raise RuntimeError(
                "this pipeline is already running with its act maps armed; pipelines are not re-entrant"
            )
        defaults = inspect.signature(super().__call__).parameters  # type: ignore[misc]
        call = SteeredCall(
            self._act_modules,
            self._act_denoiser,
            maps,
            planned_steps=kwargs.get("num_inference_steps", defaults["num_inference_steps"].default),
            guided=lambda: bool(getattr(self, "do_classifier_free_guidance", False)),
            steps=lambda: int(getattr(self, "num_timesteps", 1) or 1),
        )
        if kwargs.get("prompt_embeds") is not None and call.steers_encoders:
            logger.warning("prompt_embeds are given, so the text encoders do not run and their maps have no effect")
        with call:
            self._act_call = call
            try:
                return super().__call__(*args, **kwargs)  # type: ignore[misc]
            finally:
                self._act_call = None

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """Encode prompts as the pipeline without maps does; maps that steer conditional rows only skip the negative prompt."""
        encode = super().encode_prompt  # type: ignore[misc]
        call = self._act_call
        if call is None or not call.steers_encoders:
            return encode(*args, **kwargs)
        bound = inspect.signature(encode).bind(*args, **kwargs)
        bound.apply_defaults()
        if not bound.arguments.get("do_classifier_free_guidance"):
            return encode(*args, **kwargs)
        with call.without_cond_only():
            plain = encode(*bound.args, **bound.kwargs)
        bound.arguments["do_classifier_free_guidance"] = False
        steered = encode(*bound.args, **bound.kwargs)
        return tuple(plain[i] if value is None else value for i, value in enumerate(steered))
