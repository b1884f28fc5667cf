"""Drawing styles of the demo data set: four icon sets as they are, and five styles derived from renders by image processing.

A style maps a 256 x 256 RGBA render with a transparent background to a 64 x 64 RGB picture. Everything is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

RENDER_SIZE = 256
IMAGE_SIZE = 64

_PIXEL_PALETTE = np.array(
    [
        (255, 255, 255), (26, 28, 44), (95, 87, 79), (148, 163, 176), (194, 195, 199),
        (255, 0, 77), (171, 82, 54), (255, 163, 0), (255, 236, 39), (255, 204, 170),
        (0, 228, 54), (0, 135, 81), (41, 173, 255), (29, 60, 160), (126, 37, 83), (255, 119, 168),
    ],
    dtype=np.float32,
)  # fmt: skip


@dataclass(frozen=True)
class Style:
    """One drawing style.

    Attributes:
        phrase: the canonical words for it, used as "{label}, {phrase}".
        wordings: other plain-language words for it, used in training captions.
        source: the icon set whose renders it starts from.
        draw: 256 x 256 RGBA render -> 64 x 64 RGB picture.
    """

    phrase: str
    wordings: tuple[str, ...]
    source: str
    draw: Callable[[Image.Image], Image.Image]


def on_colour(render: Image.Image, colour: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Composite an RGBA render on a plain background, same size, RGB."""
    background = Image.new("RGBA", render.size, (*colour, 255))
    background.alpha_composite(render)
    return background.convert("RGB")


def _shrink(picture: Image.Image) -> Image.Image:
    return picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def _to_picture(values: np.ndarray) -> Image.Image:
    """(H, W, 3) floats in 0..1 -> RGB picture."""
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))


def _floats(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, dtype=np.float32) / 255


