"""Strengths typed as text."""

import subprocess
import sys

import pytest

from actmaps.pipelines.strength_text import parse_block_strengths, parse_curve

SITES = [
    "text_encoder.final_layer_norm",
    "unet.down_blocks.0.norm1",
    "unet.up_blocks.1.norm1",
    "unet.up_blocks.10.norm1",
]
STREAMS = ["transformer.blocks.1:image", "transformer.blocks.1:text"]


@pytest.mark.parametrize("text", ["0:1.2, 0.5:0.8, 0.6:0", "0.6 : 0\n 0:1.2,\n.5: .8\n"])
def test_a_curve_goes_through_its_points_in_any_order(text):
    curve = parse_curve(text)

    assert [curve(step, 20) for step in (0, 5, 10, 11, 12, 19)] == pytest.approx([1.2, 1.0, 0.8, 0.4, 0.0, 0.0])


def test_factors_may_be_negative_and_above_one():
    curve = parse_curve("0:-1, 1:3")

    assert curve(1, 2) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0:1, .5", r"'\.5' has no colon; .* such as \"0:1\.2, 0\.5:0\.8, 0\.6:0\""),
        ("0:1, half:0", r"'half' in 'half:0' is no number; .* such as \"0:1\.2"),
        ("0:1, 0.5:strong", r"'strong' in '0\.5:strong' is no number; .* such as \"0:1\.2"),
        ("0:nan", r"'nan' in '0:nan' is no number"),
        ("0:1, 60:0", r"'60:0' is outside of the run, which goes from 0 to 1; .* such as \"0:1\.2"),
        ("0.5:1, .50:0", r"'\.50:0' is a second point at 0\.5"),
        (" , \n", "has no point"),
    ],
)
def test_a_malformed_curve_is_refused_by_its_culprit(text, message):
    with pytest.raises(ValueError, match=f"strength_curve:? ?.*{message}"):
        parse_curve(text)


def test_the_longest_beginning_of_a_name_counts_and_one_where_none_fits():
    factors = parse_block_strengths("unet: 0.5\n\nunet.up_blocks.1: 0\n", SITES)

    assert factors == dict(zip(SITES, (1.0, 0.5, 0.0, 0.5), strict=True))


def test_without_lines_every_factor_is_one():
    assert parse_block_strengths(" \n", SITES) == dict.fromkeys(SITES, 1.0)


def test_streams_are_named_with_their_colon():
    assert parse_block_strengths("transformer.blocks.1:image: 0.2", STREAMS) == {STREAMS[0]: 0.2, STREAMS[1]: 1.0}
    assert parse_block_strengths("transformer.blocks.1: 0.2", STREAMS) == dict.fromkeys(STREAMS, 0.2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unet.up_blocks 0.5", r"'unet\.up_blocks 0\.5' has no colon; .* such as \"unet\.up_blocks: 0\.5\""),
        ("unet.up_blocks: half", r"'half' in 'unet\.up_blocks: half' is no number; .* such as"),
        ("unet.upblocks: 0.5", r"no site of the map begins with 'unet\.upblocks'; closest: unet\.up_blocks,"),
        ("unet.up_block: 0.5", r"no site of the map begins with 'unet\.up_block'; closest: unet\.up_blocks,"),
        ("unet: 1\nunet: 0.5", r"'unet: 0\.5' is a second factor for 'unet'"),
        (": 0.5", "no site of the map begins with ''"),
    ],
)
def test_malformed_blocks_are_refused_by_their_culprit(text, message):
    with pytest.raises(ValueError, match=f"block_strengths: {message}"):
        parse_block_strengths(text, SITES)


def test_parsing_needs_no_diffusers_which_comfyui_lacks():
    code = "import sys, actmaps.pipelines.strength_text; print('diffusers' in sys.modules or 'transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
