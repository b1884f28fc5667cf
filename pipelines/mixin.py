"""Act maps on any diffusers pipeline."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from ..maps import ActMap
from ..maps.presets import Preset, load_preset
from .denoiser_inputs import DENOISERS
from .guidance import Branches, conditional_first, is_guided, picture_count
from .loader import ActMapLoaderMixin
from .picture_mask import PictureMask, picture_mask, picture_size
from .pipeline_fit import PipelineFit, known_embeds
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
    def _act_denoisers(self) -> list[str]:
        """Names of the components that run in every step.

        Raises:
            ValueError: if there is none.
        """
        found = [name for name in DENOISERS if name in self._act_modules]
        if not found:
            raise ValueError(
                f"{type(self).__name__} has no denoiser: none of its components is called {' or '.join(DENOISERS)}"
            )
        return found

    @property
    def _act_steps(self) -> int:
        """Steps of the run that is under way."""
        return int(getattr(self, "num_timesteps", None) or len(self.scheduler.timesteps))

    def _act_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a call of the pipeline by name, defaults filled in."""
        bound = inspect.signature(super().__call__).bind(*args, **kwargs)  # type: ignore[misc]
        bound.apply_defaults()
        return bound.arguments

    def __call__(
        self,
        *args: Any,
        act_strength: float | Sequence[float] | Mapping[str, Strength] | Callable[[int, int], float] | None = None,
        act_window: tuple[float, float] | None = None,
        act_mask: PictureMask | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the pipeline with its active maps.

        Args:
            *args, **kwargs: as for the pipeline without maps.
            act_strength: for this call only. None takes the strengths as set; a number, a function (step, steps) -> number or
                one number per prompt holds for every active map; a dict {map name: strength} changes some. Text encoders run
                before the first step and take the value of step 0. See also `strength_curve` and `strength_window`.
            act_window: for this call only: the part of the run, as fractions of its steps, in which maps act on the denoiser.
                None: each map's own, with which it was fitted.
            act_mask: for this call only: where in the picture the maps act on the denoiser. A picture of any size, white where
                they act, or an array or tensor (H, W) in [0, 1]; with (B, H, W) or a list, one for each picture drawn. Text
                streams of the denoiser have no place in the picture and are not moved then. Not for videos, nor for denoisers whose
                blocks join text and picture in their own ways (Lumina 2, Z-Image), which is an error.

        Returns:
            What the pipeline without maps returns. With strength 0 it is bit for bit the same.

        Raises:
            ValueError: for unknown map names, a malformed window or mask, or strengths that do not fit the prompts.
        """
        if act_window is not None and not 0 <= act_window[0] < act_window[1] <= 1:
            raise ValueError(f"act_window must be two fractions of the run, 0 <= start < end <= 1, got {act_window!r}")
        maps = self._act_maps_for(act_strength)
        if not maps:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        if self._act_call is not None:
            raise RuntimeError(
                "this pipeline is already running with its act maps armed; pipelines are not re-entrant"
            )
        arguments = self._act_arguments(args, kwargs)
        modules, denoisers = self._act_modules, self._act_denoisers
        call = SteeredCall(
            modules,
            denoisers,
            maps,
            Branches(
                [modules[name] for name in denoisers],
                picture_count(arguments),
                conditional_first(self),
                guided=lambda: is_guided(self, arguments),
            ),
            planned_steps=arguments.get("num_inference_steps") or 1,
            steps=lambda: self._act_steps,
            window=act_window,
            mask=None if act_mask is None else picture_mask(act_mask, picture_size(self, arguments)),
        )
        if arguments.get("prompt_embeds") is not None and call.steers_encoders:
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
        bound = inspect.signature(encode).bind(*args, **kwargs)
        bound.apply_defaults()

        def run() -> Any:
            # Some pipelines write into the list of prompts.
            copied = {key: list(value) if isinstance(value, list) else value for key, value in bound.arguments.items()}
            bound_again = inspect.BoundArguments(bound.signature, copied)
            return encode(*bound_again.args, **bound_again.kwargs)

        call = self._act_call
        if call is None or not call.steers_encoders:
            return known_embeds(run)
        if (
            "do_classifier_free_guidance" not in bound.arguments
        ):  # encodes one prompt at a time, the negative one second
            if not call.encodes_negative_prompt():
                return run()
            with call.for_negative_prompt():
                return run()
        if not bound.arguments["do_classifier_free_guidance"]:
            return run()
        with call.for_negative_prompt():
            plain = run()
        bound.arguments["do_classifier_free_guidance"] = False
        steered = run()
        return tuple(plain[i] if value is None or value == [] else value for i, value in enumerate(steered))

    def fit_act_map(
        self,
        source_prompts: Iterable[str],
        target_prompts: Iterable[str],
        *,
        name: str | None = None,
        sites: str | Sequence[str] | None = None,
        method: str = "linear",
        timesteps: int | Sequence[float] = 4,
        window: tuple[float, float] = (0.0, 0.6),
        latents: str = "target",
        num_inference_steps: int = 20,
        guidance_scale: float | None = None,
        rows: str = "cond",
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 8,
        progress: bool = True,
        call_options: Mapping[str, Any] | None = None,
        **fit_options: Any,
    ) -> ActMap:
        """Fit a map from two prompt sets, and load it under `name`.

        The latents of unsteered sampling runs are recorded at the chosen timesteps, prompt i of both sets starting from the
        same noise; then one pass over all (prompt, timestep) pairs fits every site.

        Args:
            source_prompts, target_prompts: what the model does now, and what it should do. The numbers may differ.
            name: name of the map, under which it is loaded and active; with None it is only returned.
            sites: component names, which stand for the sites that suit their architecture ("unet", ["text_encoder", "unet"]);
                "norms" or "blocks" of the denoiser; suffixes of module names; or a full-match regular expression. See
                `image_sites`. None is the denoiser, which measured best on the demo model.
            method: "linear", "mean" or "gaussian".
            timesteps: how many timesteps to record, spread over the window, or their fractions of the run: 0 is pure noise. With
                [0.0] and window (0.0, 1.0), as in the paper, no sampling is needed.
            window: the part of the run, as fractions of its steps, in which the map acts on the denoiser. Early steps decide
                the look; a map that acts to the end costs content.
            latents: whose sampling run the denoiser looks at while fitting: "own" each prompt's; "source" or "target" the run of
                prompt i of that set for prompt i of both.
            num_inference_steps, guidance_scale: of the sampling run; guidance None takes the pipeline's default. Give a distilled
                model the steps and guidance that it is made for.
            rows: "cond" fits and steers the conditional rows of classifier-free guidance, "both" all rows; their negative prompt
                is that of `call_options`, or empty.
            seed: of the noise (prompt i has seed + i) and of the draw of positions.
            height, width: image size in pixels; default the model's.
            batch_size: prompts per micro-batch.
            progress: show progress bars.
            call_options: further arguments of the pipeline's call, such as `num_frames`, `max_sequence_length`, or `image` and
                `strength` of an image-to-image pipeline. What has one entry per prompt must fit `batch_size`.
            **fit_options: `pooling`, `positions`, `support`, `spatial`, `causal`, `transport_target`, see `fit_map`.

        Returns:
            The `ActMap`.

        Raises:
            ValueError: for empty prompt sets, unknown options, sites or timesteps.
        """
        self._check_new(name)
        sizes = {"height": height, "width": width, "guidance_scale": guidance_scale}
        fit = PipelineFit(
            pipe=self,
            plain_call=super().__call__,  # type: ignore[misc]
            components=self._act_modules,
            denoisers=self._act_denoisers,
            call_options={
                **(call_options or {}),
                **{key: value for key, value in sizes.items() if value is not None},
                "num_inference_steps": num_inference_steps,
            },
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )
        act_map = fit.run(
            source_prompts,
            target_prompts,
            name=name,
            sites=sites,
            method=method,
            timesteps=timesteps,
            window=window,
            latents=latents,
            rows=rows,
            **fit_options,
        )
        if name is not None:
            self.load_act_map(act_map, name)
        return act_map

    def fit_preset(
        self,
        preset: Preset | str,
        subjects: Sequence[str] | None = None,
        count: int | None = None,
        *,
        name: str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> ActMap:
        """Fit a map on the prompts of a preset, which `actmaps presets` lists, and load it under `name`.

        Args:
            preset: its name, a .toml file, or a `Preset`.
            subjects: what the prompts are about; None takes the preset's own.
            count: draw only this many of the subjects.
            name: name under which the map is loaded and active; with None it is only returned.
            seed: of all draws.
            **options: as for `fit_act_map`; what the preset advises for this architecture holds where they say nothing.

        Returns:
            The `ActMap`, named after the preset.

        Raises:
            ValueError: for an unknown or malformed preset, and as `fit_act_map`.
        """
        if not isinstance(preset, Preset):
            preset = load_preset(preset)
        self._check_new(name)
        advice = preset.recommendation(type(self).__name__.removesuffix("ACTPipeline"))
        options = {"sites": advice.sites, "support": advice.support} | options
        fitted = self.fit_act_map(*preset.prompts(subjects, seed, count), seed=seed, **options)
        act_map = ActMap(
            fitted,
            replace(
                fitted.metadata,
                name=preset.name,
                description=preset.description,
                licence=preset.licence,
                presets=(preset.name,),
                recommended_strength=advice.strength,
            ),
        )
        if name is not None:
            self.load_act_map(act_map, name)
        return act_map
