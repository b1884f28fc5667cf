"""One map for both worlds: the same weights in both libraries, the same activations at each site, the same steered outputs."""

import re

import pytest
import torch
from twins import ALL

from actmaps.maps import ActMap, AffineMap, find_sites, steer
from actmaps.nodes.translation import denoiser_places, encoder_places

# What diffusers and transformers call and ComfyUI has no like of. Everything else must be translated.
UNTRANSLATED = {
    "activation functions, which have no weights and most often no module": (
        r".*\.(silu|act|act_1|act_fn|activation_fn|nonlinearity|conv_act)"
    ),
    "dropouts": r".*(\.dropout|\.to_out\.1|\.net\.1)",
    "adaptive norms, whose parts are computed in the block": (
        r"transformer\.(joint_|single_)?transformer_blocks\.\d+\.norm(1|1_context)?|transformer\.norm_out"
    ),
    "projections of the modulation whose halves are swapped": (
        r"transformer\.norm_out\.linear|transformer\.transformer_blocks\.2\.norm1_context\.linear"
    ),
    "positions and sinusoids, computed by functions": (
        r".*\.(time_proj|add_time_proj|timesteps_proj|time_step_embed|pos_embed|rope|rotary_emb)"
    ),
    "sums and bundles of embeddings, computed in the model": (
        r"transformer\.(time_text_embed|condition_embedder|adaln_single(\.emb)?)"
    ),
    "attention of single blocks, computed in the block": (r"transformer\.single_transformer_blocks\.\d+\.attn"),
    "text that the last block of SD3 puts out for nobody": r"transformer\.transformer_blocks\.2\.attn:text",
    "down blocks, which put out the skip connections too": r"unet\.down_blocks\.\d+",
    "keys and values of PixArt, of all prompts of a batch in one row": r"transformer\..*\.attn2\.to_[kv]",
    "embeddings, which ComfyUI looks up before it calls the encoder": r"text_encoder.*(embeddings\b.*|embed_tokens|\.text_model)",
}
# ComfyUI's own names where there is no table, and containers that are never called.
FOREIGN = {"qwen": {"transformer.pe_embedder"}}


@pytest.fixture(scope="module", params=list(ALL))
def twins(request):
    return request.param, ALL[request.param]()


