"""One-round rules, averaging rules and filters against direct computation."""

from __future__ import annotations

import itertools
import random
import statistics
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from policy_cases import messages, play, rules, view
from tenfold.errors import ConfigError
from tenfold_byzantine.contracts import Policy, RoundLine
from tenfold_byzantine.policies import entries, policy, with_filter
from tenfold_byzantine.policies.averaging import dlpsw_contraction, dlpsw_selection, wmsr_kept
from tenfold_byzantine.policies.base import votes_stop
from tenfold_byzantine.policies.one_round import quotient

VALUES = st.lists(st.integers(0, 50), min_size=1, max_size=12)


def result(text: str, values: list[int], **other) -> int | None:
    said = dict(enumerate(values))
    (answer,) = policy(text).decide_many([view(said, **other)])
    return answer.value


def half_up(x: Fraction) -> int:
    return (x + Fraction(1, 2)).__floor__()


@given(VALUES)
def test_each_rule_equals_its_definition(values: list[int]) -> None:
    m, counts = len(values), [values.count(v) for v in values]
    tied = [v for v, c in zip(values, counts, strict=True) if c == max(counts)]
    assert result("leader", values) == values[0]
    assert result("mode-min", values) == min(tied)
    assert result("mode-minid", values) == tied[0]
    assert result("mode-own", values) == (values[0] if values[0] in tied else min(tied))
    assert result("low-median", values) == statistics.median_low(values)
    assert result("mean", values) == half_up(Fraction(sum(values), m))
    assert result("mean:rounding=floor", values) == sum(values) // m
    assert result("median", values) == half_up(Fraction(statistics.median(map(Fraction, values))))
    assert result("midrange", values) == half_up(Fraction(min(values) + max(values), 2))
    assert result("min", values) == min(values)
    assert result("max", values) == max(values)
    assert result("constant:v=7", values) == 7
    assert result("voter", values) in (values[1:] or values)
    assert result("three-majority", values) in values
    assert 0 <= result("random", values) <= 50


@given(VALUES, st.integers(0, 3))
def test_trimming_rules_drop_both_ends(values: list[int], f: int) -> None:
    kept = sorted(values)
    for _ in range(f if len(values) > 2 * f else 0):
        kept.remove(min(kept))
        kept.remove(max(kept))
    assert result(f"trimmed-low-median:f={f}", values) == statistics.median_low(kept)
    assert result(f"trimmed-mean:f={f}", values) == half_up(Fraction(sum(kept), len(kept)))


def test_rules_keep_silence_out_and_keep_the_value_where_nothing_came() -> None:
    said = {0: 10, 1: None, 2: 30, 3: 30}
    (answer,) = policy("mode-min").decide_many([view(said)])
    assert answer.value == 30
    alone = view({0: 10}, game=rules(4), inbox=())
    assert policy("low-median").decide_many([alone])[0].value == 10


def test_round_one_says_the_initial_value() -> None:
    for entry in entries("honest"):
        game = rules(4, low=0, high=1) if entry.name == "ben-or" else rules(4)
        (answer,) = policy(entry.name).decide_many([view({0: 1}, game=game, round_=1, inbox=())])
        assert answer.value == 1, entry.name


def test_answers_of_a_batch_are_those_of_its_parts() -> None:
    draws = random.Random(5)
    views = []
    for game in range(40):
        said = {a: draws.randint(0, 3) for a in range(6)}
        inbox = messages(said)  # one shared tuple, as the engine has it
        views += [view(said, a, inbox=inbox, key=f"{game}/{a}") for a in range(6)]
    for entry in entries("honest"):
        if entry.name == "ben-or":
            continue
        p = policy(entry.name)
        whole = p.decide_many(views), p.vote_many(views)
        parts = [p.decide_many([v])[0] for v in views], [p.vote_many([v])[0] for v in views]
        assert whole == parts, entry.name


def test_random_rules_have_the_stated_frequencies() -> None:
    said = {0: 10, 1: 20, 2: 20, 3: 30}
    n = 4000
    keys = [f"k{i}" for i in range(n)]

    def share(text: str, value: int) -> float:
        answers = policy(text).decide_many([view(said, key=k) for k in keys])
        return sum(a.value == value for a in answers) / n

    # Binomial deviations of 4 standard errors at most; seeds are fixed.
    assert abs(share("voter", 20) - 2 / 3) < 0.03
    assert abs(share("stubborn:p=0.7", 10) - 0.7) < 0.03
    # Three draws: at least two of 20 (1/2), or 20 first among three different (1/16).
    assert abs(share("three-majority", 20) - (1 / 2 + 2 / 32)) < 0.032
    assert abs(share("random", 20) - 1 / 51) < 0.009


