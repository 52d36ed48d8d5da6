"""Every adversary by a game that shows what it does, its powers, and policies by their text."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from policy_cases import messages, play, rules, view
from tenfold.errors import ConfigError
from tenfold_byzantine.contracts import POWERS, Ballot, Policy, Proposal
from tenfold_byzantine.policies import entries, policy

START: list[int | None] = [10, 20, None, 20, 30, None, 40, 30, 20]
"""Seven honest agents and liars 2 and 5; the mode is 20."""
LIARS = (2, 5)


def game(liar: str, honest: str = "mode-min", *, start=None, seed=0, rounds=8, **other):
    start = start or START
    faults = sum(v is None for v in start)
    lies = policy(liar, role="byzantine")
    allowed = frozenset(other.pop("powers", lies.powers))
    assert lies.powers <= allowed
    settings = rules(len(start), faults, powers=allowed, **other)
    lies.check(settings)
    players = [lies if v is None else policy(honest) for v in start]
    return play(settings, players, start, seed=seed, rounds=rounds)


def words(played, agent: int) -> list[int | None]:
    return [row[agent] for row in played.said]


def ballots(played, agent: int) -> list[str]:
    return [row[agent] for row in played.votes]


def test_silent_says_nothing_and_honest_agents_stop_without_it() -> None:
    played = game("silent")
    assert words(played, 2) == [None, None]
    assert ballots(played, 2) == ["abstain", "abstain"]
    assert played.stopped
    assert played.held[-1] == [20, 20, None, 20, 20, None, 20, 20, 20]


def test_fixed_extreme_and_constant_colluders_repeat_themselves() -> None:
    for liar, value in (
        ("fixed:v=7", 7),
        ("extreme", 50),
        ("extreme:side=min", 0),
        ("collude:v=9", 9),
    ):
        played = game(liar)
        assert set(words(played, 2) + words(played, 5)) == {value}
        assert set(ballots(played, 2)) == {"continue"}
    assert set(ballots(game("fixed:v=7,votes=abstain"), 5)) == {"abstain"}


def test_two_colluders_capture_a_divided_majority() -> None:
    start = [10, 20, None, 25, 30, None, 40, 35, 22]
    played = game("collude:v=0", start=start)
    assert played.stopped
    assert {played.held[-1][a] for a in range(9) if start[a] is not None} == {0}


def test_colluders_without_a_value_agree_in_their_notes() -> None:
    played = game("collude", rounds=4, quota=10)
    first, second = words(played, 2), words(played, 5)
    assert len(set(first)) == 1
    assert second == [None, *first[1:]]
    others = {words(game("collude", seed=s, rounds=2, quota=10), 2)[0] for s in range(8)}
    assert len(others) > 1


def test_random_liars_differ_by_round_and_by_receiver() -> None:
    played = game("random", rounds=20, quota=10)
    assert len(set(words(played, 2))) > 5
    assert words(played, 2) != words(played, 5)
    (answer,) = policy("random:equivocate=true", role="byzantine").decide_many(
        [view({0: 1}, game=rules(40), inbox=())]
    )
    assert sorted(answer.to) == list(range(1, 40))
    assert len(set(answer.to.values())) > 10


def test_mimic_is_what_an_honest_agent_with_another_value_would_be() -> None:
    played = game("mimic:rule=mode-min", rounds=3, quota=10)
    made_up = words(played, 2)[0]
    assert made_up is not None
    start = [words(played, a)[0] for a in range(9)]
    honest = play(rules(9, 2, quota=10), [policy("mode-min")] * 9, start, rounds=3)
    assert honest.held == played.held
    assert honest.votes == played.votes


def test_mimic_plays_algorithms_with_memory_too() -> None:
    start: list[int | None] = [4, 9, None, 4, 7]
    played = game("mimic:rule=eig", "eig", start=start)
    assert played.stopped
    assert len(set(played.held[-1])) == 1
    assert ballots(played, 2) == ["continue", "continue", "stop"]


def test_crash_is_honest_until_it_stops() -> None:
    honest = game("mimic", rounds=5, quota=10)
    crashed = game("crash:t=3", rounds=5, quota=10)
    assert words(crashed, 2)[:2] == words(honest, 2)[:2]
    assert words(crashed, 2)[2:] == [None] * 3
    assert ballots(crashed, 2)[2:] == ["abstain"] * 3


def test_never_stop_blocks_a_quota_that_needs_it() -> None:
    start = [20, 20, 20, 20, None, None]
    assert game("mimic:rule=mode-min", start=start, quota=5).stopped
    played = game("never-stop:rule=mode-min", start=start, quota=5)
    assert not played.stopped
    assert set(ballots(played, 4)) == {"continue"}
    assert words(played, 4)[1:] == [20] * 7


def test_oscillate_alternates_between_the_largest_blocs() -> None:
    said = {0: 1, 1: 20, 2: 20, 3: 20, 4: 30, 5: 30, 6: 5}
    liar = policy("oscillate")
    seen = [
        liar.decide_many([view(said, 0, role="byzantine", round_=t)])[0].value for t in (2, 3, 4)
    ]
    assert seen == [20, 30, 20]
    assert liar.decide_many([view({0: 1, 1: 9, 2: 9}, 0, round_=3)])[0].value == 9


def test_anti_mode_strengthens_the_second_bloc_and_can_keep_two_alive() -> None:
    said = {0: 1, 1: 20, 2: 20, 3: 20, 4: 30, 5: 30}
    liar = policy("anti-mode")
    assert liar.decide_many([view(said, 0)])[0].value == 30
    assert liar.decide_many([view({0: 1, 1: 50, 2: 50}, 0)])[0].value == 49
    # Without the liar the voters of a tie go their own way; with it the smaller camp wins ground.
    start: list[int | None] = [20, 20, 20, 30, 30, None, None]
    played = game("anti-mode", "mode-own", start=start, rounds=4, quota=7)
    assert {words(played, a)[1] for a in (5, 6)} == {30}


def test_drift_drags_averages_out_of_the_honest_range() -> None:
    start = [30, 40, None, 40, 30, None, 40, 30, 40]
    played = game("drift:step=5", "mean", start=start, rounds=40, quota=10)
    honest = [row[0] for row in played.held]
    still = game("silent", "mean", start=start, rounds=40, quota=10)
    assert honest[-1] > 40
    assert honest[1:] == sorted(honest[1:])
    assert still.held[-1][0] == still.held[1][0]
    trimmed = game("drift:step=5", "trimmed-mean", start=start, rounds=40, quota=10)
    assert max(row[0] for row in trimmed.held) <= 40


def test_split_vote_keeps_two_camps_apart_where_equal_words_could_not() -> None:
    start: list[int | None] = [10, 10, 10, 40, 40, 40, None, None]
    both = {"equivocate", "rushing"}  # so that it knows the camps in round 1
    played = game("split-vote", "mode-min", start=start, rounds=10, powers=both)
    assert not played.stopped
    assert played.held[-1][:6] == [10, 10, 10, 40, 40, 40]
    assert game("anti-mode", "mode-min", start=start, rounds=10).stopped


def test_copycat_agrees_until_it_defects() -> None:
    played = game("copycat-defect:t=4", quota=10)
    assert words(played, 2)[1:] == [20, 20, 50, 50, 50, 50, 50]
    assert ballots(played, 2)[1:3] == ["stop", "stop"]
    assert ballots(played, 2)[3:] == ["continue"] * 5


def test_early_stop_ends_games_before_agreement() -> None:
    """Seven of eight equal words deceive the honest; the liars' votes fill the quota of seven."""
    start: list[int | None] = [20, 20, 20, 20, 20, 30, None, None]
    settings = {"start": start, "rounds": 5, "quota": 7}
    assert not game("never-stop:rule=(constant:v=20)", "stubborn:p=1", **settings).stopped
    played = game("early-stop", "stubborn:p=1", **settings)
    assert played.stopped
    assert set(ballots(played, 6)) == {"stop"}
    assert len({played.held[-1][a] for a in range(6)}) == 2


