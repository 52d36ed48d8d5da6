"""Policies in the real engine: reference rates, guarantees, powers, determinism."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
from tenfold.errors import ConfigError
from tenfold_byzantine.cast import Cast
from tenfold_byzantine.contracts import Policy
from tenfold_byzantine.engine import Game
from tenfold_byzantine.play import play, play_many
from tenfold_byzantine.policies import entries, policy, with_filter
from tenfold_byzantine.policies.adversaries import Mimic
from tenfold_byzantine.policies.montecarlo import simulate
from tenfold_byzantine.result import GameResult, Outcome
from tenfold_byzantine.rules import SCHEDULES, GameConfig, Threat

EVERYTHING = Threat(equivocate=True, rushing=True, collude=True, suppress=True)


def games(config: GameConfig, honest: str, liars: str, seeds: int) -> Iterator[GameResult]:
    cast = Cast(
        config,
        {"honest": policy(honest, role="honest"), "byzantine": policy(liars, role="byzantine")},
    )
    yield from play_many(Game(config, cast, seed) for seed in range(seeds))


@pytest.mark.parametrize(
    ("honest", "liars", "byzantine", "reference"),
    [
        ("mode-minid", "collude:v=25", 2, 0.354),
        ("low-median", "random", 1, 0.907),
        ("leader", "random", 2, 0.82930),
        ("low-median", "extreme", 2, 1.0),
    ],
)
def test_rates_of_games_are_the_reference_and_the_monte_carlo_ones(
    honest: str, liars: str, byzantine: int, reference: float
) -> None:
    n = 700
    config = GameConfig(n_honest=8, n_byzantine=byzantine)
    outcomes = Counter(r.outcome for r in games(config, honest, liars, n))
    rate = outcomes[Outcome.VALID] / n
    assert abs(rate - reference) <= 4 * (reference * (1 - reference) / n) ** 0.5
    counts = simulate(honest, liars, n_byzantine=byzantine, games=100_000)
    for outcome, count in (
        (Outcome.INVALID_CAPTURED, counts.captured),
        (Outcome.INVALID_FABRICATED, counts.fabricated),
        (Outcome.PREMATURE, counts.premature),
    ):
        p = count / counts.games
        assert abs(outcomes[outcome] / n - p) <= 4 * (p * (1 - p) / n) ** 0.5 + 1e-9
    assert sum(outcomes.values()) == n


def test_averaging_is_fabrication_by_arithmetic() -> None:
    config, n = GameConfig(n_honest=8), 700
    cast = Cast(config, {"honest": policy("mean")})
    results = list(play_many(Game(config, cast, seed) for seed in range(n)))
    outcomes = Counter(r.outcome for r in results)
    assert set(outcomes) == {Outcome.VALID, Outcome.INVALID_FABRICATED}
    assert abs(outcomes[Outcome.VALID] / n - 0.165573) < 4 * (0.1656 * 0.8344 / n) ** 0.5
    assert {r.rounds for r in results} == {2}


@pytest.mark.parametrize(
    ("honest", "n_honest", "liars", "rounds"),
    [
        ("phase-king", 7, "random:equivocate=true", 5),
        ("phase-king", 7, "split-vote", 5),
        ("eig", 5, "random:equivocate=true", 3),
        ("eig:rule=mode-min", 5, "split-vote", 3),
    ],
)
def test_exact_algorithms_agree_among_equivocating_liars(honest, n_honest, liars, rounds) -> None:
    config = GameConfig(n_honest=n_honest, n_byzantine=1, threat=EVERYTHING)
    for result in games(config, honest, liars, 40):
        assert result.properties is not None
        assert result.properties.agreement
        assert result.properties.unanimity_validity
        assert result.stopped
        assert result.rounds == rounds


def test_dlpsw_and_medians_stay_in_the_hull_among_equivocating_liars() -> None:
    config = GameConfig(n_honest=7, n_byzantine=2, threat=EVERYTHING, max_rounds=12)
    for honest, liars in itertools.product(
        ("dlpsw", "dlpsw:exact=true", "trimmed-mean"), ("random:equivocate=true", "split-vote")
    ):
        for result in games(config, honest, liars, 12):
            initial = [v for v in result.initial if v is not None]
            for row in result.held:
                held = [row[a] for a in result.honest]
                assert min(initial) <= min(held)
                assert max(held) <= max(initial)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ben_or_agrees_in_every_schedule(schedule: str) -> None:
    config = GameConfig(
        n_honest=6,
        n_byzantine=1,
        value_range=(0, 1),
        schedule=schedule,
        max_rounds=300,
        threat=Threat(equivocate=True),
    )
    for liars in ("random:equivocate=true", "silent"):
        for result in games(config, "ben-or", liars, 12):
            assert result.stopped
            assert result.properties is not None
            assert result.properties.unanimity_validity
            held = result.held[-1]
            if schedule == "synchronous":
                assert len({held[a] for a in result.honest}) == 1
            stop = {held[a] for a in result.honest if result.votes[-1][a] == "stop"}
            assert len(stop) == 1  # those that decided


def test_wmsr_brings_a_robust_ring_together() -> None:
    config = GameConfig(n_honest=7, n_byzantine=1, topology="ring:k=3")
    spans = []
    for result in games(config, "wmsr:exact=true", "extreme", 10):
        first, last = ([row[a] for a in result.honest] for row in (result.held[0], result.held[-1]))
        spans.append((max(first) - min(first), max(last) - min(last)))
        assert min(first) <= min(last) <= max(last) <= max(first)
    # Rounding may leave neighbours on both sides of a half.
    assert all(after <= 1 < before for before, after in spans)


def test_wmsr_filter_saves_majorities_from_extreme_colluders_only() -> None:
    """What lies beyond all honest values is dropped; what lies among them no order can tell."""
    config = GameConfig(n_honest=8, n_byzantine=2)
    plain = policy("mode-min")

    def captured(honest: Policy, liars: str) -> int:
        cast = Cast(config, {"honest": honest, "byzantine": policy(liars)})
        results = play_many(Game(config, cast, seed) for seed in range(100))
        return sum(r.outcome == Outcome.INVALID_CAPTURED for r in results)

    filtered = with_filter(plain, "wmsr")
    assert captured(plain, "extreme") > 40
    assert captured(filtered, "extreme") == 0
    assert captured(plain, "collude:v=25") > 40
    assert captured(filtered, "collude:v=25") > 40


def test_filters_and_mimics_keep_what_distinguishes_a_model() -> None:
    class Model:
        label, powers = "llm", frozenset()

        def __init__(self, identity: str) -> None:
            self.identity = identity

        def check(self, rules) -> None: ...

        def decide_many(self, views):
            return policy("mean").decide_many(views)

        def vote_many(self, views):
            return policy("mean").vote_many(views)

    config = GameConfig(n_honest=3, n_byzantine=1)

    def game_id(honest: Policy, liars: Policy) -> str:
        return Game(config, {"honest": honest, "byzantine": liars}, 1).game_id

    a, b, quiet = Model("weights a"), Model("weights b"), policy("silent")
    assert game_id(with_filter(a, "wmsr"), quiet) != game_id(with_filter(b, "wmsr"), quiet)
    assert game_id(a, Mimic(a)) != game_id(a, Mimic(b))
    assert game_id(a, Mimic(a)) == game_id(Model("weights a"), Mimic(Model("weights a")))


def test_every_adversary_plays_games_that_repeat() -> None:
    config = GameConfig(n_honest=5, n_byzantine=2, threat=EVERYTHING, max_rounds=6)
    for entry in entries("byzantine"):
        first = [r.state_hash for r in games(config, "mode-own", entry.name, 3)]
        again = [r.state_hash for r in games(config, "mode-own", entry.name, 3)]
        assert first == again
        assert len(set(first)) == 3


def test_powers_that_the_threat_model_forbids_are_refused() -> None:
    for entry in entries("byzantine"):
        config = GameConfig(n_honest=5, n_byzantine=1)
        liars = policy(entry.name, role="byzantine")
        players = {"honest": policy("mean"), "byzantine": liars}
        if entry.powers:
            message = f"adversary {entry.name} needs {', '.join(entry.powers)}"
            with pytest.raises(ConfigError, match=message):
                Cast(config, players)
            allowed = Threat(**dict.fromkeys(entry.powers, True))
            Cast(GameConfig(n_honest=5, n_byzantine=1, threat=allowed), players)
        else:
            Cast(config, players)


def test_algorithms_outside_their_bound_are_refused_by_the_game() -> None:
    config = GameConfig(n_honest=3, n_byzantine=1, max_rounds=9)
    with pytest.raises(ConfigError, match="phase-king needs n > 4f; the game has n = 4"):
        play(config, policy("phase-king"), policy("silent"))
    result = play(config, policy("phase-king", unsafe=True), policy("silent"))
    assert result.rounds == 5
    ring = GameConfig(n_honest=8, topology="ring:k=1")
    with pytest.raises(ConfigError, match="complete network"):
        play(ring, policy("dlpsw"))


HASHES = """
from tenfold_byzantine.cast import Cast
from tenfold_byzantine.engine import Game
from tenfold_byzantine.play import play_many
from tenfold_byzantine.policies import entries, policy, with_filter
from tenfold_byzantine.rules import GameConfig, Threat

