"""Offloading: storages of a suspended forward leave and come back, and a fit does not notice."""

from __future__ import annotations

import torch
from torch import nn

from actmaps.maps import fit_map
from actmaps.maps.offload import MIN_BYTES, Offload


def test_what_a_forward_made_leaves_and_comes_back_and_nothing_else():
    layer, given = nn.Linear(64, 64), torch.randn(100, 64)
    offload = Offload(layer.parameters(), min_bytes=1024)
    with torch.no_grad(), offload:
        transposed, made = layer.weight.t(), layer(given)
        view, small = made[:10], made[0, :4].clone()
    expected = made.clone()

    assert offload.park() == made.nbytes
    assert made.untyped_storage().nbytes() == 0
    for kept in (given, layer.weight, transposed, small):
        assert kept.untyped_storage().nbytes() > 0
    offload.restore()
    assert torch.equal(made, expected)
    assert torch.equal(view, expected[:10])


def test_a_fit_with_offload_gives_the_same_map(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(32, 32), nn.LayerNorm(32))])
    rows = MIN_BYTES // (32 * 4)  # the activations of one micro-batch are just large enough to move
    source = [torch.randn(1, rows, 32) for _ in range(2)]
    target = [torch.randn(1, rows, 32) + 1 for _ in range(2)]
    parked = []
    park = Offload.park
    monkeypatch.setattr(Offload, "park", lambda self: parked.append(park(self)))

    plain = fit_map(model, source, target, progress=False)
    assert not parked
    offloaded = fit_map(model, source, target, offload=True, progress=False)

    assert max(parked) >= MIN_BYTES
    for site in plain:
        assert torch.equal(plain[site].scale, offloaded[site].scale)
        assert torch.equal(plain[site].shift, offloaded[site].shift)
