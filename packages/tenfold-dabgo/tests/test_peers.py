"""Adapters of other libraries: exact where the formula is known, clear when they are missing."""

from __future__ import annotations

import copy
import importlib.util

import numpy as np
import pytest
import torch
from tenfold.errors import ConfigError
from tenfold.lm.model import CausalLM
from tenfold.lm.tokenizer import train_bpe
from tenfold_dabgo.baselines import bergson
from tenfold_dabgo.baselines.bergson import BergsonAttributor
from tenfold_dabgo.baselines.kronfluence import KronfluenceAttributor
from tenfold_dabgo.batches import sample_means, token_batch
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.queries import Query
from transformers import LlamaConfig, LlamaForCausalLM

QUERIES = [Query("a", (3, 4), (5, 6, 7)), Query("b", (9, 8), (2, 30, 11, 4, 4), span=(1, 4))]
has_bergson = importlib.util.find_spec("bergson") is not None
has_kronfluence = importlib.util.find_spec("kronfluence") is not None


@pytest.fixture(scope="module")
def setting():
    tokenizer = train_bpe(["def f(x): return x"], 300)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = CausalLM(LlamaForCausalLM(config), tokenizer)
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, 250, size=n).tolist() for n in (9, 20, 1, 13, 9, 17, 30, 5)]
    rows.append([3, 4, 5, 6, 7])
    return model, TokenDataset.from_ids(rows)


def gradients(model, batches):
    """`[n, P]` explicit gradients of the linear layers within the blocks."""
    names = [n for n, p in model.module().named_parameters() if "_proj." in n]
    out = []
    for batch in batches:
        model.module().zero_grad()
        sample_means(model.token_loss(batch), batch)[0].backward()
        named = dict(model.module().named_parameters())
        out.append(torch.cat([named[n].grad.reshape(-1) for n in names]).double())
    model.module().zero_grad()
    return torch.stack(out).numpy()


def explicit(setting):
    model, dataset = setting
    usable = np.flatnonzero(dataset.scorable)
    g = gradients(model, [token_batch(dataset, [i], 0) for i in usable])
    return usable, g, gradients(model, [q.batch() for q in QUERIES])


@pytest.mark.skipif(not has_bergson, reason="bergson is not installed")
def test_bergson_without_projection_and_whitening_is_the_gradient_cosine(setting):
    model, dataset = setting
    usable, g, q = explicit(setting)
    results = list(BergsonAttributor(model, dataset, projection=0, whiten=False).attribute(QUERIES))
    got = np.stack([r.values for r in results])
    assert np.isnan(got[:, ~dataset.scorable]).all()
    norms = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(g, axis=1)
    np.testing.assert_allclose(got[:, usable], q @ g.T / norms, atol=2e-5)
    assert results[0].details["disk"]["bytes"] > 0


@pytest.mark.skipif(not has_bergson, reason="bergson is not installed")
def test_bergson_trackstar_finds_the_copy_of_a_query(setting, tmp_path):
    model, dataset = setting
    copies = [Query("copy", (), tuple(dataset.ids(6).tolist())), QUERIES[0]]
    attributor = BergsonAttributor(model, dataset, folder=tmp_path / "work")
    results = list(attributor.attribute(copies))
    assert results[0].topk(1)[0].index == 6
    assert results[1].topk(1)[0].index == 8
    assert np.abs(results[0].values[dataset.scorable]).max() <= 1 + 1e-5


@pytest.mark.skipif(not has_kronfluence, reason="kronfluence is not installed")
def test_kronfluence_with_an_identity_curvature_is_the_gradient_dot(setting):
    model, dataset = setting
    before = model.fingerprint()
    usable, g, q = explicit(setting)
    attributor = KronfluenceAttributor(model, dataset, strategy="identity")
    got = np.stack([r.values for r in attributor.attribute(QUERIES)])
    expected = q @ g.T
    np.testing.assert_allclose(got[:, usable], expected, atol=1e-5 * np.abs(expected).max())
    assert np.isnan(got[:, ~dataset.scorable]).all()
    assert model.fingerprint() == before


@pytest.mark.skipif(not has_kronfluence, reason="kronfluence is not installed")
def test_kronfluence_diagonal_is_the_damped_diagonal_fisher(setting):
    model, dataset = setting
    usable, g, q = explicit(setting)
    attributor = KronfluenceAttributor(model, dataset, strategy="diagonal", damping=1e-3)
    got = np.stack([r.values for r in attributor.attribute(QUERIES)])
    expected = (q / ((g**2).mean(axis=0) + 1e-3)) @ g.T
    np.testing.assert_allclose(got[:, usable], expected, rtol=1e-3, atol=1e-4 * expected.max())


@pytest.mark.skipif(not has_kronfluence, reason="kronfluence is not installed")
def test_kronfluence_ekfac_finds_the_copy_of_a_query(setting):
    model, dataset = setting
    query = Query("copy", (), tuple(dataset.ids(6).tolist()))
    fresh = CausalLM(copy.deepcopy(model.module()), model.tokenizer)  # never called before
    result = next(iter(KronfluenceAttributor(fresh, dataset).attribute([query])))
    assert result.topk(1)[0].index == 6


def test_missing_peers_are_one_clear_message(setting, monkeypatch):
    model, dataset = setting
    monkeypatch.setattr(bergson.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="Bergson is not installed"):
        BergsonAttributor(model, dataset)
    with pytest.raises(ConfigError, match="Kronfluence is not installed"):
        KronfluenceAttributor(model, dataset)


def test_models_that_peers_cannot_take_are_refused(setting, make, monkeypatch):
    _, dataset = setting
    present = lambda name: object()  # noqa: E731
    monkeypatch.setattr(bergson.importlib.util, "find_spec", present)
    with pytest.raises(ConfigError, match="known: ekfac, kfac, diagonal, identity"):
        KronfluenceAttributor(setting[0], dataset, strategy="lissa")
    with pytest.raises(ConfigError, match="Conv1D"):
        KronfluenceAttributor(make.gpt2(), dataset)
    with pytest.raises(ConfigError, match="has none"):
        BergsonAttributor(make.gpt2(), dataset)
    model = make.gpt2()
    model.model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="does not know Linear"):
        BergsonAttributor(model, dataset)
