"""Real diffusers pipelines of every architecture, with small random weights, built offline.

`ARCHITECTURES` says for each how to build its components and with which arguments a call is quick.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import tiny_models

WIDTH = 32
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True)
class Architecture:
    """How to build a tiny pipeline of one kind.

    Attributes:
        pipeline: name of the diffusers class.
        components: makes its components.
        call: arguments that keep a call small.
        guided, unguided: arguments that switch classifier-free guidance on, and off.
    """

    pipeline: str
    components: Callable[[], dict[str, Any]]
    call: dict[str, Any] = field(default_factory=dict)
    guided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 4.0})
    unguided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})


def letters_tokenizer(**options: Any) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer that spells everything in letters and ends with </s>; stands for T5's, Gemma's and Qwen's."""
    tokens = ["<pad>", "</s>", "<unk>", *string.ascii_letters, *string.digits, *string.punctuation, " ", "\n"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=64,
        **options,
    )


VOCABULARY = len(letters_tokenizer())


def t5(kind: str = "T5") -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, d_model=WIDTH, d_ff=48, d_kv=8, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def clip(projection: bool = False) -> transformers.PreTrainedModel:
    config = tiny_models.text_encoder(len(tiny_models.tokenizer())).config
    config.projection_dim = WIDTH
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def decoder(kind: str) -> transformers.PreTrainedModel:
    """A language model as a text encoder: "Gemma2" or "Qwen3"."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    return getattr(transformers, f"{kind}Model")(config)


def qwen_vl() -> transformers.PreTrainedModel:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        "pad_token_id": 0,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0],
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def kl(channels: int, **options: Any) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **options,
    )


def flow() -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def stable_diffusion_xl() -> dict[str, Any]:
    return {
        "tokenizer": tiny_models.tokenizer(),
        "tokenizer_2": tiny_models.tokenizer(),
        "text_encoder": clip(),
        "text_encoder_2": clip(projection=True),
        "unet": diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=2 * WIDTH,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
            norm_num_groups=4,
        ),
        "vae": kl(4),
        "scheduler": diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
    }


def stable_diffusion_3() -> dict[str, Any]:
    return {
        "tokenizer": tiny_models.tokenizer(),
        "tokenizer_2": tiny_models.tokenizer(),
        "tokenizer_3": letters_tokenizer(),
        "text_encoder": clip(projection=True),
        "text_encoder_2": clip(projection=True),
        "text_encoder_3": t5_wide(),
        "transformer": diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=16,
            out_channels=16,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=32,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        "vae": kl(16, shift_factor=0.06, scaling_factor=1.5),
        "scheduler": flow(),
    }


def t5_wide() -> transformers.PreTrainedModel:
    """Stable Diffusion 3 wants a T5 that is as wide as both CLIP encoders together."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=2 * WIDTH, d_ff=48, d_kv=8, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return transformers.T5EncoderModel(config)


def flux(guidance_embeds: bool = True) -> dict[str, Any]:
    return {
        "tokenizer": tiny_models.tokenizer(),
        "tokenizer_2": letters_tokenizer(),
        "text_encoder": clip(),
        "text_encoder_2": t5(),
        "transformer": diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(2, 2, 4),
        ),
        "vae": kl(4, shift_factor=0.06, scaling_factor=1.5),
        "scheduler": flow(),
    }


def chroma() -> dict[str, Any]:
    return {
        "tokenizer": letters_tokenizer(),
        "text_encoder": t5(),
        "transformer": diffusers.ChromaTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(2, 2, 4),
            approximator_num_channels=16,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        "vae": kl(4, shift_factor=0.06, scaling_factor=1.5),
        "scheduler": flow(),
    }


def pixart_sigma() -> dict[str, Any]:
    return {
        "tokenizer": letters_tokenizer(),
        "text_encoder": t5(),
        "transformer": diffusers.PixArtTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_channels=WIDTH,
            in_channels=4,
            cross_attention_dim=WIDTH,
            out_channels=8,
            attention_bias=True,
            use_additional_conditions=False,
        ),
        "vae": kl(4),
        "scheduler": diffusers.DDIMScheduler(),
    }


def sana() -> dict[str, Any]:
    return {
        "tokenizer": letters_tokenizer(),
        "text_encoder": decoder("Gemma2"),
        "transformer": diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=8,
            num_cross_attention_heads=4,
            cross_attention_head_dim=8,
            cross_attention_dim=WIDTH,
            caption_channels=WIDTH,
            sample_size=8,
            patch_size=1,
        ),
        "vae": diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.4,
        ),
        "scheduler": flow(),
    }


def qwen_image() -> dict[str, Any]:
    return {
        "tokenizer": letters_tokenizer(),
        "text_encoder": qwen_vl(),
        "transformer": diffusers.QwenImageTransformer2DModel(
            in_channels=64,
            out_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(2, 2, 4),
        ),
        "vae": diffusers.AutoencoderKLQwenImage(base_dim=12, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1),
        "scheduler": flow(),
    }


def wan_transformer() -> diffusers.WanTransformer3DModel:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=32,
    )


