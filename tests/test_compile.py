"""Steering compiled models: every order of arming and compiling works, and nothing is compiled again without need."""

import copy

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn
from torch._dynamo.utils import counters

import tiny_language_models
import tiny_models
import tiny_pipelines
from actmaps.maps import ActMap, ActMapMetadata, AffineMap, find_sites, fit_map, steer
from actmaps.maps.hooks import before_call
from actmaps.pipelines import act_pipeline_class


def flux():
    """A FLUX transformer with two blocks of each kind."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        axes_dims_rope=(2, 2, 4),
    ).eval()


def llama():
    return tiny_language_models.llama(tiny_language_models.tokenizer())


def unet_inputs(draw):
    return {"sample": draw(2, 4, 8, 8), "timestep": torch.tensor(7), "encoder_hidden_states": draw(2, 5, 32)}


def flux_inputs(draw):
    pixels = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    return {
        "hidden_states": draw(2, 16, 4),
        "encoder_hidden_states": draw(2, 5, 16),
        "pooled_projections": draw(2, 12),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": torch.cat([torch.zeros(16, 1), pixels], dim=1),
        "txt_ids": torch.zeros(5, 3),
    }


def llama_inputs(draw):
    return {"input_ids": draw(2, 6).abs().mul(50).long() + 3, "use_cache": False}


# How it is built, its inputs, and its sites: norms, and for FLUX the two streams that a block returns.
NETWORKS = {
    "unet": (tiny_models.unet, unet_inputs, None),
    "transformer": (flux, flux_inputs, r".*(norm\w*\.norm|norm2\w*|norm_q|:image|:text)"),
    "model": (llama, llama_inputs, None),
}
WAYS = {
    "wrapper": lambda module, **options: torch.compile(module, **options),
    "in place": lambda module, **options: module.compile(**options) or module,
    "forward": lambda module, **options: (
        setattr(module, "forward", torch.compile(module.forward, **options)) or module
    ),
    "repeated blocks": lambda module, **options: module.compile_repeated_blocks(**options) or module,
}


class Network:
    """A small model to be compiled, an eager twin with the same weights, and two maps."""

    def __init__(self, name="unet"):
        build, inputs, sites = NETWORKS[name]
        torch.manual_seed(0)
        self.module = self.compiled = build()
        self.twin = copy.deepcopy(self.module)
        self._inputs, self._sites = inputs, sites
        self.maps = [self.fit(self.twin, seed) for seed in (1, 3)]

    def fit(self, module, seed):
        return fit_map(
            module, [self.inputs(seed)], [self.inputs(seed + 1)], sites=self._sites, positions=None, progress=False
        )

    def compile(self, way="wrapper", backend="eager"):
        self.compiled = WAYS[way](self.module, backend=backend, fullgraph=True)
        return self

    def inputs(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return self._inputs(lambda *shape: torch.randn(shape, generator=generator)) | {"return_dict": False}

    @torch.no_grad()
    def run(self, module):
        return module(**self.inputs())[0]

    def graphs(self):
        """How many graphs have been compiled, after running the model."""
        self.run(self.compiled)
        assert not counters["graph_break"]
        return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def same(one, other, backend):
    """Bit for bit where the same operations run."""
    torch.testing.assert_close(one, other, **({"rtol": 0, "atol": 0} if backend == "eager" else {}))


def no_recompile():
    return torch._dynamo.config.patch(error_on_recompile=True)


every_case = pytest.mark.parametrize(
    ("name", "way", "backend"),
    [
        ("unet", "wrapper", "eager"),
        ("unet", "in place", "aot_eager"),
        ("unet", "forward", "eager"),
        ("unet", "repeated blocks", "eager"),
        ("transformer", "repeated blocks", "aot_eager"),
        ("transformer", "wrapper", "eager"),
        ("model", "in place", "aot_eager"),
    ],
)


# Arming before compiling


@every_case
def test_nothing_is_compiled_again_for_other_strengths_and_rows(name, way, backend):
    network = Network(name)
    act_map, other = network.maps
    armed = {"act_map": {act_map: 1.0, other: 0.5}, "rows": torch.tensor([0.0, 1.0])}
    with steer(network.module, **armed) as steering, steer(network.twin, **armed) as expected:
        network.compile(way, backend)
        compiled = network.graphs()
        same(network.run(network.compiled), network.run(network.twin), backend)
        with no_recompile():
            for strength, rows in ((0.3, [0.5, 1.0]), ({act_map: -1.0}, [1.0, 0.0]), ({other: 0.0}, [1.0, 1.0])):
                for handle in (steering, expected):
                    handle.strength, handle.rows = strength, torch.tensor(rows)
                same(network.run(network.compiled), network.run(network.twin), backend)
        assert network.graphs() == compiled


def test_equal_blocks_are_compiled_once_with_their_maps():
    """There are more of them than torch would compile one by one."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x):
            return x + self.linear(self.norm(x))

    blocks = nn.Sequential(*(Block() for _ in range(torch._dynamo.config.recompile_limit + 2)))
    maps = {f"model.{i}.norm": AffineMap(torch.rand(4), torch.randn(4)) for i in range(len(blocks))}
    x = torch.randn(2, 4)
    with torch.no_grad(), steer(blocks, ActMap(maps)):
        expected = blocks(x)
        for block in blocks:
            block.compile(backend="eager", fullgraph=True)
        assert torch.equal(blocks(x), expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_supports_the_spatial_rule_and_token_masks_are_compiled_too():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Flatten(2), nn.Linear(9, 9))
    bounds = torch.full((2,), -0.1), torch.ones(2)
    conv = {"model.0": AffineMap(torch.tensor([2.0, 0.5]), torch.ones(2), *bounds)}
    linear = {"model.2": AffineMap(torch.rand(9), torch.randn(9))}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(3, 2, 3, 3)
    with torch.no_grad(), steer(model, ActMap(conv, ActMapMetadata(spatial="shift"))):
        assert torch.equal(compiled(x), model(x))
        with steer(model, ActMap(linear), tokens=torch.tensor([[True, False]])) as steering:
            assert torch.equal(compiled(x), model(x))
            steering.tokens = torch.tensor([[False, True]])
            with no_recompile():
                assert torch.equal(compiled(x), model(x))


