"""Hand-made games for tests of rows, summaries and reports."""

from __future__ import annotations

from tenfold_byzantine.result import GameResult, Outcome, Properties


def game(
    outcome: str = "VALID",
    held=((20, 30, 5), (20, 20, 5), (20, 20, 7)),
    *,
    roles=("honest", "honest", "byzantine"),
    proposed=None,
    votes=None,
    max_rounds: int = 10,
    seed: int = 1,
    game_id: str = "0123456789abcdef",
    metrics=None,
    counters=None,
    error: str = "",
):
    """A game of three agents; by default one honest agent moves to the other's value."""
    kind = Outcome(outcome)
    stopped = kind.top in ("VALID", "INVALID", "PREMATURE")
    quiet = tuple("continue" for _ in roles)
    last = tuple("stop" if r == "honest" else "abstain" for r in roles) if stopped else quiet
    if votes is None:
        votes = tuple(quiet for _ in held[:-1]) + ((last,) if held else ())
    honest = [i for i, r in enumerate(roles) if r == "honest"]
    agreed = bool(held) and len({held[-1][i] for i in honest}) == 1
    return GameResult(
        game_id=game_id,
        settings={"game": {"max_rounds": max_rounds}},
        seed=seed,
        roles=roles,
        initial=tuple(held[0][i] if r == "honest" else None for i, r in enumerate(roles))
        if held
        else (20, 30, None),
        held=held,
        proposed=held if proposed is None else proposed,
        votes=votes,
        stopped=stopped,
        outcome=kind,
        properties=Properties(stopped, agreed, kind.top == "VALID", agreed, agreed),
        metrics=metrics or {"influence": 0.0, "undefined": None},
        counters=counters or {"messages": 6},
        flags={"in_hull": agreed},
        error=error,
        state_hash="ab" * 32,
    )
