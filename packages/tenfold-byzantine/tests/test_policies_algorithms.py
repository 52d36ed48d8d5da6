"""Algorithms against exhaustive checks, their definitions, and games with liars."""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path

import networkx as nx
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from policy_cases import Played, messages, play, rules, view
from tenfold.errors import ConfigError
from tenfold_byzantine.contracts import Ballot, Message, Proposal, RoundLine
from tenfold_byzantine.policies import exhaustive, policy
from tenfold_byzantine.policies.ben_or import propose, settle
from tenfold_byzantine.policies.eig import leaves, next_level, paths, relay, resolve
from tenfold_byzantine.policies.phase_king import keeps, majority

LIES_FREELY = frozenset({"equivocate"})


class Liar:
    """Says and relays something else to everybody, or nothing, as the draws have it."""

    label, powers = "liar", LIES_FREELY

    def __init__(self, low: int = 0, high: int = 50) -> None:
        self.low, self.high = low, high

    def check(self, rules) -> None: ...

    def decide_many(self, views):
        answers = []
        for v in views:
            draws = v.draws("liar")
            some = [self.low, self.high, draws.randint(self.low, self.high), None]
            to = {n: (draws.choice(some), "") for n in v.neighbours}
            width = draws.choice([0, 1, 3, len(v.neighbours)])
            payload = draws.choice([None, "x", [draws.choice(some) for _ in range(width)]])
            answers.append(Proposal(draws.choice(some), to=to, payload=payload))
        return answers

    def vote_many(self, views):
        return [Ballot(v.draws("vote").choice(["stop", "continue"])) for v in views]


# --- model checks -----------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "runs", "violations"), [(4, 32, 0), (3, 12, 2)])
def test_oral_messages_for_every_behaviour(n, runs, violations) -> None:
    assert exhaustive.oral_messages(n) == exhaustive.Check(runs, violations)


@pytest.mark.parametrize(("n", "runs", "violations"), [(5, 143_360, 0), (4, 9_216, 2_552)])
def test_phase_king_for_every_behaviour(n, runs, violations) -> None:
    assert exhaustive.phase_king(n) == exhaustive.Check(runs, violations)


# --- Phase King -------------------------------------------------------------------------------


def test_majority_is_strict_and_counts() -> None:
    assert majority([3, 3, 3, 1, 2], 5, 0) == (3, 3)
    assert majority([3, 3, 1, 1], 4, 0) == (0, 0)
    assert majority([0, 0, 1, 1], 4, 0) == (0, 2)
    assert keeps(4, 5, 1)
    assert not keeps(3, 5, 1)  # 3 > 5/2 + 1 fails


def last(played: Played, start: list[int | None]) -> list[int | None]:
    return [v for v, x in zip(played.held[-1], start, strict=True) if x is not None]


@pytest.mark.parametrize(("n", "f"), [(5, 1), (6, 1), (9, 2)])
def test_phase_king_agrees_among_liars_in_its_round(n: int, f: int) -> None:
    draws = random.Random(n)
    game = rules(n, f, quota=n - f, powers=LIES_FREELY)
    p = policy("phase-king")
    p.check(game)
    for seed in range(40):
        liars = draws.sample(range(n), f)
        common = draws.randint(0, 50) if seed % 3 == 0 else None
        start = [
            None if a in liars else draws.randint(0, 50) if common is None else common
            for a in range(n)
        ]
        played = play(game, [Liar() if v is None else p for v in start], start, seed=seed)
        assert len(set(last(played, start))) == 1
        assert played.stopped
        assert len(played.held) == 2 * (f + 1) + 1
        votes = list(zip(*played.votes, strict=True))
        for a in range(n):
            if start[a] is not None:
                assert votes[a] == ("continue",) * (2 * (f + 1)) + ("stop",)
        if common is not None:
            assert last(played, start)[0] == common


