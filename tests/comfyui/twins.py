"""Models with the same random weights in diffusers or transformers and in ComfyUI."""

from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_detection
import comfy.sd1_clip
import comfy.supported_models
import comfy.utils
import torch
from comfy.sdxl_clip import SDXLClipG
from comfy.text_encoders.llama import Gemma2_2B, Llama2
from comfy.text_encoders.t5 import T5
from diffusers import (
    AuraFlowTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
)

from actmaps.maps.places import Place, find_places
from actmaps.nodes.demo_model import WEIGHTS, load_demo_model
from actmaps.nodes.translation import denoiser_places, encoder_places, text_tokens


@dataclass
class Twins:
    """Two models that compute the same, a run of each that gives the same, and their places under the same names."""

    theirs: dict[str, Place]
    ours: dict[str, Place]
    run_theirs: Callable[[], Tensor]
    run_ours: Callable[[], Tensor]
    component: nn.Module
    model: nn.Module | None = None


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomised(model: nn.Module) -> nn.Module:
    """`model` with weights that leave no path without effect, such as gates that start at zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 and "weight" in name:
            parameter.data = 1 + 0.2 * noise
        else:
            parameter.data = noise * (0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return model.eval().requires_grad_(False)


def _base_model(kind, config, weights):
    model_config = kind(config)
    model_config.set_inference_dtype(torch.float32, None)
    model = model_config.get_model({}, device="cpu")
    missing, unexpected = model.diffusion_model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not missing, missing
    return model.eval().requires_grad_(False)


def _converted(transformer):
    """Weights of a transformer by ComfyUI's own converter, which changes what it is given in place."""
    return comfy.model_detection.convert_diffusers_mmdit({k: v.clone() for k, v in transformer.state_dict().items()})


def demo_unet() -> Twins:
    """The bundled demo model."""
    unet = (
        UNet2DConditionModel.from_pretrained(WEIGHTS / "unet", torch_dtype=torch.float32).eval().requires_grad_(False)
    )
    model = load_demo_model()[0].model.requires_grad_(False)
    x, t, text = random(2, 8, 8, 8), torch.tensor([10.0, 500.0]), random(2, 24, 128, seed=2)
    return Twins(
        find_places({"unet": unet}),
        denoiser_places(model),
        lambda: unet(x, t, encoder_hidden_states=text).sample,
        lambda: model.diffusion_model(x, t, context=text),
        unet,
    )


def demo_text() -> Twins:
    """The text encoder of the demo model."""
    theirs = CLIPTextModel.from_pretrained(WEIGHTS / "text_encoder", dtype=torch.float32).eval().requires_grad_(False)
    model = load_demo_model()[1].cond_stage_model.requires_grad_(False)
    tokens = [[0, 7, 300, 1200, 1] + [1] * 19, [0, 45, 1] + [1] * 21]
    return Twins(
        find_places({"text_encoder": theirs}),
        encoder_places(model)["clip_l"],
        lambda: theirs(torch.tensor(tokens)).last_hidden_state,
        lambda: model.clip_l(tokens)[0],
        theirs,
    )


def sd15() -> Twins:
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=24,
        attention_head_dim=8,
    )
    config = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [2, 2],
        "channel_mult": [1, 2], "transformer_depth": [1, 1, 0, 0], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 0, 0, 0], "context_dim": 24, "use_spatial_transformer": True,
        "legacy": False, "use_linear_in_transformer": False, "adm_in_channels": None, "use_temporal_attention": False,
    }  # fmt: skip
    return _unets(unet, comfy.supported_models.SD15, config, context=24)


def sdxl() -> Twins:
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=32,
        attention_head_dim=(1, 2),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=20 + 6 * 256,
    )
    config = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64, "num_res_blocks": [2, 2],
        "channel_mult": [1, 2], "transformer_depth": [0, 0, 2, 2], "transformer_depth_middle": 2,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2], "context_dim": 32, "use_spatial_transformer": True, "legacy": False,
        "use_linear_in_transformer": True, "adm_in_channels": 1556, "num_classes": "sequential", "use_temporal_attention": False,
    }  # fmt: skip
    return _unets(unet, comfy.supported_models.SDXL, config, context=32, pooled=20)


