"""The bundled demo model in ComfyUI computes what it computes in diffusers, with its trained weights."""

import comfy.sample
import pytest
import torch

from actmaps.demo import STYLES, load_judges
from actmaps.nodes import demo_model
from actmaps.nodes.demo_model import load_demo_model
from runs import encode


def relative(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.mark.parametrize("text", ["", "red apple, pixel art", "a b c d e f g h i j k l m n o p q r s t u v"])
def test_text_embeddings(demo, pipeline, text):
    tokens = pipeline.tokenizer(
        [text], padding="max_length", max_length=24, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.inference_mode():
        ours, theirs = encode(demo[1], text)[0][0], pipeline.text_encoder(tokens).last_hidden_state
        assert ours.shape == (1, 24, 128)
        assert relative(ours, theirs) < 1e-4


def test_long_prompts_go_through_in_pieces_and_weights_change_them(demo):
    clip = demo[1]
    with torch.inference_mode():
        assert encode(clip, ", ".join(["green tree"] * 20))[0][0].shape[1] % 24 == 0
        assert encode(clip, ", ".join(["green tree"] * 20))[0][0].shape[1] > 24
        assert not torch.allclose(encode(clip, "(red:1.5) apple")[0][0], encode(clip, "red apple")[0][0], atol=1e-3)


def test_the_unet(demo, pipeline):
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(shape, generator=generator) for shape in ((3, 8, 8, 8), (3, 24, 128)))
    timesteps = torch.tensor([5.0, 400.0, 999.0])
    with torch.inference_mode():
        ours = demo[0].model.diffusion_model(x, timesteps, context=text)
        theirs = pipeline.unet(x, timesteps, encoder_hidden_states=text).sample
    assert relative(ours, theirs) < 1e-4


def test_the_autoencoder_both_ways(demo, pipeline):
    latents = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        picture = demo[2].decode(latents)
        theirs = ((pipeline.vae.decode(latents).sample + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)
        assert picture.shape == (2, 64, 64, 3)
        assert relative(picture, theirs) < 1e-4
        back = pipeline.vae.encode(picture.permute(0, 3, 1, 2) * 2 - 1).latent_dist.mean
        assert relative(demo[2].encode(picture), back) < 1e-4


def sampled(demo, texts, seed=0):
    model, clip, _ = demo
    latents = []
    with torch.inference_mode():
        for text in texts:
            # As the stock empty latent: four channels, which ComfyUI corrects.
            empty = comfy.sample.fix_empty_latent_channels(model, torch.zeros(1, 4, 8, 8))
            noise = comfy.sample.prepare_noise(empty, seed)
            latents.append(
                comfy.sample.sample(
                    model,
                    noise,
                    20,
                    4.0,
                    "euler",
                    "simple",
                    encode(clip, text),
                    encode(clip, ""),
                    empty,
                    disable_pbar=True,
                    seed=seed,
                )
            )
    return torch.cat(latents)


def test_a_run_with_the_recommended_settings_is_that_of_diffusers(demo, pipeline):
    noise = comfy.sample.prepare_noise(torch.zeros(1, 8, 8, 8), 0)
    theirs = pipeline(
        "red apple, pixel art", num_inference_steps=20, guidance_scale=4.0, latents=noise, output_type="latent"
    ).images
    ours = sampled(demo, ["red apple, pixel art"])
    assert ((ours - theirs).pow(2).mean() / theirs.pow(2).mean()).sqrt() < 1e-3


def test_prompted_styles_are_seen_by_the_judge(demo):
    judges = load_judges()
    styles = [style for style in STYLES if style not in ("flat cartoon", "glossy 3d")]  # which come out alike
    latents = sampled(demo, [f"smiling face with a hat, {style}" for style in styles])
    with torch.inference_mode():
        pictures = demo[2].decode(latents).permute(0, 3, 1, 2)
    seen = judges.style(pictures).argmax(1).tolist()
    assert sum(seen[i] == STYLES.index(style) for i, style in enumerate(styles)) >= 6


def test_every_call_gives_new_objects(demo):
    again = load_demo_model()
    assert again[0].model is not demo[0].model
    assert again[1].cond_stage_model is not demo[1].cond_stage_model
    assert again[2].first_stage_model is not demo[2].first_stage_model


def test_missing_and_damaged_weights_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "WEIGHTS", tmp_path / "demo" / "weights")
    with pytest.raises(FileNotFoundError, match=r"is missing or damaged .* clone the whole repository"):
        load_demo_model()
    (tmp_path / "demo/weights/unet").mkdir(parents=True)
    (tmp_path / "demo/weights/unet/config.json").write_text("version https://git-lfs")
    with pytest.raises(ValueError, match=r"demo/weights/unet/config\.json is missing or damaged"):
        load_demo_model()
