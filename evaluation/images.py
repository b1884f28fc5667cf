"""How steering of images is judged: does the style arrive, does the subject stay, does the unwanted thing go?

Every strength draws the same prompts from the same seeds (paper, section 5). Judges have the interface of
`actmaps.demo.load_judges`: `.styles`, `.style(images)`, `.content(images, captions)`, `.embed_images`, `.embed_captions`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import spearmanr

if TYPE_CHECKING:
    from ..demo.judges import Judges
    from ..pipelines import ACTMixin

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn. Prompt i has seed `seed + i`, whatever the strength and the batch size.

    None leaves steps or guidance to the pipeline; `call_options` are for its call too, such as `height`.
    """

    num_inference_steps: int | None = 20
    guidance_scale: float | None = 4.0
    seed: int = 10_000
    batch_size: int = 32
    call_options: Mapping[str, Any] = field(default_factory=dict)


def draw(
    pipe: ACTMixin,
    prompts: Sequence[str],
    sampling: Sampling = Sampling(),
    *,
    act_strength: Any = 0.0,
    negative_prompt: str | None = None,
) -> np.ndarray:
    """Draw one picture per prompt.

    Args:
        pipe: a text-to-image pipeline with act maps.
        prompts: n prompts.
        sampling: steps, guidance and seeds.
        act_strength: of the active maps; 0 draws without maps.
        negative_prompt: the same for all prompts.

    Returns:
        Pictures as uint8 (n, H, W, 3).
    """
    return np.concatenate(
        list(draw_batches(pipe, prompts, sampling, act_strength=act_strength, negative_prompt=negative_prompt))
    )


def draw_batches(
    pipe: ACTMixin,
    prompts: Sequence[str],
    sampling: Sampling = Sampling(),
    *,
    act_strength: Any = 0.0,
    negative_prompt: str | None = None,
) -> Iterator[np.ndarray]:
    """As `draw`, but batch by batch, so that not all pictures need to be held at once."""
    options = {
        "num_inference_steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
        **sampling.call_options,
    }
    for start in range(0, len(prompts), sampling.batch_size):
        chunk = list(prompts[start : start + sampling.batch_size])
        options["negative_prompt"] = None if negative_prompt is None else [negative_prompt] * len(chunk)
        images = pipe(
            chunk,
            generator=[torch.Generator().manual_seed(sampling.seed + start + i) for i in range(len(chunk))],
            act_strength=act_strength,
            output_type="np",
            **{name: value for name, value in options.items() if value is not None},
        ).images
        yield (images * 255).round().astype(np.uint8)


@dataclass(frozen=True)
class Scores:
    """What the judges say of one set of pictures.

    Attributes:
        share: fraction of pictures that show the wanted style or the unwanted concept.
        probability: mean probability of the same; finer than the share.
        content: mean similarity of picture and subject.
        recognised: fraction of pictures whose subject is among the five most similar of all subjects of the set.
    """

    share: float
    probability: float
    content: float
    recognised: float


def score_style(judges: Judges, images: np.ndarray, subjects: Sequence[str], style: str) -> Scores:
    """Judge pictures of `subjects`, one each, for a style.

    Raises:
        ValueError: if the judges do not know the style.
    """
    if style not in judges.styles:
        raise ValueError(f"the judges know no style {style!r}, only {', '.join(judges.styles)}")
    probabilities = judges.style(images)
    column = judges.styles.index(style)
    share = (probabilities.argmax(1) == column).float().mean()
    return Scores(float(share), float(probabilities[:, column].mean()), *_content(judges, images, subjects))


def score_concept(judges: Judges, images: np.ndarray, subjects: Sequence[str], with_concept: Sequence[str]) -> Scores:
    """Judge pictures of `subjects`, one each, for a concept: a picture shows it where the caption `with_concept` fits better.

    This is the paper's zero-shot question ("a picture of X" against "a picture of something"), asked subject by subject.
    """
    seen = judges.embed_images(images)
    margin = (seen * (judges.embed_captions(list(with_concept)) - judges.embed_captions(list(subjects)))).sum(-1)
    share, probability = (margin > 0).float().mean(), torch.sigmoid(20 * margin).mean()
    return Scores(float(share), float(probability), *_content(judges, images, subjects))


def _content(judges: Judges, images: np.ndarray, subjects: Sequence[str]) -> tuple[float, float]:
    similarity = judges.embed_images(images) @ judges.embed_captions(list(subjects)).T
    own = similarity.diagonal()
    rank = (similarity > own[:, None]).sum(1)
    return float(own.mean()), float((rank < 5).float().mean())


def monotonicity(strengths: Sequence[float], values: Sequence[float]) -> float:
    """Spearman's rank correlation of strength and effect; nan when the effect is constant."""
    return float(spearmanr(strengths, values).statistic) if len(set(values)) > 1 else float("nan")


def as_row(scores: Scores) -> dict[str, float]:
    """Scores as plain numbers, for JSON."""
    return {key: round(value, 4) for key, value in asdict(scores).items()}
