"""Classifier-free guidance, as the pipelines of diffusers do it: which rows and which calls of a denoiser are conditional.

Most put both halves into one batch, [unconditional, conditional] or the other way round. Others call the denoiser twice per
step, most of them within `denoiser.cache_context("cond")` and `("uncond")`, the rest with the conditional call first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

# Pipelines whose batches begin with the conditional rows.
_CONDITIONAL_FIRST = re.compile(
    r"ZImage.*|Lumina(Text2Img)?(ACT)?Pipeline|StableCascade.*|Wuerstchen.*|.*InstructPix2Pix.*"
)


def conditional_first(pipeline: object) -> bool:
    """Whether the batches of a pipeline's class begin with the conditional rows."""
    return any(_CONDITIONAL_FIRST.fullmatch(kind.__name__) for kind in type(pipeline).__mro__)


def without_guidance(parameters: Mapping[str, Any], denoiser: nn.Module) -> dict[str, float]:
    """Arguments of a pipeline's call that switch classifier-free guidance off.

    Args:
        parameters: of the pipeline's call, by name.
        denoiser: guidance that is distilled into it is no classifier-free guidance, and stays.
    """
    if "true_cfg_scale" in parameters:
        return {"true_cfg_scale": 1.0}
    if "guidance_scale" not in parameters or getattr(getattr(denoiser, "config", None), "guidance_embeds", False):
        return {}
    return {"guidance_scale": 1.0}


def is_guided(pipeline: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a pipeline, called with `arguments` (defaults filled in), uses classifier-free guidance.

    Meant to be asked while the call is under way, when the pipeline's own properties tell.
    """
    told = getattr(pipeline, "do_classifier_free_guidance", None)
    if told is not None:
        return bool(told)
    if "true_cfg_scale" in arguments:
        negative = ("negative_prompt", "negative_prompt_embeds")
        return (arguments["true_cfg_scale"] or 0) > 1 and any(arguments.get(name) is not None for name in negative)
    return (arguments.get("guidance_scale") or 0) > 1


def picture_count(arguments: Mapping[str, Any]) -> int | None:
    """How many pictures or videos a pipeline called with `arguments` (defaults filled in) makes; None if prompts do not tell."""
    per_prompt = arguments.get("num_images_per_prompt") or arguments.get("num_videos_per_prompt") or 1
    prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
    if isinstance(prompt, str):
        return per_prompt
    given = prompt if prompt is not None else embeds
    return None if given is None else len(given) * per_prompt


class Branches:
    """Tells, call by call of a pipeline's denoisers, which rows are conditional.

    Args:
        denoisers: the modules; their `cache_context` is listened to while `listening`.
        pictures: how many pictures the pipeline makes; None: half of the rows, if `guided`.
        conditional_first: whether batches begin with the conditional rows.
        guided: tells whether the pipeline uses guidance now.
    """

    def __init__(
        self, denoisers: list[nn.Module], pictures: int | None, conditional_first: bool, guided: Callable[[], bool]
    ) -> None:
        self._denoisers, self._pictures = denoisers, pictures
        self._conditional_first, self._guided = conditional_first, guided
        self._context: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Follow the denoisers' `cache_context` inside."""
        heard = [denoiser for denoiser in self._denoisers if hasattr(denoiser, "cache_context")]
        for denoiser in heard:
            object.__setattr__(denoiser, "cache_context", self._follow(denoiser.cache_context))
        try:
            yield
        finally:
            for denoiser in heard:
                object.__delattr__(denoiser, "cache_context")

    def _follow(self, cache_context: Any) -> Callable[..., AbstractContextManager]:
        @contextmanager
        def followed(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
            before, self._context = self._context, name
            try:
                with cache_context(name, *args, **kwargs):
                    yield
            finally:
                self._context = before

        return followed

    def conditional(self, rows: int, call: int) -> list[bool]:
        """For a call with `rows` rows, the `call`-th of its step (from 0): for each equal part of the batch, is it conditional?

        One part stands for all rows alike.

        Raises:
            ValueError: if the batch is neither of these: who steers conditional rows only cannot go on.
        """
        pictures = self._pictures or (rows // 2 if self._guided() else rows)
        parts, rest = divmod(rows, pictures)
        if rest or parts not in ((1, 2, 3) if self._conditional_first else (1, 2)):
            raise ValueError(
                f"the denoiser's batch has {rows} rows for {pictures} pictures, and which of them are conditional is not known "
                'for this pipeline: steer all of them, with a map fitted with rows="both"'
            )
        if parts > 1:
            others = [False] * (parts - 1)
            return [True, *others] if self._conditional_first else [*others, True]
        if self._context is not None:
            return [not self._context.startswith("uncond")]
        return [call == 0]
