"""An act map as tables for the terminal: how it was fitted, what it costs per site, which units move most."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from ..maps import ActMap
from .plots import largest_units


def plain_table(title: str | None = None, *headers: str, numbers: int = 0) -> Table:
    """A table without frame, the last `numbers` columns right-aligned; the first column wraps rather than being cut."""
    table = Table(
        title=title and f"\n{title}",
        title_justify="left",
        title_style="bold",
        show_header=bool(headers),
        header_style="dim",
        box=None,
        pad_edge=False,
    )
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index >= len(headers) - numbers else "left", overflow="fold")
    return table


def summary_table(act_map: ActMap) -> Table:
    """What the metadata says, two columns; empty fields are left out."""
    data = act_map.metadata
    parts = [f"{sum(site.startswith(f'{part}.') for site in act_map)} in the {part}" for part in act_map.components]
    pooling = f"{data.pooling} over positions"
    if data.pooling == "none":
        pooling = f"{data.positions} positions per prompt" if data.positions else "every position"
    before, after = (sum(cost[i] for cost in data.costs.values()) for i in (0, 1))
    rows = {
        "description": data.description,
        "sites": f"{len(act_map)} ({', '.join(parts)}), {sum(affine.channels for affine in act_map.values())} units",
        "fitted on": f"{data.n_source} source and {data.n_target} target prompts" if data.n_source else "",
        "method": f"{data.method}, {pooling}, support {data.support}, {'causal' if data.causal else 'all sites at once'}",
        "timesteps": ", ".join(f"{t:.2g}" for t in data.timesteps),
        "acts": "all through the run"
        if data.window == (0, 1)
        else f"from {data.window[0]:.0%} to {data.window[1]:.0%} of the run",
        "moves": {"generated": "generated tokens", "last": "the prompt's last token"}.get(data.scope, ""),
        "steers": {"cond": "conditional rows", "both": "all rows"}.get(data.rows, data.rows),
        "transport cost": f"{before:.3g} before, {after:.3g} after" if data.costs else "",
        "strength": f"{data.recommended_strength:g} recommended",
        "made for": ", ".join(f"{part}: {kind}" for part, kind in data.architecture.items()),
        "model": data.model_name,
        "presets": ", ".join(data.presets),
        "licence": data.licence,
        "created": data.created,
        "with": ", ".join(f"{package} {number}" for package, number in data.libraries.items()),
    }
    table = plain_table()
    table.add_column(style="dim")
    table.add_column()
    table.title, table.title_style = f"\n{escape(data.name)}", "bold"
    for key, value in rows.items():
        if value:
            table.add_row(key, escape(value))
    return table


def site_table(act_map: ActMap, top: int | None = None) -> Table:
    """Transport cost per site: of the `top` most expensive ones, or with None of all in order of execution."""
    costs = act_map.metadata.costs
    sites = list(act_map)
    title = "Transport cost per site, in order of execution"
    if top is not None and len(sites) > top:
        sites = sorted(sites, key=lambda site: -costs.get(site, (0.0, 0.0))[0])[:top]
        title = f"Transport cost: the {top} most expensive of {len(act_map)} sites"
    table = plain_table(title, "site", "units", "before", "after", "left", numbers=4)
    for site in sites:
        row = [escape(site), str(act_map[site].channels)]
        if site in costs:
            before, after = costs[site]
            row += [f"{before:.3g}", f"{after:.3g}", f"{after / before:.0%}" if before > 0 else "-"]
        table.add_row(*row)
    return table


def unit_table(act_map: ActMap, top: int) -> Table:
    """The `top` units that move most."""
    table = plain_table("Units that move most", "site", "unit", "scale", "shift", numbers=3)
    for site, unit in largest_units(act_map, top):
        affine = act_map[site]
        table.add_row(escape(site), str(unit), f"{affine.scale[unit]:.3f}", f"{affine.shift[unit]:+.3f}")
    return table