def test_what_a_forward_refuses_it_refuses_compiled():
    model = torch.compile(nn.Sequential(nn.Identity()), backend="eager")
    with (
        steer(model, ActMap({"model.0": AffineMap.identity(5)})),
        pytest.raises(ValueError, match=r"was fitted on 5 units at model\.0, this model has 1 there \(Identity\)"),
    ):
        model(torch.ones(2, 1))


# Arming after compiling


@every_case
def test_arming_a_compiled_model_works_and_is_undone_and_costs_compiling_once(name, way, backend):
    network = Network(name).compile(way, backend)
    plain = network.run(network.compiled)
    unsteered = network.graphs()
    with steer(network.compiled, network.maps[0], 0.0):
        assert torch.equal(network.run(network.compiled), plain)
        assert unsteered < network.graphs() <= 2 * unsteered
    with no_recompile():
        for strength, act_map in enumerate(network.maps * 2, 1):
            with steer(network.compiled, act_map, strength), steer(network.twin, act_map, strength):
                steered = network.run(network.compiled)
                same(steered, network.run(network.twin), backend)
                assert not torch.allclose(steered, plain, atol=1e-2)
            assert torch.equal(network.run(network.compiled), plain)


def test_a_compiled_part_is_steered_in_an_eager_and_in_a_compiled_whole():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    act_map = ActMap({f"model.{i}": AffineMap(torch.rand(4), torch.randn(4)) for i in range(2)})
    x = torch.randn(3, 4)
    with torch.no_grad():
        with steer(model, act_map):
            expected = model(x)
        plain = model(x)
        model[0] = torch.compile(model[0], backend="eager")
        for whole in (model, torch.compile(model, backend="eager", fullgraph=True)):
            assert torch.equal(whole(x), plain)
            with steer(whole, act_map):
                assert torch.equal(whole(x), expected)
            assert torch.equal(whole(x), plain)


# Callbacks before each call, which pipelines use to set strengths


