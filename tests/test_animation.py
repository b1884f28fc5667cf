"""Animations over the strength."""

import numpy as np
import pytest
from PIL import Image

from actmaps.evaluation.animation import FRAME, REST, save_animation, strength_frames
from actmaps.evaluation.grid import MARGIN, RAMP

STRENGTHS = (0.0, 0.25, 1.0)
ROWS = [[Image.new("RGB", (16, 16), (shade, 40 * column, 90)) for shade in (200, 120, 60)] for column in range(3)]


def width_of(frame, colour):
    """Of the pixels of a colour."""
    wanted = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    xs = np.nonzero((np.asarray(frame) == wanted).all(-1).sum(0) > 4)[0]
    return 0 if len(xs) == 0 else xs.max() + 1 - xs.min()


def test_a_frame_shows_every_prompt_at_its_strength_and_a_bar_that_tells_it():
    frames = strength_frames(ROWS, STRENGTHS, title="ink", cell=64)
    assert {frame.size for frame in frames} == {frames[0].size}
    whole = frames[0].width - 2 * MARGIN + 1
    assert [width_of(frame, RAMP) for frame in frames] == pytest.approx([0, whole / 4, whole], abs=1)
    for frame, shade in zip(frames, (200, 120, 60), strict=True):
        pixels = np.asarray(frame)
        assert [int((pixels == (shade, 40 * column, 90)).all(-1).sum()) for column in range(3)] == [64 * 64] * 3


def test_frames_are_of_one_size_whatever_their_labels():
    frames = strength_frames(ROWS[:1], STRENGTHS, title="", cell=16)
    assert len({frame.size for frame in frames}) == 1


def test_a_gif_runs_there_and_back_and_rests_at_both_ends(tmp_path):
    frames = strength_frames(ROWS, STRENGTHS, title="ink", cell=64)
    save_animation(frames, tmp_path / "ink.gif")
    with Image.open(tmp_path / "ink.gif") as found:
        assert (found.format, found.size, found.n_frames, found.info["loop"]) == ("GIF", frames[0].size, 4, 0)
        stays = []
        for index in range(4):
            found.seek(index)
            stays.append(found.info["duration"])
            shown = np.asarray(found.convert("RGB"), int)
            assert np.abs(shown - np.asarray(frames[[0, 1, 2, 1][index]], int)).mean() < 1
    assert stays == [REST, FRAME, REST, FRAME]
