"""Fitting a map on a diffusers pipeline, whichever: the pipeline itself encodes the prompts and calls its denoiser.

First, sampling runs are recorded: what the denoiser gets at the chosen timesteps. Then every micro-batch, some prompts at one
timestep, is a call of the pipeline without guidance, in which the denoiser's first call gets the recorded latents and timestep,
and which ends there. `fit_map` suspends these calls site by site, so all sites of text encoders and denoisers are fitted in one pass.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..maps import ActMap, ActMapMetadata, fit_map
from ..maps.image_sites import image_sites
from ..maps.ranks import Ranks
from .denoiser_inputs import DenoiserInputs
from .guidance import is_guided, without_guidance
from .loader import as_prompts, model_name


class _Done(Exception):  # noqa: N818 (it is no error)
    """Ends a call of the pipeline."""


@dataclass
class _Chunk:
    """Prompts that go through the model together. `embeds`, once they are encoded, serve all timesteps."""

    prompts: list[str]
    first: int
    keeps_embeds: bool = False
    embeds: Any = None


# The micro-batch on whose behalf the pipeline is being called: micro-batches run in turns.
_batch: ContextVar[dict[str, Any] | None] = ContextVar("batch", default=None)


def known_embeds(encode: Callable[[], Any]) -> Any:
    """What `encode` returns, which is called once per chunk of a fit that does not change text encoders, and always outside of a fit."""
    batch = _batch.get()
    if batch is None or not batch["chunk"].keeps_embeds:
        return encode()
    chunk = batch["chunk"]
    if chunk.embeds is None:
        chunk.embeds = encode()
    return chunk.embeds


@dataclass
class PipelineFit:
    """How a pipeline is called while a map is fitted on it.

    Args:
        pipe: the pipeline.
        plain_call: its `__call__` without maps.
        components: its networks by name.
        denoisers: names of those that run in every step.
        call_options: for every call of the pipeline.
        seed, batch_size, progress: as for `fit_act_map`.
    """

    pipe: Any
    plain_call: Callable[..., Any]
    components: Mapping[str, nn.Module]
    denoisers: Sequence[str]
    call_options: Mapping[str, Any]
    seed: int = 0
    batch_size: int = 8
    progress: bool = True

    def run(
        self,
        source_prompts: Iterable[str],
        target_prompts: Iterable[str],
        *,
        name: str | None,
        sites: str | Sequence[str] | None,
        timesteps: int | Sequence[float],
        window: tuple[float, float],
        latents: str,
        rows: str,
        **fit_options: Any,
    ) -> ActMap:
        """Fit the map; arguments and errors are those of `fit_act_map`."""
        prompts = {"source": as_prompts(source_prompts, "source"), "target": as_prompts(target_prompts, "target")}
        for value, option, known in (
            (rows, "rows", ("cond", "both")),
            (latents, "latents", ("own", "source", "target")),
        ):
            if value not in known:
                raise ValueError(f"{option} must be one of {', '.join(known)}, got {value!r}")
        if "prompt" not in self.parameters:
            raise ValueError(f"{type(self.pipe).__name__} takes no prompt, and maps are fitted from prompts")
        unknown = [option for option in self.call_options if option not in self.parameters]
        if unknown:
            raise ValueError(
                f"{type(self.pipe).__name__} takes no {unknown[0]!r}; it takes {', '.join(sorted(self.parameters))}"
            )
        fractions = _fractions(timesteps, window)
        fitted = {
            name: part
            for name, part in self.components.items()
            if name in self.denoisers or name.startswith("text_encoder")
        }
        names = image_sites(fitted, self.denoisers, sites)
        of_encoders = any(site.split(".")[0] not in self.denoisers for site in names)
        if all(site.split(".")[0] not in self.denoisers for site in names):
            fractions = ()  # the denoiser need not run at all
        recorded: dict[str, _Recorded] = {}
        run_of = {side: side if latents == "own" else latents for side in prompts}
        for side in dict.fromkeys(run_of.values()) if fractions else ():
            recorded[side] = self._record(prompts[side], fractions)
        micro_batches: dict[str, list[dict[str, Any]]] = {}
        for side in prompts:
            run = recorded.get(run_of[side])
            micro_batches[side] = self._micro_batches(prompts[side], run, not of_encoders)
            if rows == "both" and run is not None and run.guided:
                negative = self.call_options.get("negative_prompt") or ""
                micro_batches[side] += self._micro_batches([negative] * len(prompts[side]), run, not of_encoders)
        metadata = ActMapMetadata(
            name=name or "act_map",
            timesteps=fractions,
            window=(float(window[0]), float(window[1])),
            rows=rows,
            latents=latents,
            model_name=model_name(self.pipe.config.get("_name_or_path") or "", type(self.pipe).__name__),
            n_source=len(prompts["source"]),
            n_target=len(prompts["target"]),
            prompts_hash=hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        )
        with self._quiet(), self._on_denoisers(self._replay):
            return fit_map(
                fitted,
                micro_batches["source"],
                micro_batches["target"],
                sites=names,
                forward=self._forward,
                seed=self.seed,
                progress=self.progress,
                metadata=metadata,
                **fit_options,
            )

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """Defaults of the pipeline's call by name of the argument."""
        parameters = inspect.signature(self.plain_call).parameters
        return {name: parameter.default for name, parameter in parameters.items()}

    def _micro_batches(self, prompts: list[str], run: _Recorded | None, keeps_embeds: bool) -> list[dict[str, Any]]:
        """Chunks of prompts, each at every timestep of a recorded run; `fit_map` looks for a `sample_mask` in them."""
        chunks = [
            _Chunk(prompts[start : start + self.batch_size], start, keeps_embeds)
            for start in range(0, len(prompts), self.batch_size)
        ]
        steps = range(1 if run is None else len(run.timesteps))
        return [{"chunk": chunk, "run": run, "step": step} for chunk in chunks for step in steps]

    def _forward(self, batch: dict[str, Any]) -> None:
        """Call the pipeline on a micro-batch, up to the end of the denoiser's first call."""
        chunk = batch["chunk"]
        _batch.set(batch)
        unguided = without_guidance(self.parameters, self.components[self.denoisers[0]])
        options = {key: value for key, value in self.call_options.items() if key != "negative_prompt"}
        self._call(chunk.prompts, chunk.first, **(options | unguided))

    def _call(self, prompts: list[str], first: int, **options: Any) -> None:
        """Call the pipeline without maps, prompt i with the noise of seed + i, until a hook ends it."""
        generators = [torch.Generator().manual_seed(self.seed + first + i) for i in range(len(prompts))]
        if isinstance(options.get("negative_prompt"), str):
            options["negative_prompt"] = [options["negative_prompt"]] * len(prompts)
        with suppress(_Done):
            self.plain_call(prompt=list(prompts), generator=generators, output_type="latent", **options)

    def _replay(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict]:
        """The denoiser's inputs with the micro-batch's recorded latents and timestep in their place."""
        batch = _batch.get()
        if batch is None or batch["run"] is None:
            raise _Done
        inputs = DenoiserInputs.of(module, args, kwargs)
        return (), inputs.replaced(*batch["run"].at(batch["step"], batch["chunk"].first, inputs.rows))

    @torch.no_grad()
    def _record(self, prompts: list[str], fractions: Sequence[float]) -> _Recorded:
        """The denoiser's inputs at `fractions` of unsteered sampling runs of all prompts, which the ranks of a process group share."""
        count = self.call_options["num_inference_steps"]
        steps = sorted({min(int(fraction * count), count - 1) for fraction in fractions})
        recorded, ranks, starts = _Recorded(), Ranks.current(), range(0, len(prompts), self.batch_size)
        mine = ranks.share(starts)
        some = mine or starts[:1]  # a rank with nothing to record learns the timesteps from the first prompts
        silent = not self.progress or ranks.rank > 0
        with ranks.reporting(), self._quiet():
            for start in tqdm(some, desc="Recording latents", unit="batch", disable=silent):
                chunk = prompts[start : start + self.batch_size]
                recorder = _Recorder(steps, len(chunk), self._is_guided)
                with self._on_denoisers(recorder):
                    self._call(chunk, start, **self.call_options)
                recorded.add(recorder)
        recorded.latents = [ranks.gather(latents if mine else latents[:0]) for latents in recorded.latents]
        return recorded

    def _is_guided(self) -> bool:
        return is_guided(self.pipe, {**self.parameters, **self.call_options})

    @contextmanager
    def _on_denoisers(self, before: Callable[..., Any]) -> Any:
        """Run `before` as a pre-hook of every denoiser inside; a call of the pipeline ends with the denoiser's first call."""

        def end(*_: Any) -> None:
            if _batch.get() is not None:
                raise _Done

        with torch.compiler.set_stance("force_eager"), ExitStack() as undo:  # compiled code may not notice hooks
            for name in self.denoisers:
                module = self.components[name]
                undo.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                undo.callback(module.register_forward_hook(end).remove)
            for name, module in self.components.items():
                if name.startswith("text_encoder"):
                    undo.callback(module.register_forward_pre_hook(_mask_samples, with_kwargs=True).remove)
                    undo.callback(module.register_forward_hook(_unmask_samples).remove)
            yield

    @contextmanager
    def _quiet(self) -> Any:
        """No progress bars of the pipeline's own inside."""
        config = dict(getattr(self.pipe, "_progress_bar_config", {}))
        self.pipe.set_progress_bar_config(disable=True)
        try:
            yield
        finally:
            self.pipe.set_progress_bar_config(**config)


