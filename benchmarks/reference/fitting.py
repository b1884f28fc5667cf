"""The reference's script and `fit_map` on the same models and prompts, both with the reference's modes.

Its modes in our words: linear maps of means over positions, pictures moved by one constant per channel, and maps applied to source and
target samples on the way; without a support, whose bounds the two read differently (see differences.py).
"""

from __future__ import annotations

import random
import string
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast

from actmaps.maps import ActMap, AffineMap, fit_map
from measuring import Stopwatch
from random_models import build, unet

from .checkout import Fitting, NoiseByPrompt, Task, map_difference

CASES = {
    "language": Task("language model, Llama, layer norms", ".+layernorm", draws=False),
    "unet": Task("U-Net of SD 1.5, all norms", "unet.*norm.*", draws=True),
    "resnets": Task("the same, norms of its residual blocks", "unet.*resnets.*norm.*", draws=True),
}
WORDS = [f"w{number}" for number in range(500)]
IMAGE_WORDS, TEXT_WORDS = 12, 32  # of a prompt, which a picture's text encoder spells in letters


@dataclass
class Fit:
    """One model, fitted by both. Differences of maps are the largest per site, relative to the largest value of their kind.

    Attributes:
        comparable: sites that both fit after the same others; the rest the reference fits ahead of some that run before them.
        difference: the largest over the comparable sites.
        elsewhere: the median over the rest; None where there are none.
    """

    model: str
    sites: int
    prompts: int
    reference_seconds: float
    our_seconds: float
    reference_files: int
    reference_mb: float
    our_mb: float
    comparable: int
    difference: float
    elsewhere: float | None


def fit_both(case: str, checkout: Path, prompts: int, batch_size: int, repeats: int, device: torch.device) -> Fit:
    """Fit one of the cases with both; the reference once, us `repeats` times."""
    task = CASES[case]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_pipeline(folder / "model") if task.draws else save_language_model(folder / "model")
        words = IMAGE_WORDS if task.draws else TEXT_WORDS
        texts = {
            "source": sentences(prompts // 2, words, WORDS[:300], 0),
            "target": sentences(prompts // 2, words, WORDS[200:], 1),
        }
        fitting = Fitting(checkout, folder, folder / "model", texts, task, batch_size, device)
        if task.draws:
            fitting.responses.model.module = NoiseByPrompt(**fitting.model.components, requires_safety_checker=False)
            fitting.model.set_progress_bar_config(disable=True)
        ours = (our_image_fit if task.draws else our_language_fit)(fitting, texts, batch_size)
        ours()  # warm up
        our_times = []
        for _ in range(repeats):
            watch = Stopwatch(device)
            with watch.running():
                act_map = ours()
            our_times.append(watch.wall)
        reference = Stopwatch(device)
        with reference.running():
            fitting.run()
        act_map.save(folder / "map.safetensors")
        files, size = fitting.disk()
        comparable, gaps = compare(fitting.maps(), act_map, "" if task.draws else "model.")
        return Fit(
            model=task.title,
            sites=len(act_map),
            prompts=prompts,
            reference_seconds=reference.wall,
            our_seconds=median(our_times),
            reference_files=files,
            reference_mb=size / 1e6,
            our_mb=(folder / "map.safetensors").stat().st_size / 1e6,
            comparable=comparable,
            difference=max(gaps[:comparable]),
            elsewhere=median(gaps[comparable:]) if gaps[comparable:] else None,
        )


def table(rows: list[Fit]) -> Table:
    made = Table(
        title="Fitting in the reference's modes: a pass per site against one pass",
        caption="comparable: sites that both fit after the same others; U-Nets register attention before the residual blocks that run "
        "before it,\nand the reference fits in that order. difference: of the maps, the largest there / the median at the other sites. "
        "The reference draws new\nnoise for every site; here each prompt has its own noise, for both.",
    )
    columns = ("model", "sites", "prompts", "reference", "ours", "times as fast", "its files", "our file")
    for column in (*columns, "comparable", "difference"):
        made.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        made.add_row(
            row.model,
            str(row.sites),
            str(row.prompts),
            f"{row.reference_seconds:.1f} s",
            f"{row.our_seconds:.2f} s",
            f"{row.reference_seconds / row.our_seconds:.0f}",
            f"{row.reference_files}, {row.reference_mb:.1f} MB",
            f"{row.our_mb:.2f} MB",
            str(row.comparable),
            f"{row.difference:.0e}" + (f" / {row.elsewhere:.0e}" if row.elsewhere is not None else ""),
        )
    return made


def compare(reference: dict[str, AffineMap], act_map: ActMap, prefix: str) -> tuple[int, list[float]]:
    """How many of our sites the reference fits in our order before any is out of it, and the difference of the maps at each site."""
    order = {prefix + name: number for number, name in enumerate(reference)}
    numbers = [order[site] for site in act_map]
    comparable = next((i for i in range(1, len(numbers)) if numbers[i] < max(numbers[:i])), len(numbers))
    return comparable, [map_difference(reference[site.removeprefix(prefix)], act_map[site]) for site in act_map]


def our_language_fit(fitting: Fitting, texts: dict[str, list[str]], batch_size: int) -> Callable[[], ActMap]:
    """Our fit of the language model that the reference fits."""
    tokenizer = word_tokenizer()

    def tokenized(side: str) -> list[Any]:
        parts = [texts[side][start : start + batch_size] for start in range(0, len(texts[side]), batch_size)]
        return [tokenizer(part, return_tensors="pt").to(fitting.model.device) for part in parts]

    batches = {side: [{k: b[k] for k in ("input_ids", "attention_mask")} for b in tokenized(side)] for side in texts}
    sites = [f"model.{name}" for name in fitting.sites()]
    return lambda: fit_map(
        {"model": fitting.model},
        **batches,
        sites=sites,
        pooling="mean",
        transport_target=True,
        progress=False,
    )


def our_image_fit(fitting: Fitting, texts: dict[str, list[str]], batch_size: int) -> Callable[[], ActMap]:
    """Our fit of the U-Net that the reference fits, each forward one call of the whole pipeline as it does them."""

    def forward(prompts: list[str]) -> Any:
        return fitting.model(prompts, num_inference_steps=1, output_type="latent", guidance_scale=0)

    batches = {
        side: [some[start : start + batch_size] for start in range(0, len(some), batch_size)]
        for side, some in texts.items()
    }
    return lambda: fit_map(
        {"unet": fitting.model.unet},
        **batches,
        forward=forward,
        sites=fitting.sites(),
        pooling="mean",
        spatial="shift",
        transport_target=True,
        progress=False,
    )


def sentences(count: int, length: int, words: list[str], seed: int) -> list[str]:
    """Random texts of `length` words; equally long, so that no batch of a language model has padding."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(words, k=length)) for _ in range(count)]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")


def save_language_model(folder: Path) -> None:
    """Llama at reduced size with random weights, and its tokenizer."""
    build("llama", torch.device("cpu")).module.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def save_pipeline(folder: Path) -> None:
    """A Stable Diffusion pipeline with the reduced U-Net of SD 1.5 on 16 x 16 latents; text encoder and autoencoder are small."""
    torch.manual_seed(0)
    letters = string.ascii_lowercase + string.digits
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    ids = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    width = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = CLIPTextConfig(vocab_size=len(tokens), **width, **ids)
    StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=16),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77),
        unet=unet(False, 16).module,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
