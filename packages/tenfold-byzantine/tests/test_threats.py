"""Silence, equivocation, rushing, collusion and context, by small games (spec, 2.3 to 2.8)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from engine_cases import Rule, finish, never, played, row
from tenfold.errors import ConfigError
from tenfold_byzantine.contracts import Proposal
from tenfold_byzantine.engine import Game
from tenfold_byzantine.rules import Context, GameConfig, Group, Threat


def watched(config, honest, byzantine=None):
    """The views of phase vote by `(agent, round)`, and of phase decide likewise."""
    votes, decides = {}, {}

    def wrap(decide):
        def inner(view):
            decides[view.agent, view.round] = view
            return decide(view)

        return Rule(inner, lambda v: votes.setdefault((v.agent, v.round), v) and "continue")

    game = played(config, wrap(honest), byzantine and wrap(byzantine))
    return votes, decides, game.result()


COURSE = {0: [1, None, 3], 1: [4, 5, 6]}


def test_a_silent_agent_is_absent_and_keeps_its_value():
    config = GameConfig(n_honest=2, max_rounds=3)
    votes, decides, result = watched(config, row(COURSE))
    assert votes[1, 2].values() == [5]
    assert [m.sender for m in votes[1, 2].inbox] == [1]
    assert [m.sender for m in decides[0, 3].history[-1].messages] == [1]
    assert votes[0, 2].held == 1
    assert result.held[1] == (1, 5)
    assert result.proposed[1] == (None, 5)
    assert result.counters["messages"] == 5


def test_repeating_says_again_what_was_said_before():
    config = GameConfig(n_honest=2, max_rounds=3, abstain="repeat")
    votes, _, result = watched(config, row(COURSE))
    assert votes[1, 2].values() == [1, 5]
    assert votes[1, 2].inbox[0].sent_round == 2
    assert result.proposed[1] == (1, 5)


def test_repeating_before_the_first_word_says_what_an_honest_agent_holds():
    config = GameConfig(
        n_honest=3,
        n_byzantine=1,
        byzantine_agents=(3,),
        initial_values=(7, 8, 9),
        max_rounds=1,
        abstain="repeat",
    )
    votes, _, result = watched(config, lambda v: None, lambda v: None)
    assert votes[0, 1].values() == [7, 8, 9]
    assert result.proposed == ((7, 8, 9, None),)
    assert result.held == ((7, 8, 9, None),)


def test_a_text_without_a_value_is_silence_and_a_payload_is_not():
    config = GameConfig(n_honest=2, max_rounds=1)
    votes, _, _ = watched(config, lambda v: Proposal(None, text="I abstain"))
    assert votes[0, 1].inbox == ()
    votes, _, _ = watched(config, lambda v: Proposal(None, payload=[v.agent]))
    assert [(m.value, m.payload) for m in votes[0, 1].inbox] == [(None, [0]), (None, [1])]
    assert votes[0, 1].values() == []


def test_held_may_differ_from_what_is_said():
    config = GameConfig(n_honest=2, max_rounds=1)
    votes, _, result = watched(config, lambda v: Proposal(3, held=4))
    assert votes[0, 1].values() == [3, 3]
    assert result.held == ((4, 4),)
    assert result.proposed == ((3, 3),)


def liar(**threat):
    return GameConfig(
        n_honest=3,
        n_byzantine=1,
        byzantine_agents=(1,),
        initial_values=(10, 20, 30),
        max_rounds=3,
        threat=Threat(**threat),
    )


def test_an_equivocator_tells_each_receiver_something_else():
    def lie(view):
        if view.round == 2:
            return Proposal(5)
        return Proposal(5, text="to all", to={2: (7, "to you"), 3: (None, "")})

    votes, decides, result = watched(liar(equivocate=True), lambda v: v.held, lie)
    assert votes[0, 1].values() == [10, 5, 20, 30]
    assert votes[1, 1].values() == [10, 5, 20, 30]
    assert votes[2, 1].values() == [10, 7, 20, 30]
    assert votes[2, 1].inbox[1].text == "to you"
    assert votes[3, 1].values() == [10, 20, 30]
    assert [v.values() for v in (votes[0, 2], votes[3, 2])] == [[10, 5, 20, 30]] * 2
    # History is each receiver's own.
    assert [m.value for m in decides[2, 3].history[0].messages] == [10, 7, 20, 30]
    assert [m.value for m in decides[3, 3].history[0].messages] == [10, 20, 30]
    assert [m.value for m in decides[3, 3].history[1].messages] == [10, 5, 20, 30]
    assert result.proposed[0] == (10, 5, 20, 30)


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ({1: (3, "")}, "addressed agent 1"),
        ({4: (3, "")}, "addressed agent 4"),
        ({0: (99, "")}, "told agent 0 99"),
    ],
)
def test_an_equivocator_cannot_address_itself_or_nobody_or_break_the_range(to, message):
    with pytest.raises(ConfigError, match=message):
        watched(liar(equivocate=True), lambda v: v.held, lambda v: Proposal(3, to=to))


def test_a_rushing_agent_speaks_after_the_honest_ones():
    asked = []

    def honest(view):
        asked.append("honest")
        assert view.overheard == ()
        return view.held

    def rush(view):
        asked.append("byzantine")
        assert view.inbox == () or view.inbox[0].sent_round == view.round - 1
        return max(m.value for m in view.overheard)

    _, _, result = watched(liar(rushing=True), honest, rush)
    assert result.proposed[0] == (10, 30, 20, 30)
    assert asked[:4] == ["honest"] * 3 + ["byzantine"]


def test_without_the_power_nobody_overhears_and_allies_are_unknown():
    _, decides, _ = watched(liar(), lambda v: v.held, lambda v: 3)
    assert all(v.overheard == v.allies == v.ally_notes == () for v in decides.values())


def test_a_rushing_agent_overhears_its_neighbours_only():
    heard = []
    config = GameConfig(
        n_honest=4,
        n_byzantine=1,
        byzantine_agents=(4,),
        initial_values=(1, 2, 3, 4),
        topology="path",
        threat=Threat(rushing=True),
        max_rounds=1,
    )
    watched(config, lambda v: v.held, lambda v: heard.append(v.overheard) or 3)
    assert [m.value for m in heard[0]] == [4]


def test_colluding_agents_know_each_other_and_share_notes():
    config = GameConfig(
        n_honest=4,
        n_byzantine=2,
        byzantine_agents=(1, 5),
        max_rounds=2,
        threat=Threat(collude=True),
    )
    votes, decides, _ = watched(
        config,
        lambda v: Proposal(1, note="mine"),
        lambda v: Proposal(2, note=f"plan of {v.agent}"),
    )
    assert decides[1, 1].allies == (5,)
    assert decides[1, 1].ally_notes == ()
    assert decides[1, 2].ally_notes == ((5, 1, "plan of 5"),)
    assert votes[5, 1].ally_notes == ((1, 1, "plan of 1"),)
    assert decides[0, 2].allies == decides[0, 2].ally_notes == ()
    assert decides[0, 2].notes == ((1, "mine"),)


def test_histories_and_notes_are_as_long_as_the_context_says():
    context = Context(stored_rounds=2, notes=1, message_chars=4)
    config = GameConfig(n_honest=2, max_rounds=6, honest=(Group(2, context=context),))
    votes, decides, _ = watched(
        config, lambda v: Proposal(v.round, text="abcdefgh", note=f"n{v.round}")
    )
    assert [line.round for line in decides[0, 6].history] == [4, 5]
    assert [line.round for line in votes[0, 6].history] == [4, 5]
    assert decides[0, 6].notes == ((5, "n5"),)
    assert votes[0, 6].notes == ((6, "n6"),)
    assert {m.text for m in votes[0, 6].inbox} == {"abcd"}


def test_the_quirk_shows_voters_the_current_round_in_their_history():
    context = Context(stored_rounds=2, history_includes_current=True)
    config = GameConfig(n_honest=2, max_rounds=4, honest=(Group(2, context=context),))
    votes, decides, _ = watched(config, lambda v: v.round)
    assert [line.round for line in votes[0, 1].history] == [1]
    assert [line.round for line in votes[0, 4].history] == [3, 4]
    assert [line.round for line in decides[0, 4].history] == [2, 3]
    assert votes[0, 4].history[-1].messages == votes[0, 4].inbox


def test_no_stored_rounds_and_no_notes_are_no_memory():
    context = Context(stored_rounds=0, notes=0)
    config = GameConfig(n_honest=2, max_rounds=3, honest=(Group(2, context=context),))
    votes, decides, _ = watched(config, lambda v: Proposal(1, note="n"))
    assert all(v.history == v.notes == () for v in (*votes.values(), *decides.values()))


def test_groups_of_one_side_keep_their_own_contexts():
    groups = (Group(1, context=Context(stored_rounds=1)), Group(2, context=Context(notes=0)))
    rule = Rule(lambda v: Proposal(1, note="n"), never)
    seen = []
    short = Rule(lambda v: seen.append(v) or Proposal(1, note="n"), never)
    config = GameConfig(n_honest=3, max_rounds=4, honest=groups)
    finish(Game(config, {"honest": [(1, short), (2, rule)]}, 11))
    assert [len(v.history) for v in seen] == [0, 1, 1, 1]
    assert [len(v.notes) for v in seen] == [0, 1, 2, 3]
