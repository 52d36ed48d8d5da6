"""Trees: the best-first search, the level builder and brute force find the same optimum."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from tenfold.errors import ConfigError
from tenfold_treeflash.tree import (
    LEAF,
    TransitionTables,
    brute_force_tree,
    build_tree,
    build_tree_by_levels,
    chain,
    walk,
)


def random_tables(seed, depth=3, rows=3, width=3, leaves=0.3, ties=False):
    """Random tables; tokens are distinct within a row, as in real ones."""
    random = np.random.default_rng(seed)
    scores = (
        random.integers(1, 3, (depth, rows, width)) if ties else random.random((depth, rows, width))
    )
    scores = -np.sort(-(scores / scores.sum(-1, keepdims=True) * random.uniform(0.5, 1)), axis=-1)
    tokens = np.stack([
        np.stack([random.permutation(9)[:width] for _ in range(rows)]) for _ in range(depth)
    ])  # fmt: skip
    links = random.integers(0, rows, (depth, rows, width))
    links[random.random(links.shape) < leaves] = LEAF
    links[-1] = LEAF
    return TransitionTables(tokens, np.log(scores), links)


def as_set(tree):
    """Nodes as the paths of tokens that lead to them."""
    return {tuple(tree.tokens[i] for i in tree.path(node)) for node in range(len(tree))}


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_heap_levels_and_brute_force_find_the_same_optimum(seed, size):
    tables = random_tables(seed, depth=2 + seed % 2, rows=2, width=2)
    heap, levels = build_tree(tables, 7, size), build_tree_by_levels(tables, 7, size)
    assert as_set(heap) == as_set(levels)
    assert len(as_set(heap)) == len(heap)
    best = brute_force_tree(tables, size)
    assert heap.expected_block_efficiency() - 1 == pytest.approx(best, abs=1e-12)
    assert levels.expected_block_efficiency() - 1 == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("build", [build_tree, build_tree_by_levels])
def test_nodes_keep_the_order_of_their_probability(seed, build):
    tables = random_tables(seed, depth=7, rows=4, width=4)
    tree = build(tables, 3, 64)
    assert tree.tokens[0] == 3
    assert all(a >= b - 1e-12 for a, b in zip(tree.log_probs, tree.log_probs[1:], strict=False))
    for node in range(1, len(tree)):
        parent = tree.parents[node]
        assert 0 <= parent < node
        assert tree.depths[node] == tree.depths[parent] + 1
    children = [(tree.parents[i], tree.tokens[i]) for i in range(1, len(tree))]
    assert len(set(children)) == len(children)


@pytest.mark.parametrize("seed", range(20))
def test_builders_agree_at_large_budgets(seed):
    tables = random_tables(seed, depth=7, rows=4, width=4)
    heap, levels = build_tree(tables, 3, 200), build_tree_by_levels(tables, 3, 200)
    assert heap.log_probs == pytest.approx(levels.log_probs, abs=1e-12)
    assert as_set(heap) == as_set(levels)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("build", [build_tree, build_tree_by_levels])
def test_ties_still_give_a_tree_of_the_best_sum(seed, build):
    tables = random_tables(seed, depth=3, rows=2, width=2, ties=True)
    for size in (2, 4, 6):
        tree = build(tables, 0, size)
        assert all(0 <= tree.parents[i] < i for i in range(1, len(tree)))
        best = brute_force_tree(tables, size)
        assert tree.expected_block_efficiency() - 1 == pytest.approx(best, abs=1e-12)


def test_a_certain_child_follows_its_parent():
    ones = TransitionTables(
        np.arange(4).reshape(4, 1, 1), np.zeros((4, 1, 1)), np.array([0, 0, 0, -1]).reshape(4, 1, 1)
    )
    for build in (build_tree, build_tree_by_levels):
        tree = build(ones, 9, 4)
        assert (tree.tokens, tree.parents) == ([9, 0, 1, 2], [-1, 0, 1, 2])


def test_ancestors_are_the_transitive_closure_of_parents():
    tree = build_tree(random_tables(4, depth=6, rows=3, width=3), 0, 40)
    n = len(tree)
    step = np.zeros((n, n), dtype=int)
    for node in range(1, n):
        step[node, tree.parents[node]] = 1
    closure = sum(np.linalg.matrix_power(step, k) for k in range(n)) > 0
    assert (tree.ancestors() == closure).all()
    for node in range(n):
        assert set(np.flatnonzero(tree.ancestors()[node])) == set(tree.path(node))


def test_exhausted_tables_give_smaller_trees():
    tables = random_tables(0, depth=2, rows=2, width=2, leaves=0.0)
    assert len(build_tree(tables, 0, 100)) == 1 + 2 + 4
    assert len(build_tree_by_levels(tables, 0, 100)) == 1 + 2 + 4
    empty = TransitionTables(tables.tokens, np.full(tables.log_probs.shape, -np.inf), tables.links)
    assert len(build_tree(empty, 0, 5)) == len(build_tree_by_levels(empty, 0, 5)) == 1
    assert len(build_tree(tables.upto(1), 0, 100)) == 3
    assert len(build_tree(tables.upto(0), 0, 100)) == 1


def test_first_nodes_of_a_tree_are_the_tree_of_that_size():
    tables = random_tables(11, depth=5, rows=4, width=4)
    large = build_tree(tables, 2, 40)
    for size in (1, 7, 23):
        assert large.first(size) == build_tree(tables, 2, size)


def test_a_chain_follows_the_token_really_drafted():
    tokens = np.array([[[5, 6], [0, 0]], [[1, 2], [3, 4]], [[7, 8], [9, 10]]])
    links = np.array([[[1, 0], [0, 0]], [[0, 0], [LEAF, 0]], [[LEAF] * 2] * 2])
    tables = TransitionTables(tokens, np.log(np.full((3, 2, 2), 0.5)), links)
    drafted = chain(tables, 0, 10)
    # Row 1 at depth 2 (the link of 5), then no link: the most likely candidate's row stands in.
    assert drafted.tokens == [0, 5, 3, 7]
    assert drafted.parents == [-1, 0, 1, 2]
    assert drafted.log_probs[-1] == pytest.approx(3 * math.log(0.5))
    assert chain(tables, 0, 2).tokens == [0, 5]
    assert chain(tables, 0, 1).tokens == [0]


def test_walking_stops_at_the_first_token_outside_the_tree():
    tree = build_tree(random_tables(1, leaves=0.0), 0, 12)
    leaf = max(range(len(tree)), key=lambda node: tree.depths[node])
    path = tree.path(leaf)
    choices = [99] * len(tree)
    for node, child in itertools.pairwise(path):
        choices[node] = tree.tokens[child]
    assert walk(tree, choices) == (path, 99)
    choices[path[1]] = 99
    assert walk(tree, choices) == (path[:2], 99)


def test_paths_end_in_leaves():
    tree = build_tree(random_tables(2, depth=4), 0, 15)
    leaves = [i for i in range(len(tree)) if i not in tree.parents]
    assert sorted(tree.paths()) == sorted([tree.tokens[i] for i in tree.path(x)] for x in leaves)


@pytest.mark.parametrize("build", [build_tree, build_tree_by_levels])
def test_a_size_below_one_is_refused(build):
    with pytest.raises(ConfigError, match="tree_size is 0; it must be at least 1"):
        build(random_tables(0), 0, 0)
