"""An act map as one picture: where it acts and how, in order of execution."""

from __future__ import annotations

import re
from io import BytesIO
from itertools import groupby

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from ..maps import ActMap

INK, FAINT, GRID = "#16181d", "#6b7280", "#e5e7eb"
BEFORE = "#c9ced6"
COLOURS = ("#2f6fde", "#e4572e", "#1f9d8a", "#8a5cd6", "#c58a00")  # one per component

_BLOCK_NAMES = {
    "down_blocks": "down",
    "mid_block": "middle",
    "up_blocks": "up",
    "transformer_blocks": "block",
    "single_transformer_blocks": "single",
    "layers": "layer",
}
_BLOCK = re.compile(rf"(?:model\.)?({'|'.join(_BLOCK_NAMES)})\b(?:\.(\d+))?")


def largest_units(act_map: ActMap, count: int) -> list[tuple[str, int]]:
    """The `count` units that move most, as (site, index), largest first.

    A unit's size is `sqrt((scale - 1)^2 + shift^2)`, as in `ActMap.prune`.
    """
    sizes = torch.cat([_sizes(act_map, site) for site in act_map])
    places = [(site, unit) for site in act_map for unit in range(act_map[site].channels)]
    return [places[i] for i in sizes.topk(min(count, len(places))).indices.tolist()]


def plot_map(act_map: ActMap, *, width: int = 1200, height: int = 860) -> Image.Image:
    """Draw a map: transport cost per site before and after, how far units move per site, and all scales and shifts.

    Args:
        width, height: of the picture in pixels.

    Returns:
        An RGB picture.
    """
    figure = new_figure(width, height)
    axes = figure.subplot_mosaic(
        [["cost", "cost"], ["moves", "units"]], height_ratios=[1.15, 1], width_ratios=[1.55, 1]
    )
    figure.suptitle(_title(act_map), x=0.012, ha="left", fontsize=13, color=FAINT)
    _plot_costs(axes["cost"], act_map)
    _plot_moves(axes["moves"], act_map)
    _plot_units(axes["units"], act_map)
    return as_picture(figure)


def new_figure(width: int, height: int) -> Figure:
    """An empty figure of so many pixels, in the look of this package."""
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12, hspace=0.06)
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def as_picture(figure: Figure) -> Image.Image:
    """The figure as an RGB picture, its axes without decoration."""
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GRID)
        ax.tick_params(colors=FAINT, labelsize=9, length=0, which="both")
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def _title(act_map: ActMap) -> str:
    data = act_map.metadata
    units = sum(affine.channels for affine in act_map.values())
    name = data.name.replace("$", r"\$")
    facts = [f"{len(act_map)} sites, {units:,} units", f"{data.method} transport"]
    if data.n_source:
        facts.append(f"{data.n_source} → {data.n_target} prompts")
    return f"Act map “{name}”   ·   " + "   ·   ".join(facts)


def _plot_costs(ax: Axes, act_map: ActMap) -> None:
    """A grey dot at the cost before, a coloured one at what is left; the line in between is what the map does."""
    costs = act_map.metadata.costs
    title, explanation = (
        "How far source and target prompts are apart",
        "per site, in the order in which the model runs them",
    )
    _heading(
        ax,
        title,
        f"{explanation}; every site sees what the maps before it leave" if act_map.metadata.causal else explanation,
    )
    before, after = (np.array([costs.get(site, (0.0, 0.0))[i] for site in act_map]) for i in (0, 1))
    if not before.any():
        ax.text(0.5, 0.5, "this map stores no transport costs", transform=ax.transAxes, ha="center", color=FAINT)
        ax.set(xticks=[], yticks=[])
        return
    floor = before.max() * 1e-5  # rounding errors need no room
    before, after = np.maximum(before, floor), np.maximum(after, floor)
    places, colours = np.arange(len(act_map)), _site_colours(act_map)
    size = float(np.clip(2400 / len(act_map), 8, 60))
    ax.vlines(places, after, before, colors=colours, alpha=0.35, linewidth=size**0.5 / 2)
    ax.scatter(places, before, size, color=BEFORE, label="before the map", zorder=3)
    ax.scatter(places, after, size, color=colours, zorder=4)
    for component in act_map.components:
        label = f"after, {component.replace('_', ' ')}"
        ax.scatter([], [], size, color=_component_colour(act_map, component), label=label)
    ax.set(yscale="log", ylabel="mean squared distance")
    _style_sites(ax, act_map, characters=180)
    ax.legend(
        frameon=False, fontsize=9, labelcolor=INK, loc="lower right", bbox_to_anchor=(1, 1), ncols=4, handletextpad=0.2
    )


