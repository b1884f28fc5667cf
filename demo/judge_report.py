"""How good the judges are, on rendered pictures that they were not trained on.

    python -m actmaps.demo.judge_report --data ~/.cache/actmaps/emoji-dataset

prints accuracy and confusions of the style classifier, zero-shot retrieval of labels by the concept judge, and how well `Judges.shows`
tells pictures with a word from pictures without. With `--vae FOLDER` also the first two after a round trip through that autoencoder.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .dataset import Dataset, Record, load, subject_text
from .judges import WEIGHTS, Judges, image_batch
from .styles import STYLES

# Styles that keep the colours of things; colour words are judged in these only.
COLOURFUL_STYLES = ("flat cartoon", "glossy 3d", "pixel art", "pop art")
RELIABLE_AUROC = 0.9
FEWEST_POSITIVES = 10

# Phrase that is asked -> words (regular expressions) of which one stands in the description of a picture that shows it. Pictures that have a word among
# their tags or synonyms only are left out: their drawings may or may not show it.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "a hat": ("hat", "cowboy", "cap"),
    "sunglasses": ("sunglasses",),
    "glasses": ("(?<!clinking )glasses", "sunglasses"),
    "a crown": ("crown", "king", "queen", "prince", "princess"),
    "red hair": ("red hair",),
    "curly hair": ("curly hair",),
    "white hair": ("white hair",),
    "blond hair": ("blond hair",),
    "a beard": ("beard",),
    "a heart": ("heart", "hearts"),
    "a smile": ("smiling", "grinning", "smile", "grin", "beaming"),
    "tears": ("crying", "tear", "tears"),
    "a tongue": ("tongue",),
    "a face": ("face",),
    "a cat": ("cat",),
    "a dog": ("dog", "poodle"),
    "a bird": (
        "bird",
        "chick",
        "duck",
        "owl",
        "eagle",
        "parrot",
        "penguin",
        "dove",
        "rooster",
        "turkey",
        "flamingo",
        "peacock",
    ),
    "a fish": ("fish", "shark", "blowfish"),
    "a flower": ("flower", "rose", "tulip", "blossom", "sunflower", "hibiscus", "bouquet", "hyacinth", "rosette"),
    "a fruit": (
        "apple",
        "pear",
        "banana",
        "peach",
        "cherries",
        "strawberry",
        "lemon",
        "tangerine",
        "mango",
        "grapes",
        "melon",
    ),
    "a woman": ("woman", "women", "princess", "mermaid", "girl"),
    "a man": ("man", "men", "prince", "merman", "boy"),
    "a hand": ("hand", "hands", "finger", "fist", "thumbs", "palm", "palms"),
    "a house": ("house", "houses", "home", "building", "hotel"),
    "a car": ("car", "taxi", "automobile", "bus", "truck", "vehicle"),
    "a clothing item": ("shirt", "dress", "jeans", "coat", "shorts", "sari", "kimono", "bikini", "blouse", "swimsuit"),
    "a ball": ("ball", "baseball", "softball", "basketball", "volleyball", "soccer"),
    "red": ("red",),
    "blue": ("blue",),
    "green": ("green",),
    "yellow": ("yellow",),
    "orange": ("orange",),
    "purple": ("purple",),
    "brown": ("brown",),
    "black": ("black",),
    "white": ("white",),
}
COLOUR_WORDS = ("red", "blue", "green", "yellow", "orange", "purple", "brown", "black", "white")


def soften(images: Tensor, sigma: float = 1.0, noise: float = 0.05) -> Tensor:
    """Blur and noise of fixed strength and seed, (n, 3, H, W) in [0, 1] -> same: a stand-in for the softness of generated pictures."""
    offsets = torch.arange(-3, 4, dtype=torch.float32)
    kernel = (-(offsets**2) / (2 * sigma**2)).exp()
    kernel = (kernel / kernel.sum()).repeat(3, 1, 1, 1)
    padded = F.pad(images, (3, 3, 3, 3), mode="replicate")
    blurred = F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)
    grain = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (blurred + noise * grain).clamp(0, 1)


def auroc(scores: Tensor, positive: Tensor) -> float | None:
    """Area under the ROC curve of scores (n,) for bool labels (n,); None if one class is missing."""
    positives, negatives = scores[positive], scores[~positive]
    if not len(positives) or not len(negatives):
        return None
    ordered = negatives.sort().values
    below = torch.searchsorted(ordered, positives, side="left") + torch.searchsorted(ordered, positives, side="right")
    return (below.double() / 2).mean().item() / len(negatives)


def ranks(images: Tensor, labels: Tensor, own: Tensor) -> Tensor:
    """Rank (0 = first) of each picture's own label: images (n, D), labels (m, D), own (n,) -> (n,)."""
    similarity = images @ labels.T
    return (similarity > similarity.gather(1, own[:, None])).sum(1)


def retrieval_row(rank: Tensor) -> dict[str, float]:
    """Share of first places and of the first five, median rank counted from one."""
    return {
        "top1": (rank == 0).float().mean().item(),
        "top5": (rank < 5).float().mean().item(),
        "median_rank": float(np.median(rank.numpy())) + 1,
        "images": len(rank),
    }


