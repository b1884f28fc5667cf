"""Export: a map at a strength as a file in the format of LoRA, for programs that know nothing of act maps.

A folded map is a difference of weights, `.diff` of a weight and `.diff_b` of a bias, under the names that ComfyUI's own LoRA
loader knows. The loader's strength multiplies the difference, which is what a map's strength does.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .act_map import ActMap
from .files import write_tensors
from .foldable import NotFoldableError
from .folding import FoldedLayer, plan_fold, refusal
from .places import Components, as_components

# Projections that ComfyUI keeps in one weight, whose biases a LoRA file cannot reach.
_FUSED = re.compile(r".*\.(to_[qkv]|add_[qkv]_proj|proj_mlp)")


def save_as_lora(
    act_map: ActMap,
    model: nn.Module | Components,
    path: str | PathLike[str],
    strength: float = 1.0,
    *,
    partial: bool = False,
) -> tuple[str, ...]:
    """Write a map at a strength as a LoRA file, which ComfyUI's "Load LoRA" reads without this package.

    What is stored are differences to the weights of `model`, so the file is for this model; on one whose norms have other weights it
    does about the same. It acts on all rows and steps, whatever the map's `rows` and `window`.

    Args:
        act_map: the map.
        model: a module or {component name: module}, with the weights that the file will be used on: U-Nets of Stable Diffusion,
            the transformers of FLUX.1 and Stable Diffusion 3, and their text encoders.
        path: a .safetensors file. It appears complete or not at all.
        strength: of the map; the strength in the program that loads the file multiplies it.
        partial: leave out what cannot be exported, instead of raising.

    Returns:
        The sites that were left out, which is none unless `partial`.

    Raises:
        ValueError: naming the sites that cannot be exported and why: see `actmaps.fold`; layers that would need a new bias; and
            layers that ComfyUI keeps in another form. Also if nothing is left, or `path` does not end in .safetensors.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"LoRA files are .safetensors files, got {path.name!r}")
    components = as_components(model)
    plan = plan_fold(model, {act_map: strength})
    refused, tensors = dict(plan.refused), dict[str, Tensor]()
    for layer in plan.layers:
        try:
            tensors |= _differences(layer, _key(layer, components))
        except NotFoldableError as error:
            refused[layer.name] = str(error)
    if refused and not partial:
        raise ValueError(refusal(refused, "fit into a LoRA file", "set partial=True to leave them out"))
    if not tensors:
        raise ValueError(f"nothing of act map {act_map.metadata.name!r} at strength {strength:g} can be exported")
    write_tensors(path, tensors, {"format": "pt", "actmaps_export": json.dumps(_origin(act_map, strength))})
    return tuple(refused)


def _key(layer: FoldedLayer, components: Components) -> str:
    """The name of a layer in ComfyUI's LoRA loader.

    Raises:
        NotFoldableError: if it has none.
    """
    component, _, path = layer.name.partition(".")
    root: Any = getattr(components[component], "_orig_mod", components[component])
    kind = type(root).__name__
    if kind == "UNet2DConditionModel":
        return f"lora_unet_{path.replace('.', '_')}"
    if kind in ("FluxTransformer2DModel", "SD3Transformer2DModel"):
        if _FUSED.fullmatch(path):
            raise NotFoldableError(
                "ComfyUI keeps it as a part of a larger layer, whose bias a LoRA file does not reach"
            )
        if any(type(moved.module).__name__ == "AdaLayerNormContinuous" for moved, _ in layer.moves):
            raise NotFoldableError("ComfyUI keeps its rows in another order, which a LoRA file does not reach")
        return f"transformer.{path}"
    if kind == "T5EncoderModel":
        return f"text_encoders.t5xxl.transformer.{path}"
    if kind.startswith("CLIPText"):
        level = "" if path.startswith("text_projection") else "text_model."
        return f"text_encoders.{_clip_slot(component, root)}.transformer.{level}{path}"
    raise NotFoldableError(f"no LoRA loader that we know has names for a {kind}")


def _clip_slot(component: str, encoder: Any) -> str:
    """What ComfyUI calls a CLIP text encoder: that of Stable Diffusion 2 has a width of its own, the second of SDXL is CLIP-G."""
    if component == "text_encoder_2" and type(encoder).__name__ == "CLIPTextModelWithProjection":
        return "clip_g"
    return "clip_h" if encoder.config.hidden_size == 1024 else "clip_l"


def _differences(layer: FoldedLayer, key: str) -> dict[str, Tensor]:
    """What folding adds to the weights of a layer, float32, by name in the file.

    Raises:
        NotFoldableError: if folding adds a bias where there is none.
    """
    differences = {}
    for name, values in layer.parameters().items():
        before = layer.owner._parameters.get(name)
        if before is None:
            raise NotFoldableError("it has no bias for the map's shift, and a LoRA file adds none")
        ending = "diff" if name == "weight" else "diff_b"
        differences[f"{key}.{ending}"] = (values - before.detach().to(values.dtype)).float().cpu().contiguous()
    return differences


def _origin(act_map: ActMap, strength: float) -> dict[str, object]:
    """What the file came from: the map's metadata, less what is measured per site."""
    metadata = asdict(act_map.metadata)
    del metadata["costs"]
    return {"strength": strength, "sites": list(act_map), **metadata}