def test_phase_king_below_its_bound_can_fail() -> None:
    """n = 4, f = 1: random liars find what the exhaustive check counts."""
    game = rules(4, 1, low=0, high=1, quota=3, powers=LIES_FREELY)
    p = policy("phase-king", unsafe=True)
    p.check(game)
    draws, failed = random.Random(4), 0
    for seed in range(200):
        liar = draws.randrange(4)
        start = [None if a == liar else draws.randrange(2) for a in range(4)]
        players = [Liar(0, 1) if v is None else p for v in start]
        failed += len(set(last(play(game, players, start, seed=seed, rounds=5), start))) > 1
    assert failed > 0


# --- EIG --------------------------------------------------------------------------------------


def by_definition(n: int, f: int, inputs: list[int], liars: set[int], lie, agent: int) -> list[int]:
    """OM(f) by its recursion: what `agent` resolves for each commander."""

    def heard(path: tuple[int, ...], receiver: int) -> int:
        """What `receiver` was told at the end of a path."""
        *before, sender = path
        if receiver == sender:
            return heard(tuple(before), receiver) if before else inputs[sender]
        if sender in liars:
            return lie(path, receiver)
        return heard(tuple(before), sender) if before else inputs[sender]

    def value(path: tuple[int, ...]) -> int:
        if len(path) == f + 1:
            return heard(path, agent)
        below = [value((*path, j)) for j in range(n) if j not in path]
        winner = [v for v in set(below) if 2 * below.count(v) > len(below)]
        return winner[0] if winner else 0

    return [value((c,)) for c in range(n)]


@pytest.mark.parametrize(("n", "f"), [(4, 1), (5, 1), (6, 1), (7, 2)])
def test_eig_equals_the_recursion_under_any_lies(n: int, f: int) -> None:
    game = rules(n, f, low=0, high=2)
    for trial in range(6):
        draws = random.Random(100 * n + trial)
        liars = set(draws.sample(range(n), f))
        inputs = [draws.randint(0, 2) for _ in range(n)]
        told: dict = {}

        def lie(path, receiver, told=told, draws=draws) -> int:
            return told.setdefault((path, receiver), draws.randint(0, 2))

        levels = {
            a: [inputs[c] if c == a or c not in liars else lie((c,), a) for c in range(n)]
            for a in range(n)
        }
        for length in range(1, f + 1):
            sent = {}
            for s, r in itertools.permutations(range(n), 2):
                own = relay(levels[s], n, length, s)
                if s in liars:
                    own = [lie((*path, s), r) for path in paths(n, length) if s not in path]
                sent.setdefault(r, {})[s] = own
            levels = {a: next_level(levels[a], sent[a], n, length, game, a) for a in range(n)}
        honest = [a for a in range(n) if a not in liars]
        vectors = {a: resolve(levels[a], n, f + 1, 0) for a in honest}
        for a in honest:
            assert vectors[a] == by_definition(n, f, inputs, liars, lie, a)
            assert vectors[a] == vectors[honest[0]]
            assert all(vectors[a][c] == inputs[c] for c in honest)


@pytest.mark.parametrize(("n", "f"), [(4, 1), (7, 2)])
@pytest.mark.parametrize("rule", ["low-median", "mode-minid", "(trimmed-mean)"])
def test_eig_game_agrees_in_round_f_plus_two(n: int, f: int, rule: str) -> None:
    game = rules(n, f, quota=n - f, powers=LIES_FREELY)
    p = policy(f"eig:rule={rule}")
    p.check(game)
    draws = random.Random(n)
    for seed in range(8):
        liars = draws.sample(range(n), f)
        start = [None if a in liars else draws.randint(10, 40) for a in range(n)]
        played = play(game, [Liar() if v is None else p for v in start], start, seed=seed)
        assert len(set(last(played, start))) == 1
        assert len(played.held) == f + 2
        assert played.stopped
        if rule != "mode-minid":  # n > 2f: medians and trimmed means stay in the honest range
            honest = [v for v in start if v is not None]
            assert min(honest) <= last(played, start)[0] <= max(honest)


def test_eig_without_liars_is_the_rule_on_all_values() -> None:
    start = [40, 10, 30, 20, 50]
    played = play(rules(5), [policy("eig:f=1")] * 5, start)
    assert set(played.held[-1]) == {30}


