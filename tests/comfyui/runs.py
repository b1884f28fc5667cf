"""Sampling runs on the demo model, for tests that compare them bit by bit."""

from dataclasses import dataclass

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch

from actmaps.maps import ActMap, AffineMap
from actmaps.nodes.translation import denoiser_places, encoder_places

SUBJECT = "red apple"


def encode(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


@dataclass
class Run:
    """What one sampling run gave: its latents, and the latents at the start of each step."""

    latents: torch.Tensor
    steps: list[torch.Tensor]


def sample(
    model,
    clip,
    positive=SUBJECT,
    negative="",
    cfg=4.0,
    steps=4,
    seed=0,
    batch=1,
    negative_clip=None,
    at_step=None,
    sampler="euler",
):
    """A run as KSampler makes it. `at_step(step)` is called at the end of each step."""
    latent = comfy.sample.fix_empty_latent_channels(model, torch.zeros(batch, 4, 8, 8))
    noise = comfy.sample.prepare_noise(latent, seed)
    kept = []

    def keep(step, _denoised, x, _total):
        kept.append(x.clone())
        if at_step is not None:
            at_step(step)

    with torch.inference_mode():
        latents = comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            sampler,
            "simple",
            encode(clip, positive),
            encode(negative_clip or clip, negative),
            latent,
            callback=keep,
            disable_pbar=True,
            seed=seed,
        )
    return Run(latents, kept)


def strong_map(model=None, clip=None, seed=0, sites=None, name="strong"):
    """A random map on the norms of a model, or of its text encoders, that changes every picture."""
    places = {} if model is None else dict(denoiser_places(model.model))
    for of_encoder in () if clip is None else encoder_places(clip.cond_stage_model).values():
        places |= of_encoder
    generator = torch.Generator().manual_seed(seed)
    chosen = [site for site, place in places.items() if place.is_norm] if sites is None else sites
    maps = {}
    for site in chosen:
        units = places[site].unit_count
        maps[site] = AffineMap(
            1 + 0.2 * torch.randn(units, generator=generator), 0.3 * torch.randn(units, generator=generator)
        )
    act_map = ActMap(maps)
    return ActMap(maps, type(act_map.metadata)(name=name))


def instance_forwards(model):
    """Modules of a MODEL that have a `forward` of their own."""
    return [name for name, module in model.model.named_modules() if "forward" in module.__dict__]


def hooks(model):
    """How many forward hooks there are on a MODEL."""
    return sum(len(module._forward_hooks) for module in model.model.modules())
