"""Names: where the sites of diffusers and transformers lie in ComfyUI's models, so that one map file serves both.

ComfyUI keeps tables of its weights' names in diffusers, for LoRA files. A module is translated with its weights. Norms without
weights, whole blocks and their streams are in no table and added here. What the two libraries compute differently has no
translation, so that a map never moves the wrong thing. Models without a table keep ComfyUI's own names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from torch import nn

from ..maps.places import Place, find_places, whole_output

# How many tokens of the model call under way are text, for blocks that work on text and image in one sequence.
text_tokens: ContextVar[int] = ContextVar("text_tokens", default=0)

# Modules of ComfyUI whose output is NCHW, beside those that torch names alike.
_CHANNELS_FIRST = {"ResBlock", "SpatialTransformer", "Upsample", "Downsample"}
# What stands for no layer of diffusers.
_NO_LAYERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity)

# Site in a block -> (module in ComfyUI's block, entry of its output); "" is the block itself.
_FLUX_DOUBLE = {
    "norm1.norm": ("img_norm1", 0),
    "norm1_context.norm": ("txt_norm1", 0),
    "attn:image": ("img_attn.proj", 0),
    "attn:text": ("txt_attn.proj", 0),
    "norm2": ("img_norm2", 0),
    "norm2_context": ("txt_norm2", 0),
    "ff": ("img_mlp", 0),
    "ff_context": ("txt_mlp", 0),
    ":image": ("", 0),
    ":text": ("", 1),
}
_SD3_JOINT = {
    "norm1.norm": ("x_block.norm1", 0),
    "norm1_context.norm": ("context_block.norm1", 0),
    "attn": ("x_block.attn.proj", 0),
    "attn2": ("x_block.attn2.proj", 0),
    "norm2": ("x_block.norm2", 0),
    "norm2_context": ("context_block.norm2", 0),
    "ff": ("x_block.mlp", 0),
    "ff_context": ("context_block.mlp", 0),
    ":text": ("", 0),
    ":image": ("", 1),
}


def denoiser_places(model: Any) -> dict[str, Place]:
    """The places of a diffusion model by canonical site name.

    Args:
        model: a `comfy.model_base.BaseModel`. A compiled one has the places of the model inside.
    """
    import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
    import comfy.model_base as kinds
    import comfy.utils

    root = getattr(model.diffusion_model, "_orig_mod", model.diffusion_model)
    config = model.model_config.unet_config
    if isinstance(root, openaimodel.UNetModel):
        return unet_places(root, comfy.utils.unet_to_diffusers(config))
    tables = (
        (kinds.Flux, comfy.utils.flux_to_diffusers),
        (kinds.SD3, comfy.utils.mmdit_to_diffusers),
        (kinds.PixArt, comfy.utils.pixart_to_diffusers),
        (kinds.AuraFlow, comfy.utils.auraflow_to_diffusers),
    )
    for kind, table in tables:
        if isinstance(model, kind):
            return transformer_places(root, table(config))
    return find_places({"transformer": root})


def unet_places(root: nn.Module, table: Mapping[str, str]) -> dict[str, Place]:
    """The places of a U-Net, from ComfyUI's table {name of a weight in diffusers: name in ComfyUI}."""
    modules = dict(root.named_modules())
    paths: dict[str, str] = {}
    for theirs, ours in _modules_of(table):
        if theirs.startswith("class_embedding."):  # the same weights as add_embedding, which SDXL calls them
            continue
        paths[theirs] = ours
        block, _, last = theirs.rpartition(".")
        if last == "norm1" and block.split(".")[-2:-1] == ["resnets"]:
            paths[block] = ours.removesuffix(".in_layers.0")
        # A block has the name of its layers less what both names end in.
        while (
            (parts := (theirs.rpartition("."), ours.rpartition(".")))[0][2] == parts[1][2]
            and parts[0][0]
            and parts[1][0]
        ):
            theirs, ours = parts[0][0], parts[1][0]
            paths.setdefault(theirs, ours)
    return {
        f"unet.{theirs}": _place(modules[ours])
        for theirs, ours in paths.items()
        if ours in modules and not isinstance(modules[ours], _NO_LAYERS)
    }


