"""Vectorised games against the scalar policies, exact rates and the reference table; robustness
by naive enumeration; what theory says."""

from __future__ import annotations

import itertools
import sys
import time
from fractions import Fraction
from pathlib import Path

import networkx as nx
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from policy_cases import play
from tenfold.errors import ConfigError
from tenfold_byzantine.contracts import Ballot, Proposal
from tenfold_byzantine.policies import exact_rates, policy
from tenfold_byzantine.policies.bounds import bounds
from tenfold_byzantine.policies.montecarlo import (
    CHUNK,
    LIES,
    RULES,
    Counts,
    Setting,
    comparators,
    ordered,
    simulate,
)
from tenfold_byzantine.policies.robustness import is_robust, robustness, tolerates

GAMES = 400_000


class Says:
    """Says in every round what was drawn for it; None is silence."""

    label, powers = "says", frozenset()

    def __init__(self, drawn: dict[int, int | None]) -> None:
        self.drawn = drawn

    def check(self, rules) -> None: ...

    def decide_many(self, views):
        return [Proposal(self.drawn[v.agent]) for v in views]

    def vote_many(self, views):
        return [Ballot("continue") for _ in views]


RULE_TEXTS = (
    *(c.name for c in RULES),
    "mean:rounding=floor",
    "median:rounding=floor",
    "midrange:rounding=floor",
    "trimmed-mean:rounding=floor",
)
LIE_TEXTS = ("silent", "fixed:v=1", "collude:v=2", "extreme", "extreme:side=min", "random")


@pytest.mark.parametrize("high", [2, 50])  # in the small range games stop in round 1, and wrongly
@pytest.mark.parametrize("byzantine", [0, 1, 3])
@pytest.mark.parametrize("text", RULE_TEXTS)
def test_columns_equal_scalar_games(text: str, byzantine: int, high: int) -> None:
    honest = 2 * byzantine + 1 if byzantine else 4
    text = "constant:v=1" if text == "constant" else text
    seen = Counts(0, 0, 0, 0, 0, 0)
    for lie in LIE_TEXTS:
        if text == "dlpsw" and lie == "silent":
            continue
        setting = Setting.of(text, lie, honest, byzantine, 0, high)
        (draws,) = setting.chunks(12, seed=byzantine)
        ends = setting.play(draws)
        for g in range(12):
            compare(setting, draws, ends, g)
        seen += simulate(
            text, lie, n_honest=honest, n_byzantine=byzantine, games=12, seed=byzantine, high=high
        )
        assert seen.premature + seen.valid + seen.captured + seen.fabricated == seen.games
    if high == 2 and byzantine == 3:
        assert seen.premature > 0  # the comparison met this case


def compare(setting, draws, ends, g: int) -> None:
    """One column against a game of the scalar policies."""
    n, h = setting.rules.agents, setting.n_honest
    rows = [*draws.honest[:, g].tolist(), *draws.byzantine[:, g].tolist()]
    rows += [None] * (n - len(rows))
    seats = draws.seats[:, g].tolist()
    assert sorted(seats) == list(range(n))
    start = [rows[s] if s < h else None for s in seats]
    liar = Says({a: rows[s] for a, s in enumerate(seats) if s >= h})
    players = [setting.rule if s < h else liar for s in seats]
    played = play(setting.rules, players, start)
    assert played.stopped
    final = [played.held[-1][a] for a in range(n) if start[a] is not None]
    inputs = [v for v in start if v is not None]
    agreed = len(set(final)) == 1
    assert ends.first[g] == (len(played.held) == 1)
    assert ends.premature[g] == (not agreed)
    assert ends.valid[g] == (agreed and final[0] in inputs)
    assert ends.hull[g] == (agreed and min(inputs) <= final[0] <= max(inputs))
    lies = [v for v in liar.drawn.values() if v is not None]
    assert ends.captured[g] == (agreed and final[0] not in inputs and final[0] in lies)
    if agreed:
        assert ends.decided[g] == final[0]


@pytest.mark.parametrize("n", range(1, 13))
def test_comparators_sort(n: int) -> None:
    """The zero-one principle: a network that sorts all bits sorts all values."""
    assert all(i < j for i, j in comparators(n))
    columns = np.array(list(itertools.product((0, 1), repeat=n)), dtype=np.uint8).T
    assert np.array_equal(ordered(columns), np.sort(columns, axis=0))


