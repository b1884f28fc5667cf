"""The whole way, fit and apply, on every family of models that ComfyUI samples, at tiny sizes with random weights."""

import zlib

import comfy.sample
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn
from twins import ALL

from actmaps.nodes.fitting import Fit, Sampling
from actmaps.nodes.steering import AppliedMap, steered_model
from actmaps.nodes.translation import denoiser_places
from runs import hooks, instance_forwards

# Channels, height and width of the latents, and widths of text and pooled embeddings of the twins.
CPU = torch.device("cpu")
FAMILIES = {"sd15": (4, 16, 24, 20), "sdxl": (4, 16, 32, 20), "flux": (4, 8, 24, 20), "sd3": (16, 8, 24, 20)}


class Prompts:
    """Stands for a CLIP with encoders of any width: embeddings are random, seeded by the text, one token per word."""

    def __init__(self, width, pooled):
        self.width, self.pooled = width, pooled
        self.cond_stage_model, self.patcher = nn.Module(), ModelPatcher(nn.Module(), CPU, CPU)

    def tokenize(self, text, disable_weights=False):
        return text

    def encode_from_tokens_scheduled(self, text, show_pbar=True):
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        tokens = 3 + len(text.split())
        embeddings = torch.randn(1, tokens, self.width, generator=generator)
        return [[embeddings, {"pooled_output": torch.randn(1, self.pooled, generator=generator)}]]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request):
    channels, size, width, pooled = FAMILIES[request.param]
    pair = ALL[request.param]()
    return ModelPatcher(pair.model, CPU, CPU), Prompts(width, pooled), (channels, size)


def sample(model, prompts, latent, cfg=3.0, text="a cat"):
    channels, size = latent
    noise = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0))
    positive, negative = (prompts.encode_from_tokens_scheduled(t) for t in (text, ""))
    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            noise,
            3,
            cfg,
            "euler",
            "simple",
            positive,
            negative,
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=0,
        )


def fit(family, sites="denoiser", pattern="", **options):
    model, prompts, (channels, size) = family
    run = Fit(
        model,
        prompts,
        Sampling(torch.zeros(1, channels, size, size), steps=3, cfg=3.0),
        timesteps=2,
        batch_size=2,
        **options,
    )
    source = ["a cat", "a house", "an old green tree", "the sea"]
    with torch.inference_mode():
        return run.run(source, [f"{text} in ink" for text in source], sites, pattern, "ink")


def test_a_map_is_fitted_and_steers(family):
    model, prompts, latent = family
    act_map = fit(family)
    assert set(act_map) == {site for site, place in denoiser_places(model.model).items() if place.is_norm}
    plain = sample(model, prompts, latent)
    steered = sample(steered_model(model, AppliedMap(act_map)), prompts, latent)
    assert torch.isfinite(steered).all()
    assert not torch.allclose(steered, plain, atol=1e-3)
    assert torch.equal(sample(model, prompts, latent), plain)
    assert hooks(model) == 0
    assert instance_forwards(model) == []
    before, after = (sum(cost[i] for cost in act_map.metadata.costs.values()) for i in (0, 1))
    assert after < before


def test_streams_and_fused_projections_are_fitted_and_steer(family):
    model, prompts, latent = family
    places = denoiser_places(model.model)
    pattern = r".*:(image|text)|.*to_[kv]"
    act_map = fit(family, "pattern", pattern)
    streams = [site for site in places if site.endswith((":image", ":text"))]
    assert set(streams) <= set(act_map)
    assert any(site.endswith("to_k") for site in act_map)
    steered = sample(steered_model(model, AppliedMap(act_map)), prompts, latent)
    assert not torch.allclose(steered, sample(model, prompts, latent), atol=1e-3)


def test_negative_rows_stay_as_they_are(family):
    """At cfg 0 the result is that of the negative prompt alone."""
    model, prompts, latent = family
    steered = steered_model(model, AppliedMap(fit(family)))
    expected = sample(model, prompts, latent, cfg=0.0)
    torch.testing.assert_close(sample(steered, prompts, latent, cfg=0.0), expected, rtol=1e-4, atol=1e-4)
    both = steered_model(model, AppliedMap(fit(family, rows="both"), rows="both"))
    assert not torch.allclose(sample(both, prompts, latent, cfg=0.0), expected, atol=1e-3)


@pytest.mark.parametrize(
    "sites", [("denoiser", ""), ("pattern", r".*:(image|text)|.*to_[kv]")], ids=["norms", "streams"]
)
def test_a_mask_finds_the_picture_at_every_site(family, sites):
    model, prompts, latent = family
    act_map = fit(family, *sites)
    mask = torch.zeros(1, 1, 16, 16)
    plain, steered = (sample(m, prompts, latent) for m in (model, steered_model(model, AppliedMap(act_map))))
    nowhere = sample(steered_model(model, AppliedMap(act_map, mask=mask)), prompts, latent)
    assert torch.equal(nowhere, plain)
    mask[..., :8] = 1
    left = sample(steered_model(model, AppliedMap(act_map, mask=mask)), prompts, latent)
    assert not torch.equal(left, plain)
    assert not torch.equal(left, steered)