def _unets(unet, kind, config, context, pooled=0) -> Twins:
    randomised(unet)
    names = comfy.utils.unet_to_diffusers(config)
    model = _base_model(kind, config, {names[name]: tensor for name, tensor in unet.state_dict().items()})
    x, t, text = random(2, 4, 16, 16), torch.tensor([10.0, 500.0]), random(2, 7, context, seed=2)
    kwargs, y = {}, None
    if pooled:
        times = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(2, 1)
        kwargs["added_cond_kwargs"] = {"text_embeds": random(2, pooled, seed=3), "time_ids": times}
        seen = []
        handle = unet.add_embedding.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        unet(x, t, encoder_hidden_states=text, **kwargs)
        handle.remove()
        y = seen[0]
    return Twins(
        find_places({"unet": unet}),
        denoiser_places(model),
        lambda: unet(x, t, encoder_hidden_states=text, **kwargs).sample,
        lambda: model.diffusion_model(x, t, context=text, y=y),
        unet,
        model,
    )


def flux() -> Twins:
    transformer = randomised(
        FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
        )
    )  # fmt: skip
    config = {
        "image_model": "flux", "in_channels": 4, "out_channels": 4, "patch_size": 2, "vec_in_dim": 20, "context_in_dim": 24,
        "hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6],
        "theta": 10000, "qkv_bias": True, "guidance_embed": True,
    }  # fmt: skip
    weights = _converted(transformer)
    model = _base_model(comfy.supported_models.Flux, config, weights)
    x, t, text, pooled = random(2, 4, 8, 8), torch.tensor([0.3, 0.9]), random(2, 5, 24, seed=2), random(2, 20, seed=3)
    guidance = torch.tensor([3.5, 3.5])
    packed = x.view(2, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 16)
    ids = torch.zeros(4, 4, 3)
    ids[..., 1], ids[..., 2] = torch.arange(4.0)[:, None], torch.arange(4.0)[None]

    def run_theirs():
        out = transformer(
            packed, timestep=t, guidance=guidance, encoder_hidden_states=text, pooled_projections=pooled,
            img_ids=ids.view(16, 3), txt_ids=torch.zeros(5, 3),
        ).sample  # fmt: skip
        return out.view(2, 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 8, 8)

    def run_ours():
        token = text_tokens.set(5)
        try:
            # ComfyUI's blocks add to their inputs in place.
            return model.diffusion_model(x.clone(), t, context=text.clone(), y=pooled, guidance=guidance)
        finally:
            text_tokens.reset(token)

    return Twins(
        find_places({"transformer": transformer}), denoiser_places(model), run_theirs, run_ours, transformer, model
    )


def sd3() -> Twins:
    transformer = randomised(
        SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=64,
            num_attention_heads=3, joint_attention_dim=24, caption_projection_dim=192, pooled_projection_dim=20,
            pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0, 1),
        )
    )  # fmt: skip
    config = {
        "in_channels": 16, "patch_size": 2, "depth": 3, "input_size": None, "adm_in_channels": 20,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 24, "out_features": 192}},
        "pos_embed_max_size": 8, "num_patches": 64, "pos_embed_scaling_factor": None, "qk_norm": "rms",
        "x_block_self_attn_layers": [0, 1],
    }  # fmt: skip
    weights = _converted(transformer)
    model = _base_model(comfy.supported_models.SD3, config, weights)
    x, t, text, pooled = (
        random(2, 16, 8, 8),
        torch.tensor([300.0, 900.0]),
        random(2, 5, 24, seed=2),
        random(2, 20, seed=3),
    )
    return Twins(
        find_places({"transformer": transformer}),
        denoiser_places(model),
        lambda: transformer(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t).sample,
        lambda: model.diffusion_model(x, t, context=text, y=pooled),
        transformer,
        model,
    )


