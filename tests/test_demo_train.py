"""Training and weights of the demo model, on tiny configurations."""

import random

import numpy as np
import pytest
import torch

from actmaps.demo import dataset, train
from actmaps.demo import model as parts

TINY_VAE = parts.VAE_CONFIG | {"block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "norm_num_groups": 4}
TINY_UNET = parts.UNET_CONFIG | {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "cross_attention_dim": 16,
}
TINY_TEXT = parts.TEXT_CONFIG | {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def records():
    concepts = dataset.known_concepts()[:40]
    return [dataset.Record(i, c, i % len(dataset.STYLES), None, "train") for i, c in enumerate(concepts)]


@pytest.fixture(scope="module")
def tokenizer(records):
    return parts.train_tokenizer(train.caption_corpus(records), vocabulary=300)


def test_tokenizer_survives_saving(tokenizer, tmp_path):
    from transformers import CLIPTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    texts = ["Grinning Face, pixel art", "", "a word never seen: qwertz!", "x " * 60]
    assert torch.equal(parts.tokenize(loaded, texts), parts.tokenize(tokenizer, texts))
    assert loaded.model_max_length == parts.TOKENS


def test_tokenizer_wraps_and_pads_like_clip(tokenizer):
    ids = parts.tokenize(tokenizer, ["grinning face", "GRINNING  FACE"])
    assert ids.shape == (2, parts.TOKENS)
    assert torch.equal(ids[0], ids[1])
    assert ids[0, 0] == tokenizer.bos_token_id
    assert ids[0, -1] == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "grinning face"


def test_tokenizer_spells_words_it_has_not_seen(tokenizer):
    words = tokenizer("zqxj").input_ids[1:-1]
    assert tokenizer.eos_token_id not in words


@torch.no_grad()
def test_standardised_latents_keep_reconstructions():
    torch.manual_seed(0)
    vae = parts.build_vae(TINY_VAE).double().eval()
    pixels = torch.rand(6, 3, 64, 64, dtype=torch.float64) * 2 - 1
    before = vae.encode(pixels).latent_dist
    mean, std = before.mean.mean((0, 2, 3)), before.mean.std((0, 2, 3))
    picture = vae.decode(before.mean).sample
    parts.standardise_latents(vae, mean, std)
    after = vae.encode(pixels).latent_dist
    torch.testing.assert_close(after.mean.mean((0, 2, 3)), torch.zeros(4, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(after.mean.std((0, 2, 3)), torch.ones(4, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(after.std, before.std / std[:, None, None], atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(vae.decode(after.mean).sample, picture, atol=1e-9, rtol=0)


def tiny_run(records, tokenizer, work, steps):
    work.mkdir(exist_ok=True)
    torch.manual_seed(0)
    latents = torch.randn(len(records), 4, 8, 8, generator=torch.Generator().manual_seed(1))
    denoiser = parts.build_denoiser(tokenizer, TINY_UNET, TINY_TEXT)
    return train.denoiser_run(records, latents, tokenizer, work, train.Budget(steps), denoiser=denoiser, batch=4)


def test_a_resumed_run_equals_an_uninterrupted_one(records, tokenizer, tmp_path):
    whole = tiny_run(records, tokenizer, tmp_path / "whole", 6)
    assert whole.train()

    first = tiny_run(records, tokenizer, tmp_path / "parts", 6)
    assert not first.train(limit=3)
    second = tiny_run(records, tokenizer, tmp_path / "parts", 6)
    assert second.resume()
    assert second.step == 3
    assert second.train()

    assert second.step == whole.step == 6
    for name, value in whole.module.state_dict().items():
        assert torch.equal(second.module.state_dict()[name], value), name
    for name, value in whole.average.weights.items():
        assert torch.equal(second.average.weights[name], value), name


def test_a_signal_ends_the_run_with_a_checkpoint(records, tokenizer, tmp_path):
    run = tiny_run(records, tokenizer, tmp_path, 6)
    run.request_stop()
    assert not run.train()
    assert run.checkpoint.exists()
    assert not run.checkpoint.with_suffix(".part").exists()


def test_training_lowers_the_loss(records, tokenizer, tmp_path):
    run = tiny_run(records, tokenizer, tmp_path, 40)
    run.warmup = 5
    before = np.mean([run.loss(step).item() for step in range(1000, 1010)])
    run.train()
    after = np.mean([run.loss(step).item() for step in range(1000, 1010)])
    assert after < before * 0.95


def test_learning_rate_is_annealed_to_zero():
    rates = [train.learning_rate(1.0, step, step / 100, warmup=10) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:51] == [1.0] * 41
    assert rates[75] == pytest.approx(0.5)
    assert rates[100] == 0


def test_a_budget_needs_one_limit():
    with pytest.raises(ValueError, match="either steps or minutes"):
        train.Budget()
    with pytest.raises(ValueError, match="either steps or minutes"):
        train.Budget(steps=1, minutes=1)
    assert train.Budget(minutes=1, spent=30).progress(0) == pytest.approx(0.5, abs=0.05)


def test_autoencoder_run_resumes_too(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)

    def run(work, limit):
        work.mkdir(exist_ok=True)
        torch.manual_seed(0)
        made = train.autoencoder_run(images, work, train.Budget(4), vae=parts.build_vae(TINY_VAE), batch=2)
        made.resume()
        made.train(limit=limit)
        return made

    whole = run(tmp_path / "whole", None)
    run(tmp_path / "parts", 2)
    resumed = run(tmp_path / "parts", None)
    for name, value in whole.module.state_dict().items():
        torch.testing.assert_close(resumed.module.state_dict()[name], value, msg=name)


def test_decoder_run_leaves_the_latents_as_they_are(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
    torch.manual_seed(0)
    vae = parts.build_vae(TINY_VAE)
    latents = train.encode_all(vae, images)
    run = train.decoder_run(images, latents, tmp_path, train.Budget(12), vae=vae, batch=2)
    run.warmup = 1
    before = run.loss(100).item()
    run.train()
    assert run.loss(100).item() < before
    torch.testing.assert_close(train.encode_all(vae, images), latents)


def test_weights_are_written_whole_and_replaced(tokenizer, tmp_path):
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(0)
    vae = parts.build_vae(TINY_VAE)
    for seed in range(2):
        torch.manual_seed(seed)
        denoiser = parts.build_denoiser(tokenizer, TINY_UNET, TINY_TEXT)
        parts.save_weights(tmp_path / "weights", tokenizer, denoiser, vae)
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "weights", torch_dtype=torch.float32)
    torch.testing.assert_close(pipeline.unet.conv_in.weight, denoiser.unet.conv_in.weight, atol=1e-3, rtol=1e-3)
    assert next(denoiser.parameters()).dtype == torch.float32
    assert pipeline.safety_checker is None

    fresh = parts.build_denoiser(tokenizer, TINY_UNET, TINY_TEXT)
    train.load_denoiser(fresh, tmp_path / "weights")
    torch.testing.assert_close(fresh.unet.conv_in.weight, denoiser.unet.conv_in.weight, atol=1e-3, rtol=1e-3)


shipped = pytest.mark.skipif(not parts.WEIGHTS.exists(), reason="the demo weights are not in this checkout")


@shipped
def test_shipped_weights_are_small_and_safe():
    files = [path for path in parts.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24 * 2**20
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}


@shipped
def test_shipped_pipeline_is_deterministic_and_follows_the_style():
    from actmaps.demo import load_pipeline

    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompt):
        generator = torch.Generator().manual_seed(0)
        return pipeline(prompt, num_inference_steps=8, guidance_scale=4, generator=generator, output_type="np").images[
            0
        ]

    blueprint = draw("red apple, blueprint")
    np.testing.assert_array_equal(blueprint, draw("red apple, blueprint"))
    assert blueprint.shape == (64, 64, 3)
    corner = blueprint[:6, :6].mean((0, 1))
    assert corner[2] > corner[0] + 0.2
    assert draw("red apple, neon sign")[:6, :6].mean() < 0.25


@shipped
def test_shipped_tokenizer_knows_every_training_word():
    from transformers import CLIPTokenizer

    pipeline_tokenizer = CLIPTokenizer.from_pretrained(parts.WEIGHTS / "tokenizer")
    rng = random.Random(0)
    concepts = [concept for concept in dataset.known_concepts() if concept.split == "train"]
    captions = [
        dataset.sample_caption(dataset.Record(0, concept, rng.randrange(9), None, "train"), rng)
        for concept in concepts
    ]
    lengths = [len(ids) for ids in pipeline_tokenizer(captions).input_ids]
    assert max(lengths) <= parts.TOKENS
