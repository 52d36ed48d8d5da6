"""Inner products of per-sample gradients with directions: both forms equal the definition."""

from __future__ import annotations

import pytest
import torch
from tenfold_dabgo import products
from tenfold_dabgo.products import factorised_is_cheaper, use_products


def draw(*shape):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64
    )


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("kind", ["outer", "outer-t"])
@pytest.mark.parametrize("buffer", [1, 8 * 2**20])
def test_matrices_meet_directions_as_if_their_gradients_were_formed(
    kind, rows, buffer, monkeypatch
):
    """One row per sample is factorised, nine are formed; small buffers take many blocks."""
    monkeypatch.setattr(products, "BUFFER_BYTES", buffer)
    a, delta = draw(3, rows, 40), draw(3, rows, 35)
    gradients = torch.einsum("bro,bri->boi", delta, a)
    if kind == "outer-t":
        gradients = gradients.transpose(1, 2)
    directions = draw(4, *gradients.shape[1:])
    got = use_products(kind, a, delta, directions)
    torch.testing.assert_close(got, torch.einsum("bxy,qxy->bq", gradients, directions))
    assert factorised_is_cheaper(rows, 35, 40, 4) == (rows == 1)


def test_lookups_scales_and_shifts():
    ids = torch.tensor([[3, 3, 0], [1, -1, 3]])
    delta, table = draw(2, 3, 5), draw(2, 4, 5)
    expected = torch.stack(
        [
            sum(table[:, ids[b, t]] @ delta[b, t] for t in range(3) if ids[b, t] >= 0)
            for b in range(2)
        ]
    )
    torch.testing.assert_close(use_products("gather", ids, delta, table), expected)
    a, vector = draw(2, 3, 5), draw(2, 5)
    scaled = (a * delta).sum(1) @ vector.T
    torch.testing.assert_close(use_products("scale", a, delta, vector), scaled)
    torch.testing.assert_close(use_products("shift", None, delta, vector), delta.sum(1) @ vector.T)
    none = torch.full((2, 3), -1)
    assert not use_products("gather", none, delta, table).any()


def test_the_cheaper_form_is_chosen_by_flops():
    """Formed: O I (R + Q); factorised: O I R Q + R O Q."""
    assert factorised_is_cheaper(100, 512, 512, 1) == (
        512 * 512 * 100 + 100 * 512 < 512 * 512 * 101
    )
    assert not factorised_is_cheaper(2, 512, 512, 16)
    assert factorised_is_cheaper(1, 512, 512, 16)
