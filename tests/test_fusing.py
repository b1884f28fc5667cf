"""Maps fused into the weights of a pipeline: what calls give, what is refused, and that all of it comes back."""

import pytest
import torch

import tiny_language_models
import tiny_models
from actmaps.maps import ActMap, ActMapMetadata, AffineMap, find_sites
from actmaps.maps.places import find_places
from actmaps.pipelines import StableDiffusionACTPipeline, TextGenerationACTPipeline

NORM_OUT = "unet.conv_norm_out"
PROMPTS = ["the quick", "a"]


@pytest.fixture
def pipe():
    pipe = StableDiffusionACTPipeline(**tiny_models.components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def writer():
    tokenizer = tiny_language_models.tokenizer()
    return TextGenerationACTPipeline(model=tiny_language_models.llama(tokenizer), tokenizer=tokenizer, device="cpu")


def strong_map(modules, name="strong", seed=0, **modes):
    """A map on all norms of some components."""
    generator = torch.Generator().manual_seed(seed)
    places = find_places(modules)
    units = {site: places[site].unit_count for site in find_sites(modules)}
    draws = {site: torch.randn(2, count, generator=generator) for site, count in units.items()}
    maps = {site: AffineMap(1 + 0.2 * draw[0], 0.3 * draw[1]) for site, draw in draws.items()}
    return ActMap(maps, ActMapMetadata(**{"name": name, "rows": "both", **modes}))


def of(pipe, *components, **options):
    return strong_map({name: pipe.components[name] for name in components}, **options)


def generate(pipe, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", num_inference_steps=2, output_type="latent", generator=generator, **options).images


def weights(pipe):
    return {
        f"{name}.{key}": value.clone()
        for name, module in pipe._act_modules.items()
        for key, value in module.state_dict().items()
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def hook_count(pipe):
    return sum(
        len(m._forward_hooks) + ("forward" in vars(m)) for part in pipe._act_modules.values() for m in part.modules()
    )


def test_fused_maps_give_what_the_armed_ones_give_and_are_applied_once(pipe):
    pipe.load_act_map(of(pipe, "text_encoder", "unet"), strength={"unet": 0.5, "text_encoder": 0.8})
    pipe.load_act_map(of(pipe, "unet", name="second", seed=1), strength=0.7)
    before, steered, plain = weights(pipe), generate(pipe), generate(pipe, act_strength=0)
    assert (steered - plain).abs().mean() > 0.05

    pipe.fuse_act()
    torch.testing.assert_close(generate(pipe), steered, rtol=1e-4, atol=1e-5)
    assert hook_count(pipe) == 0

    pipe.unfuse_act()
    pipe.unfuse_act()
    assert_same(before, weights(pipe))
    assert torch.equal(generate(pipe), steered)


@pytest.mark.parametrize("strength", [0.5, {"strong": 0.5}, {"strong": {"unet": 0.5}}])
def test_the_strength_may_be_given(pipe, strength):
    pipe.load_act_map(of(pipe, "unet"))
    steered = generate(pipe, act_strength=0.5)
    pipe.fuse_act(strength)
    torch.testing.assert_close(generate(pipe), steered, rtol=1e-4, atol=1e-5)


def test_only_active_maps_are_fused(pipe):
    pipe.load_act_map(of(pipe, "unet"))
    pipe.load_act_map(of(pipe, "unet", name="second", seed=1))
    pipe.set_act_maps("second")
    steered = generate(pipe)
    pipe.fuse_act()
    torch.testing.assert_close(generate(pipe), steered, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_language_models_are_fused(family):
    """Norms of language models have no bias: one is added, and gone afterwards."""
    tokenizer = tiny_language_models.tokenizer()
    model = getattr(tiny_language_models, family)(tokenizer)
    pipe = TextGenerationACTPipeline(model=model, tokenizer=tokenizer, device="cpu")
    pipe.load_act_map(strong_map({"model": model}), strength=0.7)
    before, tokens = weights(pipe), torch.arange(5, 25).view(2, 10)
    with pipe.steered() as steered_model, torch.no_grad():
        steered = steered_model(tokens).logits
    texts = pipe(PROMPTS, max_new_tokens=5, do_sample=False)

    pipe.fuse_act()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, steered, rtol=1e-4, atol=1e-5)
    assert pipe(PROMPTS, max_new_tokens=5, do_sample=False) == texts
    assert hook_count(pipe) == 0

    pipe.unfuse_act()
    assert_same(before, weights(pipe))


@pytest.mark.parametrize(
    ("modes", "problem"),
    [
        ({"rows": "cond"}, "the conditional rows of classifier-free guidance only"),
        ({"window": (0.0, 0.6)}, "the part 0 to 0.6 of the sampling steps only"),
        ({"rows": "cond", "window": (0.0, 0.6)}, "guidance and the part 0 to 0.6"),
    ],
)
def test_maps_for_some_rows_or_steps_are_fused_only_where_that_is_accepted(pipe, modes, problem):
    pipe.load_act_map(of(pipe, "unet", **modes))
    before = weights(pipe)
    with pytest.raises(ValueError, match=rf"act map 'strong' acts on .*{problem}.*everywhere=True"):
        pipe.fuse_act()
    assert_same(before, weights(pipe))

    pipe.fuse_act(everywhere=True)
    fused = generate(pipe)
    pipe.unfuse_act()
    pipe.unload_act_maps()
    pipe.load_act_map(of(pipe, "unet"))
    torch.testing.assert_close(fused, generate(pipe), rtol=1e-4, atol=1e-5)


def test_a_window_does_not_narrow_a_text_encoder(pipe):
    pipe.load_act_map(of(pipe, "text_encoder", window=(0.0, 0.6)))
    pipe.fuse_act()


def test_a_scope_narrows_a_language_model_and_rows_do_not(writer):
    modules = {"model": writer.model}
    writer.load_act_map(strong_map(modules, rows="cond", scope="generated"))
    with pytest.raises(ValueError, match="acts on 'generated' tokens only"):
        writer.fuse_act()
    writer.fuse_act(everywhere=True)
    writer.unfuse_act()
    writer.unload_act_maps()
    writer.load_act_map(strong_map(modules, rows="cond"))
    writer.fuse_act()


@pytest.mark.parametrize(
    ("strength", "problem"),
    [(lambda step, steps: 1.0, "a function"), ([0.5, 1.0], "by prompt"), ({"unet": [0.5]}, "by prompt")],
)
def test_strengths_that_change_are_refused(pipe, strength, problem):
    pipe.load_act_map(of(pipe, "unet"), strength=strength)
    with pytest.raises(
        ValueError, match=rf"strength of act map 'strong' at unet.* is .*{problem}.*fuse_act\(strength=1.0\)"
    ):
        pipe.fuse_act()
    pipe.fuse_act(strength=1.0)


def test_without_an_active_map_there_is_nothing_to_fuse(pipe):
    with pytest.raises(ValueError, match="no act map is active"):
        pipe.fuse_act()
    pipe.unfuse_act()


def test_sites_that_do_not_fold_are_named_or_left_to_hooks(pipe):
    bounds = torch.full((16,), -1.0), torch.ones(16)
    bounded = {NORM_OUT: AffineMap(torch.full((16,), 2.0), torch.linspace(-1, 1, 16), *bounds)}
    pipe.load_act_map(ActMap({**of(pipe, "unet"), **bounded}, ActMapMetadata(name="strong", rows="both")))
    before, steered = weights(pipe), generate(pipe)
    with pytest.raises(ValueError, match=rf"{NORM_OUT}: its map has a support"):
        pipe.fuse_act()
    assert_same(before, weights(pipe))

    pipe.fuse_act(partial=True)
    torch.testing.assert_close(generate(pipe), steered, rtol=1e-4, atol=1e-5)
    assert hook_count(pipe) == 1
    pipe.unfuse_act()
    assert hook_count(pipe) == 0
    assert_same(before, weights(pipe))


CHANGES = {
    "fuse again": lambda pipe: pipe.fuse_act(),
    "load another one": lambda pipe: pipe.load_act_map(of(pipe, "unet", name="second")),
    "choose others": lambda pipe: pipe.set_act_maps("strong", 0.5),
    "delete any": lambda pipe: pipe.delete_act_maps("strong"),
    "unload any": lambda pipe: pipe.unload_act_maps(),
    "disable them": lambda pipe: pipe.disable_act(),
    "give them another strength": lambda pipe: generate(pipe, act_strength=0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_fused_maps_cannot_be_changed(pipe, change):
    pipe.load_act_map(of(pipe, "unet"))
    pipe.fuse_act()
    with pytest.raises(ValueError, match=rf"act maps are fused \('strong'\): call unfuse_act\(\) before you {change}"):
        CHANGES[change](pipe)
    pipe.unfuse_act()
    CHANGES[change](pipe)


def test_a_fused_map_cannot_be_given_another_strength_by_name(pipe):
    pipe.load_act_map(of(pipe, "unet"))
    pipe.fuse_act()
    with pytest.raises(ValueError, match="give them another strength"):
        generate(pipe, act_strength={"strong": 0.5})


def test_a_language_model_is_not_fitted_for_nothing_while_maps_are_fused(writer):
    writer.load_act_map(strong_map({"model": writer.model}))
    writer.fuse_act()
    with pytest.raises(ValueError, match="before you load another one"):
        writer.fit_act_map(["a"], ["b"], name="new", progress=False)