def pixart() -> Twins:
    transformer = randomised(
        PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, num_layers=2, in_channels=4, out_channels=8,
            sample_size=64, patch_size=4, caption_channels=24, use_additional_conditions=False,
        )
    )  # fmt: skip
    config = {
        "image_model": "pixart_alpha", "hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "in_channels": 4,
        "caption_channels": 24, "micro_condition": False, "model_max_length": 5, "pe_interpolation": 1,
    }  # fmt: skip
    table = comfy.utils.pixart_to_diffusers(config)
    weights: dict[str, Tensor] = {"y_embedder.y_embedding": torch.zeros(5, 24)}
    fused: dict[str, list[tuple[int, Tensor]]] = {}
    for name, tensor in transformer.state_dict().items():
        if name in table and isinstance(table[name], str):
            weights[table[name]] = tensor
        elif name in table:
            into, (_, start, _) = table[name]
            fused.setdefault(into, []).append((start, tensor))
    for into, parts in fused.items():
        weights[into] = torch.cat([tensor for _, tensor in sorted(parts, key=lambda part: part[0])])
    model = _base_model(comfy.supported_models.PixArtAlpha, config, weights)
    x, t, text = random(1, 4, 64, 64), torch.tensor([300.0]), random(1, 5, 24, seed=2)
    return Twins(
        find_places({"transformer": transformer}),
        denoiser_places(model),
        lambda: transformer(x, encoder_hidden_states=text, timestep=t).sample[:, :4],
        lambda: model.diffusion_model(x, t, context=text),
        transformer,
    )


def auraflow() -> Twins:
    transformer = randomised(
        AuraFlowTransformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=32, out_channels=4, pos_embed_max_size=16,
        )
    )  # fmt: skip
    config = {
        "cond_seq_dim": 24, "dim": 32, "global_conddim": 32, "n_layers": 4, "n_double_layers": 2, "n_heads": 2, "max_seq": 16,
    }  # fmt: skip
    model = _base_model(comfy.supported_models.AuraFlow, config, _converted(transformer))
    x, t, text = random(2, 4, 8, 8), torch.tensor([0.3, 0.9]), random(2, 5, 24, seed=2)
    return Twins(
        find_places({"transformer": transformer}),
        denoiser_places(model),
        lambda: transformer(x, encoder_hidden_states=text, timestep=t).sample,
        lambda: model.diffusion_model(x, t, context=text),
        transformer,
    )


def wan() -> Twins:
    config = {
        "image_model": "wan2.1", "model_type": "t2v", "dim": 24, "ffn_dim": 48, "freq_dim": 16, "text_dim": 20, "in_dim": 4,
        "out_dim": 4, "num_heads": 2, "num_layers": 2, "patch_size": (1, 2, 2), "cross_attn_norm": True, "qk_norm": True,
    }  # fmt: skip
    model_config = comfy.supported_models.WAN21_T2V(config)
    model_config.set_inference_dtype(torch.float32, None)
    model = model_config.get_model({}, device="cpu").eval()
    randomised(model.diffusion_model)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=20, freq_dim=16, ffn_dim=48,
        num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    transformer.load_state_dict(convert_wan_transformer_to_diffusers(dict(model.diffusion_model.state_dict())))
    transformer.eval().requires_grad_(False)
    x, t, text = random(2, 4, 2, 4, 6), torch.tensor([300.0, 900.0]), random(2, 5, 20, seed=2)
    return Twins(
        find_places({"transformer": transformer}),
        denoiser_places(model),
        lambda: transformer(x, t, text).sample,
        lambda: model.diffusion_model(x, t, context=text),
        transformer,
    )


def qwen() -> Twins:
    transformer = randomised(
        QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
        )
    )  # fmt: skip
    config = {
        "image_model": "qwen_image", "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    model = _base_model(comfy.supported_models.QwenImage, config, transformer.state_dict())
    x, t, text = random(2, 4, 1, 8, 8), torch.tensor([0.3, 0.9]), random(2, 5, 24, seed=2)
    packed = x.view(2, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 16)

    def run_theirs():
        out = transformer(packed, encoder_hidden_states=text, timestep=t, img_shapes=[[(1, 4, 4)]] * 2).sample
        return out.view(2, 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 1, 8, 8)

    return Twins(
        find_places({"transformer": transformer}),
        denoiser_places(model),
        run_theirs,
        lambda: model.diffusion_model(x, t, context=text),
        transformer,
    )


CLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 49408,
    "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407,
}  # fmt: skip
TOKENS = [[49406, 320, 1125, 539, 49407] + [49407] * 72, [49406, 1237, 2368, 49407] + [49407] * 73]


class Encoders(nn.Module):
    """What ComfyUI calls the cond_stage_model: text encoders by name."""

    def __init__(self, **encoders):
        super().__init__()
        for name, encoder in encoders.items():
            setattr(self, name, encoder)


