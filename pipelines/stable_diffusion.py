"""Stable Diffusion 1.x and 2.x with act maps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from tqdm import tqdm

from ..maps import ActMap, ActMapMetadata, find_sites, fit_map
from .loader import as_prompts, model_name
from .mixin import ACTMixin


class StableDiffusionACTPipeline(ACTMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` steered by act maps on its text encoder and U-Net.

    Example:
        >>> pipe = StableDiffusionACTPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> pipe.fit_act_map(["a cat", "a house"], ["a cat, watercolor", "a house, watercolor"], name="watercolor")
        >>> image = pipe("a dog", act_strength=0.8).images[0]
    """

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
        **fit_options: Any,
    ) -> ActMap:
        """Fit a map from two prompt sets, and load it under `name`.

        The latents of unsteered sampling runs are recorded at the chosen timesteps, prompt i of both sets starting from the
        same noise; then one pass over all (prompt, timestep) pairs fits every site.

        Args:
            source_prompts, target_prompts: what the model does now, and what it should do. The numbers may differ.
            name: name of the map, under which it is loaded and active; with None it is only returned.
            sites: component names, which stand for their normalisation layers ("unet", ["text_encoder", "unet"]), suffixes of
                module names, or a full-match regular expression. None is "unet", which measured best.
            method: "linear", "mean" or "gaussian".
            timesteps: how many timesteps to record, spread over the window, or their fractions of the run: 0 is pure noise. With
                [0.0] and window (0.0, 1.0), as in the paper, no sampling is needed.
            window: the part of the run, as fractions of its steps, in which the map acts on the U-Net. Early steps decide the
                look; a map that acts to the end costs content.
            latents: whose sampling run the U-Net looks at while fitting: "own" each prompt's; "source" or "target" the run of
                prompt i of that set for prompt i of both.
            num_inference_steps, guidance_scale: of the sampling run; guidance None takes the pipeline's default.
            rows: "cond" fits and steers the conditional rows of classifier-free guidance, "both" all rows.
            seed: of the noise (prompt i has seed + i) and of the draw of positions.
            height, width: image size in pixels; default the model's.
            batch_size: prompts per micro-batch.
            progress: show progress bars.
            **fit_options: `pooling`, `positions`, `support`, `spatial`, `causal`, `transport_target`, see `fit_map`.

        Returns:
            The `ActMap`.

        Raises:
            ValueError: for empty prompt sets, unknown options, sites or timesteps.
        """
        prompts = {
            "source": as_prompts(source_prompts, "source"),
            "target": as_prompts(target_prompts, "target"),
        }
        for value, option, known in (
            (rows, "rows", ("cond", "both")),
            (latents, "latents", ("own", "source", "target")),
        ):
            if value not in known:
                raise ValueError(f"{option} must be one of {', '.join(known)}, got {value!r}")
        if name is not None and name in self._act_maps:
            raise ValueError(f"an act map named {name!r} is already loaded; delete it first or choose another name")
        fractions = _fractions(timesteps, window)
        components = {"text_encoder": self.text_encoder, "unet": self.unet}
        names = find_sites(components, "unet" if sites is None else sites)
        if not any(site.startswith("unet.") for site in names):
            fractions = ()  # the U-Net need not run at all
        run_of = {side: side if latents == "own" else latents for side in prompts}
        runs = _SamplingRuns(self, num_inference_steps, guidance_scale, seed, height, width, batch_size, progress)
        recorded = {
            side: runs.record(prompts[side], fractions) for side in dict.fromkeys(run_of.values()) if fractions
        }
        micro_batches: dict[str, list[dict[str, Any]]] = {"source": [], "target": []}
        for side, side_prompts in prompts.items():
            for start in range(0, len(side_prompts), batch_size):
                chunk = side_prompts[start : start + batch_size]
                run = None
                if fractions:
                    inputs, times = recorded[run_of[side]]
                    run = inputs[[(start + i) % len(inputs) for i in range(len(chunk))]], times
                micro_batches[side].append({"prompts": chunk, "run": run})
        metadata = ActMapMetadata(
            name=name or "act_map",
            timesteps=fractions,
            window=(float(window[0]), float(window[1])),
            rows=rows,
            latents=latents,
            model_name=model_name(self.config.get("_name_or_path") or "", type(self).__name__),
            n_source=len(prompts["source"]),
            n_target=len(prompts["target"]),
            prompts_hash=hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        act_map = fit_map(
            components,
            micro_batches["source"],
            micro_batches["target"],
            sites=names,
            forward=lambda batch: self._denoise(batch, rows),
            method=method,
            seed=seed,
            progress=progress,
            metadata=metadata,
            **fit_options,
        )
        if name is not None:
            self.load_act_map(act_map, name)
        return act_map

    def _denoise(self, batch: dict[str, Any], rows: str) -> None:
        """Encode the prompts of a micro-batch and run the U-Net once on all its recorded latents."""
        embeds, negative_embeds = self.encode_prompt(batch["prompts"], self._execution_device, 1, rows == "both")
        if batch["run"] is None:
            return
        latents, timesteps = batch["run"]
        count = len(timesteps)
        latents, timesteps = latents.flatten(0, 1), timesteps.repeat(len(latents))
        embeds = embeds.repeat_interleave(count, 0)
        if rows == "both":
            embeds = torch.cat([negative_embeds.repeat_interleave(count, 0), embeds])
            latents, timesteps = latents.repeat(2, 1, 1, 1), timesteps.repeat(2)
        self.unet(latents, timesteps, encoder_hidden_states=embeds, return_dict=False)


@dataclass
class _SamplingRuns:
    """Unsteered sampling runs whose U-Net inputs are recorded."""

    pipe: StableDiffusionACTPipeline
    num_inference_steps: int
    guidance_scale: float | None
    seed: int
    height: int | None
    width: int | None
    batch_size: int
    progress: bool

    def record(self, prompts: list[str], fractions: Sequence[float]) -> tuple[Tensor, Tensor]:
        """U-Net inputs (prompts, timesteps, C, h, w) and the timesteps (timesteps,) at `fractions` of the run."""
        latents = []
        with tqdm(total=len(prompts), desc="Recording latents", unit="prompt", disable=not self.progress) as bar:
            for start in range(0, len(prompts), self.batch_size):
                chunk = prompts[start : start + self.batch_size]
                inputs, timesteps = self._record(chunk, start, fractions)
                latents.append(inputs)
                bar.update(len(chunk))
        return torch.cat(latents), timesteps

    @torch.no_grad()
    def _record(self, prompts: list[str], first_index: int, fractions: Sequence[float]) -> tuple[Tensor, Tensor]:
        pipe = self.pipe
        steps = sorted({min(int(f * self.num_inference_steps), self.num_inference_steps - 1) for f in fractions})
        latents: list[Tensor] = []
        timesteps: list[Tensor] = []
        calls = 0

        def keep(_module: Any, args: tuple[Any, ...]) -> None:
            nonlocal calls
            if calls in steps:
                latents.append(args[0][-len(prompts) :])  # the conditional half, under guidance
                timesteps.append(torch.as_tensor(args[1], device=args[0].device))
            calls += 1

        def stop(pipeline: Any, step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            pipeline._interrupt = step >= steps[-1]
            return kwargs

        options = {} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}
        config = dict(getattr(pipe, "_progress_bar_config", {}))
        handle = pipe.unet.register_forward_pre_hook(keep)
        pipe.set_progress_bar_config(disable=True)
        try:
            StableDiffusionPipeline.__call__(
                pipe,
                prompts,
                height=self.height,
                width=self.width,
                num_inference_steps=self.num_inference_steps,
                latents=self._noise(len(prompts), first_index),
                output_type="latent",
                callback_on_step_end=stop,
                **options,
            )
        finally:
            handle.remove()
            pipe.set_progress_bar_config(**config)
        return torch.stack(latents, dim=1), torch.stack(timesteps)

    def _noise(self, count: int, first_index: int) -> Tensor:
        """Initial noise, seeded per prompt so that it depends neither on the batch size nor on the prompt set."""
        pipe, size = self.pipe, self.pipe.unet.config.sample_size
        sizes = (size, size) if isinstance(size, int) else tuple(size)
        pixels = (self.height, self.width)
        h, w = (p // pipe.vae_scale_factor if p else s for p, s in zip(pixels, sizes, strict=True))
        generators = [torch.Generator().manual_seed(self.seed + first_index + i) for i in range(count)]
        shape = (count, pipe.unet.config.in_channels, h, w)
        return randn_tensor(shape, generators, torch.device("cpu"), pipe.unet.dtype).to(pipe._execution_device)


def _fractions(timesteps: int | Sequence[float], window: tuple[float, float]) -> tuple[float, ...]:
    """Fractions of the sampling run in [0, 1) at which latents are recorded."""
    start, end = window
    if not 0 <= start < end <= 1:
        raise ValueError(f"window must be two fractions of the run, 0 <= start < end <= 1, got {window!r}")
    if isinstance(timesteps, int):
        if timesteps < 1:
            raise ValueError(f"timesteps must be at least 1, got {timesteps}")
        return tuple(start + (end - start) * i / timesteps for i in range(timesteps))
    fractions = tuple(sorted(float(f) for f in timesteps))
    if not fractions or not all(0 <= f < 1 for f in fractions):
        raise ValueError(f"timesteps must be fractions of the run in [0, 1), 0 being pure noise; got {timesteps!r}")
    return fractions
