"""Every architecture through the same steps, on tiny real pipelines: fit, save, load, steer, take off, batches, precisions, guidance."""

from __future__ import annotations

import diffusers
import pytest
import torch

import actmaps
import tiny_pipelines
from actmaps.maps import ActMap, AffineMap
from actmaps.pipelines import ACTMixin, act_pipeline_class
from tiny_pipelines import ARCHITECTURES

SOURCE = ["a cat", "a dog"]
TARGET = ["a cat, ink", "a dog, ink", "a tree, ink"]


def build(name):
    return tiny_pipelines.build(name, act_pipeline_class(ARCHITECTURES[name].pipeline))


def encoders(pipe):
    return [name for name in pipe._act_modules if name.startswith("text_encoder")]


def denoiser(pipe):
    """The component that runs in every step, or in the early ones."""
    return pipe._act_denoisers[0]


def fit(pipe, kind, source=SOURCE, target=TARGET, **options):
    options = {"sites": [*encoders(pipe), denoiser(pipe)], "num_inference_steps": 3, "timesteps": 2} | options
    call_options = ARCHITECTURES[kind].call | ARCHITECTURES[kind].unguided
    return pipe.fit_act_map(source, target, call_options=call_options, progress=False, **options)


def generate(pipe, name, prompts=("a fox", "a red house"), guided=False, **options):
    """Latents of one picture per prompt; prompt i has seed i."""
    architecture = ARCHITECTURES[name]
    options = architecture.call | (architecture.guided if guided else architecture.unguided) | options
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    out = pipe(list(prompts), num_inference_steps=2, output_type="latent", generator=generators, **options)
    return out[0].clone()


def hook_count(pipe):
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    modules = [module for part in parts for module in part.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in modules)


@pytest.fixture(params=ARCHITECTURES)
def name(request):
    return request.param


def test_fit_save_load_steer_and_take_off(name, tmp_path):
    pipe = build(name)
    act_map = fit(pipe, name, name="ink")
    steered = generate(pipe, name)
    path = pipe.save_act_map(tmp_path, "ink")

    untouched = tiny_pipelines.build(name)
    plain = generate(untouched, name)
    fresh = build(name)
    assert fresh.load_act_map(path) == "ink"
    assert act_map.components == (*encoders(pipe), denoiser(pipe))
    assert torch.equal(generate(fresh, name), steered)
    assert torch.isfinite(steered).all()
    assert not torch.allclose(steered, plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(generate(fresh, name, act_strength=0), plain)
    fresh.unload_act_maps()
    assert torch.equal(generate(fresh, name), plain)
    assert hook_count(fresh) == hook_count(untouched)  # transformers' own, some of which stay after a call


def test_a_prompt_is_steered_alone_as_in_a_batch(name):
    pipe = build(name)
    fit(pipe, name, name="ink")
    # Equally long, since pipelines that pad to the longest prompt give others in a batch than alone, with maps or without.
    prompts = ["a red fox", "a bad cat"]

    together = generate(pipe, name, prompts)
    alone = generate(pipe, name, prompts[:1])
    torch.testing.assert_close(together[:1], alone, rtol=1e-3, atol=1e-4)


def test_a_map_between_equal_prompt_sets_is_the_identity(name):
    act_map = fit(build(name), name, SOURCE, SOURCE, batch_size=1)

    for site, affine in act_map.items():
        torch.testing.assert_close(affine.scale, torch.ones_like(affine.scale), rtol=1e-3, atol=1e-3, msg=site)
        torch.testing.assert_close(affine.shift, torch.zeros_like(affine.shift), rtol=1e-3, atol=1e-3, msg=site)


def test_the_map_does_not_depend_on_how_prompts_are_batched(name):
    prompts = ["a cat, ink", "a dog, ink"]
    one, two = (fit(build(name), name, target=prompts, batch_size=size) for size in (1, 2))

    for site in one:
        torch.testing.assert_close(one[site].shift, two[site].shift, rtol=1e-2, atol=1e-3, msg=site)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype):
    pipe = build(name).to(dtype)
    act_map = fit(pipe, name, name="ink")
    steered = generate(pipe, name)

    assert all(affine.scale.dtype == torch.float32 for affine in act_map.values())
    assert torch.isfinite(steered).all()
    assert not torch.equal(steered, generate(pipe, name, act_strength=0))


