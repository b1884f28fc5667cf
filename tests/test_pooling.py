"""How outputs become samples."""

import pytest
import torch

from actmaps.maps.pooling import POOLINGS, samples

TOKENS = torch.tensor([[[1.0, 10.0], [5.0, 20.0], [3.0, 60.0]], [[7.0, 0.0], [-2.0, -30.0], [4.0, 0.0]]])  # (2, 3, 2)
MASK = torch.tensor([[1, 1, 0], [0, 1, 1]])


def pooled(x, pooling, channel_dim=-1, **options):
    return samples(x, channel_dim=channel_dim, pooling=pooling, **options)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("none", [[1, 10], [5, 20], [3, 60], [7, 0], [-2, -30], [4, 0]]),
        ("mean", [[3, 30], [3, -10]]),
        ("last", [[3, 60], [4, 0]]),
        ("max", [[5, 60], [7, 0]]),
        ("min", [[1, 10], [-2, -30]]),
    ],
)
def test_poolings_of_tokens(pooling, expected):
    assert pooled(TOKENS, pooling).tolist() == expected


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("none", [[1, 10], [5, 20], [-2, -30], [4, 0]]),
        ("mean", [[3, 15], [1, -15]]),
        ("last", [[5, 20], [4, 0]]),
        ("max", [[5, 20], [4, 0]]),
        ("min", [[1, 10], [-2, -30]]),
    ],
)
def test_padding_is_no_sample(pooling, expected):
    assert pooled(TOKENS, pooling, mask=MASK).tolist() == expected


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("junk", [1e30, torch.inf, torch.nan])
def test_what_stands_in_the_padding_does_not_matter(pooling, junk):
    dirty = TOKENS.masked_fill(MASK[..., None] == 0, junk)
    assert torch.equal(pooled(dirty, pooling, mask=MASK), pooled(TOKENS, pooling, mask=MASK))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_of_any_type(dtype):
    assert pooled(TOKENS, "mean", mask=MASK.to(dtype)).tolist() == [[3, 15], [1, -15]]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_images_pool_over_space(pooling):
    image = torch.arange(2 * 3 * 2 * 2.0).view(2, 3, 2, 2)
    tokens = image.flatten(2).transpose(1, 2)
    assert torch.equal(pooled(image, pooling, channel_dim=1), pooled(tokens, pooling))


def test_a_mask_is_not_for_images():
    image = torch.arange(2 * 2 * 3 * 3.0).view(2, 2, 3, 3)
    assert pooled(image, "none", channel_dim=1, mask=MASK).shape == (18, 2)


def test_a_mask_reaches_tokens_with_units_first():
    assert pooled(TOKENS.transpose(1, 2), "mean", channel_dim=1, mask=MASK).tolist() == [[3, 15], [1, -15]]


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("pooling", ["none", "mean"])
def test_a_mask_reaches_every_attention_head(heads_first, pooling):
    """Query and key norms put out (B, T, heads, C), or (B, heads, T, C)."""
    heads = torch.stack([TOKENS, TOKENS + 100, TOKENS + 200, TOKENS + 300], dim=1 if heads_first else 2)
    found = pooled(heads, pooling, mask=MASK)
    by_head = torch.cat([pooled(TOKENS + 100 * h, "none", mask=MASK) for h in range(4)])
    if pooling == "none":
        assert sorted(found.tolist()) == sorted(by_head.tolist())
    else:
        assert found.tolist() == [[153, 165], [151, 135]]


def test_a_mask_of_another_length_is_not_for_this_output():
    assert pooled(TOKENS, "none", mask=torch.ones(2, 7)).shape == (6, 2)
    assert pooled(TOKENS, "none", mask=torch.zeros(4, 3)).shape == (6, 2)
    assert pooled(TOKENS, "none", mask=torch.zeros(2, 1, 3, 3)).shape == (6, 2)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_one_vector_per_row_is_the_sample(pooling):
    x = torch.arange(6.0).view(3, 2).half()
    assert pooled(x, pooling).tolist() == x.tolist()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_samples_are_float32(pooling, dtype):
    assert pooled(TOKENS.to(dtype), pooling).dtype == torch.float32


def test_means_of_half_precision_are_accumulated_in_float32():
    x = torch.full((1, 4096, 1), 0.1, dtype=torch.float16)
    x[:, 0] = 1000.0
    assert pooled(x, "mean").item() == pytest.approx(x.double().mean().item(), rel=1e-6)


# Drawn positions


def numbered(rows, count):
    """Activations whose one unit is the number of the position."""
    return torch.arange(float(count)).repeat(rows, 1)[..., None]


def test_drawn_positions_are_distinct_and_the_same_for_every_row():
    drawn = pooled(numbered(3, 100), "none", positions=10, seed=1, site="a").view(3, 10)
    assert len(set(drawn[0].tolist())) == 10
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_the_draw_depends_on_seed_and_site():
    def draw(seed, site):
        return set(pooled(numbered(1, 1000), "none", positions=10, seed=seed, site=site).flatten().tolist())

    assert draw(0, "a") == draw(0, "a")
    assert draw(0, "a") != draw(1, "a")
    assert draw(0, "a") != draw(0, "b")


def test_the_draw_does_not_depend_on_how_rows_are_cut():
    x = numbered(6, 50)
    together = pooled(x, "none", positions=5, seed=3)
    apart = torch.cat([pooled(rows, "none", positions=5, seed=3) for rows in (x[:1], x[1:4], x[4:])])
    assert torch.equal(together, apart)


def test_as_many_positions_as_there_are_means_all():
    for positions in (3, 4, None):
        assert torch.equal(pooled(TOKENS, "none", positions=positions), TOKENS.view(6, 2))


def test_positions_are_drawn_from_real_tokens_only():
    mask = torch.zeros(2, 20)
    mask[0, 5:15] = 1
    mask[1, :2] = 1  # fewer than are wanted
    drawn = pooled(numbered(2, 20), "none", positions=4, mask=mask).flatten()
    assert len(drawn) == 6
    assert all(5 <= position < 15 for position in drawn[:4])
    assert sorted(drawn[4:].tolist()) == [0, 1]


def test_every_position_is_drawn_equally_often():
    drawn = torch.cat([pooled(numbered(1, 8), "none", positions=2, seed=seed) for seed in range(800)])
    counts = drawn.flatten().long().bincount(minlength=8)
    assert ((counts > 140) & (counts < 260)).all()  # 200 expected, deviation 12


def test_unknown_poolings_are_refused():
    with pytest.raises(ValueError, match="pooling must be one of none, mean, last, max, min, got 'median'"):
        pooled(TOKENS, "median")
