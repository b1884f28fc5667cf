"""Folding: weights that compute what hooks compute, for every kind of layer, and that come back bit for bit."""

import copy
from collections import OrderedDict
from functools import partial

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    FP32LayerNorm,
    RMSNorm,
    SD35AdaLayerNormZeroX,
)
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

import tiny_language_models
import tiny_models
from actmaps.maps import ActMap, ActMapMetadata, AffineMap, find_sites, fold, steer
from actmaps.maps.places import Place, find_places

UNITS = 6
TEXT, IMAGE, EMBEDDING = (3, 5, UNITS), (2, UNITS, 4, 4), (3, UNITS)

# Kind of layer -> how it is made, and the shapes of its inputs.
LAYERS = {
    "LayerNorm": (partial(nn.LayerNorm, UNITS), TEXT),
    "LayerNorm without bias": (partial(nn.LayerNorm, UNITS, bias=False), TEXT),
    "FP32LayerNorm": (partial(FP32LayerNorm, UNITS), TEXT),
    "GroupNorm": (partial(nn.GroupNorm, 2, UNITS), IMAGE),
    "RMSNorm of torch": (partial(nn.RMSNorm, UNITS), TEXT),
    "RMSNorm of diffusers": (partial(RMSNorm, UNITS, 1e-6), TEXT),
    "RMSNorm of diffusers with bias": (partial(RMSNorm, UNITS, 1e-6, bias=True), TEXT),
    "LlamaRMSNorm": (partial(LlamaRMSNorm, UNITS), TEXT),
    "T5LayerNorm": (partial(T5LayerNorm, UNITS), TEXT),
    "Gemma3RMSNorm": (partial(Gemma3RMSNorm, UNITS), TEXT),
    "Linear": (partial(nn.Linear, UNITS, 4), TEXT),
    "Linear without bias": (partial(nn.Linear, UNITS, 4, bias=False), TEXT),
    "Conv1d": (partial(nn.Conv1d, UNITS, 4, 3, padding=1), (2, UNITS, 5)),
    "Conv2d": (partial(nn.Conv2d, UNITS, 4, 3, stride=2, padding=1, groups=2), IMAGE),
    "Conv2d without bias": (partial(nn.Conv2d, UNITS, 4, (1, 3), dilation=2, bias=False, padding=2), IMAGE),
    "Conv3d": (partial(nn.Conv3d, UNITS, 4, 2), (2, UNITS, 3, 4, 4)),
    "Conv1D of transformers": (partial(Conv1D, 4, UNITS), TEXT),
    "AdaLayerNormZero": (lambda: Adaptive(AdaLayerNormZero(UNITS), "emb"), TEXT),
    "AdaLayerNormZero in float32": (lambda: Adaptive(AdaLayerNormZero(UNITS, norm_type="fp32_layer_norm"), "emb"), TEXT),
    "AdaLayerNormZeroSingle": (lambda: Adaptive(AdaLayerNormZeroSingle(UNITS), "emb"), TEXT),
    "SD35AdaLayerNormZeroX": (lambda: Adaptive(SD35AdaLayerNormZeroX(UNITS), "emb"), TEXT),
    "AdaLayerNormContinuous": (lambda: Adaptive(AdaLayerNormContinuous(UNITS, UNITS), "conditioning_embedding"), TEXT),
    "AdaLayerNormContinuous without bias": (
        lambda: Adaptive(AdaLayerNormContinuous(UNITS, UNITS, bias=False), "conditioning_embedding"),
        TEXT,
    ),
}  # fmt: skip
NORMS = [kind for kind in LAYERS if "Norm" in kind]


