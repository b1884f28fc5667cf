"""ACTInspectMap."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io

from ..evaluation.plots import plot_map
from ..maps import ActMap
from .fit import summary
from .schema import ActMapType, schema


class ACTInspectMap(io.ComfyNode):
    """Shows where a map acts and how strongly."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ACTInspectMap",
            "Inspect AcT Map",
            description="Plot where an act map acts and how strongly, and say how it was fitted.",
            search_aliases=["plot act map", "act map info"],
            inputs=[ActMapType.Input("act_map", tooltip="From Fit, Load or Blend AcT Map.")],
            outputs=[
                io.Image.Output("plot", display_name="plot", tooltip="Transport cost, scales and shifts by site."),
                io.String.Output("summary", display_name="summary", tooltip="How it was fitted, and on what."),
            ],
        )

    @classmethod
    def execute(cls, act_map: ActMap) -> io.NodeOutput:
        picture = np.asarray(plot_map(act_map).convert("RGB"), dtype=np.float32) / 255
        return io.NodeOutput(torch.from_numpy(picture)[None], summary(act_map))
