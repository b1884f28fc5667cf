"""The judges of the demo bench: a style classifier and a concept judge that plays the part CLIP plays for large models.

Both read one small convolutional trunk; captions go through a small text tower. They were trained on rendered icons only, never on
generated pictures, by `actmaps.demo.train_judges`. Loading them needs neither the data set nor a download.

    judges = Judges.load()
    judges.style(images)                    # (n, 9) probabilities in the order of judges.styles
    judges.content(images, captions)        # (n,) cosine similarities
    judges.shows(images, "a hat")           # (n,) probability that the word applies to the picture
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_SIZE = 64
EMBEDDING_SIZE = 256
MAX_TOKENS = 32
WEIGHTS = Path(__file__).parent / "judge_weights" / "judges.safetensors"
METADATA_KEY = "actmaps_judges"

# EfficientNet-Lite0 without its last two blocks and its classifier: (expansion, kernel, stride, channels, blocks) per stage. The
# sixth stage keeps stride 1, since at 64 pixels stride 2 would leave a 2 x 2 map.
_STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 1, 192, 3),
)
_STEM_CHANNELS = 32
# Style is texture and palette, so its head reads the means and deviations of the shallow stages (by index into _STAGES).
_STYLE_STAGES = (0, 1, 2, 4)


class InvertedBottleneck(nn.Module):
    """MobileNetV2's block as EfficientNet-Lite has it: expand, depthwise, project, ReLU6, no squeeze-and-excitation."""

    def __init__(self, expansion: int, kernel: int, stride: int, channels_in: int, channels_out: int):
        super().__init__()
        width = channels_in * expansion
        self.expand = (
            nn.Sequential(nn.Conv2d(channels_in, width, 1, bias=False), _norm(width), nn.ReLU6())
            if expansion > 1
            else None
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(width, width, kernel, stride, kernel // 2, groups=width, bias=False), _norm(width), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(width, channels_out, 1, bias=False), _norm(channels_out))
        self.residual = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels_in, H, W) -> (n, channels_out, H / stride, W / stride)."""
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(y))
        return x + y if self.residual else y


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.02)


class ImageTower(nn.Module):
    """64 x 64 pictures -> style logits and unit vectors in the space that captions share."""

    def __init__(self, styles: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, _STEM_CHANNELS, 3, 2, 1, bias=False), _norm(_STEM_CHANNELS), nn.ReLU6())
        widths = [_STEM_CHANNELS, *(channels for *_, channels, _ in _STAGES)]
        self.stages = nn.ModuleList()
        for (width_in, width), (expansion, kernel, stride, _, blocks) in zip(pairwise(widths), _STAGES, strict=True):
            stage = [InvertedBottleneck(expansion, kernel, stride, width_in, width)]
            stage += [InvertedBottleneck(expansion, kernel, 1, width, width) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(*stage))
        features = 2 * sum(_STAGES[stage][3] for stage in _STYLE_STAGES)
        self.style_head = nn.Sequential(
            nn.LayerNorm(features), nn.Linear(features, 96), nn.ReLU(), nn.Linear(96, styles)
        )
        self.concept_head = nn.Sequential(nn.Conv2d(widths[-1], 768, 1, bias=False), _norm(768), nn.ReLU6())
        self.concept_out = nn.Linear(768, EMBEDDING_SIZE)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 3, 64, 64) in [0, 1] -> style logits (n, S) and unit vectors (n, EMBEDDING_SIZE)."""
        x = self.stem((2 * images - 1).contiguous(memory_format=torch.channels_last))
        texture = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in _STYLE_STAGES:
                variance, mean = torch.var_mean(x, dim=(2, 3), correction=0)
                texture += [mean, (variance + 1e-5).sqrt()]
        concept = self.concept_out(self.concept_head(x).mean((2, 3)))
        return self.style_head(torch.cat(texture, 1)), F.normalize(concept, dim=-1)


class TextTower(nn.Module):
    """Captions -> unit vectors: a two-layer transformer over a trimmed WordPiece vocabulary, beside a bag-of-words path.

    Distilled from all-MiniLM-L6-v2 followed by a learned projection into the judges' space.
    """

    def __init__(self, vocabulary: int, token_width: int = 96, width: int = 192, layers: int = 2):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, token_width)
        self.widen = nn.Linear(token_width, width)
        self.positions = nn.Parameter(torch.zeros(MAX_TOKENS, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, EMBEDDING_SIZE)
        self.bag = nn.Linear(token_width, EMBEDDING_SIZE)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Token ids and a bool mask of real tokens, both (n, L), L <= MAX_TOKENS -> unit vectors (n, EMBEDDING_SIZE)."""
        embedded = self.tokens(tokens)
        share = (mask / mask.sum(1, keepdim=True))[..., None]
        x = self.widen(embedded) + self.positions[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~mask)
        return F.normalize(self.out((self.norm(x) * share).sum(1)) + self.bag((embedded * share).sum(1)), dim=-1)


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Texts -> token ids and bool mask of real tokens, both (n, L) with L <= MAX_TOKENS."""
    rows = [encoding.ids[:MAX_TOKENS] for encoding in tokenizer.encode_batch(list(texts))]
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = True
    return tokens, mask


def image_batch(images: Any) -> Tensor:
    """Bring pictures of any accepted kind to float32 (n, 3, 64, 64) in [0, 1].

    Args:
        images: list of PIL images (transparency is laid on white); float tensor (n, 3, H, W) in [0, 1]; array (n, H, W, 3), either uint8
            or float in [0, 1], as diffusers' `output_type="np"` gives.

    Raises:
        ValueError: for no images, another shape, values outside [0, 1], NaN or infinity.
    """
    if isinstance(images, Image.Image):
        raise ValueError("images is one PIL image: give a list, [image]")
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError("images is empty: give at least one")
        if not all(isinstance(image, Image.Image) for image in images):
            raise ValueError("a list of images holds PIL images; give tensors as (n, 3, H, W), arrays as (n, H, W, 3)")
        return torch.cat([_resize(_from_array(_rgb(image)[None])) for image in images])
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"an image tensor is float (n, 3, H, W) in [0, 1], not {images.dtype} {tuple(images.shape)}"
            )
        batch = images.detach().float()
    elif isinstance(images, np.ndarray):
        if (
            images.ndim != 4
            or images.shape[-1] != 3
            or not (images.dtype == np.uint8 or np.issubdtype(images.dtype, np.floating))
        ):
            raise ValueError(f"an image array is uint8 or float (n, H, W, 3), not {images.dtype} {images.shape}")
        batch = _from_array(images)
    else:
        raise ValueError(f"images is a list of PIL images, a tensor or an array, not {type(images).__name__}")
    if batch.numel() == 0:
        raise ValueError(f"images is empty: its shape is {tuple(images.shape)}")
    if not bool(torch.isfinite(batch).all()):
        raise ValueError("images contain NaN or infinity: the pictures are broken, nothing was judged")
    low, high = batch.min().item(), batch.max().item()
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(
            f"float images lie in [0, 1], these span {low:.3g} to {high:.3g}: VAE output needs (x + 1) / 2"
        )
    return _resize(batch.clamp(0, 1))


