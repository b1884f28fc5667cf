"""ACTFitMap and ACTPresetPrompts."""

from __future__ import annotations

from io import StringIO
from time import monotonic
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy.utils import ProgressBar
from comfy_api.latest import io

from ..maps import ActMap
from ..maps.methods import TRANSPORTS
from ..maps.pooling import POOLINGS
from ..maps.presets import list_presets, load_preset
from .fitting import SITES, Fit, Sampling
from .schema import ActMapType, advanced, percent, schema

_PROGRESS_STEPS = 1000


class ACTFitMap(io.ComfyNode):
    """Fits a map from two prompt sets."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ACTFitMap",
            "Fit AcT Map",
            description="Learn an act map from two lists of prompts: what the model draws now, and what it should draw. "
            "No training: every prompt is sampled once and looked at a few times.",
            search_aliases=["activation transport", "train style", "fit steering", "make act map"],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model to fit on, not steered itself. LoRAs are fine."),
                io.Clip.Input("clip", tooltip="Its text encoders, not steered themselves."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent of the size that you sample; what is in it does not matter.",
                ),
                io.String.Input(
                    "source_prompts",
                    multiline=True,
                    dynamic_prompts=False,
                    tooltip="What the model draws now, one prompt per "
                    "line, for example: a cat. A few dozen give a steadier map than a few.",
                ),
                io.String.Input(
                    "target_prompts",
                    multiline=True,
                    dynamic_prompts=False,
                    tooltip="What it should draw, one prompt per line, "
                    "best about the same subjects, for example: a cat, watercolour.",
                ),
                io.String.Input("name", default="my style", tooltip="Name of the map, in reports and errors."),
                io.Combo.Input(
                    "sites",
                    options=list(SITES),
                    default="denoiser",
                    tooltip="What the map acts on. Styles: the denoiser. "
                    "Leaving something out: text encoder and denoiser. pattern: what site_pattern says.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(TRANSPORTS),
                    default="linear",
                    tooltip="How the two sets are matched. linear: the optimal transport map of Activation Transport. "
                    "mean: shifts only. gaussian: by mean and spread.",
                ),
                io.Int.Input(
                    "timesteps",
                    default=4,
                    min=1,
                    max=32,
                    tooltip="At how many noise levels the model is looked at. More is "
                    "steadier and takes longer and more memory.",
                ),
                percent("start_percent", "Start of the part of the run in which the map will act.", 0.0),
                percent("end_percent", "End of that part; use the same in Apply AcT Map.", 0.6),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 2**20,
                    control_after_generate=False,  # a new seed means a new fit: only when asked for
                    tooltip="Of the noise and of the positions drawn. The same seed gives the same map.",
                ),
                io.Int.Input(
                    "steps", default=20, min=1, max=200, tooltip="Steps of the sampling run whose latents are used."
                ),
                io.Float.Input(
                    "cfg",
                    default=4.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Guidance of that run, as you sample. 1 for models without guidance, such as FLUX.",
                ),
                advanced(
                    io.Combo.Input(
                        "sampler_name",
                        options=comfy.samplers.SAMPLER_NAMES,
                        default="euler",
                        tooltip="Sampler of that run.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "scheduler",
                        options=comfy.samplers.SCHEDULER_NAMES,
                        default="simple",
                        tooltip="Noise levels of that run.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "rows",
                        options=["positive", "both"],
                        default="positive",
                        tooltip="Fit on the positive conditioning only, or on the empty negative prompt too.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "latents",
                        options=["target", "own", "source"],
                        default="target",
                        tooltip="Whose sampling run the denoiser "
                        "looks at. target: what it will see when it is steered.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "pooling",
                        options=list(POOLINGS),
                        default="none",
                        tooltip="none: every position of a picture is a sample. Otherwise one sample per prompt.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "positions",
                        default=64,
                        min=1,
                        max=65536,
                        tooltip="With pooling none, positions drawn per prompt.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "support",
                        options=["all", "observed"],
                        default="all",
                        tooltip="observed: move only activations in the range that the source prompts showed.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "batch_size", default=8, min=1, max=256, tooltip="Prompts that go through the model together."
                    )
                ),
                advanced(
                    io.String.Input(
                        "site_pattern",
                        default="",
                        tooltip='With sites "pattern": a regular expression that matches whole site '
                        r"names, for example unet\..*attentions.*norm2",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "offload",
                        default=False,
                        tooltip="Keep the activations of waiting prompts in main memory: slower, for when "
                        "the graphics card's memory runs out.",
                    )
                ),
            ],
            outputs=[
                ActMapType.Output(
                    "act_map", display_name="ACT_MAP", tooltip="The map, for Apply, Save, Blend or Inspect AcT Map."
                ),
                io.String.Output("report", display_name="report", tooltip="Sites, samples, time and transport cost."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        latent_image: dict[str, Any],
        source_prompts: str,
        target_prompts: str,
        name: str,
        sites: str,
        method: str,
        timesteps: int,
        start_percent: float,
        end_percent: float,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str = "euler",
        scheduler: str = "simple",
        rows: str = "positive",
        latents: str = "target",
        pooling: str = "none",
        positions: int = 64,
        support: str = "all",
        batch_size: int = 8,
        site_pattern: str = "",
        offload: bool = False,
    ) -> io.NodeOutput:
        latent = comfy.sample.fix_empty_latent_channels(
            model, torch.zeros_like(latent_image["samples"][:1], device="cpu")
        )
        bar = ProgressBar(_PROGRESS_STEPS)

        def report(fraction: float) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(int(fraction * _PROGRESS_STEPS))

        started = monotonic()
        fit = Fit(
            model,
            clip,
            Sampling(latent, steps, cfg, sampler_name, scheduler, seed),
            timesteps=timesteps,
            window=(start_percent, end_percent),
            rows=rows,
            latents=latents,
            batch_size=batch_size,
            report=report,
            options={
                "method": method,
                "pooling": pooling,
                "positions": positions,
                "support": support,
                "seed": seed,
                "offload": offload,
            },
        )
        act_map = fit.run(
            _lines(source_prompts), _lines(target_prompts), sites, site_pattern, name.strip() or "my style"
        )
        return io.NodeOutput(act_map, f"fitted in {monotonic() - started:.1f} s\n{summary(act_map)}")


def _lines(text: str) -> list[str]:
    """The prompts of a text box: its lines that are not empty."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def summary(act_map: ActMap) -> str:
    """What a map is and how it was fitted, as plain text."""
    from rich.console import Console

    from ..evaluation.tables import site_table, summary_table

    text = StringIO()
    Console(file=text, width=110, no_color=True).print(summary_table(act_map), site_table(act_map, top=10))
    return "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())


