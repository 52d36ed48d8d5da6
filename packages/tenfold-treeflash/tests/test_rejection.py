"""Both ways of verifying keep the target's law: chi-square tests, each with a negative control."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from tenfold.errors import ConfigError
from tenfold_treeflash import rejection
from tenfold_treeflash.choosing import ProcessedChoice
from tenfold_treeflash.decoding import DraftSettings, SpeculativeDecoder
from tenfold_treeflash.rejection import (
    RankRates,
    accept_child,
    best_shape,
    path_shape,
    sample_tree,
    walk_by_rejection,
)
from tenfold_treeflash.target import Target
from tenfold_treeflash.tree import TransitionTables, build_tree
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import MaxLengthCriteria
from treeflash_cases import drafted, drafter_for, llama, plain, prompt

ALPHA = 1e-3


def p_value(counts, law):
    """Of Pearson's chi-square test; rare cells are put together (Wilson-Hilferty tail)."""
    counts, expected = np.asarray(counts, float), np.asarray(law) * np.sum(counts)
    rare = expected < 8
    pairs = list(zip(counts[~rare], expected[~rare], strict=True))
    if rare.any():
        pairs.append((counts[rare].sum(), expected[rare].sum()))
    statistic = sum((o - e) ** 2 / e for o, e in pairs if e > 0)
    k = len(pairs) - 1
    z = ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
    return 0.5 * math.erfc(z / math.sqrt(2))


def test_the_chi_square_tail_is_right():
    random = np.random.default_rng(0)
    law = np.array([0.4, 0.3, 0.2, 0.05, 0.05])
    values = [p_value(random.multinomial(500, law), law) for _ in range(2000)]
    assert 0.08 < np.mean(np.array(values) < 0.1) < 0.12


def tables_of(seed, vocabulary=6, depth=3, width=4, rows=6):
    """A first-order drafter: row v holds q(. | v) cut to its best tokens; row 0 is the anchor's."""
    random = np.random.default_rng(seed)
    q = random.dirichlet(np.full(vocabulary, 0.7), rows)
    best = np.argsort(-q, axis=-1)[:, :width]
    tokens = np.stack([best] * depth)
    links = tokens.copy()
    links[-1] = -1
    links[(tokens == 4)] = -1  # a token without a row
    return TransitionTables(
        tokens, np.log(np.take_along_axis(q, best, -1))[None].repeat(depth, 0), links
    )


@pytest.mark.parametrize("seed", range(4))
def test_one_node_keeps_any_law_exactly(seed):
    """Sums over all ordered draws: the probability of every token is the target's."""
    random = np.random.default_rng(seed)
    p, q = random.dirichlet(np.full(6, 0.6)), random.dirichlet(np.full(4, 0.6))
    tokens = random.permutation(6)[:4]
    for count in (1, 2, 3, 4):
        law = np.zeros(6)
        for order in itertools.permutations(range(4), count):
            drawn, left = 1.0, 1.0
            for place in order:
                drawn *= q[place] / left
                left -= q[place]
            # Integrate over the uniforms: the chance that each child is reached and accepted.
            reach, rest, now = drawn, p.copy(), q.copy()
            for place in order:
                chance = min(1.0, rest[tokens[place]] / now[place])
                law[tokens[place]] += reach * chance
                reach *= 1 - chance
                if reach <= 1e-15:
                    break
                rank, after = accept_child(
                    rest, [tokens[place]], tokens, now, np.array([1 - 1e-16])
                )
                assert rank is None or chance == 1.0
                rest = after
                now[place] = 0
                now = now / now.sum() if now.sum() > 0 else now
            law += reach * rest if reach > 1e-15 else 0
        np.testing.assert_allclose(law, p, atol=1e-9)


class Law:
    """A drawer whose target is a table of first-order probabilities."""

    def __init__(self, table, seed, length):
        self.table, self.length = torch.from_numpy(table), length
        self.generator = torch.Generator().manual_seed(seed)

    def probabilities(self, ids, logits):
        return self.table[ids[-1]][None]

    def draw(self, probabilities):
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

    def ends(self, ids):
        return len(ids) >= self.length