@pytest.mark.parametrize("way", ["in place", "repeated blocks"])
def test_a_callback_may_set_the_strength_before_each_call(way):
    network = Network().compile(way)
    with steer(network.compiled, network.maps[0]) as steering, steer(network.twin, network.maps[0]) as expected:
        compiled = network.graphs()
        steps = iter([0.9, 0.5, 0.0])

        def step(_args, kwargs):
            assert "encoder_hidden_states" in kwargs
            steering.strength = next(steps)

        remove = before_call(network.compiled, step)
        with no_recompile():
            for strength in (0.9, 0.5, 0.0):
                expected.strength = strength
                assert torch.equal(network.run(network.compiled), network.run(network.twin))
            remove()
            remove()
            steering.strength = expected.strength = 0.7
            assert torch.equal(network.run(network.compiled), network.run(network.twin))
        assert network.graphs() == compiled


# Fitting


@pytest.mark.parametrize("way", ["in place", "repeated blocks"])
def test_a_compiled_model_gives_the_maps_of_the_eager_one(way):
    network = Network().compile(way)
    plain = network.run(network.compiled)
    fitted, expected = network.fit(network.compiled, 1), network.maps[0]
    assert list(fitted) == list(expected)
    assert all(
        torch.equal(getattr(fitted[s], part), getattr(expected[s], part))
        for s in expected
        for part in ("scale", "shift")
    )
    with no_recompile():
        assert torch.equal(network.run(network.compiled), plain)


def test_sites_of_a_compiled_model_come_in_execution_order():
    network = Network()
    expected = find_sites(network.twin, example=network.inputs())
    network.compile()
    network.run(network.compiled)
    assert find_sites(network.compiled, example=network.inputs()) == expected


# Pipelines -----------------------------------------------------------------------------------------------------------


def compiled_pipe(name, how):
    pipe = tiny_pipelines.build(name, act_pipeline_class(tiny_pipelines.ARCHITECTURES[name].pipeline))
    denoiser = getattr(pipe, pipe._act_denoisers[0])
    if how == "wrapped":
        setattr(pipe, pipe._act_denoisers[0], torch.compile(denoiser, backend="eager", fullgraph=True))
    elif how == "in place":
        denoiser.compile(backend="eager", fullgraph=True)
    elif how == "repeated blocks":
        denoiser.compile_repeated_blocks(backend="eager", fullgraph=True)
    return pipe


@pytest.mark.parametrize("how", ["wrapped", "in place", "repeated blocks"])
@pytest.mark.parametrize("name", ["sdxl", "flux-dev"])
def test_compiled_pipelines_are_fitted_and_steered_as_eager_ones_and_compile_nothing_for_a_strength(name, how):
    architecture = tiny_pipelines.ARCHITECTURES[name]

    def generate(pipe, **options):
        generator = torch.Generator().manual_seed(0)
        options = architecture.call | architecture.guided | options
        return pipe("a fox", num_inference_steps=2, output_type="latent", generator=generator, **options)[0].clone()

    def fit(pipe):
        options = {"num_inference_steps": 2, "timesteps": 1, "window": (0, 1), "progress": False}
        return pipe.fit_act_map(
            ["a cat"] * 2, ["a cat, ink", "a dog, ink"], name="ink", call_options=architecture.call, **options
        )

    torch._dynamo.reset()
    eager, compiled = compiled_pipe(name, "not"), compiled_pipe(name, how)
    plain = generate(compiled, act_strength=0)
    fit(eager)
    fit(compiled)
    torch.testing.assert_close(generate(compiled), generate(eager), rtol=1e-4, atol=1e-5)
    before = counters["stats"]["unique_graphs"]
    for strength in (0.3, 0.7, 1.2):
        steered = generate(compiled, act_strength=strength)
        torch.testing.assert_close(steered, generate(eager, act_strength=strength), rtol=1e-4, atol=1e-5)
        assert not torch.equal(steered, plain)
    assert torch.equal(generate(compiled, act_strength=0), plain)
    assert counters["stats"]["unique_graphs"] == before
    assert not counters["graph_break"]
