"""Length buckets: cheapest among all groupings, within the budget, nothing lost."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from tenfold.errors import ConfigError
from tenfold_dabgo.batches import CPU_TOKENS, cheapest_cuts, length_buckets
from tenfold_dabgo.corpus import TokenDataset


def cost(lengths, cuts, price):
    return sum(int(lengths[i]) * (j - i) + price for i, j in cuts)


@pytest.mark.parametrize("seed", range(6))
def test_cuts_are_the_cheapest_of_all_groupings(seed):
    """Every way to cut 9 lengths, by brute force."""
    generator = np.random.default_rng(seed)
    lengths = np.sort(generator.integers(1, 30, size=9))[::-1]
    budget, price = int(generator.integers(20, 90)), int(generator.integers(1, 25))
    costs = []
    for marks in product((False, True), repeat=8):
        ends = [k + 1 for k, cut in enumerate(marks) if cut] + [9]
        cuts = list(zip([0, *ends[:-1]], ends, strict=True))
        if all(j - i == 1 or lengths[i] * (j - i) <= budget for i, j in cuts):
            costs.append(cost(lengths, cuts, price))
    got = cheapest_cuts(lengths, budget, price)
    assert [i for i, _ in got[1:]] == [j for _, j in got[:-1]]
    assert cost(lengths, got, price) == min(costs)


def test_buckets_keep_every_scorable_sample_once_within_the_budget():
    generator = np.random.default_rng(0)
    rows = [[1] * int(n) for n in generator.integers(0, 300, size=5000)]
    dataset = TokenDataset.from_ids(rows)
    buckets = length_buckets(dataset, np.arange(5000), 10**6)
    assert sorted(np.concatenate(buckets).tolist()) == np.flatnonzero(dataset.scorable).tolist()
    padded = [len(b) * int(dataset.lengths[b].max()) for b in buckets]
    assert max(padded) <= CPU_TOKENS
    real = int(dataset.lengths[dataset.scorable].sum())
    assert sum(padded) < 1.02 * real
    wide = length_buckets(dataset, np.arange(5000), 8192, "cuda")
    assert CPU_TOKENS < max(len(b) * int(dataset.lengths[b].max()) for b in wide) <= 8192


def test_buckets_depend_on_the_set_of_samples_alone():
    rows = [[1] * n for n in (5, 9, 5, 7, 0, 30)]
    dataset = TokenDataset.from_ids(rows)
    there = length_buckets(dataset, [0, 1, 2, 3, 4, 5], 20)
    back = length_buckets(dataset, [5, 4, 3, 2, 1, 0, 0], 20)
    assert [b.tolist() for b in there] == [b.tolist() for b in back]
    assert there[0].tolist() == [5]
    assert length_buckets(dataset, [4], 20) == []
    with pytest.raises(ConfigError, match="at least 1"):
        length_buckets(dataset, [0], 0)
