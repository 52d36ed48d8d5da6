"""Playing games: one, or many at once in waves (spec, 6.6).

In a wave every game that waits for answers hands in its questions; each policy is called once per
phase for the questions of all games, whoever asked; answers go back, and finished games are
replaced at once. How many games share a wave changes nothing but the speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tenfold.errors import ConfigError

from tenfold_byzantine.cast import Players
from tenfold_byzantine.contracts import Phase, Policy, Role, View
from tenfold_byzantine.engine import Game
from tenfold_byzantine.events import EventSink
from tenfold_byzantine.policies import policy, with_filter
from tenfold_byzantine.result import GameResult
from tenfold_byzantine.rules import GameConfig, Group


def play(
    config: GameConfig,
    honest: Players | str | None = None,
    byzantine: Players | str | None = None,
    *,
    seed: int | None = None,
    log: EventSink | None = None,
) -> GameResult:
    """Plays one game.

    Args:
        config: the settings.
        honest: policy of the honest agents, `(count, policy)` per group, or a policy's name;
            None: what the settings say.
        byzantine: the same for Byzantine agents.
        seed: instead of the settings' own.
        log: where events go.

    Raises:
        ConfigError: players and settings do not fit together.
        Exception: whatever a policy raised.
    """
    game = Game(config, players(config, honest, byzantine), seed, log=log)
    return next(play_many([game], raise_errors=True))


def players(
    config: GameConfig,
    honest: Players | str | None = None,
    byzantine: Players | str | None = None,
    *,
    build: Callable[[Group, Role], Policy] | None = None,
) -> dict[Role, Players]:
    """The policies of both sides: as given, or as the settings name them.

    Args:
        config: the settings.
        honest: as for `play`.
        byzantine: as for `play`.
        build: makes the policy of a group that is not scripted, e.g. a language model's.
    """
    given: tuple[tuple[Role, Any], ...] = (("honest", honest), ("byzantine", byzantine))
    found: dict[Role, Players] = {}
    for role, side in given:
        groups = config.honest if role == "honest" else config.byzantine
        if isinstance(side, str):
            found[role] = named_policy(side, role)
        elif side is not None:
            found[role] = side
        elif groups:
            found[role] = [(group.count, _of_group(group, role, build)) for group in groups]
    return found


def named_policy(text: str, role: Role, filter_: str = "none") -> Policy:
    """A scripted policy by its name in a game file, e.g. `dlpsw:f=2`, behind its filter."""
    return with_filter(policy(text, role=role), filter_)


def _of_group(group: Group, role: Role, build: Callable[[Group, Role], Policy] | None) -> Policy:
    if build is not None:
        return build(group, role)
    if group.use == "llm":
        raise ConfigError(
            f"the {role} agents are language models, but no model was given",
            hint=f"pass {role}=LanguagePolicy(model), or name a scripted policy",
        )
    return named_policy(group.use, role, group.filter)


def play_many(
    games: Iterable[Game],
    *,
    width: int = 64,
    raise_errors: bool = False,
    on_round: Callable[[Game], None] | None = None,
) -> Iterator[GameResult]:
    """Plays games in waves and yields each result as soon as it is known.

    A policy that raises ends only the games whose questions it cannot answer: they are asked
    again one by one, and those that fail alone become `ERROR.backend`.

    Args:
        games: taken one after the other as places become free, so that a generator of any length
            needs no more memory than a wave.
        width: games in a wave.
        raise_errors: let a policy's error pass instead.
        on_round: called for each game after each of its rounds.

    Raises:
        ConfigError: `width` is below 1.
    """
    if width < 1:
        raise ConfigError(f"width is {width}; a wave needs at least 1 game")
    waiting = iter(games)
    active: list[Game] = []
    while True:
        while len(active) < width and (game := next(waiting, None)) is not None:
            active.append(game)
        if not active:
            return
        rounds = [len(game.vote_rows) for game in active] if on_round else []
        # A resumed game may already be over.
        _wave([game for game in active if not game.finished], raise_errors)
        if on_round is not None:
            for game, before in zip(active, rounds, strict=True):
                if game.finished or len(game.vote_rows) != before:
                    on_round(game)
        finished = [game for game in active if game.finished]
        active = [game for game in active if not game.finished]
        for game in finished:
            yield game.result()


def _wave(games: list[Game], raise_errors: bool) -> None:
    """Asks and answers the open questions of all games once."""
    calls: dict[tuple[int, Phase], tuple[Policy, list[View]]] = {}
    parts: list[list[tuple[tuple[int, Phase], int, int]]] = []
    for game in games:
        mine = []
        for player, views in game.pending():
            key = (id(player), game.phase)
            if key not in calls:
                calls[key] = (player, [])
            together = calls[key][1]
            start = len(together)
            together += views
            mine.append((key, start, len(together)))
        parts.append(mine)
    answers: dict[tuple[int, Phase], list[Any]] = {}
    for key, (player, views) in calls.items():
        try:
            answers[key] = _call(player, key[1], views)
        except Exception:
            if raise_errors:
                raise
            _one_by_one(games)
            return
    for game, mine in zip(games, parts, strict=True):
        _submit(game, [answers[key][start:end] for key, start, end in mine], raise_errors)


def _call(player: Policy, phase: str, views: list[View]) -> list[Any]:
    replies = player.decide_many(views) if phase == "decide" else player.vote_many(views)
    if len(replies) != len(views):
        raise ConfigError(
            f"policy {player.label} was asked {len(views)} questions and gave {len(replies)} "
            "answers"
        )
    return replies


def _submit(game: Game, replies: list[Any], raise_errors: bool) -> None:
    try:
        game.submit(replies)
    except ConfigError as error:  # an answer that no agent may give; a full disk ends everything
        if raise_errors:
            raise
        game.fail(_said(error))


def _one_by_one(games: list[Game]) -> None:
    """The same wave with one call per game, so that only games that fail alone are lost."""
    for game in games:
        try:
            replies = [_call(player, game.phase, views) for player, views in game.pending()]
        except Exception as error:
            game.fail(_said(error))
        else:
            _submit(game, replies, raise_errors=False)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
