"""Labelled grids of pictures: rows by columns, with headings that need no further explanation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CELL = 160
MARGIN = 24
GAP = 6
SET_APART = 30  # extra space before the columns that are set apart

INK, FAINT, LINE, PAPER = "#16181d", "#6b7280", "#d3d7de", "#ffffff"
RAMP = "#e4572e"
TITLE, TEXT, SMALL = 24, 17, 14  # font sizes in pixels


@dataclass(frozen=True)
class GridLayout:
    """Where the parts of a grid lie, in pixels.

    Attributes:
        rows, columns: number of cells.
        cell: width and height of a cell.
        left, top: corner of the first cell.
        apart: number of last columns that are set apart from the others.
    """

    rows: int
    columns: int
    cell: tuple[int, int]
    left: int
    top: int
    apart: int = 0

    def box(self, row: int, column: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of a cell; right and bottom lie just outside."""
        width, height = self.cell
        x = self.left + column * (width + GAP) + (SET_APART if column >= self.columns - self.apart else 0)
        y = self.top + row * (height + GAP)
        return x, y, x + width, y + height

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the whole picture."""
        _, _, right, bottom = self.box(self.rows - 1, self.columns - 1)
        return right + MARGIN, bottom + MARGIN


def draw_grid(
    images: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    title: str = "",
    subtitle: str = "",
    heading: str = "",
    apart: int = 0,
    apart_heading: str = "",
    cell: int = CELL,
) -> Image.Image:
    """Draw rows of pictures with their labels.

    Args:
        images: rows of equally many pictures; all are drawn at the size of the first, scaled to `cell`.
        row_labels: one per row, wrapped as needed.
        column_labels: one per column. In both, what follows a line break is drawn faint.
        title, subtitle: above the grid.
        heading: above the first columns, with a wedge that grows to the right: what the column labels count.
        apart: how many last columns are set apart, under `apart_heading`.
        cell: longer side of a cell in pixels; smaller pictures are enlarged, larger ones reduced.

    Returns:
        An RGB picture.

    Raises:
        ValueError: if there is no picture, or labels and pictures differ in number.
    """
    _check(images, row_labels, column_labels, apart)
    width, height = images[0][0].size
    size = max(1, round(width * cell / max(width, height))), max(1, round(height * cell / max(width, height)))
    label_width = _label_width(row_labels, size)
    header = _Header(title, subtitle, heading or apart_heading, column_labels)
    left = MARGIN + label_width + (14 if label_width else 0)
    layout = GridLayout(len(images), len(column_labels), size, left, MARGIN + header.height, apart)

    # A title may be wider than a narrow grid.
    needed = max((round(_font(s).getlength(t)) for s, t in ((TITLE, title), (TEXT, subtitle))), default=0) + 2 * MARGIN
    canvas = Image.new("RGB", (max(layout.size[0], needed), layout.size[1]), PAPER)
    draw = ImageDraw.Draw(canvas)
    header.draw(draw, layout, heading, apart_heading)
    for row, (label, pictures) in enumerate(zip(row_labels, images, strict=True)):
        _draw_row_label(draw, label, layout.box(row, 0), label_width)
        for column, picture in enumerate(pictures):
            box = layout.box(row, column)
            canvas.paste(_scaled(picture, size), box[:2])
            draw.rectangle((box[0] - 1, box[1] - 1, box[2], box[3]), outline=LINE)
    return canvas


@dataclass(frozen=True)
class _Header:
    """What stands above the cells."""

    title: str
    subtitle: str
    heading: str
    column_labels: Sequence[str]

    @property
    def height(self) -> int:
        lines = max(label.count("\n") + 1 for label in self.column_labels)
        above = (TITLE + 12 if self.title else 0) + (TEXT + 14 if self.subtitle else 0)
        return above + (SMALL + 22 if self.heading else 0) + lines * (TEXT + 4) + 4

    def draw(self, draw: ImageDraw.ImageDraw, layout: GridLayout, heading: str, apart_heading: str) -> None:
        y = MARGIN - 4
        if self.title:
            draw.text((MARGIN, y), self.title, INK, _font(TITLE))
            y += TITLE + 12
        if self.subtitle:
            draw.text((MARGIN, y), self.subtitle, FAINT, _font(TEXT))
            y += TEXT + 14
        first_apart = layout.columns - layout.apart
        if self.heading:
            if heading and first_apart:
                _draw_wedge(draw, heading, layout.box(0, 0)[0], layout.box(0, first_apart - 1)[2], y)
            if apart_heading and layout.apart:
                middle = (layout.box(0, first_apart)[0] + layout.box(0, layout.columns - 1)[2]) / 2
                draw.text((middle, y), apart_heading, FAINT, _font(SMALL), anchor="ma")
            y += SMALL + 22
        for column, label in enumerate(self.column_labels):
            left, _, right, _ = layout.box(0, column)
            for index, line in enumerate(label.split("\n")):
                place = ((left + right) / 2, y + index * (TEXT + 4))
                draw.text(place, line, FAINT if index else INK, _fitting(line, TEXT, right - left + GAP), anchor="ma")


def _draw_wedge(draw: ImageDraw.ImageDraw, heading: str, left: int, right: int, y: int) -> None:
    """The heading, and under it a wedge from nothing to full, smoothed by drawing it four times as large."""
    draw.text((left, y), heading, FAINT, _font(SMALL))
    width, height = right - left, 9
    wedge = Image.new("L", (4 * width, 4 * height))
    ImageDraw.Draw(wedge).polygon([(0, 4 * height), (4 * width, 0), (4 * width, 4 * height)], fill=255)
    draw.bitmap((left, y + SMALL + 4), wedge.reduce(4), RAMP)


def _draw_row_label(draw: ImageDraw.ImageDraw, label: str, box: tuple[int, int, int, int], width: int) -> None:
    """Right-aligned beside the row, centred on its height; what follows a line break is faint."""
    first, *others = label.split("\n")
    lines = [(line, INK) for line in _wrapped(first, width)]
    lines += [(line, FAINT) for other in others for line in _wrapped(other, width)]
    middle = (box[1] + box[3]) / 2 - (len(lines) - 1) * (TEXT + 4) / 2
    for index, (line, colour) in enumerate(lines):
        draw.text((box[0] - 14, middle + index * (TEXT + 4)), line, colour, _font(TEXT), anchor="rm")


def _label_width(labels: Sequence[str], size: tuple[int, int]) -> int:
    """Room for the row labels: as wide as they need, at most 1.2 cells, at least their longest word."""
    font = _font(TEXT)
    widest = max((font.getlength(line) for label in labels for line in label.split("\n")), default=0)
    word = max((font.getlength(word) for label in labels for word in label.split()), default=0)
    return round(max(min(widest, size[0] * 1.2), word)) + (1 if widest else 0)


def _wrapped(text: str, width: int) -> list[str]:
    font, lines = _font(TEXT), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _scaled(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    picture = picture.convert("RGB")
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _fitting(text: str, size: int, width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font at `size`, or as much smaller as the text needs to fit the width (10 pixels at least)."""
    while size > 10 and _font(size).getlength(text) > width:
        size -= 1
    return _font(size)


def _check(
    images: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str], apart: int
) -> None:
    if not images or not images[0]:
        raise ValueError("a grid needs at least one picture")
    if len(row_labels) != len(images):
        raise ValueError(f"there are {len(images)} rows of pictures and {len(row_labels)} row labels")
    for index, row in enumerate(images):
        if len(row) != len(column_labels):
            raise ValueError(f"row {index} has {len(row)} pictures, there are {len(column_labels)} column labels")
    if not 0 <= apart <= len(column_labels):
        raise ValueError(f"cannot set {apart} of {len(column_labels)} columns apart")
