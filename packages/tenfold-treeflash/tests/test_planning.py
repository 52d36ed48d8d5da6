"""Decisions by measured cost: simulated pairs whose best policy is known."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from tenfold_treeflash.costs import CostModel, TableSize, calibrate
from tenfold_treeflash.decoding import DraftSettings, SpeculativeDecoder, _Decoding
from tenfold_treeflash.draft_cache import DraftCache
from tenfold_treeflash.planning import PAUSES, Planner, Planners
from tenfold_treeflash.target import Target
from tenfold_treeflash.tree import DraftTree, TransitionTables, build_tree, single
from treeflash_cases import drafter_for, llama, plain, prompt

NARROW, WIDE = TableSize(2, 4, None), TableSize(16, 16, None)


class Rule:
    greedy = True

    def __init__(self, length):
        self._length = length

    def choose(self, ids, logits):
        return int(logits.argmax())

    def ends(self, ids):
        return len(ids) >= self._length


def path_tree(probability, nodes=8):
    """A path whose every step has this probability."""
    steps = [i * math.log(probability) for i in range(nodes)]
    return DraftTree(list(range(nodes)), list(range(-1, nodes - 1)), list(range(nodes)), steps)


def simulate(planner, tokens, promised, true, seconds, seed=0):
    """Decodes so many tokens: trees promise one acceptance and keep another; returns seconds."""
    rng, total, written = random.Random(seed), 0.0, 0
    while written < tokens:
        if planner.drafts:
            tree = path_tree(promised)
            tree = tree.first(planner.size(tree))
            accepted = 1
            while accepted < len(tree) and rng.random() < true:
                accepted += 1
        else:
            tree, accepted = single(0), 1
        spent = seconds(len(tree), planner.drafts)
        planner.book([tree], [accepted], spent)
        total, written = total + spent, written + accepted
    return total


def costs_of(draft=0.4, slope=0.05):
    return CostModel(draft, {n: 1.0 + slope * (n - 1) for n in (1, 2, 4, 8, 16, 64)})


@pytest.mark.parametrize("true", [0.05, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("promised", [0.3, 0.9])
def test_it_is_never_much_slower_than_plain_decoding(true, promised):
    costs = costs_of()

    def seconds(nodes, drafted):
        return (costs.draft if drafted else 0.0) + costs.verified(nodes)

    tokens = 3000
    planner = Planner(costs)
    simulate(planner, 300, promised, true, seconds)  # it has seen a text before
    spent = simulate(planner, tokens, promised, true, seconds, seed=1)
    assert spent < 1.04 * tokens
    best = max(sum(true**d for d in range(n)) / costs.cost(n) for n in range(1, 9))
    if best > 1.2:
        assert tokens / spent > (0.9 if promised > 0.3 else 0.7) * best


def test_wrong_costs_are_found_out():
    """Drafted rounds take four times what was measured beforehand."""
    planner = Planner(costs_of(draft=0.1, slope=0.0))
    spent = simulate(planner, 3000, 0.8, 0.6, lambda n, drafted: 4.4 if drafted else 1.0)
    assert spent < 1.08 * 3000


def test_drafting_is_taken_up_again_when_it_pays():
    planner = Planner(costs_of())

    def seconds(nodes, drafted):
        return (0.4 if drafted else 0.0) + 1.0 + 0.05 * (nodes - 1)

    simulate(planner, 500, 0.9, 0.02, seconds)
    assert not planner.drafts or planner._pause > PAUSES[0]
    simulate(planner, 2 * PAUSES[1], 0.9, 0.95, seconds)
    fast = simulate(planner, 2000, 0.9, 0.95, seconds)
    assert 2000 / fast > 2.0


def test_sizes_have_the_largest_gain():
    generator = torch.Generator().manual_seed(0)
    tables = TransitionTables(
        np.tile(np.arange(4), (5, 4, 1)),
        torch.randn((5, 4, 4), generator=generator).log_softmax(-1).sort(-1, True)[0].numpy(),
        np.concatenate([np.tile(np.arange(4), (4, 4, 1)), np.full((1, 4, 4), -1)]),
    )
    planner = Planner(costs_of(slope=0.1))
    tree = build_tree(tables, 0, 40)
    gains = [
        1 + sum(math.exp(p) for p in tree.log_probs[1:n]) - planner.rate * planner.costs.verified(n)
        for n in range(1, len(tree) + 1)
    ]
    assert planner.size(tree) == 1 + gains.index(max(gains))
    assert 1 < planner.size(tree) < len(tree)


def test_promises_are_compared_with_what_came_of_them():
    planner = Planner(costs_of())
    tree = path_tree(0.9, 3)
    for i in range(400):
        planner.book([tree], [3 if i % 3 == 0 else 2 if i % 3 == 1 else 1], 1.0)
    tokens = planner.expected(tree)
    assert tokens[1] - tokens[0] == pytest.approx(2 / 3, abs=0.05)
    assert tokens[2] - tokens[1] == pytest.approx(1 / 3, abs=0.05)


@pytest.mark.parametrize(("wide", "chosen"), [(0.21, WIDE), (5.0, NARROW)])
def test_tables_are_as_wide_as_they_are_worth(wide, chosen):
    planner = Planner(CostModel(wide, {1: 1.0, 64: 1.1}, {WIDE: wide, NARROW: 0.2}))
    uniform = np.full((3, 16, 16), -math.log(16))
    links = np.tile(np.arange(16), (3, 16, 1))
    links[-1] = -1
    tables = TransitionTables(links.clip(min=0), uniform, links)
    for _ in range(8):
        tables_used = planner.table_size
        planner.look(tables, 0)
        planner.book([path_tree(0.9, 2)], [2], 1.0)
    assert tables_used == planner.table_size == chosen


def test_narrower_tables_are_the_first_candidates(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    links = torch.randint(-1, 6, (4, 6, 3), generator=generator).numpy()
    scores = torch.randn((4, 6, 3), generator=generator).log_softmax(-1).numpy()
    tables = TransitionTables(links.copy(), scores, links)
    narrow = tables.within(2)
    assert narrow.tokens.shape == (4, 2, 3)
    for link, kept in zip(links[:, :2].flat, narrow.links.flat, strict=True):
        assert kept == (link if link < 2 else -1)
    assert tables.within(6) is tables


def test_costs_grow_beyond_what_was_measured_and_with_rows():
    costs = CostModel(0.5, {1: 1.0, 2: 1.5, 4: 2.5}, {WIDE: 0.5, NARROW: 0.25})
    assert costs.verified(3) == pytest.approx(2.0)
    assert costs.verified(10) == pytest.approx(2.5 + 6 * 0.5)
    two = costs.for_rows(2)
    assert two.verify[2] == pytest.approx(2.5)
    assert two.tables[NARROW] == pytest.approx(two.draft / 2)
    assert CostModel.from_json(costs.to_json()) == costs


def test_choices_are_measured_on_the_pair():
    target = llama(vocab_size=512, dtype=torch.float32)
    drafter = drafter_for(target, dtype=torch.float32)
    costs = calibrate(Target(target), drafter, sizes=(2,), repeats=1, choices=True, top_m=8)
    assert [size.top_m for size in costs.tables] == [8, 4, 2]
    assert all(size.shortlist in (None, 64) for size in costs.tables)
    assert min(costs.tables.values()) > 0


@pytest.mark.parametrize("rows", [1, 3])
def test_pauses_change_no_text_and_lose_no_context(rows):
    """Drafting costs a fortune: it pauses, and what was read meanwhile is there afterwards."""
    target = llama()
    drafter = drafter_for(target)
    planners = Planners(CostModel(0.01, {1: 0.01, 64: 0.01}))
    decoder = SpeculativeDecoder(
        Target(target), drafter, DraftSettings(tree_size=16), planners=planners
    )
    sizes = []
    decoder.watch = lambda round_: sizes.append(len(round_.tree))
    planner = planners.of(rows)
    planner._plain.book(1e4, 0.1)  # plain rounds are said to be unbeatable
    prompts = [prompt(9, seed=i)[0].tolist() for i in range(rows)]
    texts, _ = decoder.decode_batch(prompts, [Rule(90)] * rows)
    for ids, text in zip(prompts, texts, strict=True):
        wanted = plain(target, torch.tensor([ids]), max_new_tokens=90 - len(ids))
        assert text[:90] == wanted[0].tolist()
    if rows > 1:
        assert 1 in sizes
        assert max(sizes) > 1


def test_the_drafter_catches_up_after_a_pause():
    target = Target(llama())
    drafter = drafter_for(target.model)
    planners = Planners(CostModel(0.01, {1: 0.01, 64: 0.01}))
    decoder = SpeculativeDecoder(target, drafter, DraftSettings(tree_size=16), planners=planners)
    planner = planners.of()
    planner._left = 5
    with torch.inference_mode(), target.features(drafter.config.target_layer_ids) as features:
        state = _Decoding(decoder, prompt()[0].tolist(), Rule(40), features)
        over = state.begin()
        while not over and not planner.drafts:
            assert state._context.length == 0
            over = state.round()
        assert not over
        state.round()
        fresh, context = target.new_cache(), DraftCache()
        target.prefill(torch.tensor(state._ids[:-1]), fresh)
        drafter.extend(context, features(), torch.arange(len(state._ids) - 1)[None])
        for a, b in zip(state._context.pairs(), context.pairs(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
