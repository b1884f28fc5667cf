"""A pipeline class with act maps for every pipeline class of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers

from .mixin import ACTMixin


def act_pipeline_class(pipeline: type[Any] | str) -> type[Any]:
    """The class with act maps of a diffusers pipeline: `ACTMixin` before it, and nothing else.

    Args:
        pipeline: a pipeline class, your own too, or the name of one of diffusers: "StableDiffusionXLImg2ImgPipeline".

    Returns:
        The class, named "StableDiffusionXLImg2ImgACTPipeline"; the same one at every call. Classes of diffusers' own pipelines
        are also attributes of `actmaps`.

    Raises:
        ValueError: if diffusers has no such pipeline.
    """
    if isinstance(pipeline, str):
        found = getattr(diffusers, pipeline, None)
        if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
            raise ValueError(f"diffusers {diffusers.__version__} has no pipeline {pipeline!r}")
        pipeline = found
    if issubclass(pipeline, ACTMixin):
        return pipeline
    if pipeline not in _made:
        _made[pipeline] = _mixed(pipeline)
    return _made[pipeline]


_made: dict[type[Any], type[Any]] = {}


def _mixed(pipeline: type[Any]) -> type[Any]:
    name = pipeline.__name__.removesuffix("Pipeline") + "ACTPipeline"
    doc = f"`{pipeline.__name__}` steered by act maps on its text encoders and denoiser; see `ACTMixin`."
    # The module of the lazy attribute, under which pickle finds diffusers' own.
    return type(name, (ACTMixin, pipeline), {"__doc__": doc, "__module__": __name__.rpartition(".")[0]})


def load_act_pipeline(model: str, **options: Any) -> Any:
    """A pipeline with act maps from a folder or the name of a hub repository, whichever its kind.

    Args:
        model: as for `DiffusionPipeline.from_pretrained`.
        **options: for `from_pretrained`, such as `dtype`, `variant` or `revision`.

    Raises:
        FileNotFoundError: if a folder holds no diffusers model.
        ValueError: if the model's pipeline is none of this diffusers version.
    """
    if (model[0] in "./~" or Path(model).is_dir()) and not Path(model, "model_index.json").is_file():
        raise FileNotFoundError(f"{model} is no diffusers model: there is no model_index.json in it")
    kind = str(diffusers.DiffusionPipeline.load_config(model).get("_class_name"))
    return act_pipeline_class(kind.replace("ACTPipeline", "Pipeline")).from_pretrained(model, **options)