class Adaptive(nn.Module):
    """An adaptive norm with an embedding of its own; its other outputs are joined to the one that is moved."""

    def __init__(self, norm, argument):
        super().__init__()
        self.norm, self.argument = norm, argument
        self.register_buffer("embedding", random(*EMBEDDING, seed=4))

    def forward(self, x):
        output = self.norm(x, **{self.argument: self.embedding.to(x.dtype)})
        return torch.cat([part.flatten() for part in output]) if isinstance(output, tuple) else output


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomised(model, seed=1):
    """`model` with random weights everywhere, also in norms, gates and biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
            if parameter.ndim == 1:
                parameter += 0.5
    return model.eval().requires_grad_(False)


def random_map(model, sites, seed=2, scale=0.3, shift=0.5, **metadata):
    """A strong map on `sites`."""
    places = find_places(model)
    maps = {}
    for number, site in enumerate(sites):
        module = places[site].module
        units = places[site].unit_count or getattr(module, "nf", None) or module.linear.in_features
        draw = random(2, units, seed=seed + number)
        maps[site] = AffineMap(1 + scale * draw[0], shift * draw[1])
    return ActMap(maps, ActMapMetadata(name="strong", **metadata))


def layer(kind, dtype=torch.float32):
    """A model of one layer, its site, and an input."""
    make, shape = LAYERS[kind]
    model = randomised(nn.ModuleDict({"layer": make()}).to(dtype))
    model.forward = lambda x: model["layer"](x)
    site = "model.layer.norm" if isinstance(model["layer"], Adaptive) else "model.layer"
    return model, site, (2 * random(*shape, seed=3)).to(dtype)


def snapshot(model):
    """Everything about a model that folding could leave behind."""
    return {
        name: (type(module), list(module._parameters), {k: v for k, v in module.__dict__.items() if k == "bias"}, len(module._forward_hooks), "forward" in vars(module))
        for name, module in model.named_modules()
    }, {name: value.clone() for name, value in model.state_dict().items()}  # fmt: skip


def assert_same(before, after):
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    for name, value in before[1].items():
        assert torch.equal(value, after[1][name]), name


def relative(found, expected):
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


# Every kind of layer


@pytest.mark.parametrize("strength", [1.0, 0.4, -0.5])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_folded_layer_computes_what_hooks_compute(kind, strength):
    model, site, x = layer(kind)
    act_map = random_map(model, [site])
    plain, before = model(x), snapshot(model)
    with steer(model, act_map, strength):
        steered = model(x)
    assert relative(plain, steered) > 0.05
    with fold(model, act_map, strength) as folded:
        assert relative(model(x), steered) < 1e-6
        assert folded.hooked == ()
        assert not any("forward" in vars(module) for module in model["layer"].modules())
    assert_same(before, snapshot(model))
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2), (torch.float64, 1e-6)]
)
@pytest.mark.parametrize("kind", LAYERS)
def test_other_precisions_are_rounded_once(kind, dtype, tolerance):
    model, site, x = layer(kind, dtype)
    act_map = random_map(model, [site])
    before = snapshot(model)
    with steer(model, act_map):
        steered = model(x)
    with fold(model, act_map):
        found = model(x)
        assert found.dtype == steered.dtype
        assert relative(found, steered) < tolerance
        assert all(
            value.dtype == dtype
            for value in model.state_dict().values()
            if value.is_floating_point() and value.dtype != torch.float32
        )
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("kind", LAYERS)
def test_several_maps_are_folded_in_order(kind):
    model, site, x = layer(kind)
    maps = {random_map(model, [site], seed=5): 0.5, random_map(model, [site], seed=6): 2.0}
    with steer(model, maps, 0.5):
        steered = model(x)
    with fold(model, maps, 0.5):
        assert relative(model(x), steered) < 1e-6


def test_folding_again_is_undone_in_reverse_order():
    model, site, x = layer("RMSNorm of diffusers")
    one, two = random_map(model, [site], seed=5), random_map(model, [site], seed=6)
    before = snapshot(model)
    with steer(model, {one: 1.0, two: 1.0}):
        steered = model(x)
    first = fold(model, one)
    second = fold(model, two)
    assert relative(model(x), steered) < 1e-6
    with pytest.raises(RuntimeError, match="folded into the same layers later; unfold that one first"):
        first.unfold()
    assert relative(model(x), steered) < 1e-6
    second.unfold()
    first.unfold()
    first.unfold()
    assert_same(before, snapshot(model))


def test_strength_zero_changes_no_bit_and_adds_no_bias():
    model, site, _ = layer("LlamaRMSNorm")
    before = snapshot(model)
    with fold(model, random_map(model, [site]), 0.0):
        assert_same(before, snapshot(model))


def test_a_scale_alone_adds_no_bias():
    model, site, _ = layer("Gemma3RMSNorm")
    with fold(model, random_map(model, [site], shift=0.0)):
        assert [name for name, _ in model.named_parameters()] == ["layer.weight"]


# What stays valid


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("kind", ["Linear without bias", "GroupNorm", "LlamaRMSNorm", "AdaLayerNormZero"])
def test_folding_works_in_every_grad_mode_and_keeps_the_parameters(kind, mode):
    model, site, x = layer(kind)
    model.requires_grad_(True)
    act_map, parameters, before = random_map(model, [site]), dict(model.named_parameters()), snapshot(model)
    with mode():
        folded = fold(model, act_map)
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())
    model(x).sum().backward()
    assert all(p.requires_grad and not p.is_inference() and p.grad is not None for p in model.parameters())
    with mode():
        folded.unfold()
    assert_same(before, snapshot(model))


def test_models_made_in_inference_mode_fold():
    with torch.inference_mode():
        model, site, x = layer("LayerNorm")
    act_map, before = random_map(model, [site]), snapshot(model)
    with steer(model, act_map):
        steered = model(x)
    with fold(model, act_map):
        assert relative(model(x), steered) < 1e-6
    assert_same(before, snapshot(model))


def test_random_generators_are_left_alone():
    model, site, _ = layer("Linear")
    state = torch.get_rng_state()
    fold(model, random_map(model, [site])).unfold()
    assert torch.equal(torch.get_rng_state(), state)


def test_unfolding_a_model_that_was_cast_meanwhile_gives_the_cast_originals():
    model, site, _ = layer("LayerNorm without bias")
    expected = copy.deepcopy(model).half()
    folded = fold(model, random_map(model, [site]))
    model.half()
    folded.unfold()
    assert_same(snapshot(expected), snapshot(model))


def test_a_copy_of_a_folded_model_stays_folded():
    model, site, x = layer("LlamaRMSNorm")
    with fold(model, random_map(model, [site])):
        moved, twin = model["layer"](x), copy.deepcopy(model["layer"])
    assert torch.equal(twin(x), moved)
    assert not torch.equal(model["layer"](x), moved)


@pytest.mark.parametrize("kind", ["Linear", "Linear without bias", "LlamaRMSNorm", "RMSNorm of diffusers"])
def test_compiled_models_obey(kind):
    model, site, x = layer(kind)
    act_map = random_map(model, [site])
    with steer(model, act_map):
        steered = model(x)
    compiled = torch.compile(nn.Sequential(OrderedDict(model)), backend="eager", fullgraph=True)
    plain = compiled(x)
    with fold({"model": compiled}, act_map):
        assert relative(compiled(x), steered) < 1e-6
    assert torch.equal(compiled(x), plain)


def test_compiled_layers_fold():
    module, _, x = layer("Linear without bias")
    model = nn.Sequential(torch.compile(module["layer"], backend="eager"))
    plain, act_map = model(x), ActMap({"model.0": AffineMap(torch.full((4,), 2.0), torch.ones(4))})
    with fold(model, act_map):
        torch.testing.assert_close(model(x), 2 * plain + 1)
    assert torch.equal(model(x), plain)


# Parts of layers


def test_channels_of_a_fused_layer_fold_into_their_rows():
    fused = randomised(nn.Linear(4, 6))
    places = {"model.to_q": Place(fused, units=slice(0, 3)), "model.to_v": Place(fused, units=slice(3, 6))}
    maps = {site: AffineMap(1 + random(3, seed=i), random(3, seed=9 + i)) for i, site in enumerate(places)}
    x = random(5, 4)
    with steer(places, ActMap(maps)):
        steered = fused(x)
    with fold(places, ActMap(maps)):
        assert relative(fused(x), steered) < 1e-6


def test_an_adaptive_norm_folds_behind_the_linear_layer_inside():
    model, site, x = layer("AdaLayerNormZero")
    act_map = random_map(model, [site, f"{site}.linear"])
    assert list(act_map) == [site, f"{site}.linear"]
    with steer(model, act_map):
        steered = model(x)
    with fold(model, act_map):
        assert relative(model(x), steered) < 1e-6


def test_a_module_with_two_names_is_moved_twice():
    shared = randomised(nn.LayerNorm(UNITS))
    model = {"one": nn.Sequential(shared), "two": nn.Sequential(shared)}
    act_map, x = random_map(model, ["one.0", "two.0"]), random(*TEXT)
    with steer(model, act_map):
        steered = shared(x)
    with fold(model, act_map):
        assert relative(shared(x), steered) < 1e-6


# What does not fold


class Doubled(nn.Linear):
    """A linear layer that does more than its name says."""

    def forward(self, x):
        return super().forward(x) ** 2


class Refused(nn.Module):
    """A layer that folds, and one of each kind that does not."""

    def __init__(self):
        super().__init__()
        self.good = nn.LayerNorm(UNITS)
        self.plain = nn.LayerNorm(UNITS, elementwise_affine=False)
        self.block = nn.Sequential(nn.Linear(UNITS, UNITS))
        self.doubled = Doubled(UNITS, UNITS)
        self.tied, self.embedding = nn.Linear(UNITS, 9, bias=False), nn.Embedding(9, UNITS)
        self.tied.weight = self.embedding.weight
        self.lora = nn.Linear(UNITS, UNITS)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["lora"]), self)
        self.offloaded = nn.Linear(UNITS, UNITS, device="meta")
        self.quantised = nn.Linear(UNITS, UNITS)
        self.quantised.weight = nn.Parameter(torch.ones(UNITS, UNITS, dtype=torch.int8), requires_grad=False)
        self.huge = nn.LayerNorm(UNITS, dtype=torch.float16)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(UNITS, UNITS))
        self.bounded = nn.LayerNorm(UNITS)
        self.image = nn.GroupNorm(1, UNITS)


REASONS = {
    "plain": "it has no weight to fold into",
    "block": "Sequential does not end in weights of its own",
    "doubled": "Doubled computes something else than scale times input plus bias",
    "tied": "its weight is shared with embedding",
    "lora": "it is wrapped by LoRA; fuse or unload the LoRA first",
    "offloaded": "its weights are offloaded; load them first",
    "quantised": r"its weights are quantised or sharded \(Parameter of torch.int8\)",
    "huge": "its folded weight would not be finite in torch.float16",
    "normed": "it has no weight to fold into, or one that is no plain parameter",
    "bounded": "its map has a support",
    "image": "spatial='shift' scales the mean over all positions",
}


def refused_map(*names):
    maps = {}
    for number, name in enumerate(names):
        units = 9 if name == "tied" else UNITS
        draw = random(2, units, seed=number)
        scale = torch.full((units,), 1e6) if name == "huge" else 1 + 0.3 * draw[0]
        bounds = (torch.zeros(units), torch.ones(units)) if name == "bounded" else ()
        maps[f"model.{name}"] = AffineMap(scale, draw[1], *bounds)
    return ActMap(maps, ActMapMetadata(name="strong", spatial="shift"))


@pytest.mark.parametrize("name", REASONS)
def test_what_does_not_fold_is_named_with_the_reason_and_the_model_is_untouched(name):
    model = Refused()
    before = snapshot(model.good)
    with pytest.raises(ValueError, match=rf"1 sites do not fold:\s+model\.{name}: {REASONS[name]}"):
        fold(model, refused_map("good", name))
    assert_same(before, snapshot(model.good))
    assert not any("forward" in vars(module) for module in model.modules())


def test_all_that_does_not_fold_is_named_at_once():
    with pytest.raises(ValueError, match="11 sites do not fold") as error:
        fold(Refused(), refused_map("good", *REASONS))
    assert all(f"model.{name}" in str(error.value) for name in REASONS)
    assert "model.good" not in str(error.value)
    assert "partial=True" in str(error.value)


@pytest.mark.parametrize("name", ["plain", "block", "doubled", "tied", "lora", "bounded"])
def test_partial_leaves_to_hooks_what_does_not_fold(name):
    model, x = Refused().requires_grad_(False), random(*TEXT)
    act_map = refused_map("good", name)
    modules = [model.good, getattr(model, name)]
    before, plain = snapshot(model.good), [module(x) for module in modules]
    with steer(model, act_map, 0.7):
        steered = [module(x) for module in modules]
    with fold(model, act_map, 0.7, partial=True) as folded:
        assert folded.hooked == (f"model.{name}",)
        assert "forward" not in vars(model.good)
        for module, expected in zip(modules, steered, strict=True):
            assert relative(module(x), expected) < 1e-6
    assert_same(before, snapshot(model.good))
    assert all(torch.equal(module(x), value) for module, value in zip(modules, plain, strict=True))


def test_partial_keeps_the_order_of_maps_on_a_layer():
    model, x = Refused().requires_grad_(False), random(*TEXT)
    maps = {
        refused_map("bounded"): 1.0,
        ActMap({"model.bounded": AffineMap(torch.full((UNITS,), 2.0), torch.ones(UNITS))}): 1.0,
    }
    with steer(model, maps):
        steered = model.bounded(x)
    with fold(model, maps, partial=True) as folded:
        assert folded.hooked == ("model.bounded",)
        assert torch.equal(model.bounded(x), steered)


def test_a_shift_of_a_tied_layer_folds():
    """Nothing of a shared weight changes."""
    model, x = Refused().requires_grad_(False), random(*TEXT)
    act_map = ActMap({"model.tied": AffineMap(torch.ones(9), random(9))})
    with steer(model, act_map):
        steered = model.tied(x)
    with fold(model, act_map):
        assert relative(model.tied(x), steered) < 1e-6


def test_a_failure_while_folding_restores_the_model(monkeypatch):
    model, site, _ = layer("LlamaRMSNorm")
    model["other"] = randomised(nn.Linear(UNITS, 4))
    before = snapshot(model)
    monkeypatch.setattr("actmaps.maps.folding.with_bias", lambda _kind: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fold(model, random_map(model, ["model.other", site]))
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_strengths_must_be_finite(strength):
    model, site, _ = layer("Linear")
    with pytest.raises(ValueError, match="the strength of act map 'strong' must be finite"):
        fold(model, random_map(model, [site]), strength)


def test_maps_of_other_models_are_refused():
    model, site, _ = layer("Linear")
    with pytest.raises(ValueError, match="no act map to fold"):
        fold(model, {})
    with pytest.raises(ValueError, match=r"sites that this model .* lacks"):
        fold(model, ActMap({"model.absent": AffineMap.identity(4)}))
    with pytest.raises(ValueError, match="was fitted on 3 units"):
        fold(model, ActMap({site: AffineMap.identity(3)}))


# Real models


def gpt2():
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return randomised(GPT2LMHeadModel(GPT2Config(**sizes)))


def tokens_through(model):
    return lambda: model(torch.arange(20).view(2, 10)).logits


def unet_run(model):
    inputs = random(2, 4, 8, 8), torch.tensor([7, 500]), random(2, 5, 32)
    return lambda: model(inputs[0], inputs[1], encoder_hidden_states=inputs[2]).sample


def flux():
    return randomised(
        FluxTransformer2DModel(
            in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=12, pooled_projection_dim=6, axes_dims_rope=(2, 2, 4),
        )
    )  # fmt: skip


def flux_run(model):
    image, text, pooled = random(2, 9, 4), random(2, 5, 12, seed=1), random(2, 6, seed=2)
    ids = torch.zeros(9, 3), torch.zeros(5, 3)
    return lambda: model(image, text, pooled, torch.tensor([0.3, 0.9]), img_ids=ids[0], txt_ids=ids[1]).sample


def sd3():
    return randomised(
        SD3Transformer2DModel(
            sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
            caption_projection_dim=16, pooled_projection_dim=6, out_channels=4, pos_embed_max_size=8, dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
    )  # fmt: skip


def sd3_run(model):
    inputs = random(2, 4, 8, 8), random(2, 5, 12, seed=1), random(2, 6, seed=2), torch.tensor([300.0, 900.0])
    return lambda: model(*inputs).sample


def language_model(make):
    return lambda: make(tiny_language_models.tokenizer())


# Model -> how it is made, how it runs, and the sites: all that fold.
MODELS = {
    "U-Net": (lambda: randomised(tiny_models.unet()), unet_run, None),
    "U-Net's linear and convolutional layers": (
        lambda: randomised(tiny_models.unet()), unet_run, r".*(to_q|to_out\.0|net\.2|conv\d?|conv_shortcut|proj_in|linear_2)",
    ),
    "CLIP text encoder": (
        lambda: randomised(tiny_models.text_encoder(20)), lambda model: lambda: model(torch.arange(20).view(2, 10)).last_hidden_state, None,
    ),
    "Llama": (language_model(tiny_language_models.llama), tokens_through, None),
    "Llama's outputs of attention and MLP": (
        language_model(tiny_language_models.llama), tokens_through, ["o_proj", "down_proj"],
    ),
    "Gemma": (language_model(tiny_language_models.gemma), tokens_through, None),
    "GPT-2": (gpt2, tokens_through, None),
    "GPT-2's linear layers": (gpt2, tokens_through, ["c_attn", "c_proj", "c_fc"]),
    "FLUX's adaptive norms": (flux, flux_run, r".*(blocks\.\d+\.norm|norm1|norm1_context|norm_out|norm_[qk]|ff\.net\.2)"),
    "SD3's adaptive norms": (sd3, sd3_run, r".*(norm1|norm1_context|norm_out|norm_[qk]|to_out\.0)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_folded_models_compute_what_steered_ones_compute(name):
    make, run_of, patterns = MODELS[name]
    model = make()
    run, before = run_of(model), snapshot(model)
    act_map = random_map(model, find_sites(model, patterns), scale=0.1, shift=0.1)
    with torch.no_grad():
        plain = run()
        with steer(model, act_map, 0.8):
            steered = run()
        assert relative(plain, steered) > 0.01
        with fold(model, act_map, 0.8) as folded:
            assert folded.hooked == ()
            assert not any("forward" in vars(module) for module in model.modules())
            assert relative(run(), steered) < 2e-6
        assert torch.equal(run(), plain)
    assert_same(before, snapshot(model))
