"""The classification, step by step, by hand-made games (spec, 2.4, Appendix B)."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from engine_cases import Rule, never, played, row, votes_at
from tenfold_byzantine.contracts import Proposal
from tenfold_byzantine.outcome import classify
from tenfold_byzantine.result import GROUPINGS, Outcome, Properties
from tenfold_byzantine.rules import GameConfig, Threat, Thresholds

O = Outcome  # noqa: E741


def game(honest, byzantine=(), *, initial=None, stop=True, votes=None, quota=None, **options):
    """Classifies a written course: rows are agents, columns rounds; honest agents come first."""
    courses = [*honest, *byzantine]
    rounds = len(courses[0])
    held = list(zip(*courses, strict=True))
    initial = tuple(initial or [c[0] for c in honest]) + (None,) * len(byzantine)
    roles = ("honest",) * len(honest) + ("byzantine",) * len(byzantine)
    last = votes or (["stop"] if stop else ["continue"]) * len(courses)
    options.setdefault("proposed", held)
    return classify(
        roles=roles,
        initial=initial,
        held=held,
        votes=[["continue"] * len(courses)] * (rounds - 1) + [last],
        stopped=stop,
        quota=quota or -(-2 * len(courses) // 3),
        **options,
    )


def test_agreement_on_an_honest_initial_value_is_valid():
    verdict = game([[1, 2], [2, 2], [3, 2]])
    assert verdict.outcome is O.VALID
    assert (verdict.flags["value"], verdict.flags["agreed_round"]) == (2, 2)
    assert verdict.properties == Properties(True, True, True, True, True)


def test_agreement_on_a_foreign_value_is_fabricated_where_nobody_proposed_it_before():
    verdict = game([[1, 2], [3, 2]])
    assert verdict.outcome is O.INVALID_FABRICATED
    assert verdict.flags["in_hull"]
    assert verdict.properties == Properties(True, True, False, True, True)
    outside = game([[1, 9], [3, 9]])
    assert outside.outcome is O.INVALID_FABRICATED
    assert not outside.flags["in_hull"]
    assert not outside.properties.hull_validity


def test_a_value_that_a_byzantine_agent_said_before_is_captured():
    assert game([[1, 9], [3, 9]], [[9, 0]]).outcome is O.INVALID_CAPTURED
    assert game([[1, 9, 9], [3, 3, 9]], [[9, 0, 0]]).flags["first_held"] == 2


def test_saying_it_in_the_same_round_is_no_capture_unless_it_was_rushing():
    assert game([[1, 9], [3, 9]], [[0, 9]]).outcome is O.INVALID_FABRICATED
    assert game([[1, 9], [3, 9]], [[0, 9]], rushing=True).outcome is O.INVALID_CAPTURED


def test_saying_it_after_the_first_honest_agent_held_it_is_no_capture():
    assert game([[1, 9, 9], [3, 3, 9]], [[0, 9, 9]]).outcome is O.INVALID_FABRICATED


def test_holding_it_silently_is_no_capture():
    silent = [(1, 3, None), (9, 9, None)]
    assert game([[1, 9], [3, 9]], [[9, 9]], proposed=silent).outcome is O.INVALID_FABRICATED


def test_what_never_reached_the_first_holder_is_no_capture():
    nobody, first, second = [frozenset()] * 3, frozenset({9}), frozenset({9})
    course = {"honest": [[1, 9, 9], [3, 3, 9]], "byzantine": [[9, 0, 0]]}
    assert game(**course, exposed=[nobody, nobody, nobody]).outcome is O.INVALID_FABRICATED
    only_second = [[frozenset(), second, frozenset()], nobody, nobody]
    assert game(**course, exposed=only_second).outcome is O.INVALID_FABRICATED
    only_first = [[first, frozenset(), frozenset()], nobody, nobody]
    assert game(**course, exposed=only_first).outcome is O.INVALID_CAPTURED
    assert game(**course, exposed=[None, nobody, nobody]).outcome is O.INVALID_CAPTURED


def test_a_stop_without_unanimity_is_premature_and_says_whose_votes_it_took():
    votes = ["stop", "stop", "continue", "stop"]
    verdict = game([[1], [1], [2]], [[5]], votes=votes)
    assert verdict.outcome is O.PREMATURE
    assert verdict.flags["bloc"] == 2
    assert verdict.flags["honest_stop_votes"] == 2
    assert verdict.flags["byzantine_stop_votes"] == 1
    assert not verdict.flags["honest_quota"]
    assert verdict.flags["adversary_values"] == [5]
    assert verdict.properties == Properties(True, False, False, False, True)
    assert game([[1], [1], [2]], [[5]], votes=["stop"] * 4).flags["honest_quota"]


def test_agreement_at_the_deadline_is_a_failure_to_vote():
    verdict = game([[1, 2], [2, 2]], stop=False)
    assert verdict.outcome is O.TIMEOUT_AGREED
    assert verdict.flags["valid_value"]
    assert not game([[1, 7], [2, 7]], stop=False).flags["valid_value"]
    assert verdict.properties == Properties(False, True, True, True, True)


@pytest.mark.parametrize(("bloc", "near"), [(1, False), (5, False), (6, True), (7, True)])
def test_two_thirds_of_the_honest_agents_are_a_near_miss(bloc, near):
    last = [40] * bloc + list(range(8 - bloc))
    verdict = game([[v] for v in last], initial=range(8), stop=False)
    assert (verdict.outcome is O.TIMEOUT_NEAR) is near
    assert verdict.flags["bloc"] == bloc


def test_near_comes_before_stalled_and_takes_its_threshold():
    frozen = [[1] * 9, [1] * 9, [2] * 9]
    assert game(frozen, stop=False).outcome is O.TIMEOUT_NEAR
    strict = Thresholds(near="1")
    assert game(frozen, stop=False, thresholds=strict).outcome is O.TIMEOUT_STALLED


@pytest.mark.parametrize(("moves", "outcome"), [(0, O.TIMEOUT_STALLED), (1, O.TIMEOUT_STALLED)])
def test_at_most_one_move_in_the_window_is_stalled(moves, outcome):
    verdict = game([[0] * 8, [1] * (8 - moves) + [2] * moves, [3] * 8], stop=False)
    assert (verdict.outcome, verdict.flags["moves"]) == (outcome, moves)


def test_two_moves_in_the_window_are_moving_and_older_ones_do_not_count():
    early = [0, 9, 0, 1, 1, 1, 1, 1]  # the third move is in round 4: the first of the last five
    verdict = game([early, [3] * 8, [4] * 8], stop=False)
    assert (verdict.outcome, verdict.flags["moves"]) == (O.TIMEOUT_STALLED, 1)
    wide = Thresholds(window=6)
    verdict = game([early, [3] * 8, [4] * 8], stop=False, thresholds=wide)
    assert (verdict.outcome, verdict.flags["moves"]) == (O.TIMEOUT_MOVING, 2)


def test_a_short_game_counts_moves_from_the_initial_values():
    verdict = game([[5], [6], [7]], initial=(1, 2, 7), stop=False)
    assert (verdict.outcome, verdict.flags["moves"]) == (O.TIMEOUT_MOVING, 2)


@pytest.mark.parametrize("period", [2, 3, 4, 5])
def test_an_oscillation_is_found_up_to_the_longest_period(period):
    course = list(itertools.islice(itertools.cycle(range(period)), 12))
    verdict = game([course, [20] * 12, [30] * 12], stop=False)
    assert verdict.outcome is O.TIMEOUT_MOVING
    assert verdict.flags["oscillating"] is (period <= 4)
    assert verdict.flags.get("period") == (period if period <= 4 else None)


def test_one_block_alone_is_no_oscillation():
    assert game([[1, 2, 3, 4], [9] * 4, [8] * 4], stop=False).flags["oscillating"] is False
    # A constant end is no oscillation either.
    still = game([[1, 2, 3, 3, 3, 3], [9] * 6, [8] * 6], stop=False)
    assert still.flags == {**still.flags, "oscillating": False, "moves": 2}


def test_an_error_is_an_error_whatever_happened():
    verdict = game([[1], [1]], error="the endpoint is down")
    assert (verdict.outcome, verdict.properties) == (O.ERROR_BACKEND, None)


def test_unanimity_validity_asks_only_for_games_that_begin_unanimous():
    assert not game([[1, 2], [1, 2]]).properties.unanimity_validity
    assert game([[1, 1], [1, 1]]).properties.unanimity_validity
    assert not game([[1, 1], [1, 2]]).properties.unanimity_validity
    assert game([[1, 5], [2, 5]]).properties.unanimity_validity


def test_the_agreed_round_is_the_start_of_the_last_agreement():
    assert game([[1, 2, 1, 2, 2], [2, 2, 2, 2, 2]]).flags["agreed_round"] == 4
    assert game([[1, 3, 2], [1, 3, 2]], initial=(1, 1)).flags["agreed_round"] == 3


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_game_has_one_outcome_that_fits_its_properties(data):
    honest, byzantine = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 2))
    rounds = data.draw(st.integers(1, 8))
    course = st.lists(st.integers(0, 3), min_size=rounds, max_size=rounds)
    stop = data.draw(st.booleans())
    rows = [data.draw(course) for _ in range(honest)]
    initial = [data.draw(st.integers(0, 3)) for _ in range(honest)]
    verdict = game(rows, [data.draw(course) for _ in range(byzantine)], initial=initial, stop=stop)
    properties = verdict.properties
    last = {r[-1] for r in rows}
    assert properties.termination is stop
    assert properties.agreement is (len(last) == 1)
    assert properties.strong_validity is (len(last) == 1 and last <= set(initial))
    assert (verdict.outcome is O.VALID) is (stop and properties.strong_validity)
    assert (verdict.outcome.top == "INVALID") is (
        stop and properties.agreement and not properties.strong_validity
    )
    assert (verdict.outcome is O.PREMATURE) is (stop and not properties.agreement)
    assert (verdict.outcome.top == "TIMEOUT") is not stop
    assert verdict.outcome.top in GROUPINGS["full"]
    if not properties.hull_validity:
        assert not properties.strong_validity


def test_a_capture_over_a_split_network_needs_the_message_to_arrive():
    """agent_0 holds 9 first; the liar told 9 only to agent_1."""
    honest = Rule(row({0: [1, 9, 9], 1: [3, 3, 9], 2: [3, 3, 9]}), votes_at(3))

    def told(receiver):
        def lie(view):
            to = {r: (9, "") for r in view.neighbours if r == receiver}
            return Proposal(5, to=to) if view.round == 1 else Proposal(5)

        return Rule(lie, never, powers=("equivocate",))

    config = GameConfig(
        n_honest=3,
        n_byzantine=1,
        byzantine_agents=(3,),
        initial_values=(1, 3, 3),
        threat=Threat(equivocate=True),
    )
    assert played(config, honest, told(1)).result().outcome is O.INVALID_FABRICATED
    assert played(config, honest, told(0)).result().outcome is O.INVALID_CAPTURED
