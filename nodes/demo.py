"""ACTDemoModel."""

from __future__ import annotations

from comfy_api.latest import io

from .demo_model import load_demo_model
from .schema import schema


class ACTDemoModel(io.ComfyNode):
    """The bundled demo model, so that every template runs without a download."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ACTDemoModel",
            "AcT Demo Model",
            description="A tiny Stable Diffusion that comes with AcT Maps: 64 x 64 pixels, emoji in nine drawing styles, fast on "
            "a CPU. For trying things out.",
            search_aliases=["act demo", "tiny model", "test checkpoint"],
            inputs=[],
            outputs=[
                io.Model.Output("model", display_name="MODEL", tooltip="The diffusion model."),
                io.Clip.Output("clip", display_name="CLIP", tooltip="Its text encoder."),
                io.Vae.Output("vae", display_name="VAE", tooltip="Its autoencoder."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_demo_model())