threat = Threat(equivocate=True, rushing=True, collude=True)
for kind in ("honest", "byzantine"):
    for entry in entries(kind):
        name = entry.name
        span = (0, 1) if name == "ben-or" else (0, 50)
        own = {"honest": "mode-own", "byzantine": "random"} | {kind: name}
        if "suppress" in entry.powers:
            continue
        if name == "constant":
            own["honest"] = "constant:v=1"
        config = GameConfig(
            n_honest=8, n_byzantine=1, value_range=span, max_rounds=7, threat=threat
        )
        cast = Cast(config, {r: policy(t, role=r) for r, t in own.items()})
        (result,) = play_many([Game(config, cast, 5)])
        print(name, result.outcome, result.state_hash)
"""


def test_games_do_not_depend_on_the_order_of_hashes() -> None:
    def run(seed: str) -> str:
        found = subprocess.run(
            [sys.executable, "-c", HASHES],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        return found.stdout

    first = run("1")
    assert len(first.splitlines()) == 38
    assert "ERROR" not in first
    assert run("2") == first


def test_policies_import_no_heavy_library() -> None:
    code = (
        "import sys, tenfold_byzantine.policies as p; p.policy('dlpsw:f=2'); p.entries();"
        "print([m for m in ('numpy', 'networkx', 'scipy', 'torch') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