def _blur(values: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur of (H, W) or (H, W, 3) floats in 0..1."""
    picture = Image.fromarray((values.clip(0, 1) * 255).astype(np.uint8))
    return _floats(picture.filter(ImageFilter.GaussianBlur(radius)))


def _outlines(render: Image.Image, width: int) -> np.ndarray:
    """(256, 256) floats in 0..1: lines of about `width` pixels wherever the colour changes, the silhouette included."""
    # A mid-grey background sets off white parts (eyes, envelopes) and dark ones alike.
    smooth = on_colour(render, (128, 150, 128)).filter(ImageFilter.MedianFilter(5))
    change = np.asarray(smooth.filter(ImageFilter.MaxFilter(3)), np.int16) - np.asarray(
        smooth.filter(ImageFilter.MinFilter(3)), np.int16
    )
    lines = Image.fromarray(((change.max(-1) > 26) * 255).astype(np.uint8))
    return _floats(lines.filter(ImageFilter.MaxFilter(width)).filter(ImageFilter.GaussianBlur(1)))


def draw_plain(render: Image.Image) -> Image.Image:
    """The icon as it is, on white."""
    return _shrink(on_colour(render))


def draw_blueprint(render: Image.Image) -> Image.Image:
    """White outlines on blue drafting paper with a grid."""
    paper = np.empty((RENDER_SIZE, RENDER_SIZE, 3), np.float32)
    paper[:] = (0.07, 0.27, 0.66)
    paper[::32] = paper[1::32] = paper[:, ::32] = paper[:, 1::32] = (0.30, 0.50, 0.85)
    lines = _outlines(render, 5)[..., None]
    return _shrink(_to_picture(paper * (1 - lines) + lines))


def draw_neon(render: Image.Image) -> Image.Image:
    """Glowing coloured tubes along the outlines, on black."""
    # White surroundings would wash out the tubes of dark icons, so colours come from inside the silhouette only.
    colours = _floats(on_colour(render, (0, 0, 0)).filter(ImageFilter.MaxFilter(9)))
    spread = colours.max(-1, keepdims=True) - colours.min(-1, keepdims=True)
    vivid = (colours - colours.min(-1, keepdims=True)) / np.maximum(spread, 1e-3)
    vivid = np.where(spread > 0.12, vivid, np.array((0.1, 0.95, 1.0), np.float32))
    tubes = _outlines(render, 5)[..., None]
    light = _floats(_shrink(_to_picture(vivid * tubes)))
    core = _floats(_shrink(_to_picture((tubes**3 * 0.35).repeat(3, axis=-1))))
    glow = _blur(light, 1.75) * 1.3 + _blur(light, 4.5) * 0.9
    return _to_picture(np.array((0.03, 0.01, 0.07), np.float32) + glow + light * 0.9 + core)


def draw_pixel_art(render: Image.Image) -> Image.Image:
    """A mosaic of 16 x 16 blocks in 16 colours."""
    blocks = np.asarray(on_colour(render).resize((16, 16), Image.Resampling.BOX), np.float32)
    weights = np.array((0.6, 1.0, 0.5), np.float32)
    distance = (((blocks[:, :, None] - _PIXEL_PALETTE) * weights) ** 2).sum(-1)
    palette = _PIXEL_PALETTE[distance.argmin(-1)].astype(np.uint8)
    return Image.fromarray(palette).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.NEAREST)


def draw_pencil(render: Image.Image) -> Image.Image:
    """Grey outlines and diagonal hatching on cream paper."""
    grey = _floats(on_colour(render).convert("L"))
    lines = _outlines(render, 3)
    rows, columns = np.mgrid[:RENDER_SIZE, :RENDER_SIZE]
    stroke = (np.sin((rows + columns) * (2 * np.pi / 17)) + 1) / 2
    cross = (np.sin((rows - columns) * (2 * np.pi / 17)) + 1) / 2
    darkness = 1 - _blur(grey, 3)
    hatching = (
        np.clip((darkness * 1.25 - stroke) * 3, 0, 1) * 0.5 + np.clip((darkness * 1.3 - 0.45 - cross) * 3, 0, 1) * 0.4
    )
    ink = np.clip(lines * 0.75 + hatching, 0, 0.88)[..., None]
    paper = np.array((0.96, 0.93, 0.85), np.float32)
    return _shrink(_to_picture(paper * (1 - ink) + np.array((0.16, 0.16, 0.18), np.float32) * ink))


def draw_pop_art(render: Image.Image) -> Image.Image:
    """Saturated poster colours and thick black outlines on yellow halftone dots."""
    rows, columns = np.mgrid[:RENDER_SIZE, :RENDER_SIZE]
    period = 32
    dots = np.hypot((rows % period) - period / 2, (columns % period) - period / 2) < 9
    background = np.where(
        dots[..., None], np.array((1.0, 0.45, 0.1), np.float32), np.array((1.0, 0.87, 0.1), np.float32)
    )
    alpha = _floats(render.getchannel("A"))[..., None]
    colours = _floats(on_colour(render))
    mean = colours.mean(-1, keepdims=True)
    poster = np.round(np.clip(mean + (colours - mean) * 1.7, 0, 1) * 3) / 3
    lines = _outlines(render, 7)[..., None]
    return _shrink(_to_picture((background * (1 - alpha) + poster * alpha) * (1 - lines)))


def draw_gold(render: Image.Image) -> Image.Image:
    """A golden relief lit from the upper left, on dark red velvet."""
    alpha = _floats(render.getchannel("A"))
    grey = _floats(on_colour(render, (128, 128, 128)).convert("L"))
    height = _blur(alpha, 5) * 26 + _blur(alpha * (grey - 0.5) + 0.5, 2) * 14
    down, right = np.gradient(height)
    slope = np.clip((-down - right) * -0.55, -1, 1)
    light = np.clip(0.55 + 0.5 * slope, 0, 1)[..., None]
    dark, mid, bright = (np.array(c, np.float32) for c in ((0.28, 0.15, 0.02), (0.86, 0.62, 0.14), (1.0, 0.96, 0.70)))
    gold = np.where(light < 0.55, dark + (mid - dark) * (light / 0.55), mid + (bright - mid) * ((light - 0.55) / 0.45))
    velvet = np.array((0.33, 0.03, 0.09), np.float32) * (1 - 0.6 * _blur(alpha, 12)[..., None])
    return _shrink(_to_picture(velvet * (1 - alpha[..., None]) + gold * alpha[..., None]))


STYLE_TABLE: tuple[Style, ...] = (
    Style(
        "flat cartoon",
        ("flat colors", "simple flat drawing", "flat clip art", "flat vector sticker"),
        "twemoji",
        draw_plain,
    ),
    Style(
        "glossy 3d",
        ("shiny 3d render", "3d plastic toy", "rendered in 3d", "soft 3d model"),
        "fluent-emoji-3d",
        draw_plain,
    ),
    Style(
        "black and white icon",
        ("black ink icon", "monochrome icon", "bold black line icon", "black and white symbol"),
        "fluent-emoji-high-contrast",
        draw_plain,
    ),
    Style(
        "blueprint",
        ("white lines on blue", "technical drawing on blue paper", "blue architect plan"),
        "twemoji",
        draw_blueprint,
    ),
    Style("neon sign", ("glowing neon", "neon lights on black", "bright neon tubes at night"), "noto", draw_neon),
    Style("pixel art", ("8-bit pixels", "retro video game sprite", "blocky mosaic"), "noto", draw_pixel_art),
    Style(
        "pencil sketch",
        ("grey pencil drawing", "hatched sketch on paper", "hand drawn in pencil"),
        "noto",
        draw_pencil,
    ),
    Style(
        "pop art",
        ("comic book poster", "comic style with dots", "bold comic print on yellow"),
        "fluent-emoji-flat",
        draw_pop_art,
    ),
    Style(
        "golden relief", ("gold sculpture", "carved in gold", "shiny gold ornament"), "fluent-emoji-flat", draw_gold
    ),
)
STYLES: tuple[str, ...] = tuple(style.phrase for style in STYLE_TABLE)