def test_negative_and_wide_ranges_are_offsets() -> None:
    shifted = simulate("mean", "extreme", n_byzantine=2, games=20_000, low=-40, high=10)
    assert shifted == simulate("mean", "extreme", n_byzantine=2, games=20_000)
    wide = simulate("low-median", "random", n_byzantine=2, games=20_000, high=100_000)
    assert wide.valid / wide.games == pytest.approx(0.8, abs=0.05)
    assert simulate("leader", n_honest=3, games=10, low=5, high=5).valid == 10


def test_draws_depend_on_the_seed_and_the_chunk_alone() -> None:
    setting = Setting.of("mean", "random", 8, 2, 0, 50)
    first = next(setting.chunks(CHUNK, 3))
    again = next(setting.chunks(3 * CHUNK, 3))
    assert np.array_equal(first.honest, again.honest)
    assert np.array_equal(first.seats, again.seats)
    assert simulate("mean", games=1000, seed=1) != simulate("mean", games=1000, seed=2)
    assert simulate("mean", games=CHUNK + 7).games == CHUNK + 7


@pytest.mark.parametrize("byzantine", [2, 40])  # a table of seatings, and sorted keys
def test_all_seatings_are_equally_likely(byzantine: int) -> None:
    setting = Setting.of("mean", "random", 2 * byzantine + 1, byzantine, 0, 50)
    (draws,) = setting.chunks(20_000, 1)
    share = (draws.seats >= setting.n_honest).mean(axis=1)
    expected = byzantine / setting.rules.agents
    assert np.abs(share - expected).max() < 4.5 * (expected * (1 - expected) / 20_000) ** 0.5


# --- exact rates ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "mean", "constant", "distinct"),
    [
        (4, 0.100073, 0.076155, 0.886537),
        (8, 0.165573, 0.146510, 0.560967),
        (16, 0.286768, 0.271554, 0.071662),
    ],
)
def test_exact_rates_are_the_published_ones(n, mean, constant, distinct) -> None:
    assert float(exact_rates.mean(n)) == pytest.approx(mean, abs=5e-7)
    assert float(exact_rates.constant(n)) == pytest.approx(constant, abs=5e-7)
    assert exact_rates.constant(n) == 1 - Fraction(50, 51) ** n
    assert float(exact_rates.all_distinct(n)) == pytest.approx(distinct, abs=5e-7)


def test_exact_rates_of_middle_pair_and_midrange() -> None:
    for n, pair, centre in ((4, 0.112, 0.076), (8, 0.212, 0.146), (16, 0.377, 0.272)):
        assert float(exact_rates.middle_pair(n)) == pytest.approx(pair, abs=6e-4)
        assert float(exact_rates.midrange(n)) == pytest.approx(centre, abs=6e-4)
    with pytest.raises(ConfigError, match="even number of values, not 3"):
        exact_rates.middle_pair(3)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize(("low", "high"), [(0, 4), (-3, 2)])
def test_exact_rates_equal_enumeration(n: int, low: int, high: int) -> None:
    def rate(text: str) -> Fraction:
        rule = policy(text)
        tuples = list(itertools.product(range(low, high + 1), repeat=n))
        return Fraction(sum(rule.pick(x, None) in x for x in tuples), len(tuples))

    assert exact_rates.mean(n, low, high) == rate("mean")
    assert exact_rates.mean(n, low, high, "floor") == rate("mean:rounding=floor")
    assert exact_rates.middle_pair(n, low, high) == rate("median:rounding=floor")
    assert exact_rates.midrange(n, low, high) == rate("midrange:rounding=floor")
    assert exact_rates.constant(n, low, high) == rate(f"constant:v={low}")


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        ("mean", exact_rates.mean),
        ("mean:rounding=floor", lambda n: exact_rates.mean(n, rounding="floor")),
        ("median:rounding=floor", exact_rates.middle_pair),
        ("midrange:rounding=floor", exact_rates.midrange),
        ("constant:v=25", exact_rates.constant),
        *((text, lambda n: 1) for text in ("low-median", "mode-min", "leader", "min", "max")),
    ],
)
def test_simulated_rates_meet_the_exact_ones(text: str, exact) -> None:
    for n in (4, 8, 16):
        games = 100_000
        p = float(exact(n))
        seen = simulate(text, n_honest=n, games=games, seed=n).valid / games
        assert abs(seen - p) <= 4 * (p * (1 - p) / games) ** 0.5


