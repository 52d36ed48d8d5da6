"""The six published trajectories come to the stated outcomes (spec, 4.3)."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from engine_cases import finish
from tenfold_byzantine.golden import MAX_ROUNDS, published_trajectories
from tenfold_byzantine.result import GROUPINGS, Outcome

BY_NAME = {t.name: t for t in published_trajectories()}
PLAYED = {name: finish(t.game()).result() for name, t in BY_NAME.items()}


def test_there_are_six_of_eight_honest_agents_each():
    assert list(BY_NAME) == ["P1", "P2", "P3", "P4", "P5", "P6"]
    assert [len(t.byzantine) for t in BY_NAME.values()] == [0, 0, 0, 1, 2, 1]
    for t in BY_NAME.values():
        assert len(t.honest) == 8
        assert {len(row) for row in (*t.honest, *t.byzantine)} == {t.stopped or MAX_ROUNDS}


@pytest.mark.parametrize("name", BY_NAME)
def test_each_is_classified_as_stated(name):
    trajectory, result = BY_NAME[name], PLAYED[name]
    assert result.outcome is trajectory.outcome
    assert result.rounds == (trajectory.stopped or MAX_ROUNDS)
    assert result.stopped is (trajectory.stopped is not None)
    assert GROUPINGS["paper-figures"][result.outcome.top] == trajectory.label
    held = [row[:8] for row in result.held]
    assert held == list(zip(*trajectory.honest, strict=True))


def test_the_first_agrees_on_the_seventh_agents_value():
    flags = PLAYED["P1"].flags
    assert (flags["value"], flags["agreed_round"], flags["in_hull"]) == (24, 7, True)
    assert PLAYED["P1"].initial[6] == 24


def test_the_second_averages_to_a_value_that_nobody_had():
    result = PLAYED["P2"]
    assert (result.outcome, result.flags["value"]) == (Outcome.INVALID_FABRICATED, 25)
    assert 25 not in result.initial
    assert result.properties.hull_validity
    assert not result.properties.strong_validity


def test_the_third_stops_with_seven_at_42_and_one_at_43():
    result = PLAYED["P3"]
    assert sorted(result.held[-1]) == [42] * 7 + [43]
    assert result.flags["bloc"] == 7
    assert GROUPINGS["paper-text"][result.outcome.top] == "invalid"


def test_the_fifth_is_a_capture_in_its_second_round():
    result = PLAYED["P5"]
    assert (result.flags["value"], result.flags["first_held"]) == (25, 2)
    assert result.flags["agreed_round"] == 28
    assert result.flags["adversary_values"] == [37, 37]


def test_the_sixth_freezes_after_two_moves():
    result = PLAYED["P6"]
    moves = sum(
        a != b
        for before, after in itertools.pairwise(result.held)
        for a, b in zip(before[:8], after[:8], strict=True)
    )
    assert moves == 2
    assert (result.flags["bloc"], result.flags["moves"]) == (4, 1)