def clip_l() -> Twins:
    """CLIP-L as Stable Diffusion 1.5 uses it: the last hidden states."""
    theirs = randomised(CLIPTextModel(CLIPTextConfig(**CLIP, hidden_act="quick_gelu")))
    config = {**CLIP, "hidden_act": "quick_gelu"}
    ours = comfy.sd1_clip.SDClipModel(textmodel_json_config=config, return_projected_pooled=False)
    return _encoders("clip_l", theirs, ours, lambda: theirs(torch.tensor(TOKENS)).last_hidden_state)


def clip_g() -> Twins:
    """CLIP-G as SDXL uses it: the last but one hidden states, and the projected embedding of the whole prompt."""
    config = {**CLIP, "hidden_act": "gelu"}
    theirs = randomised(CLIPTextModelWithProjection(CLIPTextConfig(**config, projection_dim=32)))
    options = {"clip_g_model_config": config}
    ours = SDXLClipG(model_options=options)

    def run_theirs():
        out = theirs(torch.tensor(TOKENS), output_hidden_states=True)
        return torch.cat([out.hidden_states[-2].flatten(1), out.text_embeds], dim=1)

    return _encoders("clip_g", theirs, ours, run_theirs, lambda out: torch.cat([out[0].flatten(1), out[1]], dim=1))


def t5() -> Twins:
    config = {
        "d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 100,
        "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True, "model_type": "t5",
    }  # fmt: skip
    theirs = randomised(
        T5EncoderModel(
            T5Config(
                d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2, vocab_size=100, feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        )
    )  # fmt: skip
    ours = comfy.sd1_clip.SDClipModel(
        textmodel_json_config=config, model_class=T5, special_tokens={"end": 1, "pad": 0}, layer="last"
    )
    tokens = [[5, 17, 80, 1, 0, 0], [9, 3, 44, 61, 12, 1]]
    # ComfyUI masks padding for T5 only where it is told to; both see all tokens here.
    return _encoders("t5xxl", theirs, ours, lambda: theirs(torch.tensor(tokens)).last_hidden_state, tokens=tokens)


LANGUAGE = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


def llama() -> Twins:
    """The Llama of HunyuanVideo."""
    theirs = randomised(LlamaModel(LlamaConfig(**LANGUAGE, head_dim=128, rms_norm_eps=1e-5, rope_theta=500000.0)))
    return _language_model("llama", theirs, Llama2)


def gemma() -> Twins:
    """The Gemma of Lumina 2."""
    config = Gemma2Config(**LANGUAGE, head_dim=256, attn_logit_softcapping=None, attn_implementation="eager")
    return _language_model("gemma2_2b", randomised(Gemma2Model(config)), Gemma2_2B)


def _language_model(name, theirs, kind) -> Twins:
    ours = comfy.sd1_clip.SDClipModel(textmodel_json_config=LANGUAGE, model_class=kind, special_tokens={"pad": 0})
    tokens = [[5, 17, 80, 1, 9, 2], [9, 3, 44, 61, 12, 1]]
    return _encoders(name, theirs, ours, lambda: theirs(torch.tensor(tokens)).last_hidden_state, tokens=tokens)


def _encoders(name, theirs, ours, run_theirs, read=lambda out: out[0], tokens=TOKENS) -> Twins:
    state = theirs.state_dict()
    if name in ("llama", "gemma2_2b"):
        state = {f"model.{k}": v for k, v in state.items()}
    elif name != "t5xxl":
        state = {
            k if k.startswith(("text_model.", "text_projection")) else f"text_model.{k}": v for k, v in state.items()
        }
    missing, unexpected = ours.transformer.load_state_dict(state, strict=False)
    assert all("position_ids" in key or "embed_tokens" in key for key in unexpected), unexpected
    assert all("text_projection" in key for key in missing), missing
    encoders = Encoders(**{name: ours})
    places = encoder_places(encoders)[name]
    component = next(iter(places)).split(".")[0]
    return Twins(
        find_places({component: theirs}),
        places,
        run_theirs,
        lambda: read(ours([list(row) for row in tokens])),
        theirs,
        encoders,
    )


ALL = {
    "demo_unet": demo_unet, "demo_text": demo_text,
    "sd15": sd15, "sdxl": sdxl, "flux": flux, "sd3": sd3, "pixart": pixart, "auraflow": auraflow, "wan": wan, "qwen": qwen,
    "clip_l": clip_l, "clip_g": clip_g, "t5": t5, "llama": llama, "gemma": gemma,
}  # fmt: skip
