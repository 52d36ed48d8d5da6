"""Transition tables are the softmax of the drafter's own forward pass, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tenfold.errors import ConfigError
from tenfold_treeflash.draft_cache import DraftCache
from tenfold_treeflash.tables import batch_tables, transition_tables
from tenfold_treeflash.target import Target
from tenfold_treeflash.tree import LEAF, build_tree
from treeflash_cases import VOCABULARY, drafter_for, llama

ANCHOR = 5


@pytest.fixture(scope="module")
def target():
    return Target(llama())


@pytest.fixture(scope="module")
def drafter(target):
    return drafter_for(target.model)


def context_of(drafter, length=7, seed=3):
    """Random target features, and the drafter's cache of them."""
    torch.manual_seed(seed)
    features = torch.randn((1, length, drafter.model.fc.in_features), dtype=torch.float64)
    cache = DraftCache()
    drafter.extend(cache, features, torch.arange(length)[None])
    return features, cache


def tables_of(drafter, target, cache, size=None, **settings):
    size = size or drafter.config.block_size
    with torch.no_grad():
        hidden = drafter.draft(cache, ANCHOR, target.embedding, size)
    return transition_tables(drafter, hidden, ANCHOR, target.embedding, target.head, **settings)


def direct(drafter, target, features, token=None, temperature=1.0):
    """Log-probabilities `[D, V]` by the model's forward; `token` stands before every slot."""
    length, size = features.shape[1], drafter.config.block_size
    block = drafter.block_input(torch.tensor([ANCHOR]), target.embedding, size)
    previous = None
    if token is not None:
        previous = target.embedding[token].expand(1, size, 1, -1)
    with torch.no_grad():
        states = drafter(block, features, torch.arange(length + size)[None], previous)
        return (target.head(states)[0, 1:] / temperature).log_softmax(-1)