def test_eig_refuses_trees_that_do_not_fit() -> None:
    assert leaves(12, 4) == 12 * 11 * 10 * 9 * 8
    with pytest.raises(ConfigError, match=r"need a tree of 19,535,040 leaves; at most 1,000,000"):
        policy("eig").check(rules(19, 5))
    policy("eig").check(rules(13, 4))


# --- Ben-Or -----------------------------------------------------------------------------------


def test_ben_or_thresholds() -> None:
    assert propose([1, 1, 1, 1, 0], 6, 1) == 1  # 4 > 7/2
    assert propose([1, 1, 1, 0, 0], 6, 1) is None
    assert settle([1, 1, 1, 1, None], 6, 1) == (1, True)
    assert settle([1, 1, None, None, None], 6, 1) == (1, False)
    assert settle([1, None, None, None, 0], 6, 1) == (None, False)


@pytest.mark.parametrize(("n", "f"), [(6, 1), (11, 2)])
def test_ben_or_agrees_and_ends_among_liars(n: int, f: int) -> None:
    game = rules(n, f, low=0, high=1, quota=n - f, max_rounds=400, powers=LIES_FREELY)
    p = policy("ben-or")
    p.check(game)
    draws = random.Random(n)
    for seed in range(25):
        liars = draws.sample(range(n), f)
        same = seed % 5 == 0
        start = [None if a in liars else 1 if same else draws.randrange(2) for a in range(n)]
        players = [Liar(0, 1) if v is None else p for v in start]
        played = play(game, players, start, seed=seed)
        assert played.stopped
        if same:
            assert set(last(played, start)) == {1}
            assert len(played.held) == 3  # unanimous reports, unanimous proposals, decided
        deciders = {
            played.held[-1][a] for a in range(n) if start[a] is not None and played.memory[a]
        }
        assert len(deciders) == 1


def asynchronous(n: int, f: int, start: list[int | None], seed: int) -> dict:
    """Ben-Or where messages arrive in any order and agents act on the first n - f of a round."""
    draws = random.Random(seed)
    game = rules(n, f, low=0, high=1, complete=False)
    p, liar = policy("ben-or"), Liar(0, 1)
    held, memory = dict(enumerate(start)), dict.fromkeys(range(n))
    at = dict.fromkeys(range(n), 1)
    boxes: dict[int, dict[int, list[Message]]] = {a: {} for a in range(n)}
    under_way: list[tuple[int, Message]] = []

    def act(a: int) -> None:
        t, who = at[a], liar if start[a] is None else p
        heard = tuple(sorted(boxes[a].get(t - 1, []), key=lambda m: m.sender))
        # Newest messages may already be of later rounds: what belongs to the round is history.
        v = view(
            {},
            a,
            game=game,
            round_=t,
            initial=start[a],
            held=held[a],
            memory=memory[a],
            history=(RoundLine(t - 1, heard),),
            key=f"{seed}/{t}/{a}",
        )
        (answer,) = who.decide_many([v])
        if answer.value is not None:
            held[a] = answer.value
        memory[a] = answer.memory
        for b in range(n):
            value = answer.to.get(b, (answer.value, ""))[0]
            under_way.append((b, Message(a, t, value, payload=answer.payload)))
        at[a] = t + 1

    for a in range(n):
        act(a)
    for _ in range(200_000):
        if all(memory[a] for a in range(n) if start[a] is not None):
            return {a: held[a] for a in range(n) if start[a] is not None}
        receiver, message = under_way.pop(draws.randrange(len(under_way)))
        box = boxes[receiver].setdefault(message.sent_round, [])
        if len(box) < n - f:  # acts on the first n - f; what comes later is not needed
            box.append(message)
        while len(boxes[receiver].get(at[receiver] - 1, [])) >= n - f:
            act(receiver)
    raise AssertionError("did not end")


def test_ben_or_needs_no_synchrony() -> None:
    for seed in range(30):
        draws = random.Random(seed)
        liar = draws.randrange(6)
        start = [None if a == liar else draws.randrange(2) for a in range(6)]
        assert len(set(asynchronous(6, 1, start, seed).values())) == 1


