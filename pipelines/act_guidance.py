"""Act maps in modular diffusers: a guider that steers the denoiser."""

from __future__ import annotations

from typing import Any

from diffusers.guiders import ClassifierFreeGuidance
from torch import nn

from ..maps import ActMap, Steering, steer
from .denoiser_inputs import DENOISERS


class ACTGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance whose conditional predictions are steered by a map; without the map it is its parent.

    Maps fitted with rows="both" steer the unconditional predictions too. Sites in text encoders are left alone: a guider sees the
    denoiser only.

    Args:
        act_map: a map with sites in the denoiser.
        strength: 0 leaves the model as it is, 1 is the full transport.
        window: the part of the run, as fractions of its steps, in which the map acts; None: the map's own.
        **guidance: for `ClassifierFreeGuidance`, such as `guidance_scale`.

    Raises:
        ValueError: if the map has no site in a denoiser.

    Example:
        >>> pipe = ModularPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
        >>> pipe.update_components(guider=ACTGuidance(ActMap.load("watercolor.safetensors"), guidance_scale=5.0))
    """

    def __init__(
        self,
        act_map: ActMap,
        strength: float = 1.0,
        window: tuple[float, float] | None = None,
        **guidance: Any,
    ) -> None:
        super().__init__(**guidance)
        denoisers = [component for component in act_map.components if component in DENOISERS]
        if not denoisers:
            raise ValueError(
                f"act map {act_map.metadata.name!r} acts on {', '.join(act_map.components)} only; a guider steers the denoiser, "
                "so fit a map on it, or use an ACT pipeline"
            )
        self.act_map, self.strength = act_map, strength
        self.window = act_map.metadata.window if window is None else window
        self._component = denoisers[0]
        self._part = act_map.select(rf"{self._component}\..*")
        self._steering: Steering | None = None

    def new(self, **guidance: Any) -> ACTGuidance:
        """A guider with the same map and other settings of the guidance."""
        known = ("guidance_scale", "guidance_rescale", "use_original_formulation", "start", "stop", "enabled")
        return ACTGuidance(
            self.act_map,
            guidance.pop("strength", self.strength),
            guidance.pop("window", self.window),
            **{key: self.config[key] for key in known} | guidance,
        )

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Arm the map for the predictions that come next, if they are steered."""
        super().prepare_models(denoiser)
        begins, ends = self.window
        acts = begins <= self._step / self._num_inference_steps < ends
        if acts and (self.is_conditional or self.act_map.metadata.rows == "both"):
            self._steering = steer({self._component: denoiser}, self._part, self.strength)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Take the map off."""
        super().cleanup_models(denoiser)
        if self._steering is not None:
            self._steering.remove()
            self._steering = None