@pytest.mark.parametrize(
    ("text", "lie", "rates"),
    [
        ("leader", "random", (0.90517, 0.82930, 0.76723, 0.71550)),
        ("mode-minid", "random", (0.948, 0.909, 0.880, 0.855)),
        ("mode-minid", "collude:v=25", (0.948, 0.354, 0.156, 0.147)),
        ("low-median", "random", (0.907, 0.832, 0.771, 0.721)),
        ("low-median", "collude:v=25", (0.766, 0.581, 0.394, 0.299)),
        ("low-median", "extreme", (1, 1, 1, 1)),
    ],
)
def test_rates_among_liars_are_those_of_the_reference_table(text, lie, rates) -> None:
    for byzantine, expected in enumerate(rates, 1):
        counts = simulate(
            text, lie, n_byzantine=byzantine, games=GAMES, seed=byzantine, stop="unanimity"
        )
        # The table's own error is 0.002.
        assert counts.valid / GAMES == pytest.approx(expected, abs=0.003)
        if text == "low-median":
            assert counts.hull == GAMES
        if lie == "extreme":
            assert counts.valid == GAMES
        if text == "leader":
            p = float(exact_rates.leader(8, byzantine))
            assert float(p) == pytest.approx(expected, abs=6e-6)
            assert abs(counts.valid / GAMES - p) < 4 * (p * (1 - p) / GAMES) ** 0.5
        if text == "mode-minid" and byzantine == 1:
            p = float(exact_rates.mode_minid(8))
            assert p == pytest.approx(0.947448, abs=5e-7)
            assert abs(counts.valid / GAMES - p) < 4 * (p * (1 - p) / GAMES) ** 0.5


def test_four_colluders_can_end_a_game_before_agreement() -> None:
    """Four honest 25 and four liars' make eight of twelve: all but f = 4 are equal."""
    counts = simulate("low-median", "collude:v=0", n_byzantine=4, games=GAMES, high=3)
    assert counts.premature > 0
    observed = simulate(
        "low-median", "collude:v=0", n_byzantine=4, games=GAMES, high=3, stop="unanimity"
    )
    assert observed.premature == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "voter"}, "voter has no vectorised form; those that have: leader, mode-min"),
        ({"rule": "mean:q=0.9"}, "q must be left at its default"),
        ({"adversary": "drift"}, "drift has no vectorised form; those that have: silent, fixed"),
        ({"adversary": "collude"}, "collude needs a fixed value here"),
        ({"n_byzantine": 5}, "cannot reach the quota of two thirds alone"),
        ({"n_honest": 0}, "at least one honest agent"),
        ({"rule": "dlpsw", "n_byzantine": 2}, "dlpsw is no common rule where agents are silent"),
        ({"rule": "dlpsw", "adversary": "random", "n_honest": 6, "n_byzantine": 3}, "n >= 3f+1"),
        ({"adversary": "fixed:v=99", "n_byzantine": 1}, "v is 99; the game's values go from"),
        ({"stop": "never"}, "stop is 'never'; it must be one of rule, unanimity"),
    ],
)
def test_simulations_that_cannot_be_say_why(settings, message) -> None:
    with pytest.raises(ConfigError) as error:
        simulate(**{"rule": "mean", "games": 10, **settings})
    assert message in str(error.value)


def test_every_vectorised_policy_is_compared() -> None:
    assert {t.partition(":")[0] for t in LIE_TEXTS} == {c.name for c in LIES}
    assert {t.partition(":")[0] for t in RULE_TEXTS} == {c.name for c in RULES}


# --- robustness -------------------------------------------------------------------------------


