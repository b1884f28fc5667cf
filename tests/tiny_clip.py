"""A real CLIP and a real SigLIP with small random weights, in folders as the hub has them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

import tiny_models

TOKENS, PIXELS = 77, 32


def save_clip(folder: Path) -> Path:
    """A CLIP that reads 77 letters and pictures of 32 x 32."""
    torch.manual_seed(0)
    tokens, text = _tokenizer_and_text_tower()
    config = CLIPConfig(
        text_config=text,
        vision_config=_tower(image_size=PIXELS, patch_size=8),
        projection_dim=12,
    )
    size = {"shortest_edge": PIXELS}
    processor = CLIPImageProcessorPil(size=size, crop_size={"height": PIXELS, "width": PIXELS})
    return _save(folder, CLIPModel(config), tokens, processor)


def save_siglip(folder: Path) -> Path:
    """A SigLIP of the same size, with CLIP's tokenizer."""
    torch.manual_seed(0)
    tokens, text = _tokenizer_and_text_tower()
    config = SiglipConfig(
        text_config=text,
        vision_config=_tower(image_size=PIXELS, patch_size=8),
    )
    return _save(
        folder, SiglipModel(config), tokens, SiglipImageProcessorPil(size={"height": PIXELS, "width": PIXELS})
    )


def _tokenizer_and_text_tower() -> tuple[CLIPTokenizer, dict[str, int]]:
    tokens = tiny_models.tokenizer()
    tokens.model_max_length = TOKENS
    last = len(tokens) - 1
    ids = {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    return tokens, _tower(vocab_size=len(tokens), max_position_embeddings=TOKENS, **ids)


def _tower(**others: int) -> dict[str, int]:
    return {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, **others}


def _save(folder: Path, *parts) -> Path:
    for part in parts:
        part.save_pretrained(folder)
    return folder
