"""Statistical laws on the tiny reference benchmark (minutes; `-m slow`)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from tenfold_dabgo.attributor import BidirectionalAttributor
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.evaluation.labels import precision_at_k
from tenfold_dabgo.evaluation.retrain import Retrainer, fresh_weights
from tenfold_dabgo.fisher_estimate import estimate_fisher
from tenfold_dabgo.queries import Query
from tenfold_dabgo.scores import spearman
from tenfold_dabgo.weights import load, select_parameters

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference():
    path = Path(__file__).parent.parent / "benchmarks" / "reference.py"
    spec = importlib.util.spec_from_file_location("dabgo_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setting(reference):
    return reference.tiny()


def attribute(model, dataset, queries):
    fisher = estimate_fisher(model, dataset)
    return list(BidirectionalAttributor(model, dataset, fisher).attribute(queries))


def test_planted_duplicates_rank_first(setting):
    """Held-out texts put into the corpus before training: rank 1 for at least 90 %."""
    n = len(setting.dataset)
    texts = [list(map(int, q.ids)) for q in setting.held_out]
    rows = [setting.dataset.ids(i).tolist() for i in range(n)] + texts
    dataset = TokenDataset.from_ids(rows)
    trainer = Retrainer(setting.model, dataset, [], setting.recipe)
    token = setting.model.snapshot()
    try:
        weights = trainer.train(np.arange(len(dataset)))
        load(select_parameters(setting.model.module()), weights)
        queries = [Query(f"q{i}", (), tuple(t)) for i, t in enumerate(texts)]
        results = attribute(setting.model, dataset, queries)
    finally:
        setting.model.restore(token)
    first = [r.topk(1)[0].index == n + i for i, r in enumerate(results)]
    assert np.mean(first) >= 0.9


def test_held_out_queries_find_their_own_topic(setting):
    results = attribute(setting.model, setting.dataset, setting.held_out)
    precision = [
        precision_at_k(r.values, setting.groups == topic, 10)
        for r, topic in zip(results, setting.held_out_groups, strict=True)
    ]
    assert np.mean(precision) > 3 / 8


def test_an_untrained_model_ranks_differently(setting):
    """Shared tokens keep the correlation above 0, but far below that of two equal runs."""
    queries = setting.held_out[:6]
    trained = attribute(setting.model, setting.dataset, queries)
    token = setting.model.snapshot()
    try:
        load(select_parameters(setting.model.module()), fresh_weights(setting.model, 99))
        untrained = attribute(setting.model, setting.dataset, queries)
    finally:
        setting.model.restore(token)
    agreement = [spearman(a.values, b.values) for a, b in zip(trained, untrained, strict=True)]
    assert np.mean(agreement) < 0.4
