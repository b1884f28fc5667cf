"""Site presets of language models, on the real classes of each family with small weights."""

import pytest
import torch
import transformers
from torch import nn

from actmaps.maps.language_sites import LANGUAGE_SITES, language_sites

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
# Class of the configuration, its sizes, and in the first layer: norms, norms behind, attention and feed-forward outputs.
LLAMA = (("input_layernorm", "post_attention_layernorm"), ("post_attention_layernorm",))
GEMMA = (
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("post_attention_layernorm", "post_feedforward_layernorm"),
)
FAMILIES = {
    "llama": ("LlamaConfig", SIZES, *LLAMA, "self_attn.o_proj", "mlp.down_proj"),
    "mistral": ("MistralConfig", SIZES, *LLAMA, "self_attn.o_proj", "mlp.down_proj"),
    "qwen2": ("Qwen2Config", SIZES, *LLAMA, "self_attn.o_proj", "mlp.down_proj"),
    "qwen3": ("Qwen3Config", SIZES, *LLAMA, "self_attn.o_proj", "mlp.down_proj"),
    "gemma": ("GemmaConfig", SIZES, *LLAMA, "self_attn.o_proj", "mlp.down_proj"),
    "gemma2": ("Gemma2Config", SIZES, *GEMMA, "self_attn.o_proj", "mlp.down_proj"),
    "gemma3": ("Gemma3TextConfig", SIZES, *GEMMA, "self_attn.o_proj", "mlp.down_proj"),
    "olmo2": ("Olmo2Config", SIZES, GEMMA[1], GEMMA[1], "self_attn.o_proj", "mlp.down_proj"),
    "phi3": ("Phi3Config", SIZES, *LLAMA, "self_attn.o_proj", "mlp.down_proj"),
    "phi": ("PhiConfig", SIZES, ("input_layernorm",), (), "self_attn.dense", "mlp.fc2"),
    "gpt2": ("GPT2Config", GPT, ("ln_1", "ln_2"), ("ln_2",), "attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("GPTNeoXConfig", SIZES, *LLAMA, "attention.dense", "mlp.dense_4h_to_h"),
}


def model_of(family):
    kind, sizes = FAMILIES[family][:2]
    config = getattr(transformers, kind)(**sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_presets_name_the_same_parts_of_every_family(family):
    model = model_of(family)
    norms, post_norms, attention, mlp = FAMILIES[family][2:]
    (layers,) = {site.removesuffix(".0") for site in language_sites(model, "blocks") if site.endswith(".0")}

    def in_first_layer(preset):
        found = [site for site in language_sites(model, preset) if site.startswith(f"{layers}.0")]
        return {site.removeprefix(f"{layers}.0.") for site in found}

    assert in_first_layer("norms") == set(norms)
    if post_norms:
        assert in_first_layer("post_norms") == set(post_norms)
    assert in_first_layer("attention") == {attention}
    assert in_first_layer("mlp") == {mlp}
    assert language_sites(model, "blocks") == [f"{layers}.0", f"{layers}.1"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_puts_out_a_tensor_over_tokens(family):
    model, seen = model_of(family), {}
    presets = [p for p in LANGUAGE_SITES if p != "post_norms" or FAMILIES[family][3]]
    for site in {site for preset in presets for site in language_sites(model, preset)}:
        module = model.get_submodule(site.removeprefix("model."))
        module.register_forward_hook(lambda _m, _a, output, site=site: seen.update({site: output}))
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5]]))
    for site, output in seen.items():
        assert output.shape == (1, 3, 32), site


def test_an_architecture_without_the_preset_says_what_it_has():
    with pytest.raises(
        ValueError, match="PhiForCausalLM has no sites for the preset 'post_norms'; it has norms, attent"
    ) as e:
        language_sites(model_of("phi"), "post_norms")
    assert r"model.model.layers.*.self_attn.dense (2 times)" in str(e.value)


def test_an_unknown_architecture_lists_its_modules():
    model = nn.ModuleDict({"stack": nn.ModuleList(nn.ModuleDict({"mix": nn.Linear(2, 2)}) for _ in range(3))})
    with pytest.raises(
        ValueError, match=r"it has none of the presets. Candidates for `sites`: .*model.stack.\*.mix \(3 "
    ):
        language_sites(model, "attention")


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match="site preset must be one of norms, post_norms, attention, mlp, blocks"):
        language_sites(model_of("llama"), "heads")
