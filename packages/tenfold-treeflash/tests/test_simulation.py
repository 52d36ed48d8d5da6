"""Simulated rounds are rounds: the same trees, walks and reasons as in decoding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tenfold.errors import ConfigError
from tenfold_treeflash.decoding import Clock, DraftSettings, SpeculativeDecoder
from tenfold_treeflash.draft_cache import DraftCache
from tenfold_treeflash.simulation import ENDINGS, SimulatedRound, simulate, whole_blocks
from tenfold_treeflash.target import Target
from tenfold_treeflash.tree import DraftTree, TransitionTables, build_tree
from treeflash_cases import VOCABULARY, drafted, drafter_for, llama, prompt


@pytest.fixture(scope="module")
def pair():
    model = llama()
    return Target(model), drafter_for(model)


class Greedy:
    greedy = True


@pytest.mark.parametrize("method", ["tree", "marginal", "chain"])
@torch.inference_mode()
def test_a_simulated_tree_is_the_one_that_decoding_drafts(pair, method):
    target, drafter = pair
    ids = prompt(14)[0].tolist()
    settings = DraftSettings(method=method, tree_size=12, top_m=5, top_k=4, temperature=1.3)
    places = list(whole_blocks(len(ids), drafter.config.block_size))
    assert places == [1, 2, 3, 4, 5, 6, 7, 8]
    simulated = simulate(target, drafter, ids, places, settings)
    decoder = SpeculativeDecoder(target, drafter, settings)
    for place, found in zip(places, simulated, strict=True):
        cache = DraftCache()
        with target.features(drafter.config.target_layer_ids) as features:
            target.prefill(torch.tensor(ids[:place]), target.new_cache())
            drafter.extend(cache, features(), torch.arange(place)[None])
        wanted = decoder.tree(cache, ids[place], Greedy(), decoder.new_rates(), Clock())
        assert found.tree.tokens == wanted.tokens
        assert found.tree.parents == wanted.parents
        np.testing.assert_allclose(found.tree.log_probs, wanted.log_probs, rtol=0, atol=1e-9)
        assert found.following == ids[place + 1 : place + drafter.config.block_size]


def test_simulated_walks_are_those_of_the_text_that_was_decoded(pair):
    """Where decoding began a round, the simulation accepts what it accepted."""
    target, drafter = pair
    settings = {"tree_size": 12, "temperature": 1.0}
    written = drafted(
        target.model, prompt(9), drafter, draft=settings, max_new_tokens=40,
        return_dict_in_generate=True,
    )  # fmt: skip
    ids, [stats] = written.sequences[0].tolist(), written.spec_stats
    begins = 9 + np.cumsum([0, *stats.accepted[:-1]])
    fitting = whole_blocks(len(ids), drafter.config.block_size)
    places = [int(p) for p in begins if p in fitting]
    assert len(places) > 5
    simulated = simulate(target, drafter, ids, places, DraftSettings(**settings))
    accepted = [len(r.path()) for r in simulated]
    assert accepted == stats.accepted[: len(places)]


def test_smaller_trees_are_the_beginnings_of_larger_ones(pair):
    target, drafter = pair
    ids = prompt(20, seed=3)[0].tolist()
    places = list(whole_blocks(20, drafter.config.block_size))
    large = simulate(target, drafter, ids, places, DraftSettings(tree_size=40))
    for size in (1, 2, 7, 39):
        small = simulate(target, drafter, ids, places, DraftSettings(tree_size=size))
        assert [r.path(size) for r in large] == [r.path() for r in small]
        assert [r.ending(size) for r in large] == [r.ending() for r in small]


def test_places_without_room_for_a_block_are_refused(pair):
    target, drafter = pair
    assert list(whole_blocks(5, 6)) == []
    assert list(whole_blocks(6, 6)) == []
    assert list(whole_blocks(7, 6)) == [1]
    for place in (0, 2):
        with pytest.raises(ConfigError, match=f"place {place} of a text of 7 tokens"):
            simulate(target, drafter, prompt(7)[0].tolist(), [place], DraftSettings())
    assert simulate(target, drafter, prompt(7)[0].tolist(), [], DraftSettings()) == []


# --- Why a walk ended -----------------------------------------------------------------------------


def small_tables():
    """Two depths: anchor to 1 or 2 (or 3); 1 to 4 or 5; 2 to 5 or 6."""
    tokens = np.array([[[1, 2, 3]] * 2, [[4, 5, 7], [5, 6, 8]]])
    log_probs = np.log([[[0.6, 0.3, 0.1]] * 2, [[0.9, 0.08, 0.02], [0.5, 0.3, 0.2]]])
    links = np.array([[[0, 1, -1]] * 2, [[-1] * 3] * 2])
    return TransitionTables(tokens, log_probs, links)


@pytest.mark.parametrize(
    ("text", "ending", "accepted"),
    [
        ([1, 4], "whole-block", 3),
        ([2, 4], "wrong-parent", 2),  # 4 stands below 1 only
        ([1, 5], "wrong-parent", 2),  # 5 stands below 2 only
        ([2, 8], "not-in-tree", 2),
        ([3, 9], "not-in-tree", 1),  # 3 is listed, but four drafted nodes have no room for it
        ([9, 4], "not-in-tables", 1),
        ([1, 9], "not-in-tables", 2),
    ],
)
def test_endings(text, ending, accepted):
    tables = small_tables()
    tree = build_tree(tables, 0, 5)
    assert tree.tokens == [0, 1, 4, 2, 5]
    simulated = SimulatedRound(tables, tree, text)
    assert len(simulated.path()) == accepted
    assert simulated.ending() == ending
    assert ending in ENDINGS


def test_every_text_ends_for_one_reason_and_reasons_are_exclusive():
    tables = small_tables()
    for size, text in itertools.product(range(1, 9), itertools.product(range(10), repeat=2)):
        simulated = SimulatedRound(tables, build_tree(tables, 0, size), list(text))
        depth = len(simulated.path())
        ending = simulated.ending()
        assert (ending == "whole-block") == (depth == 3)
        if depth < 3:
            listed = text[depth - 1] in tables.tokens[depth - 1].flatten()
            assert (ending == "not-in-tables") == (not listed)


def test_a_bare_root_accepts_the_targets_token_alone():
    root = DraftTree([0], [-1], [0], [0.0])
    assert SimulatedRound(small_tables(), root, [1, 4]).path() == [0]


def test_expected_tokens_are_the_mean_over_texts(pair):
    """E[tokens] = 1 + the sum over nodes of the target's probability of their path."""
    target, drafter = pair
    ids = prompt(9)[0].tolist() + [2] * 6
    settings = DraftSettings(tree_size=16, top_m=8, top_k=8)
    [simulated] = simulate(target, drafter, ids, [8], settings)
    tree, start = simulated.tree, ids[:9]

    def law(text):
        with torch.no_grad():
            return target.model(torch.tensor([text])).logits[0, -1].softmax(-1).numpy()

    laws = {
        node: law(start + [tree.tokens[i] for i in tree.path(node)[1:]])
        for node in range(len(tree))
    }
    chances = [1.0]
    for node in range(1, len(tree)):
        parent = tree.parents[node]
        chances.append(chances[parent] * laws[parent][tree.tokens[node]])
    rng = np.random.default_rng(0)
    counts = []
    for _ in range(4000):
        node, accepted = 0, 1
        while True:
            child = tree.children[node].get(int(rng.choice(VOCABULARY, p=laws[node])))
            if child is None:
                break
            node, accepted = child, accepted + 1
        counts.append(accepted)
    error = np.std(counts) / np.sqrt(len(counts))
    assert abs(np.mean(counts) - sum(chances)) < 4 * error
    assert sum(chances) > 1.05