def test_keep_alive_with_equivocation_splits_medians() -> None:
    start: list[int | None] = [10, 20, 30, 40, None]
    plain = game("silent", "low-median", start=start)
    assert plain.stopped
    both = {"equivocate", "rushing"}  # so that it knows the initial values in round 1
    liar = "keep-alive:equivocate=true"
    played = game(liar, "low-median", start=start, rounds=10, powers=both)
    assert not played.stopped
    assert all(len(set(row[:4])) > 1 for row in played.held)


def test_keep_alive_chooses_the_smallest_bloc_that_any_value_leaves() -> None:
    said = {0: 10, 1: 10, 2: 10, 3: 40, 4: 40, 5: 20, 6: 0}
    settings = rules(7, 1, powers=frozenset({"rushing"}))
    heard = messages({a: v for a, v in said.items() if a != 6})
    seen = view(said, 6, game=settings, role="byzantine", overheard=heard)
    (answer,) = policy("keep-alive:rule=mode-own").decide_many([seen])

    def bloc(c: int | None) -> int:
        now = {**said, 6: c}
        honest = policy("mode-own").decide_many([view(now, a, game=settings) for a in range(6)])
        values = [p.value for p in honest]
        return max(map(values.count, values))

    assert bloc(answer.value) == min(bloc(c) for c in range(51)) < 6