def _rgb(image: Image.Image) -> np.ndarray:
    if "A" in image.getbands() or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _from_array(array: np.ndarray) -> Tensor:
    batch = torch.tensor(array).permute(0, 3, 1, 2).float()
    return batch / 255 if array.dtype == np.uint8 else batch


def _resize(batch: Tensor) -> Tensor:
    if batch.shape[-2:] == (IMAGE_SIZE, IMAGE_SIZE):
        return batch
    return F.interpolate(batch, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True).clamp(0, 1)


@dataclass(frozen=True)
class Judges:
    """Style classifier and concept judge, ready to use.

    Attributes:
        styles: the style phrases, in the order of the columns of `style`.
        metadata: how they were trained and how good they are on held-out rendered pictures.
    """

    image_tower: ImageTower
    text_tower: TextTower
    tokenizer: Tokenizer
    styles: tuple[str, ...]
    metadata: dict[str, Any]
    batch_size: int = 128

    @classmethod
    def load(cls, path: str | Path = WEIGHTS, device: str | torch.device = "cpu") -> Judges:
        """Load the shipped judges, or those that `train_judges` wrote to `path`. Computes in float32.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file holds something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no judges at {path}: train them with `python -m actmaps.demo.train_judges`")
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if METADATA_KEY not in header:
                raise ValueError(f"{path} holds no judges: its header lacks {METADATA_KEY!r}")
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (no mapping)
        metadata = json.loads(header[METADATA_KEY])
        image_tower = ImageTower(len(metadata["styles"]))
        text_tower = TextTower(weights["text.tokens.weight"].shape[0])
        for prefix, tower in (("image.", image_tower), ("text.", text_tower)):
            state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            # Batch norms count batches for training only; the counters are not shipped.
            counters = {
                name: value for name, value in tower.state_dict().items() if name.endswith("num_batches_tracked")
            }
            tower.load_state_dict(state | counters)
            tower.eval().requires_grad_(False).to(device)
        return cls(
            image_tower.to(memory_format=torch.channels_last),
            text_tower,
            Tokenizer.from_str(header["tokenizer"]),
            tuple(metadata["styles"]),
            metadata,
        )

    @property
    def device(self) -> torch.device:
        """Where the towers compute; results always come back on the CPU."""
        return self.image_tower.concept_out.weight.device

    def style(self, images: Any) -> Tensor:
        """How likely each style is.

        Args:
            images: see `image_batch`.

        Returns:
            (n, S) probabilities on the CPU, in the order of `styles`.

        Raises:
            ValueError: for pictures that `image_batch` refuses.
        """
        return torch.cat([logits.softmax(-1) for logits, _ in self._look(images)])

    def content(self, images: Any, captions: Sequence[str]) -> Tensor:
        """How well each picture fits its caption, whatever its style.

        Args:
            images: see `image_batch`.
            captions: one per picture, of any wording; style words in them are ignored by training, best leave them out.

        Returns:
            (n,) cosine similarities on the CPU.

        Raises:
            ValueError: for pictures that `image_batch` refuses, or another number of captions than pictures.
        """
        seen, told = self.embed_images(images), self.embed_captions(captions)
        if len(seen) != len(told):
            raise ValueError(f"{len(seen)} images but {len(told)} captions: give one caption per image")
        return (seen * told).sum(-1)

    def shows(self, images: Any, concept: str) -> Tensor:
        """How likely it is that a word or phrase ("a hat", "glasses", "red hair") applies to each picture.

        A logistic regression on the cosine similarity, fitted on the words of the rendered pictures' labels and tags; see
        `metadata["attributes"]` for how reliable it is per word.

        Args:
            images: see `image_batch`.
            concept: a word or short phrase.

        Returns:
            (n,) probabilities on the CPU. Their order is what to trust: 0.5 is a fair threshold only for common words.

        Raises:
            ValueError: for pictures that `image_batch` refuses, or an empty concept.
        """
        similarity = self.embed_images(images) @ self.embed_captions([concept])[0]
        return torch.sigmoid(self.metadata["shows_scale"] * similarity + self.metadata["shows_bias"])

    def embed_images(self, images: Any) -> Tensor:
        """Pictures -> unit vectors (n, EMBEDDING_SIZE) on the CPU. Raises as `image_batch` does."""
        return torch.cat([vectors for _, vectors in self._look(images)])

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Captions -> unit vectors (n, EMBEDDING_SIZE) on the CPU.

        Raises:
            ValueError: for a bare string, no captions, or a caption without a word.
        """
        if isinstance(captions, str):
            raise ValueError("captions is one string: give a list of them")
        if not captions:
            raise ValueError("captions is empty: give at least one")
        if blank := [index for index, caption in enumerate(captions) if not caption.strip()]:
            raise ValueError(f"caption {blank[0]} is empty: there is nothing to compare the picture with")
        chunks = []
        for start in range(0, len(captions), self.batch_size):
            tokens, mask = tokenize(self.tokenizer, captions[start : start + self.batch_size])
            chunks.append(self.text_tower(tokens.to(self.device), mask.to(self.device)).cpu())
        return torch.cat(chunks)

    @torch.no_grad()
    def _look(self, images: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for chunk in image_batch(images).split(self.batch_size):
            logits, vectors = self.image_tower(chunk.to(self.device))
            yield logits.cpu(), vectors.cpu()
