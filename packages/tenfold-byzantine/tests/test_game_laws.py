"""Laws of the engine on random games (spec, 7.2)."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from engine_cases import Rule, finish, low_median, never, played, stochastic
from tenfold.errors import ConfigError
from tenfold_byzantine.cast import Cast
from tenfold_byzantine.contracts import Proposal
from tenfold_byzantine.engine import Game
from tenfold_byzantine.events import EventWriter
from tenfold_byzantine.networks import Links
from tenfold_byzantine.play import play_many
from tenfold_byzantine.rules import GameConfig, Threat

LAWS = settings(max_examples=60, deadline=None)
LOW, HIGH = 100_000, 100_050


def course(result):
    """What happened, without the settings."""
    return (result.held, result.proposed, result.votes, result.outcome, dict(result.flags))


def mode_smallest(view):
    values = view.values() or [view.held]
    return min(set(values), key=lambda v: (-values.count(v), v))


ID_BLIND = [low_median, mode_smallest, lambda view: max(view.values() or [view.held])]


@LAWS
@given(st.data())
def test_permuting_agents_permutes_the_game_and_changes_nothing_else(data):
    n, b = data.draw(st.integers(2, 6)), data.draw(st.integers(0, 1))
    values = data.draw(st.lists(st.integers(0, 50), min_size=n, max_size=n))
    order = data.draw(st.permutations(range(n + b)))
    honest = Rule(data.draw(st.sampled_from(ID_BLIND)))
    lie = data.draw(st.integers(0, 50))
    byzantine = Rule(lambda view: (lie + view.round) % 51)

    def result(courses):
        """`courses`: per agent its initial value, None for the Byzantine one."""
        return played(
            GameConfig(
                n_honest=n,
                n_byzantine=b,
                max_rounds=6,
                initial_values=tuple(v for v in courses if v is not None),
                byzantine_agents=tuple(i for i, v in enumerate(courses) if v is None),
            ),
            honest,
            byzantine,
        ).result()

    first = [*values, *[None] * b]
    one, other = result(first), result([first[i] for i in order])
    for before, after in zip(one.held, other.held, strict=True):
        assert after == tuple(before[i] for i in order)
    for before, after in zip(one.votes, other.votes, strict=True):
        assert after == tuple(before[i] for i in order)
    assert (one.outcome, one.metrics, one.counters) == (
        other.outcome,
        other.metrics,
        other.counters,
    )


def reachable(thing, seen=None):
    """Every object that can be reached from a view, itself included."""
    seen = {} if seen is None else seen
    if id(thing) in seen:
        return seen
    seen[id(thing)] = thing
    if dataclasses.is_dataclass(thing):
        parts = [getattr(thing, f.name) for f in dataclasses.fields(thing)]
    elif isinstance(thing, dict):
        parts = [*thing, *thing.values()]
    elif isinstance(thing, (list, tuple, set, frozenset)):
        parts = list(thing)
    else:
        assert thing is None or isinstance(thing, (int, str, bool)), type(thing)
        parts = []
    for part in parts:
        reachable(part, seen)
    return seen


@LAWS
@given(st.data())
def test_no_view_holds_a_role_the_seed_or_a_value_that_was_not_heard(data):
    seed = data.draw(st.integers(10**12, 10**13))
    topology = data.draw(st.sampled_from(["complete", "ring", "path", "star"]))
    b = data.draw(st.integers(0, 2))
    config = GameConfig(
        n_honest=6,
        n_byzantine=b,
        value_range=(LOW, HIGH),
        max_rounds=3,
        topology=topology,
        links=Links(loss=data.draw(st.sampled_from([0.0, 0.4]))),
        schedule=data.draw(st.sampled_from(["synchronous", "random"])),
    )
    heard: dict[int, set[int]] = {}

    def look(view):
        own = heard.setdefault(view.agent, {LOW, HIGH})
        own |= {view.initial, view.held} - {None}
        own |= {m.value for m in view.inbox}
        assert {m.sender for m in view.inbox} <= {view.agent, *view.neighbours}
        things = list(reachable(view).values())
        texts = [t for t in things if isinstance(t, str)]
        assert [t for t in texts if t in ("honest", "byzantine")] == [view.role]
        assert not any(str(seed) in t for t in texts)
        numbers = {t for t in things if isinstance(t, int)}
        assert seed not in numbers
        assert {v for v in numbers if v >= LOW} <= own
        if view.round == 1 and view.phase == "decide":
            assert {v for v in numbers if v >= LOW} <= {LOW, HIGH, view.initial}

    def decide(view):
        look(view)
        return stochastic(view) if view.values() else (view.held or LOW)

    def vote(view):
        look(view)
        return "continue"

    honest, byzantine = Rule(decide, vote), Rule(decide, vote)
    finish(Game(config, {"honest": honest, "byzantine": byzantine}, seed))


@LAWS
@given(st.integers(0, 2**32), st.integers(0, 2))
def test_under_the_papers_threat_model_all_receivers_get_equal_messages(seed, b):
    inboxes: dict[int, list] = {}
    rule = Rule(stochastic, lambda v: inboxes.setdefault(v.round, []).append(v.inbox) or "continue")
    played(GameConfig(n_honest=5, n_byzantine=b, max_rounds=3, seed=seed), rule, rule)
    for boxes in inboxes.values():
        # Not only equal: one list for all, so that a round costs N messages and not N squared.
        assert all(box is boxes[0] for box in boxes)
        assert [m.sender for m in boxes[0]] == list(range(5 + b))


@LAWS
@given(st.integers(1, 9), st.integers(0, 2**32), st.sampled_from(ID_BLIND))
def test_a_complete_graph_equals_the_widest_ring(n, seed, rule):
    honest = Rule(rule)
    one = played(GameConfig(n_honest=n, max_rounds=5, seed=seed), honest)
    ring = GameConfig(n_honest=n, max_rounds=5, seed=seed, topology=f"ring:k={max(n // 2, 1)}")
    other = played(ring, honest)
    assert course(one.result()) == course(other.result())
    assert one.result().counters == other.result().counters


@LAWS
@given(st.data())
def test_lossless_fifo_without_faults_equals_the_synchronous_game(data):
    options = {
        "n_honest": data.draw(st.integers(2, 6)),
        "n_byzantine": data.draw(st.integers(0, 1)),
        "faults": 0,
        "max_rounds": data.draw(st.integers(1, 5)),
        "topology": data.draw(st.sampled_from(["complete", "ring", "star"])),
        "seed": data.draw(st.integers(0, 2**32)),
    }
    honest = Rule(data.draw(st.sampled_from(ID_BLIND)))
    byzantine = Rule(lambda view: (7 * view.round) % 51, never)
    games = [
        played(GameConfig(**options, schedule=schedule), honest, byzantine).result()
        for schedule in ("synchronous", "fifo", "random", "adversarial")
    ]
    # Who waits for everybody is not hurt by the order either.
    assert all(course(g) == course(games[0]) for g in games)
    # Faster agents may have begun another round when the last votes come in.
    assert all(g.counters["messages"] >= games[0].counters["messages"] for g in games)


def test_fifo_with_silent_liars_equals_the_synchronous_game_with_faults():
    honest, silent = Rule(low_median), Rule(lambda view: None, never)
    for seed in range(20):
        options = {"n_honest": 5, "n_byzantine": 2, "seed": seed, "max_rounds": 4}
        one = played(GameConfig(**options), honest, silent).result()
        other = played(GameConfig(**options, schedule="fifo"), honest, silent).result()
        assert course(one) == course(other)


def test_an_asynchronous_agent_acts_on_all_but_f_messages_of_its_round():
    sizes = []

    def vote(view):
        assert all(m.sent_round == view.round for m in view.inbox)
        sizes.append(len(view.inbox))
        return "continue"

    for schedule, seed in itertools.product(("fifo", "random", "adversarial"), range(10)):
        config = GameConfig(n_honest=5, n_byzantine=2, max_rounds=4, schedule=schedule, seed=seed)
        played(config, Rule(low_median, vote), Rule(stochastic, vote))
    assert min(sizes) == 7 - 2
    assert set(sizes) <= {5, 6, 7}


def test_the_adversarial_schedule_shows_even_agents_low_and_odd_agents_high_values():
    config = GameConfig(
        n_honest=4,
        n_byzantine=1,
        byzantine_agents=(4,),
        initial_values=(10, 20, 30, 40),
        schedule="adversarial",
        faults=2,
        max_rounds=1,
    )
    heard = {}
    honest = Rule(lambda v: v.held, lambda v: heard.setdefault(v.agent, v.values()) and "continue")
    played(config, honest, Rule(lambda view: 0, never))
    assert heard == {0: [10, 20, 0], 1: [20, 40, 0], 2: [10, 30, 0], 3: [30, 40, 0]}


def test_an_asynchronous_game_survives_losing_every_message():
    config = GameConfig(n_honest=3, links=Links(loss=1.0), schedule="random", max_rounds=3)
    alone = played(config, Rule(low_median, never)).result()
    assert alone.rounds == 3
    assert alone.counters["lost"] == alone.counters["messages"] == 3 * 3 * 2


def test_an_asynchronous_game_refuses_what_it_cannot_have():
    for threat in (Threat(rushing=True), Threat(suppress=True)):
        config = GameConfig(n_honest=3, n_byzantine=1, schedule="fifo", threat=threat)
        with pytest.raises(ConfigError, match="but the schedule is fifo"):
            Game(config, {"honest": Rule(low_median), "byzantine": Rule(low_median)})
    with pytest.raises(ConfigError, match="links have a delay or gst, but the schedule is fifo"):
        GameConfig(schedule="fifo", links=Links(delay=1))


def test_an_asynchronous_equivocator_reaches_each_receiver_with_its_version():
    heard = {}
    honest = Rule(lambda v: v.held, lambda v: heard.setdefault(v.agent, v.values()) and "continue")
    liar = Rule(lambda v: Proposal(5, to={0: (7, ""), 1: (None, "")}), never)
    config = GameConfig(
        n_honest=3,
        n_byzantine=1,
        byzantine_agents=(3,),
        initial_values=(1, 2, 3),
        schedule="fifo",
        faults=0,
        max_rounds=1,
        threat=Threat(equivocate=True),
    )
    played(config, honest, liar)
    assert heard == {0: [1, 2, 3, 7], 1: [1, 2, 3], 2: [1, 2, 3, 5]}


MIXED = [
    GameConfig(n_honest=5, n_byzantine=1, max_rounds=6),
    GameConfig(n_honest=4, max_rounds=4, topology="ring", links=Links("uniform:1", 0.1)),
    GameConfig(n_honest=4, n_byzantine=1, max_rounds=4, schedule="random"),
    GameConfig(n_honest=4, n_byzantine=1, max_rounds=4, threat=Threat(rushing=True)),
]


def test_the_width_of_a_wave_changes_no_log():
    def logs(width):
        rule = Rule(stochastic)
        writers = []

        def games():
            for seed in range(30):
                for config in MIXED:
                    writers.append(EventWriter())
                    policies = {"honest": rule, "byzantine": rule}
                    yield Game(config, policies, seed, log=writers[-1])

        results = list(play_many(games(), width=width))
        assert len(results) == 120
        return {writer.lines[0]: writer.lines for writer in writers}, len(rule.calls)

    one, calls_alone = logs(1)
    many, calls_together = logs(64)
    assert one == many
    assert calls_together * 20 < calls_alone


@pytest.mark.filterwarnings("ignore:.*outside the paper's")
@LAWS
@given(st.integers(1, 7), st.integers(0, 3), st.integers(0, 2**32))
def test_a_round_asks_every_agent_twice(n, b, seed):
    rule = Rule(stochastic, never)
    config = GameConfig(n_honest=n, n_byzantine=b, max_rounds=3, seed=seed)
    played(config, rule, rule)
    assert rule.calls == [n + b] * 6


@LAWS
@given(st.integers(1, 12), st.integers(0, 2**32))
def test_low_median_of_honest_agents_is_valid_in_round_two(n, seed):
    result = played(GameConfig(n_honest=n, seed=seed), Rule(low_median)).result()
    distinct = len(set(result.initial)) > 1
    assert result.outcome.value == "VALID"
    assert result.rounds == (2 if distinct else 1)
    assert result.flags["value"] == sorted(result.initial)[(n - 1) // 2]


def memory_after(total, checkpoints):
    """Traced bytes after so many games of one generator, results dropped."""
    cast = Cast(GameConfig(), {"honest": Rule(low_median)})
    cast.seats["honest"][0].calls = _Forgetful()
    games = (Game(cast.config, cast, seed) for seed in range(total))
    sizes = []
    tracemalloc.start()
    try:
        for number, _ in enumerate(play_many(games, width=32), 1):
            if number in checkpoints:
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    return sizes


class _Forgetful(list):
    def append(self, item):
        del item


def test_memory_does_not_grow_with_the_number_of_games():
    first, last = memory_after(500, (150, 500))
    assert last - first < 30_000  # a kept game alone would be some 10 kB


@pytest.mark.slow
def test_ten_thousand_games_have_flat_memory():
    first, last = memory_after(10_000, (1000, 10_000))
    assert last - first < 30_000