def test_rushing_liars_react_to_the_round_that_is_under_way() -> None:
    late = game("anti-mode", rounds=2, quota=10)
    early = game("anti-mode", rounds=2, quota=10, powers={"rushing"})
    assert words(early, 2)[0] == 30  # the second bloc of the initial values, in round 1
    assert words(late, 2)[1] == 30 or words(late, 2)[1] != words(early, 2)[1]


def test_censor_passes_nothing_on() -> None:
    liar = policy("censor")
    (answer,) = liar.decide_many([view({0: 1, 1: 20, 2: 20}, 0)])
    assert answer == Proposal(20, withheld=(1, 2))
    assert liar.powers == {"suppress"}


@pytest.mark.parametrize(
    ("text", "powers"),
    [
        ("split-vote", {"equivocate"}),
        ("random", set()),
        ("random:equivocate=true", {"equivocate"}),
        ("keep-alive:equivocate=true", {"equivocate"}),
        ("collude", {"collude"}),
        ("collude:v=3", set()),
        ("censor", {"suppress"}),
        ("mimic", set()),
    ],
)
def test_powers_are_declared(text: str, powers: set[str]) -> None:
    assert policy(text, role="byzantine").powers == powers


def test_no_policy_uses_a_power_that_it_did_not_declare() -> None:
    said = {0: 1, 1: 20, 2: 20, 3: 30}
    for entry in entries():
        if entry.kind == "filter":
            continue
        p = policy(entry.name, role=entry.kind)
        binary = entry.name == "ben-or"
        settings = rules(4, 0, low=0, high=1 if binary else 50)
        heard = dict.fromkeys(said, 1) if binary else said
        role, memory = entry.kind, None
        for t in range(1, 7):
            v = view(heard, 0, game=settings, round_=t, role=role)
            if t == 1:
                v = view(heard, 0, game=settings, round_=1, role=role, inbox=())
            (answer,) = p.decide_many([replace(v, memory=memory)])
            memory = answer.memory
            assert not answer.to or "equivocate" in p.powers, entry.name
            assert not answer.withheld or "suppress" in p.powers, entry.name
            assert isinstance(p.vote_many([v])[0], Ballot)


# --- texts ------------------------------------------------------------------------------------


def test_labels_are_texts_that_name_the_same_policy() -> None:
    for text in (
        "low-median",
        "dlpsw:f=2",
        "trimmed-mean:q=0.5,f=1,rounding=floor",
        "mimic:rule=(trimmed-mean:q=0.5,f=1)",
        "crash:rule=mode-min,t=5",
        "collude:v=25",
        "eig:f=1,rule=(constant:v=3)",
        "surrogate:follow=0.5",
        "wmsr:exact=true,F=2",
    ):
        built = policy(text)
        assert built.label == text
        assert policy(built.label) == built
        assert isinstance(built, Policy)
    for entry in entries():
        if entry.kind != "filter":
            assert policy(entry.name, role=entry.kind).label == entry.name


