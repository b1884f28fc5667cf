"""The judge of the paper's images: a CLIP or SigLIP that knows the style, the prompt, and the unsteered picture (section 5).

    judge = ClipJudge.from_pretrained("openai/clip-vit-large-patch14")
    plain, steered = judge.embed_images(unsteered_pictures), judge.embed_images(pictures)
    judge.scores(steered, captions, "anime", plain).share

Pictures are judged by their embeddings, so that each is looked at once however many questions are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

DEFAULT_CLIP = "openai/clip-vit-large-patch14"
QUESTION, NOTHING = "A picture of {}.", "something"

Pictures = np.ndarray | Sequence[Image.Image]


@dataclass(frozen=True)
class ClipScores:
    """What CLIP says of one set of pictures.

    Attributes:
        share: fraction of pictures for which "A picture of X." is likelier than "A picture of something.".
        probability: mean probability of the same; finer than the share.
        clip_score: mean cosine of picture and original caption.
        relative_clip_score: `clip_score` over that of the unsteered pictures.
        image_similarity: mean cosine of a picture and the unsteered one from the same seed.
    """

    share: float
    probability: float
    clip_score: float
    relative_clip_score: float
    image_similarity: float


class ClipJudge:
    """Judges pictures with a model that embeds pictures and texts in one space.

    Args:
        model: a `CLIPModel`, `SiglipModel`, or another model with `get_image_features`, `get_text_features` and `logit_scale`.
        tokenizer: its tokenizer.
        image_processor: its image processor.
        batch_size: pictures or texts at once.

    Raises:
        ValueError: if the model does not compare pictures and texts.
    """

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, *, batch_size: int = 32) -> None:
        if missing := [part for part in ("get_image_features", "get_text_features", "logit_scale") if not hasattr(model, part)]:  # fmt: skip
            raise ValueError(
                f"{type(model).__name__} has no {missing[0]}: it does not compare pictures and texts; take a CLIP or a SigLIP"
            )
        self._model = model.eval().requires_grad_(False)
        self._tokenizer, self._image_processor, self._batch_size = tokenizer, image_processor, batch_size

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path = DEFAULT_CLIP,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        batch_size: int = 32,
    ) -> ClipJudge:
        """Load a judge.

        Args:
            name_or_folder: a hub id or a local folder.
            device: where it computes; default a GPU if there is one.
            dtype: of the weights.
            batch_size: pictures or texts at once.

        Raises:
            OSError: from transformers, if there is no such model or no network.
            ValueError: if the model does not compare pictures and texts.
        """
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = AutoModel.from_pretrained(name_or_folder, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder)
        # Pillow resizes alike on every machine, and needs no torchvision.
        image_processor = AutoImageProcessor.from_pretrained(name_or_folder, backend="pil")
        return cls(model.to(place), tokenizer, image_processor, batch_size=batch_size)

    def embed_images(self, images: Pictures) -> Tensor:
        """Pictures, uint8 (n, H, W, 3) or n PIL images -> unit vectors (n, d), float32 on the CPU.

        Raises:
            ValueError: for arrays of another kind.
        """

        def features(batch: Sequence[Image.Image]) -> Any:
            pixels = self._image_processor(images=list(batch), return_tensors="pt")["pixel_values"]
            return self._model.get_image_features(pixel_values=pixels.to(self._model.device, self._model.dtype))

        return self._embed(_as_pil(images), features)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Texts -> unit vectors (n, d), float32 on the CPU. What is longer than the model reads is cut."""
        # SigLIP was trained on texts padded to full length, and to CLIP's causal text encoder padding makes no difference.
        length = self._model.config.text_config.max_position_embeddings

        def features(batch: Sequence[str]) -> Any:
            tokens = self._tokenizer(
                list(batch), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            )
            return self._model.get_text_features(**tokens.to(self._model.device))

        return self._embed(captions, features)

    def probability(self, seen: Tensor, concept: str, other: str = NOTHING) -> Tensor:
        """How likely each picture shows `concept` and not `other`, by zero-shot classification.

        Args:
            seen: pictures as `embed_images` gives them, (n, d).
            concept, other: what "A picture of ... ." ends with.

        Returns:
            Probabilities (n,): softmax over the two sentences at the model's own temperature.
        """
        texts = self.embed_captions([QUESTION.format(concept), QUESTION.format(other)])
        scale = self._model.logit_scale.float().exp().cpu()
        return (scale * seen @ texts.T).softmax(-1)[:, 0]

    def clip_score(self, seen: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine of each picture and its caption, (n,)."""
        return _cosine(seen, self.embed_captions(captions))

    def scores(self, seen: Tensor, captions: Sequence[str], concept: str, unsteered: Tensor) -> ClipScores:
        """All that is asked of a set of pictures.

        Args:
            seen: pictures as `embed_images` gives them, (n, d).
            captions: what they were to show, without the concept.
            concept: the style that should be there, or what should not.
            unsteered: pictures of the same prompts and seeds without map, (n, d).

        Raises:
            ValueError: if the numbers of pictures, captions and unsteered pictures differ, or there is none.
        """
        if not len(seen) == len(captions) == len(unsteered) > 0:
            raise ValueError(f"{len(seen)} pictures, {len(captions)} captions, {len(unsteered)} unsteered pictures; give one of each")  # fmt: skip
        probability = self.probability(seen, concept)
        texts = self.embed_captions(captions)
        score, plain = float(_cosine(seen, texts).mean()), float(_cosine(unsteered, texts).mean())
        return ClipScores(
            share=float((probability > 0.5).float().mean()),
            probability=float(probability.mean()),
            clip_score=score,
            relative_clip_score=score / plain,
            image_similarity=float(_cosine(seen, unsteered).mean()),
        )

    @torch.no_grad()
    def _embed(self, items: Sequence[Any], features: Callable[[Sequence[Any]], Any]) -> Tensor:
        vectors = []
        for start in range(0, len(items), self._batch_size):
            found = features(items[start : start + self._batch_size]).pooler_output
            vectors.append(torch.nn.functional.normalize(found.float(), dim=-1).cpu())
        return torch.cat(vectors)


def _as_pil(images: Pictures) -> list[Image.Image]:
    if isinstance(images, np.ndarray):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(
                f"pictures must be uint8 (n, H, W, 3), got {images.dtype} {images.shape}; or give PIL images"
            )
        return [Image.fromarray(image) for image in images]
    return [image.convert("RGB") for image in images]


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    """Of unit vectors, row by row."""
    return (one * other).sum(-1)
