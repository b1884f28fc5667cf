"""Grids: every picture where its labels say it is."""

import numpy as np
import pytest
from PIL import Image

from actmaps.evaluation import grid
from actmaps.evaluation.grid import GridLayout, draw_grid

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def plain(colour, size=(32, 32)):
    return Image.new("RGB", size, colour)


def boxes(picture, colour):
    """Left, top, right and bottom of the pixels of a colour."""
    ys, xs = np.nonzero((np.asarray(picture) == colour).all(-1))
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def test_cells_hold_the_pictures_pixel_for_pixel():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    picture = draw_grid([[plain(RED, (64, 64)), noise]], ["row"], ["a", "b"], cell=64)
    left, top, right, bottom = boxes(picture, RED)
    assert (right - left, bottom - top) == (64, 64)
    cell = picture.crop((right + grid.GAP, top, right + grid.GAP + 64, bottom))
    assert np.array_equal(np.asarray(cell), np.asarray(noise))


def test_rows_and_columns_are_evenly_spaced():
    picture = draw_grid([[plain(RED), plain(GREEN)], [plain(BLUE), plain(RED)]], ["one", "two"], ["a", "b"], cell=50)
    green, blue = boxes(picture, GREEN), boxes(picture, BLUE)
    assert (green[2] - green[0], green[3] - green[1]) == (50, 50)
    assert green[0] - blue[0] == blue[1] - green[1] == 50 + grid.GAP
    assert picture.size == (green[2] + grid.MARGIN, blue[3] + grid.MARGIN)


def test_columns_set_apart_have_more_room():
    rows = [[plain(RED), plain(GREEN), plain(BLUE)]]
    picture = draw_grid(rows, ["row"], ["a", "b", "c"], apart=1, cell=40)
    red, green, blue = (boxes(picture, colour) for colour in (RED, GREEN, BLUE))
    assert green[0] - red[2] == grid.GAP
    assert blue[0] - green[2] == grid.GAP + grid.SET_APART


def test_tall_pictures_keep_their_shape():
    picture = draw_grid([[plain(RED, (20, 40))]], ["row"], ["a"], cell=80)
    left, top, right, bottom = boxes(picture, RED)
    assert (right - left, bottom - top) == (40, 80)


def test_labels_stand_left_of_their_row_and_above_their_column():
    rows = [[plain(RED), plain(GREEN)], [plain(RED), plain(BLUE)]]
    bare = np.asarray(draw_grid(rows, ["", ""], ["", ""], cell=100), int)
    labelled = draw_grid(rows, ["", "xxx"], ["", "xxx"], cell=100)
    blue, green = boxes(labelled, BLUE), boxes(labelled, GREEN)
    pixels = np.asarray(labelled, int).sum(-1)
    # Nothing is written beside the first row or above the first column, the labels are beside and above the others.
    assert (pixels[green[1] : green[3], : green[0] - 100 - grid.GAP - 1] == 765).all()
    assert (pixels[blue[1] : blue[3], : green[0] - 100 - grid.GAP - 1] < 765).any()
    assert (pixels[: green[1] - 1, : green[0] - grid.GAP] == 765).all()
    assert (pixels[: green[1] - 1, green[0] : green[2]] < 765).any()
    assert bare.shape[0] == labelled.height


def test_long_row_labels_are_wrapped_and_widen_the_grid_a_little():
    label = "a very long prompt about many things that would never fit on one line"
    wide, narrow = (draw_grid([[plain(RED)]], [text], ["a"], cell=100).width for text in (label, "cat"))
    assert narrow < wide < narrow + 1.5 * 100


def test_a_long_title_is_not_cut():
    title = "a title that is a good deal wider than a grid of one picture"
    picture = draw_grid([[plain(RED)]], ["cat"], ["a"], title=title, cell=60)
    pixels = np.asarray(picture.convert("L"))
    assert (pixels[:, -grid.MARGIN :] == 255).all()
    assert picture.width > 400


def test_headings_make_room_above_the_cells():
    plain_top = boxes(draw_grid([[plain(RED)]], [""], ["a"]), RED)[1]
    headed_top = boxes(draw_grid([[plain(RED)]], [""], ["a"], title="t", subtitle="s", heading="h"), RED)[1]
    assert headed_top - plain_top >= grid.TITLE + grid.TEXT + grid.SMALL


def test_the_layout_is_what_is_drawn():
    layout = GridLayout(rows=2, columns=3, cell=(10, 20), left=5, top=7, apart=1)
    assert layout.box(1, 2) == (
        5 + 2 * (10 + grid.GAP) + grid.SET_APART,
        7 + 20 + grid.GAP,
        15 + 2 * (10 + grid.GAP) + grid.SET_APART,
        27 + 20 + grid.GAP,
    )


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (([], [], ["a"]), "at least one picture"),
        (([[plain(RED)]], ["a", "b"], ["a"]), "1 rows of pictures and 2 row labels"),
        (([[plain(RED)], [plain(RED), plain(RED)]], ["a", "b"], ["a"]), "row 1 has 2 pictures"),
    ],
)
def test_labels_and_pictures_must_agree(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        draw_grid(*arguments)


def test_no_more_columns_than_there_are_can_be_set_apart():
    with pytest.raises(ValueError, match="cannot set 2 of 1 columns apart"):
        draw_grid([[plain(RED)]], ["a"], ["a"], apart=2)
