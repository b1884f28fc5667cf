"""Fitting a map on any model that ComfyUI samples, through ComfyUI's own path: its text encoding, its sampler, its model calls."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, TypeVar

import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from torch import Tensor

from ..maps import ActMap, ActMapMetadata, find_sites, fit_map
from ..maps.places import Place
from ..maps.sites import component_names
from .steering import applied_maps, steered_clip, steers_encoders
from .translation import denoiser_places, encoder_places, text_tokens

# One prompt as CLIP.encode_from_tokens_scheduled gives it: [embeddings (1, T, C), {name: value}] per part of the schedule.
Conditioning = list[list[Any]]
Report = Callable[[float], None]
Call = Callable[[int, Tensor, Tensor], None]
T = TypeVar("T")

SITES = ("denoiser", "text encoder and denoiser", "text encoder", "pattern")


@dataclass(frozen=True)
class Sampling:
    """How pictures are sampled, so that the model is met on latents as it sees them in use.

    Attributes:
        latent: an empty latent (1, C, ...) of the size that will be sampled.
        steps, cfg, sampler_name, scheduler: as for KSampler.
        seed: of the noise; prompt i has seed + i.
    """

    latent: Tensor
    steps: int = 20
    cfg: float = 4.0
    sampler_name: str = "euler"
    scheduler: str = "simple"
    seed: int = 0

    def sigmas(self, model: ModelPatcher) -> Tensor:
        """Noise levels (steps + 1,) of the run."""
        sampler = comfy.samplers.KSampler(
            model, self.steps, model.load_device, self.sampler_name, self.scheduler, model_options=model.model_options
        )
        return sampler.sigmas

    def noise(self, indices: Sequence[int]) -> Tensor:
        """Initial noise (len(indices), C, ...), the same for prompt i whatever it is batched with."""
        generators = [torch.Generator().manual_seed(self.seed + i) for i in indices]
        return torch.cat([torch.randn(self.latent.shape, generator=g, dtype=self.latent.dtype) for g in generators])

    def record(
        self, model: ModelPatcher, chunk: _Chunk, negative: Conditioning, steps: Sequence[int], report: Report
    ) -> list[Tensor]:
        """The latents (B, C, ...) at which the model is called in each of `steps`, in a run with the prompts of `chunk`."""
        wanted, recorded = set(steps), []
        last = max(steps)

        def keep(step: int, _denoised: Tensor, x: Tensor, _total: int) -> None:
            if step in wanted:
                recorded.append(x.clone())
            report((step + 1) / (last + 1))

        noise = self.noise(chunk.indices)
        comfy.sample.sample_custom(
            model,
            noise,
            self.cfg,
            comfy.samplers.sampler_object(self.sampler_name),
            self.sigmas(model)[: last + 2],
            chunk.conditioning,
            negative,
            torch.zeros_like(noise),
            callback=keep,
            disable_pbar=True,
            seed=self.seed,
        )
        return recorded


@dataclass(frozen=True)
class _Chunk:
    """Prompts that go through the model in one batch: their places in the list, and their joint conditioning."""

    indices: list[int]
    conditioning: Conditioning


@dataclass(frozen=True)
class _Visit:
    """One micro-batch of the fit: latents `x` (B, C, ...) at noise level `sigma`, with conditioning number `conditioning`."""

    conditioning: int
    x: Tensor
    sigma: Tensor


@dataclass
class _Share:
    """Maps the progress of one stage to its share of the whole."""

    report: Report
    start: float
    end: float

    def __call__(self, fraction: float) -> None:
        self.report(self.start + (self.end - self.start) * fraction)

    def of(self, index: int, count: int) -> _Share:
        """The share of stage `index` of `count` equal ones."""
        step = (self.end - self.start) / count
        return _Share(self.report, self.start + step * index, self.start + step * (index + 1))


@dataclass
class Fit:
    """A map being fitted.

    Args:
        model, clip: not steered themselves.
        sampling: how pictures are sampled.
        timesteps: how many noise levels to look at, spread evenly over `window`.
        window: part of the run, as fractions of its steps, in which the map will act.
        rows: "positive" fits on the positive conditioning, "both" on the empty negative prompt too.
        latents: whose sampling run the denoiser looks at: "own" each prompt's; "source" or "target" the run of prompt i of
            that set for prompt i of both.
        batch_size: prompts per micro-batch.
        report: called with the fraction done after every step of a micro-batch; what it raises ends the fit.
        options: further arguments of `fit_map`.

    Raises:
        ValueError: if the model or the text encoders are steered already, or a number is out of range.
    """

    model: ModelPatcher
    clip: CLIP
    sampling: Sampling
    timesteps: int = 4
    window: tuple[float, float] = (0.0, 0.6)
    rows: str = "positive"
    latents: str = "target"
    batch_size: int = 8
    report: Report = lambda _fraction: None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [repr(applied.act_map.metadata.name) for applied in applied_maps(self.model)]
        if names or steers_encoders(self.clip):
            steered = f"MODEL is steered by {', '.join(names)}" if names else "CLIP is steered by an act map"
            raise ValueError(
                f"this {steered}: a map is fitted on the plain model. Connect the MODEL and CLIP from before Apply AcT Map"
            )
        start, end = self.window
        if not 0 <= start < end <= 1:
            raise ValueError(f"start_percent must be below end_percent, both within 0 to 1; got {start:g} and {end:g}")

    def run(self, source: Sequence[str], target: Sequence[str], sites: str, pattern: str, name: str) -> ActMap:
        """Fit the map.

        Args:
            source, target: prompts, what the model does now and what it should do.
            sites: one of `SITES`; "pattern" takes the sites that `pattern` matches in full.
            pattern: a regular expression over canonical site names.
            name: stored in the map.

        Raises:
            ValueError: for empty prompt sets, sites that match nothing, or activations that are not finite.
            MemoryError: when the waiting activations would exhaust the memory.
        """
        prompts = {"source": list(source), "target": list(target)}
        for side, texts in prompts.items():
            if not texts:
                raise ValueError(f"{side}_prompts is empty: write at least one prompt, one per line")
        encoders = {
            site: place
            for places in encoder_places(self.clip.cond_stage_model).values()
            for site, place in places.items()
        }
        denoiser = denoiser_places(self.model.model)
        wanted = _wanted_sites(encoders, denoiser, sites, pattern)
        of_encoders = [site for site in wanted if site in encoders]
        of_denoiser = [site for site in wanted if site in denoiser]
        steps = self._steps() if of_denoiser else []
        metadata = ActMapMetadata(
            name=name,
            timesteps=tuple(step / self.sampling.steps for step in steps),
            window=self.window,
            rows="both" if self.rows == "both" else "cond",
            latents=self.latents,
            architecture=_architecture(self.model, self.clip, wanted),
            model_name=type(self.model.model.model_config).__name__,
            n_source=len(prompts["source"]),
            n_target=len(prompts["target"]),
            prompts_hash=hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        )
        turn = 0.15 if of_denoiser else 1.0  # where progress passes from the encoders to the denoiser
        fitted: ActMap | None = None
        with torch.compiler.set_stance("force_eager"):
            if of_encoders:
                fitted = self._fit_encoders(encoders, of_encoders, prompts, metadata, _Share(self.report, 0.0, turn))
            if of_denoiser:
                steered = self.clip if fitted is None else steered_clip(self.clip, fitted, 1.0)
                share = _Share(self.report, 0.0 if fitted is None else turn, 1.0)
                part = self._fit_denoiser(of_denoiser, prompts, steered, steps, metadata, share)
                fitted = part if fitted is None else _joined(fitted, part)
        assert fitted is not None
        return fitted

    def _steps(self) -> list[int]:
        """The steps of the sampling run at which the denoiser is looked at."""
        start, end = self.window
        fractions = (start + (end - start) * i / self.timesteps for i in range(self.timesteps))
        return list(dict.fromkeys(int(fraction * self.sampling.steps) for fraction in fractions))

    def _fit_encoders(
        self,
        places: dict[str, Place],
        sites: list[str],
        prompts: dict[str, list[str]],
        metadata: ActMapMetadata,
        report: Report,
    ) -> ActMap:
        """The maps of the text encoders; every prompt is a micro-batch of its own, since lengths differ."""
        self.clip.load_model()
        return fit_map(
            places,
            prompts["source"],
            prompts["target"],
            sites=sites,
            forward=lambda prompt: self._encode(self.clip, prompt),
            progress=report,
            metadata=metadata,
            **self.options,
        )

    def _fit_denoiser(
        self,
        sites: list[str],
        prompts: dict[str, list[str]],
        steered: CLIP,
        steps: list[int],
        metadata: ActMapMetadata,
        report: _Share,
    ) -> ActMap:
        """The maps of the denoiser, fitted on the latents of unsteered runs; `steered` encodes the source prompts."""
        plain = {side: [self._encode(self.clip, text) for text in texts] for side, texts in prompts.items()}
        negative = self._encode(self.clip, "")
        recorded = self._record(plain, negative, steps, _Share(report, 0.0, 0.4))
        if steered is not self.clip:
            plain["source"] = [self._encode(steered, text) for text in prompts["source"]]
        sigmas = self.sampling.sigmas(self.model)[steps]
        conditionings: list[Conditioning] = []
        visits: dict[str, list[_Visit]] = {side: [] for side in prompts}
        for side in prompts:
            latents = recorded[side if self.latents == "own" else self.latents]
            for chunk in _chunks(plain[side], self.batch_size):
                x = latents[[i % len(latents) for i in chunk.indices]]
                for conditioning in (chunk.conditioning, negative)[: 2 if self.rows == "both" else 1]:
                    conditionings.append(conditioning)
                    visits[side] += [_Visit(len(conditionings) - 1, x[:, k], sigma) for k, sigma in enumerate(sigmas)]

        def fit(call: Call) -> ActMap:
            return fit_map(
                denoiser_places(self.model.model),
                visits["source"],
                visits["target"],
                sites=sites,
                forward=lambda visit: call(visit.conditioning, visit.x, visit.sigma),
                progress=_Share(report, 0.4, 1.0),
                metadata=metadata,
                **self.options,
            )

        noise = self.sampling.noise(range(self.batch_size))
        return _within_sampler(self.model, conditionings, noise, self.sampling.sigmas(self.model), fit)

    def _record(
        self, encoded: dict[str, list[Conditioning]], negative: Conditioning, steps: list[int], report: _Share
    ) -> dict[str, Tensor]:
        """Latents (prompts, steps, C, ...) of unsteered sampling runs, by prompt set."""
        sides = list(encoded) if self.latents == "own" else [self.latents]
        chunks = [(side, chunk) for side in sides for chunk in _chunks(encoded[side], self.batch_size)]
        recorded: dict[str, dict[int, Tensor]] = {side: {} for side in sides}
        for number, (side, chunk) in enumerate(chunks):
            share = report.of(number, len(chunks))
            latents = torch.stack(self.sampling.record(self.model, chunk, negative, steps, share), dim=1)
            recorded[side].update(zip(chunk.indices, latents, strict=True))
        return {side: torch.stack([found[i] for i in range(len(found))]) for side, found in recorded.items()}

    @staticmethod
    def _encode(clip: CLIP, prompt: str) -> Conditioning:
        return clip.encode_from_tokens_scheduled(clip.tokenize(prompt, disable_weights=True), show_pbar=False)


def _wanted_sites(encoders: dict[str, Place], denoiser: dict[str, Place], sites: str, pattern: str) -> list[str]:
    """Names of the sites to fit."""
    places = {**encoders, **denoiser}
    if sites == "pattern":
        if not pattern.strip():
            raise ValueError(
                'sites is "pattern", but site_pattern is empty: write a regular expression, e.g. unet\\..*norm2'
            )
        return find_sites(places, pattern.strip())
    if sites not in SITES:
        raise ValueError(f"sites must be one of {', '.join(SITES)}, got {sites!r}")
    components = component_names(encoders) if "text encoder" in sites else []
    return find_sites(places, components + (component_names(denoiser) if "denoiser" in sites else []))


def _architecture(model: ModelPatcher, clip: CLIP, sites: Sequence[str]) -> dict[str, str]:
    """Class name of every component that has sites."""
    names = {component_names(denoiser_places(model.model))[0]: type(model.model.diffusion_model).__name__}
    for path, places in encoder_places(clip.cond_stage_model).items():
        names |= {name: f"{type(clip.cond_stage_model).__name__}.{path}" for name in component_names(places)}
    return {name: kind for name, kind in names.items() if name in component_names(sites)}


def _joined(encoders: ActMap, denoiser: ActMap) -> ActMap:
    """One map of both parts, in execution order."""
    costs = {**encoders.metadata.costs, **denoiser.metadata.costs}
    return ActMap({**encoders, **denoiser}, replace(denoiser.metadata, costs=costs))


def _chunks(encoded: Sequence[Conditioning], batch_size: int) -> Iterator[_Chunk]:
    """Prompts in batches of at most `batch_size`, of equal numbers of tokens and otherwise alike."""
    groups: dict[Any, list[int]] = {}
    for index, conditioning in enumerate(encoded):
        groups.setdefault(_likeness(conditioning, index), []).append(index)
    for indices in groups.values():
        for start in range(0, len(indices), batch_size):
            chunk = indices[start : start + batch_size]
            yield _Chunk(chunk, _batched([encoded[i] for i in chunk]))


def _likeness(conditioning: Conditioning, index: int) -> Any:
    """What must agree for conditionings to be batched; of something unknown, only one goes into a batch."""
    if len(conditioning) != 1:
        return index
    embeddings, extras = conditioning[0]
    if not all(value is None or (isinstance(value, Tensor) and value.shape[:1] == (1,)) for value in extras.values()):
        return index
    shapes = ((name, None if value is None else value.shape) for name, value in sorted(extras.items()))
    return embeddings.shape, tuple(shapes)


def _batched(conditionings: Sequence[Conditioning]) -> Conditioning:
    if len(conditionings) == 1:
        return conditionings[0]
    embeddings = torch.cat([conditioning[0][0] for conditioning in conditionings])
    extras = [conditioning[0][1] for conditioning in conditionings]
    batched = {name: None if v is None else torch.cat([e[name] for e in extras]) for name, v in extras[0].items()}
    return [[embeddings, batched]]


def _within_sampler(
    model: ModelPatcher, conditionings: list[Conditioning], noise: Tensor, sigmas: Tensor, work: Callable[[Call], T]
) -> T:
    """The result of `work`, which is given the loaded model as a function of (number of the conditioning, latents
    (B, C, ...), noise level ()).

    It runs in place of a sampler's steps, so that ComfyUI loads the model, prepares the conditionings and applies what is
    patched as it does when it samples.
    """
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": conditionings[0]})
    entries = [entry for conditioning in conditionings for entry in conditioning]
    first = [0, *accumulate(len(conditioning) for conditioning in conditionings)]
    results: list[T] = []

    def steps(_model: Any, x: Tensor, _sigmas: Tensor, extra_args: dict[str, Any], **_: Any) -> Tensor:
        base, conds = guider.inner_model, {"positive": comfy.sampler_helpers.convert_cond(entries)}
        conds = comfy.samplers.process_conds(base, x, conds, x.device, torch.zeros_like(x))

        def call(number: int, latents: Tensor, sigma: Tensor) -> None:
            chosen = conds["positive"][first[number] : first[number + 1]]
            text_tokens.set(chosen[0]["cross_attn"].shape[1])
            latents = latents.to(x.device)
            timestep = sigma.to(x.device).expand(len(latents))
            comfy.samplers.calc_cond_batch(base, [chosen], latents, timestep, extra_args["model_options"])

        results.append(work(call))
        return x

    guider.sample(noise, torch.zeros_like(noise), comfy.samplers.KSAMPLER(steps), sigmas, disable_pbar=True)
    return results[0]
