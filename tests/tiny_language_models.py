"""Real language models with small random weights and a tokenizer of bytes, built offline."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tokenizer(*, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer that spells every text in bytes (259 tokens), so that nothing is unknown and decoding restores the text.

    Args:
        adds_bos: begin every text with <bos>, as the tokenizers of Llama and Gemma do; that of SmolLM2 does not.
    """
    tokens = [PAD, BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    spelling = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    spelling.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelling.decoder = decoders.ByteLevel()
    if adds_bos:
        spelling.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokens.index(BOS))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=spelling,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def llama(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with 2 layers of width 32 and grouped keys."""
    return _random(LlamaForCausalLM, LlamaConfig(**_sizes(tokenizer)), seed)


def gemma(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Gemma3ForCausalLM:
    """A Gemma 3 with 2 layers of width 32, one of them local: norms before and after each part, and on queries and keys."""
    config = Gemma3TextConfig(
        **_sizes(tokenizer),
        query_pre_attn_scalar=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    return _random(Gemma3ForCausalLM, config, seed)


def _sizes(tokenizer: PreTrainedTokenizerFast) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _random(model_class: type[PreTrainedModel], config: LlamaConfig | Gemma3TextConfig, seed: int) -> PreTrainedModel:
    """Weights from a seed, the norms' too (they would begin as the identity), without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