def _pictures(dataset: Dataset, records: list[Record]) -> Tensor:
    return image_batch(np.asarray(dataset.images[[record.image for record in records]]))


def style_report(judges: Judges, dataset: Dataset) -> dict[str, Any]:
    """Accuracy on subjects and pairs never seen, clear and softened, and the confusion matrix (rows: true style)."""
    records = dataset.select("held_out_concept")
    pictures, truth = _pictures(dataset, records), torch.tensor([record.style for record in records])
    guess, soft_guess = judges.style(pictures).argmax(1), judges.style(soften(pictures)).argmax(1)
    pairs = dataset.select("held_out_pair")
    pair_guess = judges.style(_pictures(dataset, pairs)).argmax(1)
    confusion = torch.zeros(len(STYLES), len(STYLES), dtype=torch.long)
    confusion.index_put_((truth, guess), torch.tensor(1), accumulate=True)
    return {
        "accuracy": (guess == truth).float().mean().item(),
        "accuracy_softened": (soft_guess == truth).float().mean().item(),
        "accuracy_unseen_pairs": (pair_guess == torch.tensor([record.style for record in pairs]))
        .float()
        .mean()
        .item(),
        "images": len(records),
        "confusion": confusion.tolist(),
    }


def retrieval_report(judges: Judges, dataset: Dataset) -> dict[str, Any]:
    """Zero-shot retrieval of the plain label, for held-out subjects (per style too) and for unseen pairs of seen subjects."""
    labels = list(dict.fromkeys(record.concept.label for record in dataset.records))
    unseen = list(dict.fromkeys(record.concept.label for record in dataset.select("held_out_concept")))
    vectors = dict(zip(labels, judges.embed_captions(labels), strict=True))
    every, held_out = (
        torch.stack([vectors[label] for label in labels]),
        torch.stack([vectors[label] for label in unseen]),
    )

    def rank(records: list[Record], pictures: Tensor, candidates: list[str], bank: Tensor) -> Tensor:
        own = torch.tensor([candidates.index(record.concept.label) for record in records])
        return ranks(judges.embed_images(pictures), bank, own)

    records = [record for record in dataset.select("held_out_concept") if record.accessory is None]
    pairs = [record for record in dataset.select("held_out_pair") if record.accessory is None]
    pictures = _pictures(dataset, records)
    among_unseen = rank(records, pictures, unseen, held_out)
    style = torch.tensor([record.style for record in records])
    return {
        "unseen_labels": len(unseen),
        "all_labels": len(labels),
        "unseen_among_unseen": retrieval_row(among_unseen),
        "unseen_among_unseen_softened": retrieval_row(rank(records, soften(pictures), unseen, held_out)),
        "unseen_among_all": retrieval_row(rank(records, pictures, labels, every)),
        "unseen_pairs_among_all": retrieval_row(rank(pairs, _pictures(dataset, pairs), labels, every)),
        "unseen_among_unseen_by_style": {
            name: retrieval_row(among_unseen[style == index]) for index, name in enumerate(STYLES)
        },
    }


def attribute_report(judges: Judges, dataset: Dataset) -> dict[str, Any]:
    """AUROC of `Judges.shows` per phrase of ATTRIBUTES, over pictures of held-out subjects and held-out pairs."""
    records = dataset.select("held_out_concept", "held_out_pair")
    seen = judges.embed_images(_pictures(dataset, records))
    asked = judges.embed_captions(list(ATTRIBUTES))
    rows = {}
    for (phrase, words), vector in zip(ATTRIBUTES.items(), asked, strict=True):
        pattern = re.compile(rf"\b({'|'.join(words)})\b")
        eligible, positive = _label_pictures(records, pattern.search, colourful=phrase in COLOUR_WORDS)
        scores = seen @ vector
        probability = torch.sigmoid(judges.metadata["shows_scale"] * scores + judges.metadata["shows_bias"])
        new = torch.tensor([record.split == "held_out_concept" for record in records])
        if not bool((eligible & positive).any()):
            continue
        rows[phrase] = {
            "auroc": auroc(scores[eligible], positive[eligible]),
            "auroc_unseen_subjects": auroc(scores[eligible & new], positive[eligible & new]),
            "positives": int((positive & eligible).sum()),
            "subjects": len({r.concept.label for r, yes in zip(records, positive & eligible, strict=True) if yes}),
            "mean_if_shown": probability[eligible & positive].mean().item(),
            "mean_if_not": probability[eligible & ~positive].mean().item(),
        }
    return rows


def _label_pictures(records: list[Record], matches: Callable[[str], Any], colourful: bool) -> tuple[Tensor, Tensor]:
    eligible, positive = [], []
    for record in records:
        shown = bool(matches(subject_text(record.concept, record.accessory)))
        doubtful = not shown and bool(matches(" ; ".join((*record.concept.tags, *record.concept.synonyms))))
        eligible.append(not doubtful and (not colourful or STYLES[record.style] in COLOURFUL_STYLES))
        positive.append(shown)
    return torch.tensor(eligible), torch.tensor(positive)


