"""ACTApplyMap and ACTBlendMaps."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io
from torch import Tensor

from ..maps import ActMap
from ..maps.masks import as_mask
from ..maps.sites import closest
from ..pipelines.strength_text import parse_block_strengths, parse_curve
from .schema import ActMapType, advanced, percent, schema, strength
from .steering import AppliedMap, steered_clip, steered_model
from .translation import denoiser_places, encoder_places


class ACTApplyMap(io.ComfyNode):
    """Puts a map on MODEL and CLIP, as a LoRA loader does with a LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ACTApplyMap",
            "Apply AcT Map",
            description="Steer a model with an act map: a style, a concept, or something to leave out. "
            "Chain several to add their effects up.",
            search_aliases=["activation transport", "steering", "style strength", "concept slider"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The diffusion model to steer. It stays as it is; a steered copy comes out."
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoders, for maps that act on them. Encode the positive prompt "
                    "with the CLIP that comes out and the negative prompt with the one from before.",
                ),
                ActMapType.Input("act_map", tooltip="From Fit, Load or Blend AcT Map."),
                strength(
                    "strength_model",
                    "How far the diffusion model is moved: 0 not at all, 1 as fitted, above 1 beyond it, "
                    "below 0 the other way.",
                ),
                strength(
                    "strength_clip", "How far the text encoders are moved. No effect with maps of the denoiser only."
                ),
                percent(
                    "start_percent", "Where in the sampling run the map begins to act on the diffusion model.", 0.0
                ),
                percent(
                    "end_percent",
                    "Where in the run it ends. Early steps decide the look; a map that acts to the end can "
                    "cost content.",
                    0.6,
                ),
                io.Combo.Input(
                    "rows",
                    options=["positive", "both"],
                    default="positive",
                    tooltip="Steer the positive conditioning only, which the guidance scale then amplifies, or the negative one too.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the picture the map acts on the diffusion model: in full where it is white, not at all where "
                    "it is black. Any size.",
                ),
                advanced(
                    io.Boolean.Input(
                        "partial",
                        default=False,
                        tooltip="Apply the sites that this model has, where the map was made for another one, instead of stopping.",
                    )
                ),
                advanced(
                    io.String.Input(
                        "strength_curve",
                        default="",
                        optional=True,
                        tooltip="A factor on strength_model that changes over the run, as points percent:factor with straight lines "
                        "between them: 0:1.2, 0.5:0.8, 0.6:0. Percents count as in start_percent and end_percent, outside of which "
                        "nothing is moved. Empty: 1 all the time.",
                    )
                ),
                advanced(
                    io.String.Input(
                        "block_strengths",
                        default="",
                        multiline=True,
                        dynamic_prompts=False,
                        optional=True,
                        tooltip="Factors on the strengths by the beginning of site names, one per line: unet.up_blocks: 0.5. The longest "
                        "that fits a site counts, and 1 for what none fits. Inspect AcT Map shows such names.",
                    )
                ),
            ],
            outputs=[
                io.Model.Output("steered_model", display_name="MODEL", tooltip="The steered model."),
                io.Clip.Output("steered_clip", display_name="CLIP", tooltip="The steered text encoders."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        act_map: ActMap,
        strength_model: float,
        strength_clip: float,
        start_percent: float,
        end_percent: float,
        rows: str,
        partial: bool = False,
        clip: CLIP | None = None,
        mask: Tensor | None = None,
        strength_curve: str = "",
        block_strengths: str = "",
    ) -> io.NodeOutput:
        if start_percent >= end_percent:
            raise ValueError(f"start_percent ({start_percent:g}) must be below end_percent ({end_percent:g})")
        curve = parse_curve(strength_curve) if strength_curve.strip() else None
        factors = parse_block_strengths(block_strengths, act_map)
        denoiser = denoiser_places(model.model)
        encoders = {} if clip is None else encoder_places(clip.cond_stage_model)
        known = {*denoiser, *(site for places in encoders.values() for site in places)}
        missing = [site for site in act_map if site not in known]
        if missing and not partial:
            raise ValueError(_unmatched(act_map, missing, known, has_clip=clip is not None))
        if len(missing) == len(act_map):
            raise ValueError(
                f"act map {act_map.metadata.name!r} has no site in common with this model; it cannot be applied"
            )
        if any(factor != 1 for factor in factors.values()):
            moved = {site: affine.at(factors[site]) for site, affine in act_map.items() if factors[site] != 0}
            if not moved:
                return io.NodeOutput(model, clip)
            act_map = ActMap(moved, act_map.metadata)
        of_denoiser = [site for site in act_map if site in denoiser]
        if of_denoiser and strength_model != 0:
            part = act_map if len(of_denoiser) == len(act_map) else act_map.select(of_denoiser)
            area = None if mask is None else as_mask(mask.clamp(0, 1))
            applied = AppliedMap(part, strength_model, start_percent, end_percent, rows, mask=area, curve=curve)
            model = steered_model(model, applied)
        if clip is not None and strength_clip != 0:
            clip = steered_clip(clip, act_map, strength_clip)
        return io.NodeOutput(model, clip)


def _unmatched(act_map: ActMap, missing: list[str], known: set[str], has_clip: bool) -> str:
    listed = "\n  ".join(missing[:20]) + (f"\n  and {len(missing) - 20} more" if len(missing) > 20 else "")
    made_for = ", ".join(f"{part}: {kind}" for part, kind in act_map.metadata.architecture.items()) or "unknown"
    remedy = "Choose a map that was fitted on this kind of model, or set partial to apply the other sites."
    if not has_clip and all(site.startswith("text_encoder") for site in missing):
        remedy = "They belong to the text encoders: connect CLIP, or set partial to steer the diffusion model alone."
    return (
        f"act map {act_map.metadata.name!r} (made for {made_for}) has {len(missing)} of {len(act_map)} sites that this model "
        f"lacks:\n  {listed}\nClosest to the first: {closest(missing[0], sorted(known))}. {remedy}"
    )


class ACTBlendMaps(io.ComfyNode):
    """Two maps as one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ACTBlendMaps",
            "Blend AcT Maps",
            description="Combine two act maps into one, each at its own weight. Chain for more than two.",
            search_aliases=["merge act maps", "mix styles", "combine"],
            inputs=[
                ActMapType.Input("map_a", tooltip="The first map."),
                strength("weight_a", "How much of the first map; below 0 takes it away.", 0.5),
                ActMapType.Input("map_b", tooltip="The second map."),
                strength("weight_b", "How much of the second map; below 0 takes it away.", 0.5),
            ],
            outputs=[
                ActMapType.Output("act_map", display_name="ACT_MAP", tooltip="The blended map, for Apply AcT Map.")
            ],
        )

    @classmethod
    def execute(cls, map_a: ActMap, weight_a: float, map_b: ActMap, weight_b: float) -> io.NodeOutput:
        if map_a is map_b:  # two weights of one map are one weight
            return io.NodeOutput(ActMap.blend({map_a: weight_a + weight_b}))
        return io.NodeOutput(ActMap.blend({map_a: weight_a, map_b: weight_b}))