def relative(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


def record(places, run):
    """The activations of every site in one run: a list with one entry per call."""
    found, handles = {}, []
    for site, place in places.items():

        def keep(_module, _args, output, site=site, place=place):
            if isinstance(x := place.read(output), torch.Tensor):  # SD3's last block returns no text
                found.setdefault(site, []).append(x.clone())

        handles.append(place.module.register_forward_hook(keep))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


@pytest.fixture(scope="module")
def activations(twins):
    _, pair = twins
    return record(pair.theirs, pair.run_theirs), record(pair.ours, pair.run_ours)


def test_the_twins_compute_the_same(twins):
    _, pair = twins
    with torch.no_grad():
        assert relative(pair.run_ours(), pair.run_theirs()) < 1e-4


def test_every_norm_is_translated(twins):
    _, pair = twins
    norms = {site for site, place in pair.theirs.items() if place.is_norm}
    assert norms
    assert norms <= set(pair.ours)
    assert {site for site, place in pair.ours.items() if place.is_norm} == norms


def test_what_is_not_translated_is_known_and_explained(twins, activations):
    _, pair = twins
    theirs, _ = activations
    untranslated = [site for site in theirs if site not in pair.ours]
    assert [site for site in untranslated if not any(re.fullmatch(p, site) for p in UNTRANSLATED.values())] == []


def test_every_name_is_one_of_diffusers(twins):
    name, pair = twins
    assert set(pair.ours) - set(pair.theirs) == FOREIGN.get(name, set())


def test_every_translated_site_is_reached_and_has_the_same_activations(twins, activations):
    _, pair = twins
    theirs, ours = activations
    translated = [site for site in pair.ours if site in pair.theirs]
    assert [site for site in translated if (site in theirs) != (site in ours)] == []
    reached = [site for site in translated if site in ours]
    unreached = set(translated) - set(reached)
    assert all(isinstance(pair.ours[site].module, torch.nn.ModuleList) for site in unreached)
    for site in reached:
        assert len(ours[site]) == len(theirs[site]), site
        for x, y in zip(theirs[site], ours[site], strict=True):
            assert y.shape[pair.ours[site].channel_dim(y)] == x.shape[pair.theirs[site].channel_dim(x)], site
            if x.ndim == 4 and y.shape != x.shape:  # heads before tokens
                y = y.transpose(1, 2)
            assert relative(y.reshape(x.shape), x) < 1e-4, site


def random_map(pair, activations, size, norms_only=False):
    """A random map on all translated sites, in the order in which ComfyUI's places come."""
    generator = torch.Generator().manual_seed(0)
    theirs, _ = activations
    maps = {}
    for site in pair.ours:
        if site in theirs and (pair.theirs[site].is_norm or not norms_only):
            x = theirs[site][0]
            units = x.shape[pair.theirs[site].channel_dim(x)]
            scale, shift = torch.randn(2, units, generator=generator)
            maps[site] = AffineMap(1 + size * scale, size * shift)
    return ActMap(maps)


@pytest.mark.parametrize("rows", [None, torch.tensor([0.0, 1.0])], ids=["all rows", "second row"])
def test_maps_on_the_norms_steer_both_alike(twins, activations, rows):
    name, pair = twins
    if name == "pixart" and rows is not None:
        rows = torch.tensor([0.5])  # its twins agree for one row only
    compare(pair, random_map(pair, activations, 0.2, norms_only=True), rows)


def test_maps_on_all_sites_with_streams_and_slices_steer_both_alike(twins, activations):
    _, pair = twins
    compare(pair, random_map(pair, activations, 0.02), None)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_maps_on_streams_alone_steer_both_alike(name):
    pair = ALL[name]()
    activations = record(pair.theirs, pair.run_theirs), None
    streams = [site for site in random_map(pair, activations, 0.2) if ":" in site]
    assert {site.split(":")[1] for site in streams} == {"image", "text"}
    compare(pair, random_map(pair, activations, 0.2).select(streams), None)


@pytest.mark.parametrize("name", ["flux", "sd3", "sdxl"])
def test_a_support_is_tested_within_the_part_of_the_output(name):
    """On the last slices, streams and blocks only: values that land on a bound would make outputs of the two differ."""
    pair = ALL[name]()
    affine = random_map(pair, (record(pair.theirs, pair.run_theirs), None), 0.5)
    last = [site for site in affine if re.search(r"(attn|attn1)\.to_v$|:image$|resnets\.1$", site)][-3:]
    bounded = {}
    for site in last:
        bounds = torch.full((2, affine[site].channels), 0.8) * torch.tensor([[-1.0], [1.0]])
        bounded[site] = AffineMap(affine[site].scale, affine[site].shift, *bounds)
    compare(pair, ActMap(bounded), None)
    everywhere, _ = steered_outputs(pair, affine.select(last), None)
    assert relative(steered_outputs(pair, ActMap(bounded), None)[0], everywhere) > 1e-2


def steered_outputs(pair, act_map, rows):
    with torch.no_grad():
        with steer(pair.theirs, act_map, rows=rows):
            theirs = pair.run_theirs()
        with steer(pair.ours, act_map, rows=rows):
            ours = pair.run_ours()
    return theirs, ours


def compare(pair, act_map, rows):
    theirs, ours = steered_outputs(pair, act_map, rows)
    with torch.no_grad():
        plain = pair.run_theirs()
        assert relative(theirs, plain) > 1e-2
        assert relative(ours, theirs) < 1e-4
        assert relative(pair.run_ours(), plain) < 1e-4


# Kinds of models


def test_a_compiled_model_has_the_same_places():
    from actmaps.nodes.demo_model import load_demo_model

    model = load_demo_model()[0].model
    plain = denoiser_places(model)
    model.diffusion_model = torch.compile(model.diffusion_model, backend="eager")
    assert denoiser_places(model) == plain
    assert find_sites(plain) == [site for site, place in plain.items() if place.is_norm]


def test_compiled_blocks_have_the_same_names():
    from actmaps.nodes.demo_model import load_demo_model

    model = load_demo_model()[0].model
    names = set(denoiser_places(model))
    model.diffusion_model.input_blocks[1] = torch.compile(model.diffusion_model.input_blocks[1], backend="eager")
    assert set(denoiser_places(model)) == names


def test_a_model_without_a_table_keeps_comfyuis_names():
    import comfy.supported_models

    config = comfy.supported_models.LTXV(
        {"image_model": "ltxv", "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16,
         "cross_attention_dim": 32, "caption_channels": 24, "in_channels": 8}
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device="cpu")
    places = denoiser_places(model)
    modules = dict(model.diffusion_model.named_modules())
    assert places
    assert all(modules[site.removeprefix("transformer.")] is place.module for site, place in places.items())


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        ("sdxl", {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}),
        ("refiner", {"clip_g": "text_encoder_2"}),
        ("flux", {"clip_l": "text_encoder", "t5xxl": "text_encoder_2"}),
        ("sd3", {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}),
        ("sd3 without clip_g", {"clip_l": "text_encoder", "t5xxl": "text_encoder_3"}),
    ],
)
def test_text_encoders_count_as_in_diffusers(build, expected):
    """ComfyUI's classes at full size, without memory for their weights."""
    from comfy.sdxl_clip import SDXLClipModel, SDXLRefinerClipModel
    from comfy.text_encoders.flux import FluxClipModel
    from comfy.text_encoders.sd3_clip import SD3ClipModel

    kinds = {
        "sdxl": SDXLClipModel,
        "refiner": SDXLRefinerClipModel,
        "flux": FluxClipModel,
        "sd3": SD3ClipModel,
        "sd3 without clip_g": lambda **kwargs: SD3ClipModel(clip_g=False, **kwargs),
    }
    model = kinds[build](device="meta", dtype=torch.float16)
    found = {path: {site.split(".")[0] for site in places} for path, places in encoder_places(model).items()}
    assert found == {path: {component} for path, component in expected.items()}


def test_only_clip_g_has_a_projection():
    from comfy.sdxl_clip import SDXLClipModel

    places = encoder_places(SDXLClipModel(device="meta", dtype=torch.float16))
    assert "text_encoder.text_projection" not in places["clip_l"]
    assert "text_encoder_2.text_projection" in places["clip_g"]