def counts_of(tables, target, runs, shape_of, grow=sample_tree, length=4):
    """How often each continuation of three tokens of anchor 0 was written."""
    law = Law(target, 0, length)
    counts, rates = np.zeros(target.shape[0] ** 3), RankRates(tables.tokens.shape[2])
    accepted = 0
    for _ in range(runs):
        ids, over = [0], False
        while not over:
            # A round starts at row `ids[-1]` of the tables, as a drafter's would.
            first = tables.tokens.copy(), tables.log_probs.copy(), tables.links.copy()
            for part in first:
                part[0, 0] = part[1, ids[-1]]
            now = TransitionTables(*first)
            tree = grow(now, ids[-1], shape_of(rates), law.generator)
            path, over = walk_by_rejection(tree, torch.zeros(len(tree), 1), ids, law, rates)
            accepted += len(path)
        a, b, c = ids[1:4]
        counts[(a * target.shape[0] + b) * target.shape[0] + c] += 1
    return counts, accepted


def joint(target):
    return np.array([
        target[0, a] * target[a, b] * target[b, c]
        for a, b, c in itertools.product(range(len(target)), repeat=3)
    ])  # fmt: skip


TARGET = np.random.default_rng(99).dirichlet(np.full(6, 0.8), 6)


def adaptive(rates):
    return best_shape(rates.rates(), 9, 3)


@pytest.mark.parametrize("shape", [adaptive, lambda _: path_shape(4, 3)], ids=["tree", "chain"])
def test_rejection_keeps_the_joint_law(shape):
    counts, _ = counts_of(tables_of(1), TARGET, 6000, shape)
    assert p_value(counts, joint(TARGET)) > ALPHA


def test_a_verifier_that_accepts_too_much_fails_the_test(monkeypatch):
    def generous(target, children, tokens, proposal, uniform):
        return accept_child(target, children, tokens, proposal, uniform * 0.8)

    monkeypatch.setattr(rejection, "accept_child", generous)
    counts, _ = counts_of(tables_of(1), TARGET, 6000, adaptive)
    assert p_value(counts, joint(TARGET)) < ALPHA


def test_keeping_the_likeliest_of_the_draws_fails_the_test():
    """A shape that depends on the draws is not lossless; the test can see it."""

    def greedy(tables, anchor, shape, generator):
        tree = sample_tree(tables, anchor, shape, generator)
        for node, children in enumerate(tree.order):
            tree.order[node] = sorted(children, key=lambda child: -tree.log_probs[child])
        return tree

    counts, _ = counts_of(tables_of(1), TARGET, 6000, adaptive, greedy)
    assert p_value(counts, joint(TARGET)) < ALPHA


def test_draws_without_replacement_have_their_law():
    tables = tables_of(3)
    q = np.exp(tables.log_probs[0, 0])
    q /= q.sum()
    generator, counts = torch.Generator().manual_seed(0), np.zeros((4, 4))
    place = {int(token): i for i, token in enumerate(tables.tokens[0, 0])}
    for _ in range(5000):
        tree = sample_tree(tables, 0, best_shape([0.5, 0.3], 3, 1), generator)
        assert len(set(tree.tokens[1:])) == 2
        counts[place[tree.tokens[1]], place[tree.tokens[2]]] += 1
    law = q[:, None] * q[None] / (1 - q[:, None])
    np.fill_diagonal(law, 0)
    assert counts.trace() == 0
    off = ~np.eye(4, dtype=bool)
    assert p_value(counts[off], law[off]) > ALPHA


def test_a_perfect_drafter_has_its_first_child_accepted():
    p = np.array([0.4, 0.3, 0.2, 0.1])
    for u in (0.0, 0.5, 1 - 1e-12):
        assert accept_child(p, [2], np.arange(4), p, np.array([u]))[0] == 0


def test_shapes_are_the_likeliest_nodes_of_fixed_rates():
    rates = [0.6, 0.2, 0.1]
    shape = best_shape(rates, 12, 3)
    values = [1.0]
    for node in range(1, len(shape.parents)):
        values.append(values[shape.parents[node]] * rates[shape.ranks[node]])
    every = [
        math.prod(path) for depth in (1, 2, 3) for path in itertools.product(rates, repeat=depth)
    ]
    assert sorted(values[1:]) == pytest.approx(sorted(sorted(every)[-11:]))
    assert path_shape(4, 9).parents == [-1, 0, 1, 2]
    assert path_shape(9, 2).parents == [-1, 0, 1]
    assert len(best_shape(rates, 1, 3).parents) == len(best_shape(rates, 5, 0).parents) == 1


