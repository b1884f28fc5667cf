"""Maps on ComfyUI's MODEL and CLIP. Both are patched on clones, so that other branches of a graph stay as they are."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy.sd import CLIP
from comfy.utils import repeat_to_batch_size
from torch import Tensor

from ..maps import ActMap
from ..maps.masks import resized
from ..maps.places import Places
from ..pipelines.strength import Schedule
from .forwards import ArmedModel
from .translation import denoiser_places, encoder_places, text_tokens

KEY = "actmaps"
# Of each model the latest combinations of maps stay armed, which saves looking up their sites again.
_KEPT_COMBINATIONS = 8
# A curve takes the run for this many steps, whatever the sampler's: percents of four decimals are met exactly.
_CURVE_STEPS = 10_000


@dataclass(frozen=True)
class AppliedMap:
    """A map as one apply node puts it on a MODEL.

    Attributes:
        strength: 0 leaves the model as it is, 1 is the full transport.
        start_percent, end_percent: part of the sampling run, as fractions of its noise schedule, in which the map acts.
        rows: "positive" steers the positive conditioning only, "both" the negative one too.
        mask: (pictures or 1, 1, H, W), a factor on the displacement at each position of the picture; None moves all in full.
        curve: a factor on the strength at each place of the run; None is 1 everywhere.
    """

    act_map: ActMap
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    rows: str = "positive"
    mask: Tensor | None = None
    curve: Schedule | None = None


def steered_model(model: ModelPatcher, applied: AppliedMap) -> ModelPatcher:
    """A clone of `model` that is steered by one more map, after those that it has."""
    clone = model.clone()
    steering = SteeredSampling((*applied_maps(model), applied))
    clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, steering)
    return clone


def applied_maps(model: ModelPatcher) -> tuple[AppliedMap, ...]:
    """The maps that steer `model`, in the order in which they apply."""
    wrappers = model.get_wrappers(WrappersMP.APPLY_MODEL, KEY)
    return wrappers[0].applied if wrappers else ()


class SteeredSampling:
    """Wrapper of `BaseModel.apply_model`: steers each call by the maps that act at its noise level, and takes them off again."""

    def __init__(self, applied: Sequence[AppliedMap]) -> None:
        self.applied = tuple(applied)

    def __call__(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        x, context = args[0], _argument(args, kwargs, 3, "c_crossattn")
        options = _argument(args, kwargs, 5, "transformer_options") or {}
        model: BaseModel = executor.class_obj
        sigma = float((args[1] if options.get("sigmas") is None else options["sigmas"]).flatten()[0])
        acting: list[tuple[AppliedMap, float, Tensor | None]] = []
        for applied in self.applied:
            factors = _row_factors(applied, options.get("cond_or_uncond"), x.shape[0])
            strength = _strength(applied, model, sigma)
            if strength != 0 and factors.any():
                acting.append((applied, strength, None if factors.all() else factors))
        if not acting:
            return executor(*args, **kwargs)
        armed = _armed(model, tuple(applied.act_map for applied, _, _ in acting), options.get("sample_sigmas"))
        for arm, (applied, strength, rows) in zip(armed.arms, acting, strict=True):
            arm.strength, arm.rows = strength, rows
            arm.mask = None if applied.mask is None else _mask_of_rows(applied.mask, x, options.get("cond_or_uncond"))
        token = text_tokens.set(context.shape[1] if isinstance(context, Tensor) and context.ndim > 1 else 0)
        try:
            with armed.installed(x.device):
                return executor(*args, **kwargs)
        finally:
            text_tokens.reset(token)


def _argument(args: Sequence[Any], kwargs: dict[str, Any], index: int, name: str) -> Any:
    return args[index] if len(args) > index else kwargs.get(name)


def _strength(applied: AppliedMap, model: BaseModel, sigma: float) -> float:
    """The strength of a map at a noise level: 0 outside of the part of the run in which it acts."""
    sigma_at = model.model_sampling.percent_to_sigma
    if not sigma_at(applied.end_percent) < sigma <= sigma_at(applied.start_percent):
        return 0.0
    if applied.curve is None:
        return applied.strength
    # The last step that is at least as noisy; noise falls, its negative rises. Known from the noise level, the place is right
    # for samplers that call the model several times per step, too.
    steps = range(_CURVE_STEPS + 1)
    step = bisect_right(steps, -sigma, key=lambda step: -sigma_at(step / _CURVE_STEPS)) - 1
    return applied.strength * applied.curve(step, _CURVE_STEPS)


def _row_factors(applied: AppliedMap, cond_or_uncond: Sequence[int] | None, batch: int) -> Tensor:
    """1 for the rows of the batch that are steered, else 0. Chunk 0 is the positive conditioning, wherever it stands."""
    if applied.rows == "both" or not cond_or_uncond:
        return torch.ones(batch)
    chunks = torch.tensor([float(chunk == 0) for chunk in cond_or_uncond])
    return chunks.repeat_interleave(batch // len(chunks))


def _mask_of_rows(mask: Tensor, x: Tensor, cond_or_uncond: Sequence[int] | None) -> Tensor:
    """The mask at the size of the latents `x`, for all rows or, where it has several, for each row of the batch."""
    mask = resized(mask, x.shape[-2], x.shape[-1])
    chunks = len(cond_or_uncond or [0])
    return mask if len(mask) == 1 else repeat_to_batch_size(mask, x.shape[0] // chunks).repeat(chunks, 1, 1, 1)


@dataclass
class _Kept:
    """The armed combinations of maps of one model, and the sampling run in which they were last checked."""

    armed: OrderedDict[tuple[ActMap, ...], ArmedModel]
    run: Any = None


_kept: WeakKeyDictionary[BaseModel, _Kept] = WeakKeyDictionary()


def _armed(model: BaseModel, act_maps: tuple[ActMap, ...], run: Any) -> ArmedModel:
    """The maps armed on `model`; anew if some of its modules have been exchanged since the last sampling run."""
    kept = _kept.setdefault(model, _Kept(OrderedDict()))
    if run is None or run is not kept.run:
        kept.run = run
        present = set(model.diffusion_model.modules())
        kept.armed = OrderedDict((maps, armed) for maps, armed in kept.armed.items() if armed.modules <= present)
    if act_maps not in kept.armed:
        kept.armed[act_maps] = ArmedModel(denoiser_places(model), act_maps)
        while len(kept.armed) > _KEPT_COMBINATIONS:
            kept.armed.popitem(last=False)
    kept.armed.move_to_end(act_maps)
    return kept.armed[act_maps]


def steered_clip(clip: CLIP, act_map: ActMap, strength: float) -> CLIP:
    """A clone of `clip` whose text encoders are steered by one more map, after those that they have."""
    clone = clip.clone()
    for path, places in encoder_places(clip.cond_stage_model).items():
        sites = [site for site in act_map if site in places]
        if not sites:
            continue
        key = f"{path}.transformer.forward"
        forward = clone.patcher.get_model_object(key)
        earlier = forward.applied if isinstance(forward, SteeredEncoder) else ()
        plain = forward.plain if isinstance(forward, SteeredEncoder) else forward
        part = act_map.select(sites)
        clone.patcher.add_object_patch(key, SteeredEncoder(plain, places, (*earlier, (part, strength))))
    return clone


def steers_encoders(clip: CLIP) -> bool:
    """Whether `clip` is steered."""
    return any(isinstance(patch, SteeredEncoder) for patch in clip.patcher.object_patches.values())


class SteeredEncoder:
    """The `forward` of a text encoder, steered by maps."""

    def __init__(self, plain: Callable[..., Any], places: Places, applied: Sequence[tuple[ActMap, float]]) -> None:
        self.plain, self.applied = plain, tuple(applied)
        self._armed = ArmedModel(places, [act_map for act_map, _ in applied])
        for arm, (_, strength) in zip(self._armed.arms, self.applied, strict=True):
            arm.strength = strength

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not any(strength for _, strength in self.applied):
            return self.plain(*args, **kwargs)
        with self._armed.installed(_device(args, kwargs)):
            return self.plain(*args, **kwargs)


def _device(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.device:
    """The device of the first tensor among the arguments."""
    return next(
        (value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), torch.device("cpu")
    )