def naive(graph: nx.Graph, r: int, s: int) -> bool:
    """(r, s)-robustness as it is written down."""
    nodes = sorted(graph)
    for sides in itertools.product((0, 1, 2), repeat=len(nodes)):
        sets = [{v for v, x in zip(nodes, sides, strict=True) if x == k} for k in (1, 2)]
        if not all(sets):
            continue
        able = [{v for v in S if len(set(graph[v]) - S) >= r} for S in sets]
        if not (able[0] == sets[0] or able[1] == sets[1] or sum(map(len, able)) >= s):
            return False
    return True


def test_robustness_numbers() -> None:
    assert [robustness(nx.complete_graph(n)) for n in range(3, 9)] == [2, 2, 3, 3, 4, 4]
    rings = [nx.circulant_graph(8, range(1, k + 1)) for k in (1, 2, 3)]
    assert [robustness(g) for g in rings] == [1, 2, 3]
    assert robustness(nx.cycle_graph(6)) == 1
    assert robustness(nx.complete_graph(12)) == 6
    assert robustness(nx.empty_graph(3)) == 0
    assert robustness(nx.empty_graph(1)) == 0


def test_robustness_equals_the_definition() -> None:
    for seed in range(12):
        graph = nx.gnp_random_graph(6, 0.3 + 0.05 * seed, seed=seed)
        r = robustness(graph)
        for k in range(5):
            assert naive(graph, k, 1) == (k <= r) == is_robust(graph, k), (seed, k)
            for s in range(1, 5):
                assert naive(graph, k, s) == is_robust(graph, k, s), (seed, k, s)


def test_complete_graphs_tolerate_what_the_rule_says() -> None:
    for n in range(3, 10):
        for F in range(1, 4):
            assert tolerates(nx.complete_graph(n), F) == (n >= 2 * F + 1)
    assert tolerates(nx.circulant_graph(8, [1, 2, 3]), 1, equivocate=True)
    assert not tolerates(nx.circulant_graph(8, [1, 2]), 1, equivocate=True)


def test_robustness_refuses_large_graphs() -> None:
    with pytest.raises(ConfigError, match="1 to 12 nodes; the graph has 13"):
        robustness(nx.complete_graph(13))


# --- bounds -----------------------------------------------------------------------------------


def test_bounds_are_those_that_policies_check() -> None:
    from policy_cases import rules

    for n, f in itertools.product(range(2, 16), range(4)):
        if f >= n:
            continue
        said = {s.name: s for s in bounds(n, f)}
        for name in ("phase-king", "eig", "dlpsw", "wmsr", "ben-or"):
            game = rules(n, f, low=0, high=1)
            try:
                policy(name).check(game)
                allowed = True
            except ConfigError:
                allowed = False
            assert said[name].holds == allowed, (name, n, f)
        assert all(s.condition and s.says and s.source for s in said.values())


def test_bounds_of_the_papers_game() -> None:
    said = {s.name: s for s in bounds(12, 4)}
    assert said["liveness of the vote"].condition == "n - f >= quota: 8 >= 8"
    assert said["liveness of the vote"].holds
    assert said["safety of the vote"].says.startswith("4 honest stop votes end the game")
    assert not bounds(13, 5)[0].holds
    strong = {f: {s.name: s.holds for s in bounds(51, f)}["strong validity"] for f in (0, 1)}
    assert strong == {0: True, 1: False}  # m = 51 values: not solvable for n <= 51 and f = 1
    assert {s.name: s.holds for s in bounds(52, 1)}["strong validity"]
    assert "0.5 of the honest diameter" in {s.name: s.says for s in bounds(7, 2)}["dlpsw"]
    # The quota as count, as float and as share: N = 50 differs between 0.66 and 2/3.
    assert bounds(50, 0, quota=0.66)[0].condition.endswith("50 >= 33")
    assert bounds(50, 0)[0].condition.endswith("50 >= 34")
    assert bounds(50, 0, quota=40)[0].condition.endswith("50 >= 40")
    with pytest.raises(ConfigError, match="0 <= f < n"):
        bounds(3, 3)


def test_a_million_games_take_less_than_a_second_of_one_core() -> None:
    simulate("low-median", "random", n_byzantine=2, games=CHUNK)  # tables are made
    start = time.process_time()
    simulate("low-median", "random", n_byzantine=2, games=GAMES)
    assert GAMES / (time.process_time() - start) > 1e6