def test_rates_are_learnt_and_never_increase_with_the_rank():
    rates = RankRates(3)
    for _ in range(200):
        rates.saw(3, 1)
    learnt = rates.rates()
    assert learnt == sorted(learnt, reverse=True)
    assert learnt[0] < 0.1
    for _ in range(2000):
        rates.saw(2, 0)
    assert rates.rates()[0] > 0.8


@pytest.fixture(scope="module")
def small():
    """A target of six tokens, and its exact law of the next three."""
    target = llama(vocab_size=6, initializer_range=0.5)
    ids = [3, 1, 4]
    with torch.no_grad():
        law = []
        for rest in itertools.product(range(6), repeat=2):
            logits = target(torch.tensor([ids + list(rest)])).logits[0, 2:].softmax(-1)
            law.append(logits[0, rest[0]] * logits[1, rest[1]] * logits[2])
    return target, drafter_for(target, block_size=4), ids, torch.stack(law).flatten().numpy()


def decode_many(small, runs, **settings):
    """Counts of three tokens after the prompt, from batches of rows."""
    target, drafter, ids, _ = small
    settings = {"tree_size": 8, "top_m": 6, "top_k": 3} | settings
    decoder = SpeculativeDecoder(Target(target), drafter, DraftSettings(**settings))
    generator, counts = torch.Generator().manual_seed(7), np.zeros(6**3)
    for _ in range(runs // 250):
        rules = [
            ProcessedChoice(
                ids, 3, LogitsProcessorList(), StoppingCriteriaList([MaxLengthCriteria(6)]),
                sample=True, device=torch.device("cpu"), generator=generator,
            )
            for _ in range(250)
        ]  # fmt: skip
        for text in decoder.decode_batch([ids] * 250, rules)[0]:
            counts[(text[3] * 6 + text[4]) * 6 + text[5]] += 1
    return counts


@pytest.mark.parametrize("verification", ["match", "rejection"])
def test_decoding_keeps_the_targets_law(small, verification):
    counts = decode_many(small, 4000, verification=verification)
    assert p_value(counts, small[3]) > ALPHA


def test_a_biased_target_is_noticed(small, monkeypatch):
    draw = ProcessedChoice.draw
    monkeypatch.setattr(ProcessedChoice, "draw", lambda self, p: draw(self, p.pow(1.2)))
    assert p_value(decode_many(small, 4000), small[3]) < ALPHA


@pytest.mark.slow
@pytest.mark.parametrize("verification", ["match", "rejection"])
@pytest.mark.parametrize("method", ["tree", "marginal", "chain"])
def test_decoding_keeps_the_targets_law_over_many_runs(small, verification, method):
    counts = decode_many(small, 20_000, verification=verification, method=method)
    assert p_value(counts, small[3]) > ALPHA


def test_rejection_of_a_greedy_rule_is_matching():
    target = llama()
    drafter = drafter_for(target)
    wanted = plain(target, prompt(), max_new_tokens=20)
    draft = {"verification": "rejection"}
    assert drafted(target, prompt(), drafter, draft=draft, max_new_tokens=20).tolist() == (
        wanted.tolist()
    )


def test_rejection_follows_the_processed_law():
    target = llama()
    drafter = drafter_for(target)
    settings = {"do_sample": True, "top_k": 1, "repetition_penalty": 1.3, "max_new_tokens": 30}
    wanted = plain(target, prompt(), **settings)
    for method in ("tree", "chain", "marginal"):
        draft = {"verification": "rejection", "method": method, "tree_size": 30}
        found = drafted(target, prompt(), drafter, draft=draft, seed=1, **settings)
        assert found.tolist() == wanted.tolist()


def test_sampled_children_beat_the_best_ones_when_the_drafter_is_the_target():
    """With p = q a drawn child is always accepted; the best child only with its probability."""
    q = np.exp(tables_of(5, width=6).log_probs[1])
    tokens = tables_of(5, width=6).tokens[1]
    target = np.zeros((6, 6))
    np.put_along_axis(target, tokens, q, -1)
    tables = tables_of(5, width=6)
    tables.links[:-1] = tables.tokens[:-1]
    _, drawn = counts_of(tables, target, 300, lambda _: path_shape(3, 2), length=4)
    # Rounds of three tokens: two drawn children and one more token, always.
    assert drawn == 300 * 3
    tree = build_tree(tables, 0, 3)
    assert tree.expected_block_efficiency() < 3


def test_an_unknown_verification_is_named():
    with pytest.raises(ConfigError, match="did you mean 'rejection'"):
        DraftSettings(verification="rejecting")
