"""The published recipe, as the speed benchmark has it, gives the scores of the paper's preset."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from tenfold_dabgo.attributor import BidirectionalAttributor
from tenfold_dabgo.fisher_estimate import estimate_fisher
from tenfold_dabgo.perturb import Perturbation
from tenfold_dabgo.queries import Query


@pytest.fixture(scope="module")
def published():
    path = Path(__file__).parents[1] / "benchmarks" / "published.py"
    spec = importlib.util.spec_from_file_location("published", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_published_recipe_and_the_paper_preset_agree(published, make, tmp_path):
    model, dataset = make.llama(), make.corpus(33)
    make.train(model, dataset, steps=30)
    fisher = estimate_fisher(model, dataset)
    query = Query("q", (3, 4), (5, 6, 7, 8))
    perturbation = Perturbation.paper()
    expected = next(
        iter(BidirectionalAttributor(model, dataset, fisher, perturbation).attribute([query]))
    )
    network, before = model.model, model.snapshot()
    rows = [dataset.ids(i).tolist() for i in range(len(dataset))]
    found = {}
    for name, sign in (("ascent", 1), ("descent", -1)):
        model.restore(before)
        published.perturb(
            network, torch.tensor([query.ids]), len(query.prompt_ids), fisher.values, 33, sign
        )
        published.save(network, tmp_path / f"{name}.safetensors")
    for name in ("ascent", "descent"):
        model.restore(before)
        published.load(network, tmp_path / f"{name}.safetensors")
        found[name] = published.losses(network, rows).numpy()
        np.testing.assert_allclose(found[name], expected.losses[name], atol=1e-5)
    scores = found["ascent"] - found["descent"]
    assert np.abs(scores).max() > 1e-3
    np.testing.assert_allclose(scores, expected.values, atol=1e-5)
