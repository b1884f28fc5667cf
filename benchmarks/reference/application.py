"""The reference's hooks and ours with the same map on the output of the same layer: outputs and time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor, nn

from actmaps.maps import ActMap, ActMapMetadata, steer
from measuring import Setup, side_by_side

from .checkout import as_affine, fitted_hook


@dataclass
class Application:
    """One map on the output of one layer."""

    case: str
    plain_ms: float
    reference_ms: float
    our_ms: float
    ratio: float
    """The reference's time on top of the layer, as a multiple of ours."""
    difference: float
    """Of the outputs, relative to how far the map moves them at most."""


@dataclass(frozen=True)
class Case:
    """A map and the kind of output that it is applied to: "tokens" (B, T, C) or a "picture" (B, C, H, W)."""

    method: str
    output: str
    spatial: str
    support: str = "all"
    strength: float = 1.0


# Where both move alike; where they do not is among the differences.
CASES = (
    Case("linear", "tokens", "affine"),
    Case("linear", "tokens", "affine", support="observed"),
    Case("linear", "tokens", "affine", strength=0.5),
    Case("gaussian", "tokens", "affine"),
    Case("mean", "tokens", "affine"),
    Case("linear", "picture", "shift"),
    Case("linear", "picture", "shift", support="observed"),
    Case("linear", "picture", "shift", strength=0.5),
    Case("gaussian", "picture", "affine"),
)
TOKENS, PICTURE = (2, 1024, 640), (2, 320, 64, 64)


@torch.no_grad()
def apply_both(case: Case, rounds: int, device: torch.device, dtype: torch.dtype) -> Application:
    """One map, applied by the reference's hook and by ours."""
    torch.manual_seed(0)
    size, units = (TOKENS, TOKENS[-1]) if case.output == "tokens" else (PICTURE, PICTURE[1])
    norm = (nn.LayerNorm(units) if case.output == "tokens" else nn.GroupNorm(32, units)).to(device, dtype)
    model, x = nn.Sequential(norm), torch.randn(size).to(device, dtype)
    source, target = (0.5 * torch.randn(64, units)).to(device), (1 + 2 * torch.randn(64, units)).to(device)
    hook = fitted_hook(case.method, source, target, support=case.support, strength=case.strength)
    act_map = ActMap({"model.0": as_affine(hook)}, ActMapMetadata(spatial=case.spatial, support=case.support))

    def forward() -> Tensor:
        return model(x)

    @contextmanager
    def hooked() -> Iterator[Callable[[], Tensor]]:
        handle = norm.register_forward_hook(hook)  # as the reference does
        yield forward
        handle.remove()

    @contextmanager
    def steered() -> Iterator[Callable[[], Tensor]]:
        with steer(model, act_map, case.strength):
            yield forward

    setups: dict[str, Setup] = {"plain": lambda: nullcontext(forward), "reference": hooked, "ours": steered}
    timings, outputs = side_by_side(setups, rounds, device), {}
    for name, setup in setups.items():
        with setup() as run:
            outputs[name] = run().float()
    extra = {name: timings.seconds(name) - timings.seconds("plain") for name in ("reference", "ours")}
    return Application(
        case=f"{case.method}, {case.output}, {case.spatial}, support {case.support}, strength {case.strength:g}",
        plain_ms=1000 * timings.seconds("plain"),
        reference_ms=1000 * timings.seconds("reference"),
        our_ms=1000 * timings.seconds("ours"),
        ratio=extra["reference"] / max(extra["ours"], 1e-9),
        difference=float(
            (outputs["reference"] - outputs["ours"]).abs().max()
            / (outputs["reference"] - outputs["plain"]).abs().max()
        ),
    )


def table(rows: list[Application]) -> Table:
    made = Table(
        title=f"Application to the output of a normalisation layer, tokens {TOKENS} or a picture {PICTURE}: milliseconds of layer and map",
        caption="ratio: of the reference's time on top of the layer to ours; difference: of the outputs, relative to the largest move",
    )
    for column in ("map and output", "layer alone", "reference", "ours", "ratio", "difference"):
        made.add_column(column, justify="left" if column == "map and output" else "right")
    for row in rows:
        times = (f"{value:.2f}" for value in (row.plain_ms, row.reference_ms, row.our_ms))
        made.add_row(row.case, *times, f"{row.ratio:.1f}", f"{row.difference:.0e}")
    return made
