"""The game's order of events, by hand-simulated games (spec, 2.2 to 2.5)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from engine_cases import Rule, low_median, never, played, row, stop_at_unanimity, votes_at
from tenfold.errors import ConfigError
from tenfold_byzantine.contracts import Ballot, Proposal
from tenfold_byzantine.engine import Game
from tenfold_byzantine.play import play, play_many
from tenfold_byzantine.result import Outcome
from tenfold_byzantine.rules import GameConfig, Threat


def test_low_median_agrees_in_round_two_by_hand():
    config = GameConfig(n_honest=4, initial_values=(40, 10, 30, 20))
    result = played(config, Rule(low_median)).result()
    assert result.held == ((40, 10, 30, 20), (20, 20, 20, 20))
    assert result.votes == (("continue",) * 4, ("stop",) * 4)
    assert (result.outcome, result.stopped, result.rounds) == (Outcome.VALID, True, 2)
    assert result.counters["messages"] == 2 * 4 * 3


def test_the_deadline_ends_a_game_that_nobody_stops():
    config = GameConfig(n_honest=3, max_rounds=4, initial_values=(1, 1, 1))
    result = played(config, Rule(low_median, never)).result()
    assert (result.rounds, result.stopped) == (4, False)
    assert result.outcome is Outcome.TIMEOUT_AGREED


def test_byzantine_votes_count_for_the_quota_and_abstentions_do_not_stop():
    config = GameConfig(n_honest=2, n_byzantine=1, byzantine_agents=(0,), max_rounds=1, quota="1")
    for vote, stopped in (("stop", True), ("abstain", False), ("continue", False)):
        honest = Rule(lambda view: view.initial, votes_at(1))
        byzantine = Rule(lambda view: 0, lambda view, vote=vote: vote)
        assert played(config, honest, byzantine).result().stopped is stopped
    config = GameConfig(n_honest=2, n_byzantine=1, byzantine_agents=(0,), max_rounds=1)
    assert played(config, honest, Rule(lambda view: 0, never)).result().stopped


@pytest.mark.parametrize("stops", range(9))
def test_exactly_the_quota_stops(stops):
    config = GameConfig(n_honest=8, max_rounds=1)
    vote = Rule(low_median, lambda view: "stop" if view.agent < stops else "continue")
    assert played(config, vote).result().stopped is (stops >= 6)


def test_a_view_before_anything_was_said_knows_only_itself():
    seen = []
    rule = Rule(lambda view: seen.append(view) or 7)
    played(GameConfig(n_honest=3, max_rounds=1, initial_values=(1, 2, 3)), rule)
    for agent, view in enumerate(seen):
        assert (view.agent, view.initial, view.held, view.round) == (agent, agent + 1, agent + 1, 1)
        assert (view.inbox, view.history, view.notes, view.memory) == ((), (), (), None)
        assert view.neighbours == tuple(j for j in range(3) if j != agent)


def test_voters_see_this_rounds_values_and_held_ones_follow_proposals():
    views = []
    rule = Rule(row({0: [5, 6], 1: [7, 8]}), lambda view: views.append(view) or "continue")
    played(GameConfig(n_honest=2, max_rounds=2), rule)
    assert [(v.round, v.held, v.values()) for v in views] == [
        (1, 5, [5, 7]),
        (1, 7, [5, 7]),
        (2, 6, [6, 8]),
        (2, 8, [6, 8]),
    ]
    assert [len(v.history) for v in views] == [0, 0, 1, 1]
    assert [m.value for m in views[2].history[0].messages] == [5, 7]


def test_roles_groups_and_values_are_drawn_from_the_seed():
    policies = {
        "honest": [(2, Rule(low_median)), (4, Rule(low_median))],
        "byzantine": Rule(low_median),
    }
    config = GameConfig(n_honest=6, n_byzantine=2)
    games = [Game(config, policies, seed) for seed in range(300)]
    again = [Game(config, policies, seed) for seed in range(300)]
    assert [(g.roles, g.initial) for g in games] == [(g.roles, g.initial) for g in again]
    byzantine = [sum(g.roles[a] == "byzantine" for g in games) for a in range(8)]
    first = [sum(g.policies[a] is policies["honest"][0][1] for g in games) for a in range(8)]
    # Binomial(300, 1/4): mean 75, deviation 7.5; four deviations on either side.
    assert all(45 <= n <= 105 for n in byzantine)
    assert all(45 <= n <= 105 for n in first)
    assert {x for g in games for x in g.initial if x is not None} == set(range(51))


def test_games_of_one_seed_share_values_whatever_the_number_of_byzantine_agents():
    values = []
    for count in range(4):
        rule = Rule(low_median)
        config = GameConfig(n_honest=8, n_byzantine=count)
        game = Game(config, {"honest": rule, "byzantine": rule}, 5)
        values.append([x for x in game.initial if x is not None])
    assert all(v == values[0] for v in values)


def test_one_call_per_policy_and_phase_for_all_games_of_a_wave():
    rule = Rule(low_median)
    config = GameConfig(n_honest=4)
    games = [Game(config, {"honest": rule}, seed) for seed in range(10)]
    assert len(list(play_many(games, width=10))) == 10
    assert rule.calls[:4] == [40, 40, 40, 40]


def test_a_policy_of_both_sides_is_asked_once():
    rule = Rule(low_median)
    config = GameConfig(n_honest=3, n_byzantine=1, max_rounds=1)
    play(config, rule, rule)
    assert rule.calls == [4, 4]


def test_notes_and_memory_come_back_to_their_agent_only():
    seen = []

    def decide(view):
        seen.append((view.agent, view.round, view.memory, view.notes))
        return Proposal(1, note=f"note {view.agent} {view.round}", memory={"count": view.round})

    config = GameConfig(n_honest=2, max_rounds=8)
    played(config, Rule(decide, lambda view: Ballot("continue", memory=[view.round, "voted"])))
    agent, _, memory, notes = seen[-1]
    assert agent == 1
    assert memory == [7, "voted"]
    assert notes == tuple((r, f"note 1 {r}") for r in range(3, 8))


def test_answers_that_were_not_asked_for_are_refused():
    game = Game(GameConfig(n_honest=2), {"honest": Rule(low_median)})
    with pytest.raises(ConfigError, match="1 policies were asked, 0 answered"):
        game.submit([])
    with pytest.raises(ConfigError, match="asked 2 questions and gave 1"):
        game.submit([[Proposal(1)]])
    with pytest.raises(ConfigError, match="phase decide needs a Proposal"):
        game.submit([[Ballot("stop"), Ballot("stop")]])
    with pytest.raises(ConfigError, match="gave value 51"):
        game.submit([[Proposal(51), Proposal(1)]])
    with pytest.raises(ConfigError, match=r"gave value 1\.5"):
        game.submit([[Proposal(1.5), Proposal(1)]])
    with pytest.raises(ConfigError, match="cannot be recorded"):
        game.submit([[Proposal(1, memory=object()), Proposal(1)]])
    with pytest.raises(ConfigError, match="not finished"):
        game.result()


def test_honest_agents_do_not_abstain_from_voting():
    game = Game(GameConfig(n_honest=1), {"honest": Rule(low_median)})
    game.submit([[Proposal(1)]])
    with pytest.raises(ConfigError, match="it may vote stop or continue"):
        game.submit([[Ballot("abstain")]])


def test_powers_are_checked_before_the_game():
    config = GameConfig(n_honest=3, n_byzantine=1)
    liar = Rule(lambda view: 1, label="split-vote", powers=("equivocate",))
    with pytest.raises(ConfigError, match="split-vote needs equivocate, which the threat model"):
        play(config, Rule(low_median), liar)
    with pytest.raises(ConfigError, match="honest agents have no such power"):
        play(config, liar, Rule(low_median))
    allowed = GameConfig(n_honest=3, n_byzantine=1, threat=Threat(equivocate=True), max_rounds=1)
    assert play(allowed, Rule(low_median), liar).rounds == 1


def test_undeclared_powers_are_refused_when_used():
    config = GameConfig(n_honest=3, n_byzantine=1)
    for proposal, power in (
        (Proposal(1, to={0: (2, "")}), "equivocate"),
        (Proposal(1, withheld=(0,)), "suppress"),
    ):
        with pytest.raises(ConfigError, match=f"used the power {power}"):
            play(config, Rule(low_median), Rule(lambda view, p=proposal: p))


def test_a_side_without_a_policy_is_refused():
    with pytest.raises(ConfigError, match="no policy plays them"):
        Game(GameConfig(n_honest=3, n_byzantine=1), {"honest": Rule(low_median)})
    with pytest.raises(ConfigError, match="have 2 agents, but n_honest is 3"):
        Game(GameConfig(n_honest=3), {"honest": [(2, Rule(low_median))]})
    with pytest.raises(ConfigError, match="no model was given"):
        play(GameConfig(n_honest=3))


def test_a_failing_game_does_not_stop_others():
    def fragile(view):
        if view.initial == 13 and view.round == 1 and view.agent == 0:
            raise OSError("the endpoint is down")
        return low_median(view)

    config = GameConfig(n_honest=4)
    rule = Rule(fragile, stop_at_unanimity)
    games = [Game(config, {"honest": rule}, seed) for seed in range(200)]
    bad = {g.game_id for g in games if g.initial[0] == 13}
    assert 0 < len(bad) < 20
    results = list(play_many(iter(games), width=16))
    assert len(results) == 200
    failed = {r.game_id for r in results if r.outcome is Outcome.ERROR_BACKEND}
    assert failed == bad
    assert all("the endpoint is down" in r.error for r in results if r.game_id in bad)
    with pytest.raises(OSError, match="the endpoint is down"):
        list(play_many([Game(config, {"honest": rule}, g.seed) for g in games], raise_errors=True))


def test_a_game_files_policies_play_by_their_names():
    config = GameConfig.from_table(
        {
            "game": {"n_honest": 6, "n_byzantine": 2, "max_rounds": 4, "seed": 3},
            "honest": {
                "use": "mixed",
                "group": [{"count": 4, "use": "low-median"}, {"count": 2, "use": "mode-minid"}],
            },
            "byzantine": {"use": "collude:v=25"},
        }
    )
    result = play(config)
    assert {
        row[b] for row in result.proposed for b, r in enumerate(result.roles) if r != "honest"
    } == {25}
    by_name = play(GameConfig(n_honest=6, n_byzantine=2, seed=3), "low-median", "collude:v=25")
    assert by_name.outcome is Outcome.VALID or by_name.flags["value"] == 25
    with pytest.raises(ConfigError, match="low-medain"):
        play(GameConfig(n_honest=3), "low-medain")