def _plot_moves(ax: Axes, act_map: ActMap) -> None:
    """Bands of the displacement of a typical activation, over units: median, half, nine tenths of them."""
    _heading(ax, "How far the map moves its units", "band: 5 % to 95 % of the units, line: the median")
    levels = np.array([np.quantile(_sizes(act_map, site).numpy(), (0.05, 0.25, 0.5, 0.75, 0.95)) for site in act_map])
    places = np.arange(len(act_map))
    for component, inside in _runs(act_map):
        colour = _component_colour(act_map, component)
        edges = np.concatenate([places[inside] - 0.5, places[inside][-1:] + 0.5])
        steps = np.concatenate([levels[inside], levels[inside][-1:]])
        ax.fill_between(edges, steps[:, 0], steps[:, 4], step="post", color=colour, alpha=0.16, linewidth=0)
        ax.fill_between(edges, steps[:, 1], steps[:, 3], step="post", color=colour, alpha=0.28, linewidth=0)
        ax.step(edges, steps[:, 2], where="post", color=colour, linewidth=1.6)
    ax.set_ylabel("displacement")
    ax.set_ylim(bottom=0)
    _style_sites(ax, act_map, characters=100)


def _plot_units(ax: Axes, act_map: ActMap) -> None:
    """Density of all units over scale and shift, the identity marked."""
    _heading(ax, "Scale and shift of every unit", "the ring marks a unit that stays as it is")
    scale, shift = (torch.cat([getattr(m, part) for m in act_map.values()]).numpy() for part in ("scale", "shift"))
    x, y = _reach(scale, 1), _reach(shift, 0)
    ax.axhline(0, color=GRID, linewidth=1, zorder=0)
    ax.axvline(1, color=GRID, linewidth=1, zorder=0)
    shades = LinearSegmentedColormap.from_list("units", ("#cfdcf5", COLOURS[0], "#0b1f4b"))
    ax.hexbin(scale, shift, gridsize=46, extent=(*x, *y), norm=LogNorm(), cmap=shades, mincnt=1, linewidths=0.1)
    ax.plot(1, 0, "o", markersize=11, markerfacecolor="none", markeredgecolor=COLOURS[1], markeredgewidth=1.8)
    ax.set(xlim=x, ylim=y, xlabel="scale", ylabel="shift")
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set(color=FAINT, size=9)


def _reach(values: np.ndarray, neutral: float) -> tuple[float, float]:
    """Where nearly all values lie, with the neutral one and a margin."""
    low, high = np.quantile(values, (0.002, 0.998))
    low, high = min(float(low), neutral - 0.05), max(float(high), neutral + 0.05)
    margin = 0.05 * (high - low)
    return low - margin, high + margin


def _heading(ax: Axes, title: str, explanation: str) -> None:
    ax.set_title(title, loc="left", fontsize=12, color=INK, pad=22)
    ax.annotate(explanation, (0, 1), (0, 8), "axes fraction", "offset points", fontsize=9, color=FAINT)


def _sizes(act_map: ActMap, site: str) -> torch.Tensor:
    return torch.hypot(act_map[site].scale - 1, act_map[site].shift)


def _site_colours(act_map: ActMap) -> list[str]:
    return [_component_colour(act_map, site.split(".", 1)[0]) for site in act_map]


def _component_colour(act_map: ActMap, component: str) -> str:
    return COLOURS[act_map.components.index(component) % len(COLOURS)]


def _runs(act_map: ActMap) -> list[tuple[str, np.ndarray]]:
    """Stretches of sites of one component: its name and the places."""
    places: dict[str, list[int]] = {}
    for index, site in enumerate(act_map):
        places.setdefault(site.split(".", 1)[0], []).append(index)
    return [(component, np.array(indices)) for component, indices in places.items()]


def _group(site: str) -> str:
    """The part of the model that a site belongs to, in few words: "unet.down_blocks.1.attentions.0.norm" -> "down 1"."""
    component, _, path = site.partition(".")
    block = _BLOCK.match(path)
    if block is None or component.startswith("text_encoder"):
        return "out" if path.startswith(("conv_norm_out", "norm_out")) else component.replace("_", " ")
    kind = _BLOCK_NAMES[block[1]]
    return f"{kind} {block[2]}" if block[2] else kind


def _style_sites(ax: Axes, act_map: ActMap, characters: int) -> None:
    """An axis that counts sites, with the parts of the model named below it."""
    ax.set_xlim(-0.7, len(act_map) - 0.3)
    ax.yaxis.label.set(color=FAINT, size=9)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    _name_groups(ax, act_map, characters)


def _name_groups(ax: Axes, act_map: ActMap, characters: int) -> None:
    """Below the axis, which has room for so many `characters`, the parts of the model; a thin line where one ends."""
    groups = [
        (name, [index for index, _ in sites]) for name, sites in groupby(enumerate(act_map), lambda s: _group(s[1]))
    ]
    for _, indices in groups[1:]:
        ax.axvline(indices[0] - 0.5, color=GRID, linewidth=1, zorder=0)
    # The largest parts get their names first; those whose name would run into another stay without.
    named: list[tuple[float, float, str]] = []
    for name, indices in sorted(groups, key=lambda group: -len(group[1])):
        middle, half = (indices[0] + indices[-1]) / 2, (len(name) + 2) / 2 * len(act_map) / characters
        if all(abs(middle - other) >= half + other_half for other, other_half, _ in named):
            named.append((middle, half, name))
    ax.set_xticks([middle for middle, _, _ in named], [name for _, _, name in named])