@pytest.mark.parametrize("kind", ["swiglu", "linear"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tables_are_the_softmax_of_the_forward_pass(target, kind, temperature):
    drafter = drafter_for(target.model, ar_approximation=kind)
    features, cache = context_of(drafter)
    with torch.no_grad():
        tables = tables_of(drafter, target, cache, top_m=6, top_k=4, temperature=temperature)
    marginal = direct(drafter, target, features)
    for depth in range(tables.depth):
        previous = [ANCHOR] if depth == 0 else marginal[depth - 1].topk(6).indices.tolist()
        for row, token in enumerate(previous):
            wanted = direct(drafter, target, features, token, temperature)[depth].topk(4)
            assert tables.tokens[depth, row].tolist() == wanted.indices.tolist()
            np.testing.assert_allclose(tables.log_probs[depth, row], wanted.values, atol=1e-12)


def test_corrections_differ_between_previous_tokens(target, drafter):
    _, cache = context_of(drafter)
    tables = tables_of(drafter, target, cache, top_m=6, top_k=4)
    assert np.ptp(tables.log_probs[1, :, 0]) > 1e-3


def test_links_lead_to_the_row_of_the_same_token(target, drafter):
    features, cache = context_of(drafter)
    tables = tables_of(drafter, target, cache, top_m=5, top_k=5)
    marginal = direct(drafter, target, features)
    missing = 0
    for depth in range(tables.depth - 1):
        candidates = marginal[depth].topk(5).indices.tolist()
        for row in range(1 if depth == 0 else 5):
            for rank in range(5):
                token, link = tables.tokens[depth, row, rank], tables.links[depth, row, rank]
                missing += link == LEAF
                assert (candidates.index(token) if token in candidates else LEAF) == link
    assert missing
    assert (tables.links[-1] == LEAF).all()


def test_unused_rows_at_depth_one_cannot_be_reached(target, drafter):
    _, cache = context_of(drafter)
    tables = tables_of(drafter, target, cache, top_m=4, top_k=3)
    assert np.isneginf(tables.log_probs[0, 1:]).all()


def test_a_zero_correction_drafts_the_marginal_tree(target):
    drafter = drafter_for(target.model, shake=0.0)
    _, cache = context_of(drafter)
    # With every token a candidate no link is missing, and the trees must be equal.
    tables = tables_of(drafter, target, cache, top_m=VOCABULARY, top_k=6)
    marginal = tables_of(drafter, target, cache, top_k=6, marginal=True)
    for depth in range(tables.depth):
        rows = 1 if depth == 0 else VOCABULARY
        for row in range(rows):
            assert (tables.tokens[depth, row] == marginal.tokens[depth, 0]).all()
            np.testing.assert_allclose(
                tables.log_probs[depth, row], marginal.log_probs[depth, 0], atol=1e-12
            )
    ours, ddtree = build_tree(tables, ANCHOR, 40), build_tree(marginal, ANCHOR, 40)
    assert {tuple(p) for p in ours.paths()} == {tuple(p) for p in ddtree.paths()}


@pytest.mark.parametrize("kind", ["swiglu", "linear", "swiglu2", None])
def test_marginal_tables_are_the_uncorrected_forward(target, kind):
    drafter = drafter_for(target.model, ar_approximation=kind)
    features, cache = context_of(drafter)
    tables = tables_of(drafter, target, cache, top_k=3, marginal=True)
    wanted = direct(drafter, target, features).topk(3)
    assert (tables.tokens[:, 0] == wanted.indices.numpy()).all()
    np.testing.assert_allclose(tables.log_probs[:, 0], wanted.values, atol=1e-12)


def test_a_shortlist_of_everything_changes_nothing(target, drafter):
    _, cache = context_of(drafter)
    full = tables_of(drafter, target, cache, top_m=4, top_k=3)
    same = tables_of(drafter, target, cache, top_m=4, top_k=3, shortlist=VOCABULARY)
    assert (full.tokens == same.tokens).all()


@pytest.mark.parametrize("size", [4, 12])
def test_a_shortlist_ranks_the_best_tokens_of_the_marginal(target, drafter, size):
    features, cache = context_of(drafter)
    tables = tables_of(drafter, target, cache, top_m=4, top_k=3, shortlist=size)
    marginal = direct(drafter, target, features)
    for depth in range(tables.depth):
        listed = marginal[depth].topk(size).indices
        previous = [ANCHOR] if depth == 0 else marginal[depth - 1].topk(4).indices.tolist()
        for row, token in enumerate(previous):
            scores = direct(drafter, target, features, token)[depth, listed].log_softmax(-1)
            best = scores.topk(3)
            assert tables.tokens[depth, row].tolist() == listed[best.indices].tolist()
            np.testing.assert_allclose(tables.log_probs[depth, row], best.values, atol=1e-12)


def test_a_shortlist_keeps_the_heads_factor_and_cap(target, drafter):
    capped = llama(seed=0)
    capped.config.final_logit_softcapping, capped.config.logit_scale = 1.5, 0.7
    capped = Target(capped)
    _, cache = context_of(drafter)
    full = tables_of(drafter, capped, cache, top_m=4, top_k=3)
    listed = tables_of(drafter, capped, cache, top_m=4, top_k=3, shortlist=VOCABULARY - 1)
    plain = tables_of(drafter, target, cache, top_m=4, top_k=3)
    assert (full.tokens == listed.tokens).mean() > 0.9
    # The tokens left out hold little: what is listed has nearly its probability.
    assert np.abs(np.exp(full.log_probs) - np.exp(listed.log_probs)).max() < 0.05
    assert np.abs(np.exp(full.log_probs) - np.exp(plain.log_probs)).max() > 0.05


def test_m_and_k_are_cut_to_the_vocabulary(target, drafter):
    _, cache = context_of(drafter)
    tables = tables_of(drafter, target, cache, top_m=1000, top_k=1000)
    assert tables.tokens.shape == (drafter.config.block_size - 1, VOCABULARY, VOCABULARY)
    np.testing.assert_allclose(np.exp(tables.log_probs[1]).sum(-1), 1, atol=1e-12)


def test_the_smallest_block_has_one_depth(target, drafter):
    _, cache = context_of(drafter)
    for settings in ({}, {"shortlist": 5}, {"marginal": True}):
        tables = tables_of(drafter, target, cache, size=2, top_m=4, top_k=3, **settings)
        assert tables.depth == 1
        assert (tables.links == LEAF).all()


def test_a_shorter_block_than_trained_is_the_forward_of_that_block(target, drafter):
    features, cache = context_of(drafter)
    tables = tables_of(drafter, target, cache, size=3, top_k=3, marginal=True)
    block = drafter.block_input(torch.tensor([ANCHOR]), target.embedding, 3)
    with torch.no_grad():
        states = drafter(block, features, torch.arange(features.shape[1] + 3)[None])
        wanted = target.head(states)[0, 1:].log_softmax(-1).topk(3)
    assert (tables.tokens[:, 0] == wanted.indices.numpy()).all()


@pytest.mark.parametrize("settings", [{}, {"shortlist": 6}, {"marginal": True}])
def test_a_batch_of_blocks_gives_the_tables_of_each(target, drafter, settings):
    anchors, hidden = [5, 8, 2], []
    for seed in range(3):
        _, cache = context_of(drafter, length=4 + seed, seed=seed)
        with torch.no_grad():
            hidden.append(drafter.draft(cache, anchors[seed], target.embedding, 6))
    found = batch_tables(
        drafter, torch.stack(hidden), anchors, target.embedding, target.head,
        top_m=4, top_k=3, **settings,
    )  # fmt: skip
    for tables, states, anchor in zip(found, hidden, anchors, strict=True):
        alone = transition_tables(
            drafter, states, anchor, target.embedding, target.head, top_m=4, top_k=3, **settings
        )
        assert (tables.tokens == alone.tokens).all()
        assert (tables.links == alone.links).all()
        np.testing.assert_allclose(tables.log_probs, alone.log_probs, atol=1e-12)


def test_log_probabilities_never_exceed_zero(target, drafter):
    _, cache = context_of(drafter)
    assert (tables_of(drafter, target, cache, temperature=0.0).log_probs <= 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_m": 0}, "top_m is 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"shortlist": 0}, "shortlist is 0"),
        ({"temperature": -1.0}, "drafter_temperature is -1.0"),
        ({"temperature": float("nan")}, "drafter_temperature is nan"),
    ],
)
def test_bad_sizes_are_refused(target, drafter, settings, message):
    _, cache = context_of(drafter)
    with pytest.raises(ConfigError, match=message):
        tables_of(drafter, target, cache, **settings)


def test_two_previous_tokens_need_marginal_trees(target):
    drafter = drafter_for(target.model, ar_approximation="swiglu2")
    _, cache = context_of(drafter)
    with pytest.raises(ConfigError, match="looks back one token"):
        tables_of(drafter, target, cache)
