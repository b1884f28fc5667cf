"""Where language models are steered: names for groups of sites that every architecture spells in its own way."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from .places import Steerable, class_names, find_places

# Ends of module names, over all architectures: GPT-2, GPT-NeoX, Llama, Mistral, Qwen, Gemma, OLMo, Phi, OPT, Falcon, BLOOM.
_ATTENTION = (
    *("self_attn.o_proj", "self_attn.out_proj", "self_attn.dense", "self_attention.dense"),
    *("attn.c_proj", "attn.out_proj", "attn.attention.out_proj", "attention.dense", "attention.wo"),
)
_MLP = (
    *("mlp.down_proj", "mlp.c_proj", "mlp.fc2", "mlp.dense_4h_to_h", "feed_forward.w2"),
    *(r"layers.\d+.fc2", "block_sparse_moe", "mlp.experts"),
)
_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm", "ln_2", r"layers.\d+.final_layer_norm")
_BLOCKS = (r"(layers|h|blocks).\d+",)

LANGUAGE_SITES: dict[str, str] = {
    "norms": "every normalisation layer of the residual stream",
    "post_norms": "the norms after attention and feed-forward (Gemma), or between them (Llama, GPT-2)",
    "attention": "what attention puts out, behind its output projection",
    "mlp": "what the feed-forward layers put out",
    "blocks": "the residual stream behind every decoder layer",
}
_PATTERNS = {"post_norms": _POST_NORMS, "attention": _ATTENTION, "mlp": _MLP, "blocks": _BLOCKS}


def language_sites(model: Steerable, preset: str) -> list[str]:
    """The sites of a preset, found by the model's own module names, in registration order.

    Args:
        model: a module, {component name: module}, or {site name: `Place`}.
        preset: a key of `LANGUAGE_SITES`.

    Raises:
        ValueError: if the model has no such sites; it lists the presets and the modules that the model has.
    """
    if preset not in LANGUAGE_SITES:
        raise ValueError(f"site preset must be one of {', '.join(LANGUAGE_SITES)}, got {preset!r}")
    found = _found(model, preset)
    if not found:
        known = [name for name in LANGUAGE_SITES if _found(model, name)]
        raise ValueError(
            f"{', '.join(class_names(model).values()) or 'this model'} has no sites for the preset {preset!r}; "
            f"it has {', '.join(known) or 'none of the presets'}. Candidates for `sites`: {'; '.join(candidates(model))}"
        )
    return found


def candidates(model: Steerable) -> list[str]:
    """The model's modules as patterns, layer numbers written as *, each with how often it occurs; single ones are left out."""
    counts = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", site) for site in find_places(model))
    return [f"{pattern} ({count} times)" for pattern, count in counts.items() if count > 1]


def _found(model: Steerable, preset: str) -> list[str]:
    places = find_places(model)
    if preset == "norms":
        return [site for site, place in places.items() if place.is_norm and not re.search(r"\.[qk]_\w*norm$", site)]
    expression = _ending_in(_PATTERNS[preset])
    return [site for site in places if expression.fullmatch(site)]


def _ending_in(suffixes: Sequence[str]) -> re.Pattern[str]:
    """Matches names that end in one of `suffixes`, whole dotted parts."""
    return re.compile(rf"(.*\.)?({'|'.join(suffix.replace('.', '[.]') for suffix in suffixes)})")