def transformer_places(root: nn.Module, table: Mapping[str, Any]) -> dict[str, Place]:
    """The places of a diffusion transformer, from ComfyUI's table {name of a weight in diffusers: name in ComfyUI}.

    Where several weights of diffusers are one in ComfyUI, the table gives (name, (dim, start, length)). Where it gives a
    function that rearranges the weight, the outputs differ and there is no place.
    """
    modules = dict(root.named_modules())
    places = {}
    for theirs, ours, units in _fused_modules_of(table):
        if ours in modules:
            places[f"transformer.{theirs}"] = _place(modules[ours], units=units)
    for theirs, ours, entry in _blocks(modules):
        if ours in modules:
            places[f"transformer.{theirs}"] = _place(modules[ours], entry)
    for path in modules:
        if path.startswith("single_blocks.") and path.count(".") == 1:
            number, block = path.split(".")[1], modules[path]
            site = f"transformer.single_transformer_blocks.{number}"
            places[f"{site}:text"] = Place(block, tokens=lambda: slice(0, text_tokens.get()))
            places[f"{site}:image"] = Place(block, tokens=lambda: slice(text_tokens.get(), None))
    return places


def _modules_of(table: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Names of modules in diffusers and in ComfyUI, from the names of their weights, in the order of execution."""
    order = {
        "conv_in": 0,
        "time_embedding": 1,
        "add_embedding": 2,
        "class_embedding": 3,
        "down_blocks": 4,
        "mid_block": 5,
    }
    pairs = {theirs.rpartition(".")[0]: ours.rpartition(".")[0] for theirs, ours in table.items()}
    yield from sorted(pairs.items(), key=lambda pair: order.get(pair[0].split(".")[0], 6 + ("conv" in pair[0][:4])))


def _fused_modules_of(table: Mapping[str, Any]) -> Iterator[tuple[str, str, slice | None]]:
    """Names of modules in diffusers and in ComfyUI, and the channels that are theirs in a fused module."""
    seen = set()
    for key, value in table.items():
        name, part, rearranged = (*((value,) if isinstance(value, str) else value), None, None)[:3]
        theirs, ours = key.rpartition(".")[0], name.rpartition(".")[0]
        if rearranged is not None or not ours or theirs in seen:
            continue
        seen.add(theirs)
        yield theirs, ours, None if part is None else slice(part[1], part[1] + part[2])


def _blocks(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str, int]]:
    """Sites that have no weights of their own, their module in ComfyUI, and the entry of its output."""
    for path in modules:
        kind, _, number = path.partition(".")
        if not number.isdigit():
            continue
        if kind in ("double_blocks", "joint_blocks"):
            for suffix, (inner, entry) in (_FLUX_DOUBLE if kind == "double_blocks" else _SD3_JOINT).items():
                dot = "" if suffix.startswith(":") else "."
                yield f"transformer_blocks.{number}{dot}{suffix}", f"{path}.{inner}".rstrip("."), entry
        elif kind == "single_blocks":
            yield f"single_transformer_blocks.{number}.norm.norm", f"{path}.pre_norm", 0
    yield "norm_out.norm", "final_layer.norm_final", 0


def _place(module: nn.Module, entry: int = 0, units: slice | None = None) -> Place:
    channels_first = whole_output(module).channels_first or type(module).__name__ in _CHANNELS_FIRST
    return Place(module, entry, units, channels_first=channels_first)


def encoder_places(model: nn.Module) -> dict[str, dict[str, Place]]:
    """The places of every text encoder by its path in ComfyUI, such as "clip_l", and by canonical site name.

    Args:
        model: the `cond_stage_model` of a CLIP. Its encoders count as in diffusers: clip_l is `text_encoder`, clip_g
            `text_encoder_2`, t5xxl `text_encoder_3` of SD3 and `text_encoder_2` of FLUX.
    """
    from comfy.sd1_clip import SDClipModel

    paths = [path for path, module in model.named_modules() if isinstance(module, SDClipModel)]
    names = encoder_names(paths, has_clip_g=hasattr(model, "clip_g"))
    return {path: find_places({names[path]: model.get_submodule(f"{path}.transformer")}) for path in paths}


def encoder_names(paths: list[str], has_clip_g: bool) -> dict[str, str]:
    """Component name of each encoder. With `has_clip_g` the model has a place for clip_g, even if none is loaded there."""
    if has_clip_g:
        numbers = {"clip_l": 1, "clip_g": 2, "t5xxl": 3, "llama": 4}
    elif "llama" in paths:
        numbers = {"llama": 1, "clip_l": 2}
    else:
        order = [path for path in ("clip_l", "t5xxl") if path in paths]
        numbers = {path: number for number, path in enumerate(order + [p for p in paths if p not in order], 1)}
    known = {path: numbers.get(path.split(".")[-1]) or numbers.get(path) or 1 + i for i, path in enumerate(paths)}
    return {path: "text_encoder" if number == 1 else f"text_encoder_{number}" for path, number in known.items()}