def _mask_samples(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Padding that a text encoder is told to overlook is no sample there."""
    batch = _batch.get()
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if batch is not None and isinstance(mask, Tensor):
        batch["sample_mask"] = mask


def _unmask_samples(*_: Any) -> None:
    batch = _batch.get()
    if batch is not None:
        batch.pop("sample_mask", None)


@dataclass
class _Recorder:
    """A pre-hook that keeps the denoiser's inputs at some steps of one call, and ends it when it has them all.

    Attributes:
        latents: (pictures, ...) for each step.
        timesteps: of one row, for each step.
        guided: whether the call uses classifier-free guidance.
    """

    steps: list[int]
    pictures: int
    asks_guided: Callable[[], bool]
    latents: list[Tensor] = field(default_factory=list)
    timesteps: list[Any] = field(default_factory=list)
    guided: bool = False
    step: int = -1
    last: Any = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = DenoiserInputs.of(module, args, kwargs)
        latents, timestep = inputs.last_rows(self.pictures)
        if self.last is not None and bool((torch.as_tensor(timestep) == torch.as_tensor(self.last)).all()):
            return  # the second call of a step
        self.step, self.last = self.step + 1, timestep
        if self.step in self.steps:
            self.latents.append(latents.clone())
            self.timesteps.append(timestep)
        if self.step >= self.steps[-1]:
            self.guided = self.asks_guided()
            raise _Done


@dataclass
class _Recorded:
    """Inputs of the denoiser in the sampling runs of a prompt set: latents (prompts, ...) and the timestep for each step."""

    latents: list[Tensor] = field(default_factory=list)
    timesteps: list[Any] = field(default_factory=list)
    guided: bool = False

    def add(self, recorder: _Recorder) -> None:
        """Append what was recorded for further prompts."""
        parts = (
            zip(self.latents, recorder.latents, strict=True)
            if self.latents
            else ((part,) for part in recorder.latents)
        )
        self.latents = [torch.cat(part) for part in parts]
        self.timesteps, self.guided = recorder.timesteps, recorder.guided

    def at(self, step: int, first: int, rows: int) -> tuple[Tensor, Any]:
        """Latents of `rows` prompts from number `first` on, beginning anew after the last, and the timestep."""
        latents = self.latents[step]
        chosen = [(first + row) % len(latents) for row in range(rows)]
        return latents[chosen], self.timesteps[step]


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
