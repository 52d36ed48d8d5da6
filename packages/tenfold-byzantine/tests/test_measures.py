"""The metrics against hand computation and other libraries' formulas (spec, 2.10)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from engine_cases import Rule, low_median, played, row, votes_at
from tenfold_byzantine.contracts import Proposal
from tenfold_byzantine.measures import (
    KEYWORDS,
    Measures,
    half_stop_snapshot,
    influence,
    keyword_counts,
    measure,
    published,
    stubbornness,
)
from tenfold_byzantine.rules import GameConfig


def test_the_worked_example_has_quality_93():
    values = [[10, 20, 30, 40], [20, 20, 30, 40], [20, 20, 20, 40], [20, 20, 20, 30], [20] * 4]
    metrics = published([10, 20, 30, 40], values, 20, 50)
    assert metrics["centrality"] == pytest.approx(0.8333, abs=5e-5)
    assert metrics["efficiency"] == pytest.approx(0.9)
    assert metrics["quality"] == pytest.approx(93.0)


def test_the_published_formulas_by_hand():
    """x = 10 20 30 40; three rounds; the second is unanimous, the third breaks up again."""
    values = [[10, 20, 30, 40], [20, 20, 20, 20], [20, 20, 20, 30], [20] * 4, [20] * 4]
    m = published([10, 20, 30, 40], values, 20, 10)
    assert m["convergence_speed"] == 2
    assert m["convergence_rate"] == pytest.approx(3 / 5)
    assert m["stability_rounds"] == 2
    deviations = [np.std(v, ddof=1) for v in values]
    assert m["trajectory_stability"] == pytest.approx(np.mean(deviations))
    assert (m["agreement_rate"], m["inclusivity"]) == (100, 1)
    assert m["avg_distance"] == pytest.approx((10 + 0 + 10 + 20) / 4)
    assert m["consensus_is_median"] == 0.0  # the median is 25
    assert m["consensus_is_extreme"] == 0.0
    assert m["consensus_is_initial"] == 1.0


def test_flags_of_the_decided_value():
    assert published([10, 21, 40], [[21] * 3], 21, 9)["consensus_is_median"] == 1.0
    assert published([20, 21], [[20] * 2], 20, 9)["consensus_is_median"] == 1.0  # int(20.5)
    assert published([10, 21, 40], [[40] * 3], 40, 9)["consensus_is_extreme"] == 1.0
    assert published([10, 11], [[10] * 2], 10, 9)["consensus_is_extreme"] is None
    assert published([5, 5], [[5, 5]], 5, 9)["centrality"] == 1.0


def test_without_a_decision_only_its_formulas_are_undefined():
    m = published([1, 2], [[1, 2]], None, 4)
    assert m["quality"] == 0
    assert m["efficiency"] == 0.75
    for name in ("centrality", "avg_distance", "consensus_is_median", "consensus_is_initial"):
        assert m[name] is None
    assert m["convergence_speed"] is None
    assert m["agreement_rate"] == 50


def test_efficiency_of_a_full_length_game_is_zero():
    assert published([1], [[1]] * 4, 1, 4)["efficiency"] == 0


ROLES = ("honest", "honest", "byzantine")


def test_influence_counts_moves_to_values_a_liar_proposed_last():
    initial = (1, 2, None)
    #        moves:        -,-      0→9 by liar   1→9: honest 0 said it after the liar
    held = [(1, 2, 9), (9, 2, 5), (9, 9, 5)]
    assert influence(ROLES, initial, held, held) == pytest.approx(1 / 2)
    # The liar repeats itself in round 2, beside the honest agent: both moves are its.
    again = [(1, 2, 9), (9, 2, 9), (9, 9, 9)]
    assert influence(ROLES, initial, again, again) == 1
    assert influence(ROLES, initial, [(1, 2, 9)], [(1, 2, 9)]) is None
    silent = [(1, 2, None), (9, 2, None), (9, 9, None)]
    assert influence(ROLES, initial, held, silent) == 0


def test_stubbornness_is_the_share_of_rounds_kept_off_the_mode():
    roles = ("honest",) * 4
    held = [(7, 7, 7, 1), (7, 7, 7, 1), (7, 7, 7, 7), (7, 7, 7, 7)]
    # Round 1 compares with the initial values, where all four are modes.
    assert stubbornness(roles, (7, 6, 5, 1), held) == {0: 0, 1: 0, 2: 0, 3: 1 / 4}
    assert stubbornness(roles, (7, 7, 5, 1), held)[3] == 2 / 4


def test_vote_quality_is_precision_and_recall_of_honest_stop_votes():
    votes = [["stop", "continue", "stop"], ["stop", "continue", "stop"]]
    m = measure(
        roles=ROLES,
        initial=(1, 2, None),
        held=[(1, 2, 0), (2, 2, 0)],
        proposed=[(1, 2, 0), (2, 2, 0)],
        votes=votes,
        stopped=True,
        max_rounds=5,
    )
    assert m["vote_precision"] == 1 / 2  # one of two honest stop votes was cast in agreement
    assert m["vote_recall"] == 1 / 2
    assert (m["first_unanimous"], m["time_lost_to_voting"]) == (2, 0)
    assert m["half_stop_round"] == 1
    assert half_stop_snapshot(votes, [(1, 2, 0), (2, 2, 0)]) == {
        "round": 1,
        "votes": ["stop", "continue", "stop"],
        "held": [1, 2, 0],
    }
    assert m["byzantine_infiltration"] == 0


def test_half_stop_needs_half_of_all_agents():
    assert half_stop_snapshot([["stop", "continue", "continue"]], [(1, 1, 1)]) is None
    assert half_stop_snapshot([["stop", "continue"]], [(1, 1)])["round"] == 1


def test_byzantine_success_is_split_without_rest():
    for values, stopped, name in (
        ([(1, 2, 0)], False, "byzantine_block"),
        ([(1, 2, 0)], True, "byzantine_split"),
        ([(3, 3, 3)], True, "byzantine_capture"),
        ([(1, 1, 1)], True, None),
    ):
        m = measure(
            roles=ROLES,
            initial=(1, 2, None),
            held=values,
            proposed=values,
            votes=[["stop"] * 3],
            stopped=stopped,
            max_rounds=5,
        )
        parts = {p: m[p] for p in ("byzantine_block", "byzantine_split", "byzantine_capture")}
        assert parts == {p: float(p == name) for p in parts}
        assert m["byzantine_success"] == float(name is not None)


def test_infiltration_is_the_share_of_liars_that_hold_the_decision():
    config = GameConfig(n_honest=4, n_byzantine=2, byzantine_agents=(4, 5), initial_values=(1,) * 4)
    honest = Rule(lambda view: 1, votes_at(1))
    liars = Rule(row({4: [1], 5: [2]}), votes_at(1))
    assert played(config, honest, liars).result().metrics["byzantine_infiltration"] == 50


def test_keywords_count_once_per_text_of_honest_agents():
    texts = [["He is LYING, lying!", "manipulating me", "attack"], ["", "An outlier", ""]]
    counts = keyword_counts(texts, [0, 1])
    assert {w: n for w, n in counts.items() if n} == {"lying": 1, "manipulat": 1, "outlier": 1}
    assert set(counts) == set(KEYWORDS)


def test_keywords_reach_the_metrics_of_a_played_game():
    rule = Rule(lambda view: Proposal(1, text="a Byzantine attack?"))
    config = GameConfig(n_honest=2, max_rounds=1)
    assert played(config, rule).result().metrics["keyword_hits"] == 4


def test_measures_are_computed_when_asked_for():
    result = played(
        GameConfig(n_honest=4, initial_values=(40, 10, 30, 20)), Rule(low_median)
    ).result()
    assert isinstance(result.metrics, Measures)
    assert result.metrics["rounds"] == 2
    assert dict(result.metrics) == result.metrics
    assert len(result.metrics) == len(set(result.metrics))
    # x = 10 20 30 40, c = 20, R = 2 of 50: centrality as in the worked example.
    assert result.metrics["quality"] == pytest.approx(50 + 30 * 5 / 6 + 20 * 0.96)
