"""Maps on a model for the length of one call.

ComfyUI shares one model between all branches of a graph, so nothing may stay on it between calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ..maps import ActMap
from ..maps.arming import ArmedMap
from ..maps.hooks import attach
from ..maps.places import Places


class ArmedModel:
    """Several maps armed on one model; strength and rows of each may change from call to call.

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
        self._sites = [site for arm in self.arms for site in sorted(arm.sites, key=lambda site: order[site.name])]

    @property
    def modules(self) -> set[nn.Module]:
        """The modules whose output the maps move."""
        return {site.place.module for site in self._sites}

    @contextmanager
    def installed(self, device: torch.device) -> Iterator[None]:
        """Steer what runs on `device` inside; everything is as before afterwards."""
        for arm in self.arms:
            arm.load(device)
        with ExitStack() as undo:
            for site in self._sites:
                undo.callback(attach(site.place.module, site.move))
            yield
