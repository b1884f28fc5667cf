"""Maps on a model for the length of one call, by a `forward` of their own on each module that they move.

ComfyUI shares one model between all branches of a graph, so nothing may stay on it between calls. An instance attribute
`forward` is seen by `torch.compile` whenever it comes and goes, which a hook is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..maps import ActMap
from ..maps.places import Places
from ..maps.steering import ArmedMap, ArmedSite

Forward = Callable[..., Any]


class ArmedModel:
    """Several maps armed on one model; strength and rows of each may change from call to call.

    The forwards are made once and kept, so that a compiled model is compiled once for all strengths.

    Args:
        places: where sites lie in the model.
        act_maps: the maps, in the order in which they apply. The same map may occur more than once.

    Raises:
        ValueError: if the model lacks sites of a map or has other unit counts.
    """

    def __init__(self, places: Places, act_maps: Sequence[ActMap]) -> None:
        self.arms = [ArmedMap(act_map, places) for act_map in act_maps]
        # Sites that share a module are moved in the order of the places, whatever their order in a map.
        order = {site: number for number, site in enumerate(places)}
        moves: dict[nn.Module, list[tuple[ArmedMap, ArmedSite]]] = {}
        for arm in self.arms:
            for site in sorted(arm.sites, key=lambda site: order[site.name]):
                moves.setdefault(site.place.module, []).append((arm, site))
        self._moves = {module: tuple(of_module) for module, of_module in moves.items()}
        self._forwards = {
            module: _moving(type(module).forward.__get__(module), of_module)
            for module, of_module in self._moves.items()
        }

    @property
    def modules(self) -> set[nn.Module]:
        """The modules whose output the maps move."""
        return set(self._moves)

    @contextmanager
    def installed(self, device: torch.device) -> Iterator[None]:
        """Steer what runs on `device` inside; everything is as before afterwards."""
        for arm in self.arms:
            arm.load(device)
        before = {}
        try:
            for module, forward in self._forwards.items():
                own = module.__dict__.get("forward")
                before[module] = own
                # Someone else's forward, such as an object patch, goes on working inside ours.
                module.__dict__["forward"] = forward if own is None else _moving(own, self._moves[module])
            yield
        finally:
            for module, own in before.items():
                if own is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = own


def _moving(plain: Forward, moves: Sequence[tuple[ArmedMap, ArmedSite]]) -> Forward:
    """`plain` with the activations in its output moved by each of `moves` in turn."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        for arm, site in moves:
            output = arm.move(site, output)
        return output

    return forward
