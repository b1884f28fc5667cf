"""A labelled sheet of pictures by the demo model: `python -m actmaps.demo.gallery --out gallery.png`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from . import STYLES, load_pipeline

SUBJECTS = (
    "red apple",
    "dog face",
    "grinning face with a hat",
    "sailboat",
    "rose",
    "cat face with sunglasses",
    "house",
    "hamburger",
)
CELL, MARGIN, HEADER, LABEL = 96, 4, 34, 120


def gallery(
    pipeline: Any, subjects: tuple[str, ...] = SUBJECTS, steps: int = 20, guidance: float = 4.0, seed: int = 0
) -> Image.Image:
    """One row per subject: without style words, then in every style. All pictures of a row start from the same noise."""
    import torch

    font = ImageFont.load_default(11)
    columns = ("no style words", *STYLES)
    sheet = Image.new(
        "RGB", (LABEL + len(columns) * (CELL + MARGIN), HEADER + len(subjects) * (CELL + MARGIN)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for column, words in enumerate(columns):
        text = words.replace(" ", "\n", 1) if len(words) > 14 else words
        pen.text((LABEL + column * (CELL + MARGIN) + 2, 4), text, fill="black", font=font)
    for row, subject in enumerate(subjects):
        top = HEADER + row * (CELL + MARGIN)
        pen.text((4, top + CELL // 2 - 12), subject.replace(" with", "\nwith"), fill="black", font=font)
        pictures = pipeline(
            [subject, *(f"{subject}, {style}" for style in STYLES)],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed + row) for _ in columns],
        ).images
        for column, picture in enumerate(pictures):
            sheet.paste(
                picture.resize((CELL, CELL), Image.Resampling.LANCZOS), (LABEL + column * (CELL + MARGIN), top)
            )
    return sheet


def main() -> None:
    """Draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gallery.png"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    sheet = gallery(pipeline, steps=arguments.steps, guidance=arguments.guidance, seed=arguments.seed)
    sheet.quantize(256).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
