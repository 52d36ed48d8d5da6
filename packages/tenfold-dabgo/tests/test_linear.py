"""First-order scores: gradients = forward mode = explicit, and the limit of DABGO."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tenfold.errors import ConfigError
from tenfold_dabgo.attributor import BidirectionalAttributor
from tenfold_dabgo.batches import sample_means, token_batch
from tenfold_dabgo.fisher_estimate import estimate_fisher
from tenfold_dabgo.linear import linear_scores
from tenfold_dabgo.perturb import Perturbation
from tenfold_dabgo.queries import Query
from tenfold_dabgo.weights import borrowed

QUERIES = [Query("a", (3, 4), (5, 6, 7)), Query("b", (9,), (2, 30, 11, 4)), Query("c", (), (8, 7))]


def directions(model, seed=0, count=3):
    generator = torch.Generator().manual_seed(seed)
    named = dict(model.module().named_parameters())
    return [
        {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in named.items()}
        for _ in range(count)
    ]


def explicit(model, dataset, vectors):
    out = np.zeros((len(vectors), len(dataset)))
    named = dict(model.module().named_parameters())
    for i in range(len(dataset)):
        model.module().zero_grad()
        batch = token_batch(dataset, [i], 0)
        sample_means(model.token_loss(batch), batch)[0].backward()
        for q, v in enumerate(vectors):
            out[q, i] = sum(float((p.grad * v[n]).sum()) for n, p in named.items())
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("mode", "route"), [("gradients", "capture"), ("gradients", "loop"), ("jvp", "")]
)
def test_every_route_equals_explicit_gradients(make, arch, dtype, mode, route):
    """Embeddings, tied head, LayerNorm and RMSNorm, biases, Conv1D: nothing is left out."""
    model, dataset = getattr(make, arch)(dtype=dtype), make.corpus(7)
    vectors = directions(model)
    expected = explicit(model, dataset, vectors)
    with borrowed(model) as params:
        got = linear_scores(
            model, params, dataset, vectors, mode=mode, route=route or "auto", token_budget=60
        )
    scale = np.abs(expected).max()
    double = dtype == torch.float64
    # Llama normalizes in single precision whatever its weights are.
    tolerance = (1e-10 if arch == "gpt2" else 1e-7) if double else 2e-6
    np.testing.assert_allclose(got / scale, expected / scale, atol=tolerance)


def test_a_query_scores_the_same_whoever_shares_the_pass(make):
    """Bit for bit: alone, at another place, or with many others."""
    model, dataset = make.gpt2(), make.corpus(6)
    vectors = directions(model, count=5)
    with borrowed(model) as params:
        together = linear_scores(model, params, dataset, vectors)
        alone = linear_scores(model, params, dataset, vectors[3:4])
        reversed_order = linear_scores(model, params, dataset, vectors[::-1])
    np.testing.assert_array_equal(together[3], alone[0])
    np.testing.assert_array_equal(together[::-1], reversed_order)


def test_unscorable_samples_and_unknown_modes(make):
    from tenfold_dabgo.corpus import TokenDataset

    model = make.gpt2()
    dataset = TokenDataset.from_ids([[1, 2], [3]])
    with borrowed(model) as params:
        got = linear_scores(model, params, dataset, directions(model, count=1))
        assert np.isnan(got[0]).tolist() == [False, True]
        with pytest.raises(ConfigError, match="known: gradients, jvp"):
            linear_scores(model, params, dataset, [], mode="magic")


@pytest.mark.parametrize("steps", [1, 4])
def test_scores_approach_the_first_order_scores(make, steps):
    """s / (2 eta K) -> <g_i, Pi g_x>; fp64, relative error below 1e-4 at small eta."""
    model, dataset = make.gpt2(dtype=torch.float64), make.corpus(8)
    fisher = estimate_fisher(model, dataset)
    settings = Perturbation(steps=steps, lr=1e-8, damping="relative:1.5", dataset_size=1)
    attributor = BidirectionalAttributor(model, dataset, fisher, settings)
    linear = attributor.first_order(QUERIES)
    for q, result in enumerate(attributor.attribute(QUERIES)):
        scaled = result.values / (2 * 1e-8 * steps)
        assert np.abs(scaled - linear[q]).max() < 1e-4 * np.abs(linear[q]).max()


@pytest.mark.parametrize("steps", [1, 3])
def test_two_directions_are_a_central_difference(make, steps):
    """Halving eta divides the central error by about 4, the one-sided error by about 2."""
    model, dataset = make.gpt2(dtype=torch.float64), make.corpus(8)
    fisher = estimate_fisher(model, dataset)
    central, ascent, descent = [], [], []
    for eta in (1e-6, 5e-7):
        settings = Perturbation(steps=steps, lr=eta, damping="relative:1.5", dataset_size=1)
        attributor = BidirectionalAttributor(model, dataset, fisher, settings, base_losses=True)
        exact = attributor.first_order(QUERIES[:1])[0]
        result = next(iter(attributor.attribute(QUERIES[:1])))
        unit = eta * steps
        central.append(np.abs(result.values / (2 * unit) - exact).max())
        ascent.append(np.abs(result.scores("ascent") / unit - exact).max())
        descent.append(np.abs(result.scores("descent") / unit - exact).max())
    assert central[0] / central[1] == pytest.approx(4, rel=0.1)
    assert ascent[0] / ascent[1] == pytest.approx(2, rel=0.1)
    assert descent[0] / descent[1] == pytest.approx(2, rel=0.1)
    assert central[1] < 0.1 * ascent[1]
