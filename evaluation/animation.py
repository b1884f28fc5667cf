"""Pictures at growing strength as frames of an animation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from .grid import LINE, MARGIN, RAMP, TEXT, TITLE, draw_grid

FRAME, REST = 350, 1200  # milliseconds that a frame stays, and the first and the last one


def strength_frames(
    rows: Sequence[Sequence[Image.Image]], strengths: Sequence[float], *, title: str, cell: int = 256
) -> list[Image.Image]:
    """One frame per strength: the pictures side by side under the title, the strength, and a bar that fills.

    Args:
        rows: one per prompt, each with a picture per strength.
        strengths: rising, from 0.
        title: above the pictures.
        cell: longer side of a picture in pixels.

    Returns:
        RGB pictures of one size.
    """
    frames = []
    for column, strength in enumerate(strengths):
        pictures = [row[column] for row in rows]
        label = "strength 0, unsteered" if strength == 0 else f"strength {strength:g}"
        frame = draw_grid([pictures], [""], [""] * len(rows), title=title, subtitle=label, cell=cell)
        # In the empty line of the column labels.
        top, right = MARGIN - 4 + TITLE + 12 + TEXT + 14, frame.width - MARGIN
        draw = ImageDraw.Draw(frame)
        draw.rectangle((MARGIN, top, right, top + 7), fill=LINE)
        if strength > 0:
            draw.rectangle((MARGIN, top, MARGIN + (right - MARGIN) * strength / max(strengths), top + 7), fill=RAMP)
        frames.append(frame)
    width = max(frame.width for frame in frames)
    return [_widened(frame, width) for frame in frames]


def save_animation(frames: Sequence[Image.Image], path: Path) -> None:
    """Write the frames as a GIF that runs there and back without end."""
    order = [*frames, *reversed(frames[1:-1])]
    stays = [REST if frame is frames[0] or frame is frames[-1] else FRAME for frame in order]
    order[0].save(path, format="GIF", save_all=True, append_images=order[1:], duration=stays, loop=0)


def _widened(frame: Image.Image, width: int) -> Image.Image:
    """The frame with white on its right."""
    if frame.width == width:
        return frame
    wide = Image.new("RGB", (width, frame.height), "white")
    wide.paste(frame)
    return wide
