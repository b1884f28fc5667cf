"""Spatial masks: a map acts where they say, at every site of a denoiser."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

import tiny_models
from actmaps.maps import ActMap, AffineMap, fit_map, steer
from actmaps.maps.masks import as_mask, position_weights, resized, stream_of

LEFT = torch.zeros(8, 8)
LEFT[:, :4] = 1
RAMP = torch.linspace(0, 1, 8).expand(8, 8)


def one_site(channels=1, site="unet.0"):
    generator = torch.Generator().manual_seed(0)
    return ActMap({site: AffineMap(1 + torch.rand(channels, generator=generator), torch.ones(channels))})


def moved_by(model, act_map, x, mask=None, **options):
    with torch.no_grad(), steer({"unet": model}, act_map, mask=mask, **options):
        return model(x)


# Sizes and positions


def test_masks_are_resized_by_the_mean_and_keep_ones_and_zeros():
    assert resized(as_mask(LEFT), 2, 4).tolist() == [[[[1, 1, 0, 0]] * 2]]
    assert resized(as_mask(LEFT), 3, 1).tolist() == [[[[0.5]] * 3]]
    assert (resized(torch.ones(1, 1, 17, 31), 5, 7) == 1).all()
    assert resized(as_mask(LEFT), 16, 16).sum() == 128


@pytest.mark.parametrize(
    ("mask", "tokens", "grid"),
    [
        ((512, 768), 6144, (64, 96)),  # the latents of a picture
        ((64, 96), 384, (16, 24)),
        ((65, 97), 33 * 49, (33, 49)),  # convolutions of stride 2 round up
        ((1000, 1000), 62 * 62, (62, 62)),  # patches round down
        ((8, 2), 4, (4, 1)),
    ],
)
def test_the_length_of_a_token_sequence_tells_its_grid(mask, tokens, grid):
    ramp = torch.linspace(0, 1, mask[0])[:, None].expand(mask)
    weights = position_weights(as_mask(ramp), torch.zeros(2, tokens, 5), -1, "image")
    assert torch.equal(weights.view(grid), resized(as_mask(ramp), *grid)[0, 0])


def test_tokens_of_attention_heads_and_channels_first_sequences():
    mask = as_mask(LEFT)
    tokens = LEFT.flatten()
    assert torch.equal(position_weights(mask, torch.zeros(1, 16, 64, 3), -1, "image"), tokens.view(1, 1, 64, 1))
    assert torch.equal(position_weights(mask, torch.zeros(1, 64, 16, 3), -1, "image"), tokens.view(1, 64, 1, 1))
    assert torch.equal(position_weights(mask, torch.zeros(1, 3, 64), 1, "image"), tokens.view(1, 1, 64))
    assert torch.equal(position_weights(mask, torch.zeros(2, 3, 5, 8, 8), 1, "image"), LEFT.view(1, 1, 1, 8, 8))


def test_of_a_joint_sequence_the_text_comes_first_and_is_not_moved():
    weights = position_weights(as_mask(LEFT), torch.zeros(1, 5 + 64, 3), -1, "joint")
    assert torch.equal(weights[0, :, 0], torch.cat([torch.zeros(5), LEFT.flatten()]))


@pytest.mark.parametrize(
    ("site", "stream"),
    [
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q", "image"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "text"),
        ("unet.add_embedding.linear_1", "text"),
        ("transformer.transformer_blocks.0.norm1_context.norm", "text"),
        ("transformer.transformer_blocks.0.attn.norm_added_q", "text"),
        ("transformer.transformer_blocks.0.attn.norm_q", "image"),
        ("transformer.transformer_blocks.0:text", "text"),
        ("transformer.transformer_blocks.0:image", "image"),
        ("transformer.transformer_blocks.0.txt_mlp.net.2", "text"),
        ("transformer.single_transformer_blocks.3.norm.norm", "joint"),
        ("transformer.single_transformer_blocks.3:image", "image"),
        ("transformer.single_transformer_blocks.3:text", "text"),
        ("text_encoder.encoder.layers.0.layer_norm1", "image"),
    ],
)
def test_names_tell_the_stream(site, stream):
    assert stream_of(site) == stream


# Moving


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_feature_maps_move_where_the_mask_is(dtype):
    model = nn.Sequential(nn.Conv2d(3, 3, 1)).to(dtype)
    x = torch.randn(2, 3, 8, 8).to(dtype)
    act_map = one_site(3)
    with torch.no_grad():
        plain = model(x)
    whole = moved_by(model, act_map, x)
    left = moved_by(model, act_map, x, LEFT)
    assert torch.equal(left[..., :4], whole[..., :4])
    assert torch.equal(left[..., 4:], plain[..., 4:])
    assert torch.equal(moved_by(model, act_map, x, torch.ones(1, 1, 16, 16)), whole)
    assert torch.equal(moved_by(model, act_map, x, torch.zeros(8, 8)), plain)
    between = plain.float() + RAMP * (whole.float() - plain.float())
    torch.testing.assert_close(moved_by(model, act_map, x, RAMP).float(), between, rtol=1e-2, atol=1e-2)


def test_what_is_not_finite_stays_outside_of_the_mask():
    x = torch.tensor([torch.inf, -0.0]).view(1, 2, 1)
    out = moved_by(nn.Sequential(nn.Identity()), one_site(), x, torch.zeros(1, 2))
    assert torch.equal(out.view(torch.int32), x.view(torch.int32))


def test_each_row_may_have_a_mask_and_a_strength_of_its_own():
    """Of four rows, the first two (unconditional) stay; the third and fourth have masks of their own."""
    masks = torch.stack([torch.ones(8, 8), torch.ones(8, 8), LEFT, 1 - LEFT])[:, None]
    moved = moved_by(
        nn.Sequential(nn.Identity()), one_site(), torch.zeros(4, 64, 1), masks, rows=torch.tensor([0.0, 1.0])
    )
    assert (moved[:2] == 0).all()
    assert torch.equal(moved[2].view(8, 8), LEFT)
    assert torch.equal(moved[3].view(8, 8), 1 - LEFT)
    two = moved_by(nn.Sequential(nn.Identity()), one_site(), torch.zeros(4, 64, 1), masks[2:])
    assert torch.equal(two.view(4, 8, 8), torch.stack([LEFT, LEFT, 1 - LEFT, 1 - LEFT]))


def test_the_mask_can_change_while_steering():
    model, x = nn.Sequential(nn.Identity()), torch.zeros(1, 64, 1)
    with steer({"unet": model}, one_site(), mask=LEFT) as steering:
        assert model(x).sum() == 32
        steering.mask = RAMP
        assert torch.equal(model(x).view(8, 8), RAMP)
        steering.mask = None
        assert model(x).sum() == 64


# Whole networks


def deep_map(model, component, sites, *inputs):
    return fit_map(
        {component: model}, *([i] for i in inputs), sites=sites, forward=lambda i: model(**i), progress=False
    )


def test_a_masked_unet_moves_in_the_region_and_a_mask_of_ones_is_no_mask():
    torch.manual_seed(0)
    unet = tiny_models.unet()
    inputs = [
        {"sample": torch.randn(2, 4, 8, 8), "timestep": 7, "encoder_hidden_states": torch.randn(2, 5, 32)}
        for _ in range(2)
    ]
    act_map = deep_map(unet, "unet", None, *inputs)

    @torch.no_grad()
    def run(**options):
        with steer(unet, act_map, **options):
            return unet(**inputs[0]).sample

    plain, whole, left = run(strength=0.0), run(), run(mask=LEFT)
    assert torch.equal(run(mask=torch.ones(64, 64)), whole)
    assert torch.equal(run(mask=torch.zeros(64, 64)), plain)
    change = (left - plain).abs().mean(dim=(0, 1, 2))
    assert change[:4].sum() > change[4:].sum()


def test_a_masked_flux_leaves_the_region_outside_of_an_output_alone():
    torch.manual_seed(0)
    flux = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    pixels = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    inputs = [
        {
            "hidden_states": torch.randn(2, 16, 4),
            "encoder_hidden_states": torch.randn(2, 5, 16),
            "pooled_projections": torch.randn(2, 12),
            "timestep": torch.tensor([0.5, 0.5]),
            "img_ids": torch.cat([torch.zeros(16, 1), pixels], dim=1),
            "txt_ids": torch.zeros(5, 3),
        }
        for _ in range(2)
    ]
    every_norm = deep_map(flux, "transformer", None, *inputs)
    assert {stream_of(site) for site in every_norm} == {"image", "text", "joint"}

    @torch.no_grad()
    def run(act_map, **options):
        with steer(flux, act_map, **options):
            return flux(**inputs[0]).sample

    plain = run(every_norm, strength=0.0)
    assert torch.equal(run(every_norm, mask=torch.zeros(8, 8)), plain)
    assert not torch.allclose(run(every_norm, mask=LEFT), plain, atol=1e-3)
    last = every_norm.select(["norm_out.norm"])
    left, whole = run(last, mask=LEFT).view(2, 4, 4, 4), run(last).view(2, 4, 4, 4)
    assert torch.equal(left[:, :, :2], whole[:, :, :2])
    assert torch.equal(left[:, :, 2:], plain.view(2, 4, 4, 4)[:, :, 2:])


def test_a_mask_is_compiled_once_for_all_its_values():
    torch._dynamo.reset()  # other tests have compiled the code of nn.Sequential
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(2), nn.Linear(64, 64))
    act_map = ActMap({**one_site(3), "unet.2": AffineMap(torch.rand(64), torch.rand(64))}).select(["0"])
    compiled, x = torch.compile(model, backend="eager", fullgraph=True), torch.randn(2, 3, 8, 8)
    with torch.no_grad(), steer({"unet": model}, act_map, mask=LEFT) as steering:
        assert torch.equal(compiled(x), model(x))
        steering.mask = RAMP
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(compiled(x), model(x))


# Refusals


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((2, 77, 3), 3), ((2, 3), 3), ((2, 1, 3), 3)],
    ids=["text tokens", "a pooled vector", "a time embedding"],
)
def test_sites_without_positions_are_refused_by_name(shape, channels):
    with pytest.raises(ValueError, match=r"unet\.0 has activations of shape .* finds no positions of the picture"):
        moved_by(nn.Sequential(nn.Identity()), one_site(channels), torch.zeros(shape), LEFT)


def test_masks_for_another_number_of_rows_are_refused_by_site():
    with pytest.raises(ValueError, match=r"unet\.0 .* the mask \(2, 1, 8, 8\) .* one row or one per picture"):
        moved_by(nn.Sequential(nn.Identity()), one_site(), torch.zeros(3, 64, 1), torch.ones(2, 8, 8))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(8), r"got \(8,\)"),
        (torch.ones(1, 3, 8, 8), r"got \(1, 3, 8, 8\)"),
        (torch.full((8, 8), 255.0), "divide one of bytes by 255"),
        (torch.full((8, 8), torch.nan), "between 0"),
    ],
)
def test_what_is_no_mask_is_refused_and_nothing_is_armed(mask, message):
    model = nn.Sequential(nn.Identity())
    with pytest.raises(ValueError, match=message):
        steer({"unet": model}, one_site(), mask=mask)
    assert "forward" not in vars(model[0])