@torch.no_grad()
def round_trip(vae: torch.nn.Module, pictures: Tensor) -> Tensor:
    """Encode and decode (n, 3, 64, 64) in [0, 1] with an `AutoencoderKL`; same shape, device and range."""
    return torch.cat([(vae(chunk * 2 - 1).sample / 2 + 0.5).clamp(0, 1) for chunk in pictures.split(64)])


def vae_report(judges: Judges, dataset: Dataset, vae: torch.nn.Module) -> dict[str, Any]:
    """Style accuracy and retrieval for unseen subjects without accessories, before and after `round_trip`."""
    records = [record for record in dataset.select("held_out_concept") if record.accessory is None]
    labels = list(dict.fromkeys(record.concept.label for record in records))
    bank, own = judges.embed_captions(labels), torch.tensor([labels.index(record.concept.label) for record in records])
    style = torch.tensor([record.style for record in records])
    before = _pictures(dataset, records)
    report = {}
    for name, pictures in (("before", before), ("after", round_trip(vae, before))):
        right = (judges.style(pictures).argmax(1) == style).float()
        report[name] = {
            "style_accuracy": right.mean().item(),
            "style_accuracy_by_style": {
                word: right[style == index].mean().item() for index, word in enumerate(STYLES)
            },
            "retrieval": retrieval_row(ranks(judges.embed_images(pictures), bank, own)),
        }
    return report


def evaluate(judges: Judges, dataset: Dataset) -> dict[str, Any]:
    """All figures: {"style", "retrieval", "attributes", "reliable_attributes"}, as kept in the weights' metadata."""
    attributes = attribute_report(judges, dataset)
    return {
        "style": style_report(judges, dataset),
        "retrieval": retrieval_report(judges, dataset),
        "attributes": attributes,
        "reliable_attributes": [
            phrase
            for phrase, row in attributes.items()
            if (row["auroc"] or 0) >= RELIABLE_AUROC and row["positives"] >= FEWEST_POSITIVES
        ],
    }


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def print_report(report: dict[str, Any]) -> None:
    """The tables, as Markdown."""
    style, retrieval = report["style"], report["retrieval"]
    print(
        f"\nStyle, {style['images']} pictures of unseen subjects: {style['accuracy']:.1%}, with blur and noise "
        f"{style['accuracy_softened']:.1%}; unseen pairs {style['accuracy_unseen_pairs']:.1%}\n"
    )
    print("| true style | " + " | ".join(STYLES) + " |\n|---" * 1 + "|---:" * len(STYLES) + "|")
    for name, row in zip(STYLES, style["confusion"], strict=True):
        print(f"| {name} | " + " | ".join(map(str, row)) + " |")
    names = {
        f"unseen subjects, among {retrieval['unseen_labels']} unseen labels": retrieval["unseen_among_unseen"],
        "the same with blur and noise": retrieval["unseen_among_unseen_softened"],
        f"unseen subjects, among all {retrieval['all_labels']} labels": retrieval["unseen_among_all"],
        "unseen pairs of seen subjects, among all labels": retrieval["unseen_pairs_among_all"],
    } | {f"unseen, {name}": row for name, row in retrieval["unseen_among_unseen_by_style"].items()}
    print("\n| retrieval of the label | top 1 | top 5 | median rank | pictures |\n|---|---:|---:|---:|---:|")
    for name, row in names.items():
        print(f"| {name} | {row['top1']:.1%} | {row['top5']:.1%} | {row['median_rank']:g} | {row['images']} |")
    print("\n| shows | AUROC | unseen subjects only | pictures with it | subjects | mean if shown | if not |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for phrase, row in report["attributes"].items():
        print(
            f"| {phrase} | {_figure(row['auroc'])} | {_figure(row['auroc_unseen_subjects'])} | {row['positives']} | {row['subjects']} | "
            f"{row['mean_if_shown']:.2f} | {row['mean_if_not']:.2f} |"
        )
    print(f"\nreliable (AUROC >= {RELIABLE_AUROC}): {', '.join(report['reliable_attributes'])}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="folder of the data set (default: the cache's)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--vae", type=Path, help="folder of an AutoencoderKL, such as demo/weights/vae")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    judges, dataset = Judges.load(arguments.weights), load(arguments.data)
    report = evaluate(judges, dataset)
    print_report(report)
    if arguments.vae:
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(arguments.vae, torch_dtype=torch.float32).eval()
        report["vae"] = vae_report(judges, dataset, vae)
        for when, row in report["vae"].items():
            by_style = ", ".join(f"{name} {share:.0%}" for name, share in row["style_accuracy_by_style"].items())
            print(
                f"\n{when} the VAE: style {row['style_accuracy']:.1%} ({by_style}); "
                f"label top 1 {row['retrieval']['top1']:.1%}, top 5 {row['retrieval']['top5']:.1%}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