# --- W-MSR ------------------------------------------------------------------------------------


def spans(played: Played, start: list[int | None]) -> list[float]:
    honest = [a for a, v in enumerate(start) if v is not None]
    return [max(x) - min(x) for row in played.payloads if (x := [row[a] for a in honest])]


def test_wmsr_converges_on_a_robust_graph_among_liars() -> None:
    graph = nx.circulant_graph(8, [1, 2, 3])  # 3-robust: F = 1, also under equivocation
    game = rules(8, 1, complete=False, powers=LIES_FREELY, quota=9)  # votes cannot end it
    p = policy("wmsr:exact=true")
    p.check(game)
    for seed, liar in enumerate(("random:equivocate=true", "split-vote", "extreme")):
        start: list[int | None] = [0, 50, 3, None, 44, 17, 29, 8]
        lies = policy(liar, role="byzantine")
        players = [lies if v is None else p for v in start]
        played = play(game, players, start, graph=graph.adj, seed=seed, rounds=120)
        assert len(played.held) == 120
        assert spans(played, start)[0] == 50
        assert spans(played, start)[-1] < 1e-6
        exact = [x for row in played.payloads for x in row if isinstance(x, float)]
        assert min(exact) >= 0
        assert max(exact) <= 50


def test_wmsr_freezes_on_a_graph_that_is_not_robust() -> None:
    graph = nx.disjoint_union(nx.complete_graph(4), nx.complete_graph(4))
    graph.add_edges_from((a, a + 4) for a in range(4))  # one neighbour on the other side
    start: list[int | None] = [0] * 4 + [50] * 4
    game = rules(8, 1, complete=False, quota=9)
    played = play(game, [policy("wmsr:exact=true")] * 8, start, graph=graph.adj, rounds=30)
    assert spans(played, start)[-1] == 50


# --- bounds -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ("phase-king", rules(5, 1), rules(4, 1)),
        ("eig", rules(4, 1), rules(3, 1)),
        ("dlpsw", rules(7, 2), rules(6, 2)),
        ("trimmed-mean", rules(5, 2), rules(4, 2)),
        ("trimmed-low-median", rules(5, 2), rules(4, 2)),
        ("wmsr", rules(3, 1), rules(2, 1)),
        ("wmsr", rules(4, 1, powers=LIES_FREELY), rules(3, 1, powers=LIES_FREELY)),
        ("ben-or", rules(6, 1, low=0, high=1), rules(5, 1, low=0, high=1)),
    ],
)
def test_algorithms_are_refused_outside_their_bounds(text, good, bad) -> None:
    policy(text).check(good)
    with pytest.raises(ConfigError, match=rf"{text} needs n .*the game has n = {bad.agents}"):
        policy(text).check(bad)
    policy(text, unsafe=True).check(bad)


def test_algorithms_are_refused_where_their_needs_are_not_met() -> None:
    for text in ("phase-king", "eig", "dlpsw"):
        with pytest.raises(ConfigError, match="complete network"):
            policy(text).check(rules(9, 1, complete=False))
        with pytest.raises(ConfigError, match="f >= 2"):
            policy(f"{text}:f=1").check(rules(9, 2))
    with pytest.raises(ConfigError, match="decides in round 5; the game ends after 4"):
        policy("phase-king").check(rules(9, 1, max_rounds=4))
    with pytest.raises(ConfigError, match="decides in round 3; the game ends after 2"):
        policy("eig").check(rules(9, 1, max_rounds=2))
    with pytest.raises(ConfigError, match="two values; the game has the range 0 to 50"):
        policy("ben-or").check(rules(9, 1))
    sparse = view(
        {0: 1}, game=rules(6, 1, low=0, high=1), neighbours=(1, 2), inbox=messages({0: 1})
    )
    with pytest.raises(ConfigError, match="every agent hears every other"):
        policy("ben-or").decide_many([sparse])
    with pytest.raises(ConfigError, match="v is 60; the game's values go from 0 to 50"):
        policy("constant:v=60").check(rules(4))
