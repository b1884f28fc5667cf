"""Translation: where the sites of diffusers and transformers lie in ComfyUI's models, so that one map file serves both.

ComfyUI keeps tables of the names that its weights have in diffusers, for LoRA files. A module is translated with its weights.
Norms without weights, whole blocks and their streams are in no table: they are kin of a module that is. A site has a place
only if both libraries compute the same there, so that a map never moves the wrong thing. Not translated are projections of the
modulation whose halves ComfyUI swaps (`norm_out.linear`), the output of adaptive norms (`norm1`, ComfyUI has no such module),
and the attention of FLUX's single blocks.

Models without a table keep ComfyUI's own names: Qwen-Image's are those of diffusers, others serve inside ComfyUI only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..maps.places import Place, find_places, whole_output

# How many tokens of the model call under way are text, for blocks that work on text and image in one sequence.
text_tokens: ContextVar[int] = ContextVar("text_tokens")

# {name of a weight in diffusers: its name in ComfyUI, or (name, (dim, start, length)) for a part of a fused weight, or
# (name, None, function) where ComfyUI rearranges it}
Table = Mapping[str, Any]


def _text_length() -> int:
    try:
        return text_tokens.get()
    except LookupError:
        raise RuntimeError(
            "set translation.text_tokens to the number of text tokens before the model is called"
        ) from None


def _text() -> slice:
    return slice(0, _text_length())


def _image() -> slice:
    return slice(_text_length(), None)


@dataclass(frozen=True)
class Part:
    """A module by its path in ComfyUI, and the part of its output that is a site."""

    path: str
    entry: int = 0
    tokens: Callable[[], slice] | None = None


# (ending in diffusers, ending in ComfyUI) of a translated module -> sites of the same block: its name without the ending,
# followed by ... -> its path without the ending, followed by ...
Kin = Mapping[tuple[str, str], Mapping[str, Part]]

_UNET: Kin = {
    (".linear_1", ".0"): {"": Part("")},
    (".conv2", ".out_layers.3"): {"": Part("")},
    (".conv", ".op"): {"": Part("")},
    (".conv", ".conv"): {"": Part("")},
    (".proj_out", ".proj_out"): {"": Part("")},
    (".norm3", ".norm3"): {"": Part(""), ".ff": Part(".ff"), ".ff.net.0": Part(".ff.net.0")},
    # Nodes that replace the attention call `to_out`, but not the module around it.
    (".to_out.0", ".to_out.0"): {"": Part(".to_out")},
}
_FLUX: Kin = {
    (".linear_1", ".in_layer"): {"": Part("")},
    (".ff.net.2", ".img_mlp.2"): {
        ".norm1.norm": Part(".img_norm1"),
        ".norm1_context.norm": Part(".txt_norm1"),
        ".attn:image": Part(".img_attn.proj"),
        ".attn:text": Part(".txt_attn.proj"),
        ".norm2": Part(".img_norm2"),
        ".ff.net.0": Part(".img_mlp.1"),
        ".ff": Part(".img_mlp"),
        ".norm2_context": Part(".txt_norm2"),
        ".ff_context.net.0": Part(".txt_mlp.1"),
        ".ff_context": Part(".txt_mlp"),
        ":image": Part("", 0),
        ":text": Part("", 1),
    },
    (".proj_out", ".linear2"): {
        ".norm.norm": Part(".pre_norm"),
        ".act_mlp": Part(".mlp_act"),
        ":text": Part("", tokens=_text),
        ":image": Part("", tokens=_image),
    },
    ("proj_out", "final_layer.linear"): {"norm_out.norm": Part("final_layer.norm_final")},
}
_SD3: Kin = {
    (".linear_1", ".mlp.0"): {"": Part(".mlp")},
    (".ff.net.2", ".x_block.mlp.fc2"): {
        ".norm1_context.norm": Part(".context_block.norm1"),
        ".norm1.norm": Part(".x_block.norm1"),
        ".attn:image": Part(".x_block.attn.proj_drop"),
        ".attn2": Part(".x_block.attn2.proj_drop"),
        ".norm2": Part(".x_block.norm2"),
        ".ff.net.0": Part(".x_block.mlp.act"),
        ".ff": Part(".x_block.mlp"),
        ":image": Part("", 1),
    },
    # The last block has neither this layer nor a text stream.
    (".attn.to_add_out", ".context_block.attn.proj"): {
        ".attn:text": Part(".context_block.attn.proj"),
        ".norm2_context": Part(".context_block.norm2"),
        ".ff_context.net.0": Part(".context_block.mlp.act"),
        ".ff_context": Part(".context_block.mlp"),
        ":text": Part("", 0),
    },
    ("proj_out", "final_layer.linear"): {"norm_out.norm": Part("final_layer.norm_final")},
}
_PIXART: Kin = {
    (".linear_1", ".mlp.0"): {"": Part(".mlp")},
    (".linear_1", ".fc1"): {"": Part("")},
    (".ff.net.2", ".mlp.fc2"): {
        ".norm1": Part(".norm1"),
        ".attn1": Part(".attn"),
        ".attn2": Part(".cross_attn"),
        ".norm2": Part(".norm2"),
        ".ff.net.0": Part(".mlp.act"),
        ".ff": Part(".mlp"),
        "": Part(""),
    },
    ("proj_out", "final_layer.linear"): {"norm_out": Part("final_layer.norm_final")},
}
_AURAFLOW: Kin = {
    (".linear_1", ".mlp.0"): {"": Part(".mlp")},
    (".norm1.linear", ".modX.1"): {
        ".norm1_context.norm": Part(".normC1"),
        ".norm1.norm": Part(".normX1"),
        ".attn.norm_added_q": Part(".attn.q_norm1"),
        ".attn.norm_added_k": Part(".attn.k_norm1"),
        ".attn.norm_q": Part(".attn.q_norm2"),
        ".attn.norm_k": Part(".attn.k_norm2"),
        ".attn:text": Part(".attn", 0),
        ".attn:image": Part(".attn", 1),
        ".norm2_context": Part(".normC2"),
        ".ff_context": Part(".mlpC"),
        ".norm2": Part(".normX2"),
        ".ff": Part(".mlpX"),
        ":text": Part("", 0),
        ":image": Part("", 1),
    },
    (".norm1.linear", ".modCX.1"): {
        ".norm1.norm": Part(".norm1"),
        ".attn.norm_q": Part(".attn.q_norm1"),
        ".attn.norm_k": Part(".attn.k_norm1"),
        ".attn": Part(".attn"),
        ".norm2": Part(".norm2"),
        ".ff": Part(".mlp"),
        "": Part(""),
    },
}
_WAN: Kin = {
    (".linear_1", ".0"): {"": Part("")},
    (".ffn.net.2", ".ffn.2"): {
        ".norm1": Part(".norm1"),
        ".norm2": Part(".norm3"),
        ".norm3": Part(".norm2"),
        ".ffn.net.0": Part(".ffn.1"),
        ".ffn": Part(".ffn"),
        "": Part(""),
    },
    (".to_out.0", ".o"): {"": Part("")},
    ("proj_out", "head.head"): {"norm_out": Part("head.norm")},
}
# Wan has no table in ComfyUI. Ending of a module in ComfyUI, from the block on -> in diffusers.
_WAN_NAMES = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{
        f"{ours}.{layer}": f"{theirs}.{name}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for layer, name in {
            "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k",
            "k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k",
        }.items()
    },
    **{
        f"img_emb.proj.{layer}": f"condition_embedder.image_embedder.{name}"
        for layer, name in {"0": "norm1", "1": "ff.net.0.proj", "3": "ff.net.2", "4": "norm2"}.items()
    },
}  # fmt: skip

# Modules of ComfyUI whose output is NCHW, beside those that torch names alike.
_CHANNELS_FIRST = {
    "ResBlock",
    "VideoResBlock",
    "SpatialTransformer",
    "SpatialVideoTransformer",
    "Upsample",
    "Downsample",
}

# The text encoders of a model that has several, in the order of diffusers.
_ENCODERS = (
    ("clip_l", "clip_g", "t5xxl", "llama"),
    ("clip_l", "clip_g", "t5xxl"),
    ("clip_l", "clip_g"),
    ("clip_l", "t5xxl"),
    ("llama", "clip_l"),
    ("hydit_clip", "mt5xl"),
    ("qwen25_7b", "byt5_small"),
)
# Class of a text encoder -> the level around its layers in ComfyUI and in transformers, where they differ.
_ENCODER_LEVELS = {
    "Llama2": ("model.", ""),
    "Gemma2_2B": ("model.", ""),
    "Qwen25_3B": ("model.", "model.language_model."),
    "Qwen25_7BVLI": ("model.", "model.language_model."),
}
_EMBEDDINGS = re.compile(r"(embeddings|shared|(model\.)?embed_tokens)(\..*)?$")


def denoiser_places(model: Any) -> dict[str, Place]:
    """The places of a diffusion model by canonical site name, children before their parents, about in execution order.

    Args:
        model: a `comfy.model_base.BaseModel`. A compiled one has the places of the model inside.
    """
    import comfy.model_base as kinds
    import comfy.utils as tables
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    root = getattr(model.diffusion_model, "_orig_mod", model.diffusion_model)
    config = model.model_config.unet_config
    if isinstance(root, UNetModel):
        # Both names stand for the same weights, of which a model in diffusers has one.
        absent = "add_embedding." if isinstance(model, kinds.SD21UNCLIP) else "class_embedding."
        table = {
            name: value for name, value in tables.unet_to_diffusers(config).items() if not name.startswith(absent)
        }
        return translated("unet", root, {**table, **_blocks_of_unet(root, table)}, _UNET)
    for kind, names, kin in (
        (kinds.Flux, tables.flux_to_diffusers, _FLUX),
        (kinds.SD3, tables.mmdit_to_diffusers, _SD3),
        (kinds.PixArt, tables.pixart_to_diffusers, _PIXART),
        (kinds.AuraFlow, tables.auraflow_to_diffusers, _AURAFLOW),
    ):
        if isinstance(model, kind):
            # There PixArt strings the prompts of a batch together, so that rows are not those of the other sites.
            table = {
                k: v for k, v in names(config).items() if kin is not _PIXART or ".cross_attn.kv_linear." not in v[0]
            }
            return translated("transformer", root, table, kin)
    if isinstance(model, kinds.WAN21):
        return translated("transformer", root, wan_to_diffusers(root), _WAN)
    return find_places({"transformer": root})


def translated(component: str, root: nn.Module, table: Table, kin: Kin) -> dict[str, Place]:
    """The places in `root` of the modules in `table` and of their kin, by site name; children come before their parents."""
    modules: dict[str, nn.Module] = {}
    for path, module in root.named_modules():
        # Of a compiled submodule the wrapper comes first.
        modules.setdefault(".".join(part for part in path.split(".") if part != "_orig_mod"), module)
    found: dict[str, Place] = {}

    def add(site: str, part: Part, units: slice | None = None) -> None:
        module = modules.get(part.path)
        # An identity stands where another model of the family has a layer.
        if module is not None and not isinstance(module, nn.Identity):
            inner = getattr(module, "_orig_mod", module)
            first = whole_output(inner).channels_first or type(inner).__name__ in _CHANNELS_FIRST
            found.setdefault(
                f"{component}{'' if site.startswith(':') else '.'}{site}",
                Place(module, part.entry, units, part.tokens, first),
            )

    pairs = list(_modules_of(table))
    for theirs, ours, units in pairs:
        add(theirs, Part(ours), units)
    for theirs, ours, _ in pairs:
        for (their_end, our_end), parts in kin.items():
            if ours in modules and theirs.endswith(their_end) and ours.endswith(our_end):
                stem, path = theirs.removesuffix(their_end), ours.removesuffix(our_end)
                for name, part in parts.items():
                    add(stem + name, Part(path + part.path, part.entry, part.tokens))
    # A block that puts out what its last layer does comes after that layer.
    order = {module: number for number, module in enumerate(_children_first(root))}
    return dict(sorted(found.items(), key=lambda item: (order[item[1].module], -item[0].count("."))))


def _modules_of(table: Table) -> Iterator[tuple[str, str, slice | None]]:
    """Names of modules in diffusers and in ComfyUI, and the channels that are theirs in a fused module."""
    for key, value in sorted(table.items()):
        name, part, rearranged = (*((value,) if isinstance(value, str) else value), None, None)[:3]
        if rearranged is None and key.endswith(".weight") and name.endswith((".weight", ".scale")):
            units = None if part is None else slice(part[1], part[1] + part[2])
            yield key.removesuffix(".weight"), name.rpartition(".")[0], units


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _children_first(child)
    yield module


def _blocks_of_unet(root: Any, table: Table) -> dict[str, str]:
    """A table of the blocks of a U-Net, which put out what their last layers do. Down blocks put out the skips as well."""
    paths = {} if root.middle_block is None else {"mid_block": "middle_block"}
    for theirs, ours in table.items():
        block, path = ".".join(theirs.split(".")[:2]), ".".join(ours.split(".")[:2])
        # The table has an upsampler also in the last block, beyond the end of the model.
        if block.startswith("up_blocks.") and int(path.split(".")[1]) < len(root.output_blocks):
            paths[block] = max(paths.get(block, path), path, key=lambda p: int(p.split(".")[1]))
    return {f"{block}.weight": f"{path}.{len(root.get_submodule(path)) - 1}.weight" for block, path in paths.items()}


def wan_to_diffusers(root: nn.Module) -> dict[str, str]:
    """Names of Wan's weights, as ComfyUI's tables give them for other models."""
    matches = (re.fullmatch(r"(blocks\.\d+\.)?(.+)", path) for path, _ in root.named_modules() if path)
    return {
        f"{match[1] or ''}{_WAN_NAMES[match[2]]}.weight": f"{match[0]}.weight"
        for match in matches
        if match and match[2] in _WAN_NAMES
    }


def encoder_places(model: nn.Module) -> dict[str, dict[str, Place]]:
    """The places of every text encoder by its path in ComfyUI, such as "clip_l", and by canonical site name.

    Embeddings have none, since ComfyUI looks them up before it calls the encoder.

    Args:
        model: the `cond_stage_model` of a CLIP. Its encoders count as in diffusers: clip_l is `text_encoder`, clip_g
            `text_encoder_2`, t5xxl `text_encoder_3` of SD3 and `text_encoder_2` of FLUX.
    """
    from comfy.sd1_clip import SDClipModel
    from comfy.sdxl_clip import SDXLClipG, StableCascadeClipG

    encoders = {path: module for path, module in model.named_modules() if isinstance(module, SDClipModel)}
    slots = {*encoders, *(slot for slot in _ENCODERS[0] if hasattr(model, slot))}
    if slots == {"clip_g"} and isinstance(encoders["clip_g"], SDXLClipG):
        slots |= {"clip_l"}  # the refiner of SDXL
    names = encoder_names(slots)
    found = {path: places_of_encoder(names[path], encoder.transformer) for path, encoder in encoders.items()}
    for path, places in found.items():
        # Every CLIP has a projection here; in diffusers it is the pooled embedding of CLIP-G alone that is projected.
        if not isinstance(encoders[path], (SDXLClipG, StableCascadeClipG)):
            places.pop(f"{names[path]}.text_projection", None)
    return found


def encoder_names(slots: Collection[str]) -> dict[str, str]:
    """Component name of each text encoder of a model that has these `slots` for them, whether loaded or not."""
    order = next((known for known in _ENCODERS if set(known) == set(slots)), tuple(slots))
    return {slot: f"text_encoder_{i}" if i > 1 else "text_encoder" for i, slot in enumerate(order, 1)}


def places_of_encoder(component: str, transformer: nn.Module) -> dict[str, Place]:
    """The places of one text encoder, whose names are those of transformers but for a level."""
    level, theirs = _ENCODER_LEVELS.get(type(transformer).__name__, ("", ""))
    places = {}
    for site, place in find_places({component: transformer}).items():
        name = site.removeprefix(f"{component}.")
        if _EMBEDDINGS.match(name) or name in ("text_model", level.rstrip(".")):
            continue
        places[f"{component}.{theirs + name.removeprefix(level) if name.startswith(level) else name}"] = place
    return places