@pytest.mark.parametrize(
    ("total", "count", "up", "floor"),
    [(5, 2, 3, 2), (-5, 2, -2, -3), (7, 3, 2, 2), (8, 3, 3, 2), (0, 4, 0, 0)],
)
def test_halves_are_rounded_up_also_below_zero(total, count, up, floor) -> None:
    assert quotient(total, count) == up
    assert quotient(total, count, "floor") == floor


def test_stop_rule_counts_equal_values_and_forgives_f() -> None:
    def stops(said, f=0, q=None, n=None):
        game = rules(n or len(said), f)
        return votes_stop(view(said, game=game, phase="vote"), q)

    assert stops({0: 5, 1: 5, 2: 5})
    assert not stops({0: 5, 1: 5, 2: 6})
    ten = {**dict.fromkeys(range(8), 5), 8: 1, 9: 2}
    assert stops(ten, f=2)
    assert not stops(ten, f=1)
    assert not stops({**ten, 7: 4}, f=2)
    # Two silent neighbours use up f = 2: the eight heard must be equal.
    assert stops(dict.fromkeys(range(8), 5), f=2, n=10)
    assert not stops({**dict.fromkeys(range(7), 5), 7: 4}, f=2, n=10)
    assert stops(ten, q=0.8)
    assert not stops(ten, q=0.81)
    assert not stops({0: None, 1: None}, f=1)


