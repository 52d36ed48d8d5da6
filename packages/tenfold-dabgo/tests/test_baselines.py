"""Baselines against their formulas, and against the libraries that have them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tenfold.errors import ConfigError
from tenfold_dabgo.baselines.bm25 import Bm25Attributor, Bm25Index, words
from tenfold_dabgo.baselines.gradient import GradientAttributor
from tenfold_dabgo.baselines.trivial import PerplexityAttributor, RandomAttributor
from tenfold_dabgo.batches import sample_means, token_batch
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.queries import Query

DOCUMENTS = [t.split() for t in ("a b c a", "a d", "e f a g h", "d d d", "a b")]


def test_okapi_is_the_published_formula():
    """idf = ln((N - df + .5) / (df + .5)); negative ones become a quarter of the mean idf."""
    k1, b = 1.5, 0.75
    df = {w: sum(w in d for d in DOCUMENTS) for d in DOCUMENTS for w in d}
    idf = {w: math.log((5 - n + 0.5) / (n + 0.5)) for w, n in df.items()}
    mean = sum(idf.values()) / len(idf)
    idf = {w: (v if v >= 0 else 0.25 * mean) for w, v in idf.items()}
    average = sum(map(len, DOCUMENTS)) / 5
    query = ["a", "d", "d", "unknown"]
    expected = [
        sum(
            idf.get(w, 0) * d.count(w) * (k1 + 1)
            / (d.count(w) + k1 * (1 - b + b * len(d) / average))
            for w in query
        )
        for d in DOCUMENTS
    ]  # fmt: skip
    np.testing.assert_allclose(Bm25Index(DOCUMENTS).scores(query), expected, rtol=1e-12)
    assert df["a"] == 4  # more than half of the documents: its plain idf is negative


def test_okapi_equals_rank_bm25():
    library = pytest.importorskip("rank_bm25")
    generator = np.random.default_rng(0)
    documents = [list(map(str, generator.integers(0, 30, 20))) for _ in range(50)]
    query = list(map(str, generator.integers(0, 35, 12)))
    expected = library.BM25Okapi(documents).get_scores(query)
    np.testing.assert_allclose(Bm25Index(documents).scores(query), expected, rtol=1e-9)


def test_lucene_variant_equals_bm25s():
    library = pytest.importorskip("bm25s")
    generator = np.random.default_rng(0)
    documents = [list(map(str, generator.integers(0, 30, 20))) for _ in range(50)]
    query = sorted(set(map(str, generator.integers(0, 30, 12))))
    retriever = library.BM25(method="lucene", k1=1.5, b=0.75)
    retriever.index(documents, show_progress=False)
    # bm25s leaves out the constant factor k1 + 1.
    expected = retriever.get_scores(query) * 2.5
    mine = Bm25Index(documents, variant="lucene").scores(query)
    np.testing.assert_allclose(mine, expected, rtol=1e-4)


def test_words_are_lower_case_runs():
    assert words("def Foo_bar(x):\n  return 'A-b'") == ["def", "foo_bar", "x", "return", "a", "b"]


def test_bad_bm25_settings_are_refused():
    with pytest.raises(ConfigError, match="known: okapi, lucene"):
        Bm25Index(DOCUMENTS, variant="plus")
    with pytest.raises(ConfigError, match="at least one document"):
        Bm25Index([])


def test_bm25_ranks_by_the_completion_alone(make):
    model = make.gpt2()
    model.decode = lambda ids: " ".join(f"w{int(i)}" for i in ids)
    dataset = TokenDataset.from_ids([[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11], [12, 13]])
    result = next(iter(Bm25Attributor(model, dataset).attribute([Query("q", (1, 2, 3), (4, 5))])))
    assert result.topk(1)[0].sample_id == "1"
    assert result.values[0] == 0
    part = Query("q", (), (4, 7, 8), span=(1, 3))
    result = next(iter(Bm25Attributor(model, dataset).attribute([part])))
    assert result.values[1] == 0
    assert result.values[2] > 0


def test_gradient_dot_and_cosine_equal_explicit_gradients(make):
    model, dataset = make.gpt2(dtype=torch.float64), make.corpus(6)
    query = Query("q", (3,), (4, 5, 6))

    def gradient(batch):
        model.module().zero_grad()
        sample_means(model.token_loss(batch), batch)[0].backward()
        return torch.cat([p.grad.reshape(-1) for p in model.module().parameters()])

    g_x = gradient(query.batch())
    g = torch.stack([gradient(token_batch(dataset, [i], 0)) for i in range(6)])
    model.module().zero_grad()
    dot = next(iter(GradientAttributor(model, dataset).attribute([query]))).values
    cosine = next(iter(GradientAttributor(model, dataset, cosine=True).attribute([query]))).values
    np.testing.assert_allclose(dot, (g @ g_x).numpy(), rtol=1e-8)
    expected = torch.nn.functional.cosine_similarity(g, g_x[None]).numpy()
    np.testing.assert_allclose(cosine, expected, rtol=1e-8)


def test_random_scores_are_fixed_by_seed_and_query(make):
    dataset = make.corpus(5)
    a, b = (
        next(iter(RandomAttributor(dataset, 1).attribute([Query("q", (), (1, 2))]))) for _ in "ab"
    )
    np.testing.assert_array_equal(a.values, b.values)
    c = next(iter(RandomAttributor(dataset, 2).attribute([Query("q", (), (1, 2))])))
    assert not np.array_equal(a.values, c.values)


def test_perplexity_ranks_the_best_predicted_first(make):
    model, dataset = make.gpt2(), make.corpus(6)
    results = list(
        PerplexityAttributor(model, dataset).attribute(
            [Query("a", (), (1, 2)), Query("b", (), (3, 4))]
        )
    )
    np.testing.assert_array_equal(results[0].values, results[1].values)
    best = results[0].topk(1)[0].index
    losses = [
        float(sample_means(model.token_loss(b), b)[0].detach())
        for b in (token_batch(dataset, [i], 0) for i in range(6))
    ]
    assert best == int(np.argmin(losses))
