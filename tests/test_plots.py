"""What pictures and tables of a map say."""

import numpy as np
import pytest
import torch
from rich.console import Console

from actmaps.evaluation import plots
from actmaps.evaluation.plots import largest_units, plot_map
from actmaps.evaluation.tables import site_table, summary_table, unit_table
from actmaps.maps import ActMap, ActMapMetadata, AffineMap

FIRST, SECOND = "text_encoder.encoder.layers.0.layer_norm1", "unet.down_blocks.0.resnets.0.norm1"


def two_sites(**metadata):
    maps = {
        FIRST: AffineMap(torch.tensor([1.0, 1.0, 4.0]), torch.tensor([0.0, -2.0, 0.0])),
        SECOND: AffineMap(torch.tensor([0.5, 1.0]), torch.tensor([0.0, 0.1])),
    }
    return ActMap(maps, ActMapMetadata(name="ink", **metadata))


def printed(table):
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def pixels_of(picture, colour):
    """How many pixels are nearly of a colour."""
    target = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(np.asarray(picture, int) - target).max(-1) < 12).sum())


def test_largest_units_come_first():
    assert largest_units(two_sites(), 4) == [(FIRST, 2), (FIRST, 1), (SECOND, 0), (SECOND, 1)]


def test_no_more_units_than_there_are():
    assert len(largest_units(two_sites(), 99)) == 5


def test_plot_has_the_size_asked_for():
    costs = {FIRST: (2.0, 0.1), SECOND: (0.5, 0.5)}
    assert plot_map(two_sites(costs=costs), width=900, height=700).size == (900, 700)


def test_plot_shows_every_component_in_its_colour():
    picture = plot_map(two_sites(costs={FIRST: (2.0, 0.1), SECOND: (0.5, 0.2)}))
    assert pixels_of(picture, plots.COLOURS[0]) > 100
    assert pixels_of(picture, plots.COLOURS[1]) > 100
    alone = plot_map(two_sites(costs={FIRST: (2.0, 0.1)}).select(FIRST))
    # What is left of the second colour is the ring that marks the identity.
    assert pixels_of(alone, plots.COLOURS[1]) < pixels_of(picture, plots.COLOURS[1]) / 2


@pytest.mark.parametrize("costs", [{}, {FIRST: (0.0, 0.0), SECOND: (0.0, 0.0)}])
def test_plot_of_a_map_without_costs_has_no_dots_for_them(costs):
    with_costs = plot_map(two_sites(costs={FIRST: (2.0, 0.1), SECOND: (0.5, 0.2)}))
    assert pixels_of(plot_map(two_sites(costs=costs)), plots.BEFORE) < pixels_of(with_costs, plots.BEFORE)


def test_a_map_of_the_identity_can_be_plotted():
    picture = plot_map(ActMap({SECOND: AffineMap.identity(4)}))
    assert picture.mode == "RGB"
    assert picture.size == (1200, 860)


@pytest.mark.parametrize(
    ("site", "group"),
    [
        ("unet.down_blocks.1.attentions.0.norm", "down 1"),
        ("unet.mid_block.resnets.0.norm1", "middle"),
        ("unet.up_blocks.0.resnets.0.norm1", "up 0"),
        ("unet.conv_norm_out", "out"),
        ("transformer.transformer_blocks.3.norm1", "block 3"),
        ("transformer.single_transformer_blocks.12:image", "single 12"),
        ("model.model.layers.7.input_layernorm", "layer 7"),
        ("text_encoder_2.final_layer_norm", "text encoder 2"),
    ],
)
def test_sites_are_grouped_by_part_of_the_model(site, group):
    assert plots._group(site) == group


def test_summary_names_modes_and_leaves_out_what_is_unknown():
    text = printed(summary_table(two_sites(method="mean", n_source=3, n_target=4, costs={FIRST: (2.0, 0.5)})))
    assert "2 (1 in the text_encoder, 1 in the unet), 5 units" in text
    assert "3 source and 4 target prompts" in text
    assert "2 before, 0.5 after" in text
    assert "mean, every position, support all, causal" in text
    assert "licence" not in text


def test_site_table_lists_the_most_expensive_or_all_in_order():
    act_map = two_sites(costs={FIRST: (0.5, 0.1), SECOND: (2.0, 0.5)})
    assert FIRST not in printed(site_table(act_map, 1))
    assert "25%" in printed(site_table(act_map, 1))
    full = printed(site_table(act_map))
    assert full.index(FIRST) < full.index(SECOND)
    assert "20%" in full


def test_unit_table_shows_scale_and_shift():
    text = printed(unit_table(two_sites(), 2))
    assert "4.000" in text
    assert "-2.000" in text
    assert SECOND not in text
