"""Real pipelines with small random weights, built offline."""

from __future__ import annotations

import string

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MAX_LENGTH = 12


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that spells every word in letters."""
    letters = string.ascii_lowercase + string.digits + ",."
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=MAX_LENGTH)


def text_encoder(vocab_size: int) -> CLIPTextModel:
    """A CLIP text encoder with 2 layers of width 32."""
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    return CLIPTextModel(config).eval()


def unet() -> UNet2DConditionModel:
    """A Stable Diffusion U-Net with two levels, in which registration order is not execution order."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def vae() -> AutoencoderKL:
    """An autoencoder with factor 2."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def components(seed: int = 0) -> dict:
    """Components of a Stable Diffusion pipeline."""
    torch.manual_seed(seed)
    tokens = tokenizer()
    return {
        "tokenizer": tokens,
        "text_encoder": text_encoder(len(tokens)),
        "unet": unet(),
        "vae": vae(),
        "scheduler": DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