def test_listing_says_what_each_policy_is_good_for() -> None:
    kinds = {kind: entries(kind) for kind in ("honest", "byzantine", "filter")}
    assert [e for group in kinds.values() for e in group] == entries()
    assert len(kinds["honest"]) == 23
    assert len(kinds["byzantine"]) == 16
    assert all(e.summary and len(e.summary) < 100 for e in entries())
    assert all(e.guarantee for e in kinds["honest"])
    assert {e.name: e.bound for e in kinds["honest"]}["phase-king"].startswith("n > 4f")
    assert all(set(e.powers) <= POWERS for e in entries())
    with pytest.raises(ConfigError, match="kinds are honest, byzantine, filter"):
        entries("evil")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lowmedian", "unknown policy 'lowmedian'; did you mean 'low-median'"),
        ("zzz", "unknown policy 'zzz'\n  hint: known: leader, mode-min"),
        ("dlpsw:g=1", "unknown parameter 'g'; it has q, exact, unsafe, f"),
        ("stubborn:pp=1", "unknown parameter 'pp'; did you mean 'p'"),
        ("dlpsw:f=two", "f is 'two'; it must be a whole number"),
        ("dlpsw:f=-1", "f is -1; it must be at least 0"),
        ("stubborn:p=1.5", "p is 1.5; it must be at most 1"),
        ("dlpsw:unsafe=yes", "unsafe is 'yes'; it must be true or false"),
        ("mean:rounding=up", "rounding is 'up'; it must be one of half-up, floor"),
        ("constant:7", "'7' is no parameter; write name:key=value"),
        ("dlpsw:f=1,f=2", "f is given twice"),
        ("mimic:rule=(mean", "parentheses do not match"),
        ("mimic:rule=mode-mim", "unknown honest policy 'mode-mim'; did you mean 'mode-min'"),
        ("eig:rule=voter", "rule cannot be 'voter'; it must be one of leader, mode-min"),
        ("surrogate:follow=0.9,stay=0.9", "follow + average + stay is 1.9; it must be at most 1"),
        ("llm", "'llm' needs a model"),
        ("os.path:join", "would import code"),
    ],
)
def test_texts_that_name_nothing_say_what_would(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        policy(text)
    assert message in str(error.value)


def test_roles_are_kept_apart() -> None:
    assert policy("random").role == "honest"
    assert policy("random", role="byzantine").role == "byzantine"
    with pytest.raises(ConfigError, match="'split-vote' is no honest policy"):
        policy("split-vote", role="honest")
    with pytest.raises(ConfigError, match="mimic:rule=mean plays it"):
        policy("mean", role="byzantine")


def test_own_policies_are_named_from_python_only(monkeypatch, tmp_path) -> None:
    (tmp_path / "my_policies.py").write_text(
        "from dataclasses import dataclass\n"
        "from tenfold_byzantine.policies.base import VOTES, Scripted, param, says\n"
        "@dataclass(frozen=True)\n"
        "class Seven(Scripted):\n"
        "    name = 'seven'\n"
        "    v: int = param(7, 'value', minimum=0)\n"
        "    def decide(self, view): return says(self.v)\n"
        "    def vote(self, view): return VOTES['stop']\n"
        "class Nothing: pass\n"
    )
    (tmp_path / "policies_of").mkdir()
    (tmp_path / "policies_of" / "mine.py").write_text("from my_policies import *\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seven = policy("policies_of.mine:Seven", imports=True)
    assert seven.decide_many([view({0: 1})])[0].value == 7
    assert policy("policies_of.mine:Seven:v=8", imports=True).decide_many([view({0: 1})]) == [
        Proposal(8)
    ]
    with pytest.raises(ConfigError, match="v is -1; it must be at least 0"):
        policy("policies_of.mine:Seven:v=-1", imports=True)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        policy("policies_of.mine:Eight", imports=True)
    with pytest.raises(ConfigError, match="lacks what contracts"):
        policy("policies_of.mine:Nothing", imports=True)


def test_surrogate_moves_with_the_stated_frequencies() -> None:
    p = policy("surrogate:follow=0.5,average=0.2,stay=0.2,stop=0.7,near_stop=0.3,near=0.7")
    said = {0: 10, 1: 20, 2: 20, 3: 46}  # mode 20, mean 24, own 10; 46 only by copying
    n = 4000
    moves = [a.value for a in p.decide_many([view(said, key=f"{i}") for i in range(n)])]
    # Copying (0.1) hits 10, 20, 20, 46 with 1/4 each. Four standard errors, fixed seeds.
    for value, share in ((20, 0.55), (24, 0.2), (10, 0.225), (46, 0.025)):
        assert abs(moves.count(value) / n - share) < 4 * (share * (1 - share) / n) ** 0.5

    def stops(said: dict) -> float:
        views = [view(said, key=f"{i}", phase="vote") for i in range(n)]
        return sum(b.vote == "stop" for b in p.vote_many(views)) / n

    assert abs(stops(dict.fromkeys(range(4), 5)) - 0.7) < 0.03
    assert abs(stops({0: 5, 1: 5, 2: 5, 3: 6}) - 0.3) < 0.03
    assert stops({0: 5, 1: 5, 2: 7, 3: 6}) == 0


def test_the_guide_names_every_policy_and_filter() -> None:
    page = Path(__file__).parents[3] / "docs" / "howto" / "consensus-policies.md"
    text = page.read_text(encoding="utf-8")
    for entry in entries():
        assert f"`{entry.name}`" in text or f'"{entry.name}' in text, entry.name
