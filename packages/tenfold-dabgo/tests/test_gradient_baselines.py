"""TrackStar, TRAK, DataInf, UnTrac-Inv and embeddings against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tenfold.capabilities import HiddenStates
from tenfold.errors import CapabilityError, ConfigError
from tenfold_dabgo.attributor import BidirectionalAttributor
from tenfold_dabgo.baselines.datainf import DataInfAttributor
from tenfold_dabgo.baselines.embeddings import EmbeddingAttributor
from tenfold_dabgo.baselines.projection import Projector, joined
from tenfold_dabgo.baselines.trackstar import TrackStarAttributor, blocks_of_layers
from tenfold_dabgo.baselines.trak import TrakAttributor, kernel_scores
from tenfold_dabgo.baselines.untrac import UnTracInvAttributor
from tenfold_dabgo.batches import sample_means, token_batch
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.fisher_estimate import estimate_fisher
from tenfold_dabgo.perturb import Perturbation
from tenfold_dabgo.queries import Query

QUERIES = [Query("a", (3, 4), (5, 6, 7)), Query("b", (9,), (2, 30, 11, 4))]


@pytest.fixture(scope="module")
def setting(make):
    return make.gpt2(dtype=torch.float64, width=4), make.corpus(7)


def gradients(model, batches, names):
    """name → `[n, numel]` explicit gradients."""
    rows = {n: [] for n in names}
    for batch in batches:
        model.module().zero_grad()
        sample_means(model.token_loss(batch), batch)[0].backward()
        for name, p in model.module().named_parameters():
            if name in rows:
                rows[name].append(p.grad.reshape(-1).clone())
    model.module().zero_grad()
    return {n: torch.stack(r).numpy() for n, r in rows.items()}


def explicit(model, dataset, names):
    samples = gradients(model, [token_batch(dataset, [i], 0) for i in range(len(dataset))], names)
    return samples, gradients(model, [q.batch() for q in QUERIES], names)


def scores_of(attributor):
    return np.stack([r.values for r in attributor.attribute(QUERIES)])


def test_trackstar_without_v_r_and_projection_is_the_gradient_cosine(setting):
    model, dataset = setting
    attributor = TrackStarAttributor(model, dataset, None, rank=None, whiten=False)
    names = Projector(model).matrices()
    assert "transformer.wte.weight" not in names
    assert len(names) == 8
    g, q = (joined(x, names) for x in explicit(model, dataset, names))
    norms = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(g, axis=1)
    np.testing.assert_allclose(scores_of(attributor), q @ g.T / norms, rtol=1e-5)


def test_trackstar_divides_by_the_root_of_v_and_whitens_by_block(setting):
    model, dataset = setting
    fisher = estimate_fisher(model, dataset)
    names = Projector(model).matrices()
    g, q = explicit(model, dataset, names)
    floor = 1e-8 * fisher.mean()
    parts = []
    for block in blocks_of_layers(names, 2).values():
        scale = np.concatenate(
            [(fisher.values[n].reshape(-1).numpy() + floor) ** -0.5 for n in block]
        )
        phi, psi = joined(g, block) * scale, joined(q, block) * scale
        values, vectors = np.linalg.eigh(phi.T @ phi / len(phi))
        values = np.maximum(values, 1e-6 * values[-1])
        root = vectors @ np.diag(values**-0.5) @ vectors.T
        parts.append((phi @ root, psi @ root))
    phi, psi = (np.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    norms = np.linalg.norm(psi, axis=1)[:, None] * np.linalg.norm(phi, axis=1)
    got = scores_of(TrackStarAttributor(model, dataset, fisher, rank=None))
    np.testing.assert_allclose(got, psi @ phi.T / norms, atol=2e-3)


def test_blocks_are_attention_and_mlp_of_groups_of_layers():
    names = [f"h.{i}.{p}.weight" for i in range(4) for p in ("attn.c_attn", "mlp.c_fc")]
    blocks = blocks_of_layers([*names, "lm_head.weight"], 2)
    assert blocks[0, "attention"] == ["h.0.attn.c_attn.weight", "h.1.attn.c_attn.weight"]
    assert len(blocks) == 5
    assert blocks[-1, "other"] == ["lm_head.weight"]


def test_projection_keeps_inner_products_in_expectation(setting):
    """Mean over many seeds of <P g, P h> is <g, h>."""
    model, _ = setting
    generator = torch.Generator().manual_seed(0)
    g, h = torch.randn(2, 1, 16, 24, generator=generator, dtype=torch.float64)
    products = []
    for seed in range(400):
        p = Projector(model, rank=4, seed=seed)
        products.append(float((p.project("w", g) * p.project("w", h)).sum()))
    error = np.std(products) / 20
    assert abs(np.mean(products) - float((g * h).sum())) < 4 * error
    same = [Projector(model, rank=4, seed=3).project("w", g) for _ in range(2)]
    assert torch.equal(same[0], same[1])


def test_trak_is_the_regularized_kernel(setting):
    model, dataset = setting
    names = Projector(model).matrices()
    g, q = (joined(x, names) for x in explicit(model, dataset, names))
    lam = 0.1 * (g**2).sum() / min(g.shape)
    inverse = np.linalg.inv(g.T @ g + lam * np.eye(g.shape[1]))
    got = scores_of(TrakAttributor(model, dataset, rank=None))
    expected = q @ inverse @ g.T
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
    few = g[:, :4]
    np.testing.assert_allclose(
        kernel_scores(few[:2], few, 0.1), _kernel(few[:2], few, 0.1), rtol=1e-9
    )


def _kernel(queries, samples, damping):
    lam = damping * (samples**2).sum() / min(samples.shape)
    return queries @ np.linalg.inv(samples.T @ samples + lam * np.eye(samples.shape[1])) @ samples.T


def test_datainf_averages_the_inverses_weight_by_weight(setting):
    """(1/n) sum_i (lam I + g_i g_i^T)^{-1} v, formed explicitly."""
    model, dataset = setting
    fisher = estimate_fisher(model, dataset)
    names = [n for n, _ in model.module().named_parameters()]
    g, q = explicit(model, dataset, names)
    expected = np.zeros((2, len(dataset)))
    for n in names:
        lam = 0.1 * fisher.mean({n: 0})
        eye = np.eye(g[n].shape[1])
        inverse = sum(np.linalg.inv(lam * eye + np.outer(x, x)) for x in g[n]) / len(dataset)
        expected += q[n] @ inverse @ g[n].T
    got = scores_of(DataInfAttributor(model, dataset, fisher))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_untrac_inv_is_the_ascent_side_without_a_fisher(setting):
    model, dataset = setting
    got = scores_of(UnTracInvAttributor(model, dataset, steps=4))
    settings = Perturbation(method="sgd", steps=4, lr="auto:1.0")
    reference = BidirectionalAttributor(model, dataset, None, settings, base_losses=True)
    expected = np.stack([r.scores("ascent") for r in reference.attribute(QUERIES)])
    np.testing.assert_allclose(got, expected, atol=1e-9)


def test_embeddings_are_cosines_of_token_means(setting):
    model, dataset = setting
    with pytest.raises(CapabilityError, match="offers no `hidden`"):
        EmbeddingAttributor(model, dataset)
    table = model.model.transformer.wte.weight.detach()

    class Embedder:
        pad_id = 0

        def hidden_states(self, batch, layers):
            assert layers == [-1]
            return HiddenStates((0,), (table[batch.input_ids],))

    for budget in (1, 8192):
        got = scores_of(EmbeddingAttributor(Embedder(), dataset, token_budget=budget))
        a = torch.stack([table[list(q.completion_ids)].mean(0) for q in QUERIES])
        b = torch.stack(
            [table[torch.from_numpy(dataset.ids(i).copy()).long()].mean(0) for i in range(7)]
        )
        expected = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-9)


def test_embeddings_from_a_file_of_vectors(setting, tmp_path):
    dataset = TokenDataset.from_ids([[1, 2], [3, 4]], ids=["x", "y"])
    path = tmp_path / "v.npz"
    np.savez(path, ids=["x", "y", "a", "b"], vectors=np.eye(4)[[0, 1, 1, 0]])
    got = scores_of(EmbeddingAttributor(None, dataset, vectors=path))
    np.testing.assert_array_equal(got, [[0, 1], [1, 0]])
    np.savez(path, ids=["x"], vectors=np.eye(1))
    with pytest.raises(ConfigError, match="no vector for 'a'"):
        scores_of(EmbeddingAttributor(None, dataset, vectors=path))
    path.write_bytes(b"no")
    with pytest.raises(ConfigError, match="not a file of vectors"):
        scores_of(EmbeddingAttributor(None, dataset, vectors=path))
