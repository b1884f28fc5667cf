"""One map for both worlds: the same weights in both libraries, the same sites, the same steered outputs."""

import pytest
import torch
from twins import ALL

from actmaps.maps import ActMap, AffineMap, find_sites, steer
from actmaps.nodes.translation import denoiser_places, encoder_names


@pytest.fixture(scope="module", params=list(ALL))
def twins(request):
    return request.param, ALL[request.param]()


def relative(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


def record(places, sites, run):
    """The activations of all sites in one run."""
    found, handles = {}, []
    for site in sites:
        place = places[site]

        def keep(_module, _args, output, site=site, place=place):
            if isinstance(x := place.read(output), torch.Tensor):  # SD3's last block returns no text
                found.setdefault(site, x.clone())

        handles.append(place.module.register_forward_hook(keep))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def test_the_twins_compute_the_same(twins):
    _, pair = twins
    with torch.no_grad():
        assert relative(pair.run_ours(), pair.run_theirs()) < 1e-4


def test_every_norm_is_translated(twins):
    _, pair = twins
    norms = {site for site, place in pair.theirs.items() if place.is_norm}
    assert norms <= set(pair.ours)
    assert {site for site in norms if pair.ours[site].is_norm} == norms


def test_every_translated_site_has_the_same_activations(twins):
    _, pair = twins
    shared = [site for site in pair.theirs if site in pair.ours]
    theirs, ours = record(pair.theirs, shared, pair.run_theirs), record(pair.ours, shared, pair.run_ours)
    # Embeddings: one library calls the module and the other does not, or once per prompt.
    embeddings = {site for site in shared if "embeddings" in site or site.endswith("shared")}
    assert set(theirs) - embeddings == set(ours) - embeddings
    compared = [site for site in theirs if site not in embeddings]
    assert len(compared) > 0.4 * len(pair.theirs)
    for site in compared:
        x, y = theirs[site], ours[site]
        if x.ndim == 4 and y.shape != x.shape:  # heads before tokens
            y = y.transpose(1, 2)
        assert relative(y.reshape(x.shape), x) < 1e-4, site


def test_no_name_is_foreign(twins):
    """Names that diffusers does not know are ComfyUI's containers or what transformers holds elsewhere, never norms."""
    name, pair = twins
    foreign = [site for site in pair.ours if site not in pair.theirs]
    assert not any(pair.ours[site].is_norm for site in foreign)
    if name in ("sd15", "sdxl", "flux", "sd3"):
        assert all(site.endswith((".ff.net", "pos_embed.proj")) for site in foreign), foreign


def random_map(pair, sites, size):
    """A random map on those of `sites` that both libraries call; units as the activations tell them."""
    generator = torch.Generator().manual_seed(0)
    theirs, ours = record(pair.theirs, sites, pair.run_theirs), record(pair.ours, sites, pair.run_ours)
    units = {site: x.shape[pair.theirs[site].channel_dim(x)] for site, x in theirs.items() if site in ours}
    return ActMap(
        {
            site: AffineMap(1 + size * torch.randn(n, generator=generator), size * torch.randn(n, generator=generator))
            for site, n in units.items()
        }
    )


@pytest.mark.parametrize("rows", [None, torch.tensor([0.0, 1.0])], ids=["all rows", "second row"])
def test_maps_on_the_norms_steer_both_alike(twins, rows):
    _, pair = twins
    sites = [site for site, place in pair.theirs.items() if place.is_norm]
    compare(pair, random_map(pair, sites, 0.2), rows)


def test_maps_on_all_sites_steer_both_alike(twins):
    _, pair = twins
    shared = [site for site in pair.theirs if site in pair.ours and not site.endswith((":text", ":image"))]
    compare(pair, random_map(pair, shared, 0.02), None)


def test_maps_on_streams_steer_both_alike(twins):
    _, pair = twins
    streams = [site for site in pair.theirs if site.endswith((":text", ":image"))]
    if not streams:
        pytest.skip("this architecture has one stream")
    assert all(
        site in pair.ours for site in streams if not site.startswith("transformer.single") or ".attn" not in site
    )
    shared = [site for site in streams if site in pair.ours]
    compare(pair, random_map(pair, shared, 0.1), None)


def compare(pair, act_map, rows):
    with torch.no_grad():
        plain = pair.run_theirs()
        with steer(pair.theirs, act_map, rows=rows):
            theirs = pair.run_theirs()
        with steer(pair.ours, act_map, rows=rows):
            ours = pair.run_ours()
        assert relative(theirs, plain) > 1e-2
        assert relative(ours, theirs) < 1e-4
        assert relative(pair.run_ours(), plain) < 1e-4


# Names alone


@pytest.mark.parametrize(
    ("paths", "has_clip_g", "expected"),
    [
        (["clip_l"], False, ["text_encoder"]),
        (["clip_l", "clip_g"], True, ["text_encoder", "text_encoder_2"]),
        (["clip_g"], True, ["text_encoder_2"]),
        (["clip_l", "t5xxl"], False, ["text_encoder", "text_encoder_2"]),
        (["clip_l", "clip_g", "t5xxl"], True, ["text_encoder", "text_encoder_2", "text_encoder_3"]),
        (["clip_l", "t5xxl"], True, ["text_encoder", "text_encoder_3"]),
        (["clip_l", "llama"], False, ["text_encoder_2", "text_encoder"]),
        (["t5xxl"], False, ["text_encoder"]),
        (["qwen25_7b"], False, ["text_encoder"]),
    ],
)
def test_text_encoders_count_as_in_diffusers(paths, has_clip_g, expected):
    assert encoder_names(paths, has_clip_g) == dict(zip(paths, expected, strict=True))


def test_a_compiled_model_has_the_same_places():
    from actmaps.nodes.demo_model import load_demo_model

    model = load_demo_model()[0].model
    plain = denoiser_places(model)
    model.diffusion_model = torch.compile(model.diffusion_model, backend="eager")
    assert denoiser_places(model) == plain
    assert find_sites(plain) == [site for site, place in plain.items() if place.is_norm]
