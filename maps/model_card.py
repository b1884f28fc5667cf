"""The model card of a map: what its hub repository says of it, how to use it, and how it was fitted."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from .act_map import ActMap
from .files import DEFAULT_FILENAME

IMAGES, TEXT = "text-to-image", "text-generation"  # the hub's words for what a model does

_TAGS = ["activation-transport", "actmaps"]
_HUB_LICENCES = {  # those that the hub knows by a name of its own
    *("apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "unlicense"),
    *("bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "gemma", "llama3", "openrail"),
    *("openrail++", "creativeml-openrail-m"),
}
_MODES = ("method", "pooling", "positions", "support", "causal", "transport_target", "seed")
_MODES_OF_TASK = {IMAGES: ("spatial", "timesteps", "window", "latents", "rows"), TEXT: ("scope",)}
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_LANGUAGE_MODEL = re.compile(r"ForCausalLM|LMHeadModel|ForConditionalGeneration")
_IMAGE_COMPONENT = re.compile(r"unet|transformer|text_encoder(_\d)?")
_PIPELINES = {  # by the denoiser's class, in diffusers and in ComfyUI
    **dict.fromkeys(("UNet2DConditionModel", "UNetModel"), "StableDiffusionACTPipeline"),
    **dict.fromkeys(("SD3Transformer2DModel", "OpenAISignatureMMDITWrapper"), "StableDiffusion3ACTPipeline"),
    **dict.fromkeys(("FluxTransformer2DModel", "Flux"), "FluxACTPipeline"),
}
# Only SDXL's U-Net has several transformer blocks in a row.
_SDXL_SITE = re.compile(r"unet\..*\.transformer_blocks\.[1-9].*|text_encoder_2\..*")


def model_card(
    act_map: ActMap,
    repo_id: str,
    *,
    filename: str = DEFAULT_FILENAME,
    picture: str | None = None,
    base_model: str | None = None,
    samples: Sequence[str] = (),
) -> str:
    """The text of README.md: YAML that the hub reads, then Markdown for people.

    Args:
        repo_id: the repository that will hold the map, "user/name".
        filename: of the map there.
        picture: name of a picture there, which is shown on top.
        base_model: hub id of the model that the map was fitted on; None takes what the map says if that is a hub id.
        samples: prompts to try; the first is used in the examples.
    """
    data = act_map.metadata
    if base_model is None and _HUB_ID.fullmatch(data.model_name):
        base_model = data.model_name
    samples = [" ".join(sample.split()) for sample in samples]
    sections = [
        f"---\n{_front_matter(act_map, base_model)}\n---",
        f"# {_text(data.name)}",
        f"![What the map does]({picture})" if picture else "",
        _text(data.description),
        _summary(act_map, base_model or data.model_name),
        f"## How to use it\n\n{_use(act_map, repo_id, filename, base_model, samples[0] if samples else None)}",
        "## Prompts to try\n\n" + "\n".join(f"- {_text(sample)}" for sample in samples) if samples else "",
        f"## How it was fitted\n\n{_table('fact', 'value', _facts(act_map))}",
        f"With these options:\n\n{_table('option', 'value', _modes(act_map))}",
        f"## Licence\n\n{_text(data.licence)}, of the map. The model that it steers has its own."
        if data.licence
        else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(act_map: ActMap, base_model: str | None) -> str:
    from huggingface_hub import ModelCardData

    facts: dict[str, Any] = {}
    if licence := act_map.metadata.licence.strip():
        known = licence.lower() in _HUB_LICENCES
        facts |= {"license": licence.lower()} if known else {"license": "other", "license_name": licence}
    if base_model:
        facts |= {"base_model": base_model, "base_model_relation": "adapter"}
    task = _task(act_map)
    tags = [*_TAGS, task] if task else _TAGS
    return ModelCardData(**facts, library_name="actmaps", pipeline_tag=task, tags=tags).to_yaml()


def _task(act_map: ActMap) -> str | None:
    """What the model of a map does, where its class or its components tell."""
    if any(map(_LANGUAGE_MODEL.search, act_map.metadata.architecture.values())):
        return TEXT
    return IMAGES if any(map(_IMAGE_COMPONENT.fullmatch, act_map.components)) else None


def _pipeline(act_map: ActMap) -> str | None:
    """Name of the pipeline class for the model of a map, where its classes tell."""
    if _task(act_map) == TEXT:
        return "TextGenerationACTPipeline"
    known = (_PIPELINES.get(kind) for kind in act_map.metadata.architecture.values())
    pipeline = next((name for name in known if name), None)
    if pipeline == "StableDiffusionACTPipeline" and any(map(_SDXL_SITE.fullmatch, act_map)):
        return "StableDiffusionXLACTPipeline"
    return pipeline


def _summary(act_map: ActMap, model: str) -> str:
    units = sum(affine.channels for affine in act_map.values())
    parts = [f"{sum(site.startswith(f'{part}.') for site in act_map)} in {part}" for part in act_map.components]
    return (
        f"An act map of {_text(model) or 'a model'}: one scale and one shift for each of {units:,} units at {len(act_map)} sites "
        f"({_text(', '.join(parts))}). They move what the model computes for one set of prompts towards what it computes for "
        "another; no weight changes. Strength 0 leaves the model as it is, and "
        f"**{act_map.metadata.recommended_strength:g} is the recommended strength**."
    )


def _use(act_map: ActMap, repo_id: str, filename: str, base_model: str | None, sample: str | None) -> str:
    """Examples in Python, on the command line and in ComfyUI, as far as they exist for the model of the map."""
    task, pipeline = _task(act_map), _pipeline(act_map)
    named = "" if filename == DEFAULT_FILENAME else f", filename={_quoted(filename)}"
    strength = f"{act_map.metadata.recommended_strength:g}"
    prompt = sample or ("Once upon a time" if task == TEXT else "a lighthouse on a cliff")
    if pipeline is None:
        modules = ", ".join(f"{_quoted(part)}: ..." for part in act_map.components)
        python = [
            "from actmaps import ActMap, steer\n",
            f"act_map = ActMap.load({_quoted(repo_id)}{named})",
            f"with steer({{{modules}}}, act_map, strength={strength}):  # ...: that module of your model",
            "    ...  # run the model",
        ]
    else:
        base = _quoted(base_model) if base_model else '"..."'
        call = f"pipe({_quoted(prompt)}, act_strength={strength})"
        python = [
            f"from actmaps import {pipeline}\n",
            f"pipe = {pipeline}.from_pretrained({base})"
            + ("" if base_model else "  # the model that the map was fitted on"),
            f"pipe.load_act_map({_quoted(repo_id)}{named})",
            f'print({call}[0]["generated_text"])' if task == TEXT else f'{call}.images[0].save("picture.png")',
        ]
    parts = [_fenced("python", python)]
    if pipeline is not None:
        commands = [["actmaps", "generate" if task == TEXT else "sweep", "--model", base_model or "..."]]
        commands[0] += ["--map", filename if named else repo_id, "--prompt", prompt]
        if named:
            commands.insert(0, ["hf", "download", repo_id, filename, "--local-dir", "."])
        parts.append(
            f"At growing strength, on the command line:\n\n{_fenced('bash', list(map(shlex.join, commands)))}"
        )
    if task == IMAGES:
        parts.append(f"In ComfyUI, put `{filename}` into `models/act_maps` and choose it in *Load AcT Map*.")
    return "\n\n".join(parts)


def _facts(act_map: ActMap) -> dict[str, str]:
    data = act_map.metadata
    before, after = (sum(cost[i] for cost in data.costs.values()) for i in (0, 1))
    return {
        "prompts": f"{data.n_source} source and {data.n_target} target prompts" if data.n_source else "",
        "presets": ", ".join(data.presets),
        "hash of the prompts": data.prompts_hash,
        "model": data.model_name,
        "classes": ", ".join(f"{part}: {kind}" for part, kind in data.architecture.items()),
        "transport cost": f"{before:.3g} before the map, {after:.3g} after" if data.costs else "",
        "with": ", ".join(f"{package} {number}" for package, number in data.libraries.items()),
        "created": data.created,
    }


def _modes(act_map: ActMap) -> dict[str, str]:
    names = [*_MODES, *_MODES_OF_TASK.get(_task(act_map) or "", ())]
    return {f"`{name}`": _value(getattr(act_map.metadata, name)) for name in names}


def _value(value: Any) -> str:
    if value is None:
        return "all"  # positions
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(f"{number:g}" for number in value) if isinstance(value, tuple) else str(value)


# Markdown ------------------------------------------------------------------------------------------------------------


def _text(text: str) -> str:
    """`text` on one line, as it is: nothing in it means anything to Markdown or HTML."""
    escaped = re.sub(r"([\\`*_\[\]<>#|!~&$])", r"\\\1", " ".join(text.split()))
    return re.sub(r"^(\d*)([-+.)=])(?=[-=\s]|$)", r"\1\\\2", escaped)  # what would begin a list or a rule


def _table(first: str, second: str, rows: Mapping[str, str]) -> str:
    """Two columns; rows without value are left out."""
    lines = [f"| {first} | {second} |", "|---|---|"]
    return "\n".join(lines + [f"| {key} | {_text(value)} |" for key, value in rows.items() if value])


def _fenced(language: str, lines: Sequence[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _quoted(text: str) -> str:
    """`text` as a Python string in double quotes."""
    return json.dumps(text, ensure_ascii=False)