class ACTPresetPrompts(io.ComfyNode):
    """The two prompt lists of a preset."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ACTPresetPrompts",
            "AcT Preset Prompts",
            description="Write the two prompt lists for Fit AcT Map from a preset: a style, a concept, or something to leave out.",
            search_aliases=["act preset", "style preset", "negation preset", "prompt pairs"],
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=list_presets(),
                    tooltip="Built-in presets, and your own from ~/.config/actmaps/presets.",
                ),
                io.String.Input(
                    "subjects",
                    multiline=True,
                    default="",
                    dynamic_prompts=False,
                    tooltip="What the prompts are about, one subject per line. Empty: the preset's own list.",
                ),
                io.Int.Input(
                    "count", default=32, min=0, max=4096, tooltip="How many of the subjects to draw; 0 takes all."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=False,
                    tooltip="Of the draw of subjects and wordings.",
                ),
            ],
            outputs=[
                io.String.Output("source_prompts", display_name="source prompts", tooltip="What the model draws now."),
                io.String.Output("target_prompts", display_name="target prompts", tooltip="What it should draw."),
            ],
        )

    @classmethod
    def execute(cls, preset: str, subjects: str, count: int, seed: int) -> io.NodeOutput:
        if preset not in list_presets():  # a name, never a path: workflows come from anywhere
            raise ValueError(f"there is no preset {preset!r}; known: {', '.join(list_presets())}")
        chosen, own = load_preset(preset), _lines(subjects) or None
        available = len(own or chosen.subjects)
        source, target = chosen.prompts(own, seed, min(count, available) or None)
        return io.NodeOutput("\n".join(source), "\n".join(target))