def test_stop_rule_is_the_share_one_minus_f_of_a_full_inbox() -> None:
    for n in range(4, 20):
        for f in range((n - 1) // 3 + 1):
            for same in range(1, n + 1):
                said = {a: 7 if a < same else 20 + a for a in range(n)}
                expected = Fraction(same, n) >= 1 - Fraction(f, n)
                assert votes_stop(view(said, game=rules(n, f), phase="vote")) == expected


# --- averaging --------------------------------------------------------------------------------


def test_dlpsw_worked_example() -> None:
    received = [0, 0, 10, 10, 10, -100, 100]
    assert dlpsw_selection(received, 2) == [0, 10]
    game = rules(7, 2, low=-100, high=100)
    assert result("dlpsw:f=2", received, game=game) == 5


@pytest.mark.parametrize(
    ("n", "f", "bound"),
    [(4, 1, 1 / 2), (5, 1, 1 / 3), (7, 1, 1 / 5), (7, 2, 1 / 2), (10, 3, 1 / 2)],
)
def test_dlpsw_contracts_by_one_over_c_and_no_more(n: int, f: int, bound: float) -> None:
    assert dlpsw_contraction(n, f) == pytest.approx(bound, abs=1e-15)
    draws = random.Random(1000 * n + f)
    worst = 0.0
    for trial in range(4000):
        coarse = trial % 2 == 0  # extremes reach the bound, fractions try to break it
        honest = [draws.choice((0.0, 1.0)) if coarse else draws.random() for _ in range(n - f)]
        diameter = max(honest) - min(honest)
        if diameter < 0.1:
            continue
        after = []
        for _ in honest:
            lies = [draws.choice((-1.0, 0.0, 1.0, 2.0)) if coarse else draws.uniform(-1, 2)]
            lies += [draws.choice((-1.0, 2.0)) for _ in range(f - 1)]
            kept = dlpsw_selection(honest + lies, f)
            after.append(sum(kept) / len(kept))
        assert min(after) >= min(honest) - 1e-12  # never out of the honest range
        assert max(after) <= max(honest) + 1e-12
        worst = max(worst, (max(after) - min(after)) / diameter)
    assert worst <= bound + 1e-12
    assert worst == pytest.approx(bound, abs=1e-12)


def test_dlpsw_game_with_equivocation_contracts_and_stays_in_the_hull() -> None:
    game = rules(7, 2, powers=frozenset({"equivocate"}))
    for seed in range(10):
        liars = policy("random:equivocate=true", role="byzantine")
        start = [0, None, 50, 10, None, 33, 50]
        players = [liars if v is None else policy("dlpsw:exact=true") for v in start]
        played = play(game, players, start, seed=seed, rounds=12)
        honest = [a for a in range(7) if start[a] is not None]
        spans = []
        for row in played.payloads:
            exact = [row[a] for a in honest]
            assert min(exact) >= 0
            assert max(exact) <= 50
            spans.append(max(exact) - min(exact))
        for before, after in itertools.pairwise(spans):
            assert after <= before * dlpsw_contraction(7, 2) + 1e-9


def test_wmsr_keeps_equals_and_itself() -> None:
    assert wmsr_kept(5, [1, 2, 5, 8, 9], 1) == [2, 5, 5, 8]
    assert wmsr_kept(5, [1, 9], 2) == [5]
    assert wmsr_kept(5, [6, 7, 8], 1) == [5, 6, 7]
    assert wmsr_kept(5, [1, 9], 0) == [1, 5, 9]


# --- filters ----------------------------------------------------------------------------------


class Sees:
    """Says how many values it sees; remembers nothing else."""

    label, powers = "sees", frozenset()

    def check(self, rules) -> None: ...

    def decide_many(self, views):
        self.views = list(views)
        return policy("max").decide_many(views)

    def vote_many(self, views):
        self.views = list(views)
        return policy("max").vote_many(views)


def test_filter_on_the_view_hides_what_wmsr_drops() -> None:
    inner = Sees()
    filtered = with_filter(inner, "wmsr:F=1")
    assert isinstance(filtered, Policy)
    said = {0: 20, 1: 50, 2: 22, 3: 1, 4: 19}
    line = RoundLine(1, messages({0: 21, 1: 50, 2: 22, 3: 20, 4: 1}))
    (answer,) = filtered.decide_many([view(said, game=rules(5, 1), history=(line,))])
    assert inner.views[0].values() == [20, 22, 19]
    assert [m.value for m in inner.views[0].history[0].messages] == [21, 22, 20]
    assert answer.value == 22


def test_filter_on_the_proposal_moves_it_into_the_kept_range() -> None:
    filtered = with_filter(policy("max"), "wmsr:F=1,on=proposal")
    said = {0: 20, 1: 50, 2: 22, 3: 1, 4: 19}
    assert filtered.decide_many([view(said)])[0].value == 22
    assert filtered.label == "max behind wmsr:on=proposal,F=1"
    first = view({0: 3}, game=rules(5), round_=1, inbox=())
    assert filtered.decide_many([first])[0].value == 3


@given(VALUES, st.integers(0, 2))
def test_dlpsw_filter_keeps_the_own_message(values: list[int], f: int) -> None:
    inner = Sees()
    filtered = with_filter(inner, f"dlpsw:f={f},unsafe=true")
    filtered.decide_many([view(dict(enumerate(values)))])
    others = sorted(values[1:])
    kept = others[f : len(others) - f] if len(others) > 2 * f else []
    assert sorted(inner.views[0].values()) == sorted([values[0], *kept])


def test_filter_protects_followers_of_the_majority_from_colluders() -> None:
    start = [10, 20, 20, 30, 40, None, None, None]
    game = rules(8, 3)
    liars = policy("collude:v=0")

    def final(honest: Policy) -> set:
        players = [liars if v is None else honest for v in start]
        return {v for v, x in zip(play(game, players, start).held[-1], start, strict=True) if x}

    plain = final(policy("mode-min"))
    assert plain == {0}
    assert 0 not in final(with_filter(policy("mode-min"), "wmsr"))


def test_filters_have_bounds_and_errors_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"filter dlpsw needs n >= 3f\+1"):
        with_filter(policy("max"), "dlpsw:f=2").check(rules(6))
    with pytest.raises(ConfigError, match=r"filter wmsr needs n >= 2F\+1"):
        with_filter(policy("max"), "wmsr:F=3").check(rules(6))
    with_filter(policy("max"), "wmsr:F=3").check(rules(6, complete=False))
    with pytest.raises(ConfigError, match="did you mean 'wmsr'"):
        with_filter(policy("max"), "wmsrr:F=1")
    with pytest.raises(ConfigError, match="on is 'both'; it must be one of view, proposal"):
        with_filter(policy("max"), "wmsr:on=both")
    rule = policy("max")
    assert with_filter(rule, "none") is rule