@pytest.mark.parametrize("rows", ["cond", "both"])
def test_which_rows_are_steered_under_guidance(name, rows):
    """The rows that follow the negative prompt are unconditional; of the others every row follows its prompt."""
    pipe = build(name)
    act_map = fit(pipe, name, sites=denoiser(pipe), rows=rows)
    site = list(act_map)[-1]
    last = ActMap({site: AffineMap(act_map[site].scale, act_map[site].shift + 1)}, act_map.metadata)

    plain = denoiser_calls(pipe, name, site, negative_prompt=["ugly", "ugly"])
    other = denoiser_calls(pipe, name, site, negative_prompt=["bad hands", "bad hands"])
    pipe.load_act_map(last)
    steered = denoiser_calls(pipe, name, site, negative_prompt=["ugly", "ugly"])

    unconditional = [not torch.equal(one, two) for one, two in zip(plain, other, strict=True)]
    moved = [not torch.equal(one, two) for one, two in zip(plain, steered, strict=True)]
    assert unconditional.count(True) == 2
    assert moved == [rows == "both" or not row for row in unconditional]


def denoiser_calls(pipe, name, site, **options):
    """What the site puts out in the first step, row by row, over all calls of the denoiser."""
    component, path = site.split(":")[0].split(".", 1)
    module = getattr(pipe, component).get_submodule(path)
    seen = []

    def keep(_module, _args, output):
        entry = output if isinstance(output, torch.Tensor) else output[1 if site.endswith("image") else 0]
        seen.extend(entry.clone().unbind())

    handle = module.register_forward_hook(keep)
    try:
        generate(pipe, name, guided=True, **options)
    finally:
        handle.remove()
    return seen[:4]  # two prompts, with and without their condition


@pytest.mark.parametrize("guided", [False, True])
def test_strengths_per_prompt(name, guided):
    pipe = build(name)
    fit(pipe, name, name="ink", sites=denoiser(pipe))
    prompts = ["a red fox", "a bad cat"]

    mixed = generate(pipe, name, prompts, guided, act_strength=[0.3, 1.0])
    for index, strength in enumerate((0.3, 1.0)):
        alone = generate(pipe, name, prompts, guided, act_strength=strength)
        torch.testing.assert_close(mixed[index], alone[index], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("sd", "StableDiffusionImg2ImgPipeline"),
        ("sd", "StableDiffusionInpaintPipeline"),
        ("sdxl", "StableDiffusionXLImg2ImgPipeline"),
        ("sdxl", "StableDiffusionXLInpaintPipeline"),
        ("sd3", "StableDiffusion3Img2ImgPipeline"),
        ("sd3", "StableDiffusion3InpaintPipeline"),
        ("flux-dev", "FluxImg2ImgPipeline"),
        ("flux-dev", "FluxInpaintPipeline"),
        ("qwen-image", "QwenImageImg2ImgPipeline"),
        ("qwen-image", "QwenImageInpaintPipeline"),
        ("z-image", "ZImageImg2ImgPipeline"),
        ("pixart-sigma", "PixArtSigmaPAGPipeline"),
    ],
)
def test_variants_take_the_maps_of_their_text_to_image_pipeline(name, variant):
    act_map = fit(build(name), name)
    pipe = act_pipeline_class(variant).from_pipe(tiny_pipelines.build(name), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    size = ARCHITECTURES[name].call["height"]
    picture = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    options = {}
    if "PAG" not in variant:
        options = {"image": picture, "strength": 1.0}
    if "Inpaint" in variant:
        options["mask_image"] = torch.ones(1, 1, size, size).expand(2, -1, -1, -1)

    plain = generate(pipe, name, **options)
    pipe.load_act_map(act_map)
    steered = generate(pipe, name, **options)
    assert torch.isfinite(steered).all()
    assert not torch.allclose(steered, plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(generate(pipe, name, act_strength=0, **options), plain)


def test_every_pipeline_of_diffusers_has_a_class():
    named = [(name, getattr(diffusers, name)) for name in dir(diffusers) if name.endswith("Pipeline")]
    kinds = {
        name: kind for name, kind in named if isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)
    }

    assert len(kinds) > 200
    for name, kind in kinds.items():
        made = act_pipeline_class(name)
        assert made.__name__ == name.removesuffix("Pipeline") + "ACTPipeline"
        assert issubclass(made, ACTMixin)
        assert issubclass(made, kind)
        assert getattr(actmaps, made.__name__) is act_pipeline_class(kind) is act_pipeline_class(made) is made


def test_a_cache_that_skips_blocks_refuses_maps_on_their_outputs():
    pipe = build("flux-dev")
    fit(pipe, "flux-dev", name="blocks", sites="transformer")
    fit(pipe, "flux-dev", name="norms", sites="norms")
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1.0))

    pipe.set_act_maps("blocks")
    with pytest.raises(ValueError, match=r"blocks.0 is a block that the transformer's cache skips.*disable_cache"):
        generate(pipe, "flux-dev")
    pipe.set_act_maps("norms")
    assert torch.isfinite(generate(pipe, "flux-dev")).all()
    pipe.transformer.disable_cache()
    pipe.set_act_maps("blocks")
    assert torch.isfinite(generate(pipe, "flux-dev")).all()