def wan() -> dict[str, Any]:
    return {
        "tokenizer": letters_tokenizer(),
        "text_encoder": t5("UMT5"),
        "transformer": wan_transformer(),
        "vae": diffusers.AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        "scheduler": diffusers.UniPCMultistepScheduler(
            flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"
        ),
    }


def wan_2_2() -> dict[str, Any]:
    """Two transformers: one for the noisy steps, one for the others."""
    return wan() | {"transformer_2": wan_transformer(), "boundary_ratio": 0.8}


def z_image() -> dict[str, Any]:
    return {
        "tokenizer": letters_tokenizer(chat_template=CHAT),
        "text_encoder": decoder("Qwen3"),
        "transformer": diffusers.ZImageTransformer2DModel(
            in_channels=16,
            dim=WIDTH,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[256, 32, 32],
        ),
        "vae": kl(16, shift_factor=0.1, scaling_factor=0.4),
        "scheduler": flow(),
    }


def lumina_2() -> dict[str, Any]:
    return {
        "tokenizer": letters_tokenizer(),
        "text_encoder": decoder("Gemma2"),
        "transformer": diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=WIDTH,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(128, 64, 64),
            cap_feat_dim=WIDTH,
        ),
        "vae": kl(4, shift_factor=0.1, scaling_factor=0.4),
        "scheduler": flow(),
    }


def ltx() -> dict[str, Any]:
    return {
        "tokenizer": letters_tokenizer(),
        "text_encoder": t5(),
        "transformer": diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=WIDTH,
            num_layers=2,
            caption_channels=WIDTH,
        ),
        "vae": diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False,) * 5,
            upsample_residual=(False,) * 4,
            upsample_factor=(1,) * 4,
        ),
        "scheduler": flow(),
    }


def aura_flow() -> dict[str, Any]:
    return {
        "tokenizer": letters_tokenizer(),
        "text_encoder": t5(),
        "transformer": diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            caption_projection_dim=WIDTH,
            pos_embed_max_size=64,
        ),
        "vae": kl(4),
        "scheduler": flow(),
    }


def cogvideox() -> dict[str, Any]:
    return {
        "tokenizer": letters_tokenizer(),
        "text_encoder": t5(),
        "transformer": diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=WIDTH,
            num_layers=2,
            sample_width=2,
            sample_height=2,
            sample_frames=9,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=24,
        ),
        "vae": diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        ),
        "scheduler": diffusers.CogVideoXDDIMScheduler(),
    }


SMALL = {"height": 16, "width": 16}
TRUE_CFG = {"guided": {"true_cfg_scale": 4.0, "negative_prompt": "ugly"}, "unguided": {"true_cfg_scale": 1.0}}

ARCHITECTURES = {
    "sd": Architecture("StableDiffusionPipeline", tiny_models.components, SMALL),
    "sdxl": Architecture("StableDiffusionXLPipeline", stable_diffusion_xl, SMALL),
    "sd3": Architecture("StableDiffusion3Pipeline", stable_diffusion_3, SMALL | {"max_sequence_length": 24}),
    "flux-dev": Architecture("FluxPipeline", flux, SMALL | {"max_sequence_length": 24}, **TRUE_CFG),
    "flux-schnell": Architecture(
        "FluxPipeline", lambda: flux(guidance_embeds=False), SMALL | {"max_sequence_length": 24}, **TRUE_CFG
    ),
    "pixart-sigma": Architecture(
        "PixArtSigmaPipeline",
        pixart_sigma,
        SMALL | {"max_sequence_length": 24, "use_resolution_binning": False, "clean_caption": False},
    ),
    "sana": Architecture(
        "SanaPipeline",
        sana,
        {
            "height": 32,
            "width": 32,
            "max_sequence_length": 24,
            "use_resolution_binning": False,
            "clean_caption": False,
            "complex_human_instruction": None,
        },
    ),
    "qwen-image": Architecture("QwenImagePipeline", qwen_image, {"height": 32, "width": 32}, **TRUE_CFG),
    "wan": Architecture("WanPipeline", wan, SMALL | {"num_frames": 5, "max_sequence_length": 24}),
    "wan-2.2": Architecture("WanPipeline", wan_2_2, SMALL | {"num_frames": 5, "max_sequence_length": 24}),
    "z-image": Architecture("ZImagePipeline", z_image, SMALL | {"max_sequence_length": 24}),
    "lumina-2": Architecture(
        "Lumina2Pipeline",
        lumina_2,
        {"height": 32, "width": 32, "max_sequence_length": 24, "system_prompt": "draw"},
    ),
    "ltx": Architecture("LTXPipeline", ltx, {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 24}),
    "chroma": Architecture("ChromaPipeline", chroma, SMALL | {"max_sequence_length": 24}),
    "aura-flow": Architecture("AuraFlowPipeline", aura_flow, SMALL | {"max_sequence_length": 24}),
    "cogvideox": Architecture(
        "CogVideoXPipeline", cogvideox, {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 24}
    ),
}


def build(name: str, pipeline_class: type | None = None, seed: int = 0) -> Any:
    """The tiny pipeline of an architecture, quiet, as the diffusers class or another one of the same components."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(seed)
    components = architecture.components()
    for part in components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe = (pipeline_class or getattr(diffusers, architecture.pipeline))(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe
