"""A source whose block efficiencies are known: what training reaches is what theory says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from markov_cases import (
    BLOCK,
    LENGTH,
    MATRIX,
    expected_tokens,
    perfect_marginal_chain,
    perfect_marginal_tree,
    perfect_tree,
    texts,
    train_drafter,
    train_target,
)
from tenfold_treeflash.decoding import DraftSettings
from tenfold_treeflash.generation import generate
from tenfold_treeflash.simulation import simulate, whole_blocks
from tenfold_treeflash.target import Target
from tenfold_treeflash.tree import chain

pytestmark = pytest.mark.timeout(900)

ENTROPY = -sum(p * math.log(p) for p in (0.4, 0.3, 0.2, 0.1))


def test_the_source_has_the_papers_numbers():
    """Closed forms: best-first search over exact probabilities."""
    np.testing.assert_allclose(MATRIX.sum(axis=0), 1)  # the uniform law is stationary
    np.testing.assert_allclose(
        [perfect_tree(size) for size in (8, 16, 32, 64)], [2.400, 2.930, 3.463, 3.999], atol=6e-4
    )
    # Ties between marginals may be broken in other ways.
    np.testing.assert_allclose(
        [perfect_marginal_tree(size) for size in (8, 16, 32, 64)],
        [2.259, 2.515, 2.803, 3.069], atol=0.02,
    )  # fmt: skip
    assert perfect_marginal_chain() == pytest.approx(1.621, abs=6e-4)


@pytest.fixture(scope="module")
def trained():
    model, loss = train_target()
    assert loss < ENTROPY + 0.03
    return model, train_drafter(model)


@pytest.fixture(scope="module")
def held_out():
    return texts(24, LENGTH, torch.Generator().manual_seed(9)).tolist()


def rounds(trained, held_out, method, size):
    model, drafter = trained
    places = list(whole_blocks(LENGTH, BLOCK))
    settings = DraftSettings(method=method, tree_size=size)
    return [r for ids in held_out for r in simulate(Target(model), drafter, ids, places, settings)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "size", "perfect", "tolerance"),
    [
        ("marginal", 8, perfect_marginal_tree(8), 0.04),
        ("marginal", 16, perfect_marginal_tree(16), 0.06),
        ("marginal", 64, perfect_marginal_tree(64), 0.06),
        ("tree", 8, perfect_tree(8), 0.01),
        ("tree", 16, perfect_tree(16), 0.02),
        ("tree", 32, perfect_tree(32), 0.03),
        ("tree", 64, perfect_tree(64), 0.049),
        ("chain", 8, sum(0.4**depth for depth in range(BLOCK)), 0.01),
    ],
)
def test_trained_drafters_reach_what_perfect_ones_do(
    trained, held_out, method, size, perfect, tolerance
):
    """Exact expectations of the drafted trees under the source; at 64 nodes at least 3.95."""
    simulated = rounds(trained, held_out, method, size)
    exact = [expected_tokens(r.tree) for r in simulated]
    assert np.mean(exact) == pytest.approx(perfect, abs=tolerance)
    # The texts themselves agree with the expectation: neighbouring rounds share tokens, so the
    # error is estimated over texts.
    places = len(whole_blocks(LENGTH, BLOCK))
    gaps = np.array([len(r.path()) for r in simulated]) - np.array(exact)
    means = gaps.reshape(-1, places).mean(axis=1)
    assert abs(means.mean()) < 4 * means.std(ddof=1) / math.sqrt(len(means))


@pytest.mark.slow
def test_the_chain_of_marginal_arg_maxes_is_dflash(trained, held_out):
    simulated = rounds(trained, held_out, "marginal", BLOCK)
    chains = [chain(r.tables, r.tree.tokens[0], BLOCK) for r in simulated]
    found = np.mean([expected_tokens(tree) for tree in chains])
    # Deep marginals are nearly flat, so which of their tokens is the likeliest is not learned well.
    assert found == pytest.approx(perfect_marginal_chain(), abs=0.08)


@pytest.mark.slow
def test_decoding_reaches_it_too(trained):
    """Rounds of real sampled texts; those that the length limit might cut do not count."""
    model, drafter = trained
    prompts = texts(40, 8, torch.Generator().manual_seed(5))
    written = generate(
        model, prompts, drafter=drafter, settings=DraftSettings(tree_size=64), do_sample=True,
        top_k=0, max_new_tokens=LENGTH - 8, return_dict_in_generate=True, checked=True,
        seeds=list(range(40)),
    )  # fmt: skip
    means = []
    for stats in written.spec_stats:
        ends = np.cumsum([1, *stats.accepted])
        means.append([a for a, e in zip(stats.accepted, ends, strict=False) if e <= 56 - BLOCK])
    counted = np.array([sum(row) for row in means]), np.array([len(row) for row in means])
    found = counted[0].sum() / counted[1].sum()
    # The standard error of a ratio over texts.
    error = (counted[0] - found * counted[1]).std(ddof=1) / counted[1].mean() / math.sqrt(40)
    assert counted[1].sum() > 300
    assert abs(found - perfect_tree(64)) < 4 * error
    assert error < 0.1
