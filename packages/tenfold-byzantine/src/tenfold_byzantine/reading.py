"""`tenfold byzantine replay | show | classify | report | plot | export`: verbs that read games."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tenfold.cli.output import note, print_json, print_table
from tenfold.errors import EXIT_OK, ConfigError, nearest
from tenfold.files import write_text
from tenfold.report import Block, render_html, render_svg

from tenfold_byzantine import plots
from tenfold_byzantine.commands import cell_facts, show_cells
from tenfold_byzantine.contracts import agent_name
from tenfold_byzantine.presets import Published, preset
from tenfold_byzantine.reports import game_blocks, report_blocks
from tenfold_byzantine.result import GROUPINGS, GameResult
from tenfold_byzantine.rows import export as export_rows
from tenfold_byzantine.rows import game_row
from tenfold_byzantine.sources import find_game, read_source
from tenfold_byzantine.stories import Examples
from tenfold_byzantine.summary import Cell, collect
from tenfold_byzantine.transcript import Call, Transcript, read_transcript, round_line
from tenfold_byzantine.transcript import transcript_blocks as blocks_of

GAME_PLOTS: Mapping[str, Callable[[GameResult], Block]] = {
    "trajectory": plots.trajectory,
    "votes": plots.votes,
    "blocs": plots.blocs,
    "influence": plots.influence,
}
"""Plots of one game."""
CELL_PLOTS: Mapping[str, Callable[[Sequence[Cell]], Block | None]] = {
    "rates": plots.rates,
    "outcomes": plots.outcomes,
    "heatmap": plots.heatmap,
    "survival": plots.survival,
}
"""Plots of many games."""


def replay(game: str, as_json: bool = False) -> int:
    """Plays a recorded game again and compares every round; a difference is an error."""
    from tenfold_byzantine.replay import replay as again

    path = find_game(game)
    result = again(path)
    if as_json:
        print_json({"file": str(path), "equal": True, **game_row(result)})
    else:
        print(
            f"{path}: {result.rounds} rounds played again, all states equal; {result.outcome.value}"
        )
    return EXIT_OK


def show(
    game: str,
    agent: str | None = None,
    round: int | None = None,
    as_json: bool = False,
) -> int:
    """Shows a game, or what an agent was asked in a round and what it answered."""
    found = read_transcript(find_game(game))
    number = None if agent is None else _agent(agent, len(found.result.roles))
    if round is not None and not 1 <= round <= max(found.result.rounds, 1):
        raise ConfigError(f"the game has rounds 1 to {found.result.rounds}; there is no {round}")
    if as_json:
        print_json(_facts(found, number, round))
        return EXIT_OK
    if number is None and round is None:
        _show_game(found)
        return EXIT_OK
    calls = found.calls_of(number, round)
    for t in range(found.result.rounds) if round is None else [round - 1]:
        for a in range(len(found.result.roles)) if number is None else [number]:
            _show_turn(found, a, t, [c for c in calls if (c.agent, c.round) == (a, t + 1)])
    return EXIT_OK


def _agent(text: str, agents: int) -> int:
    number = text.removeprefix("agent_")
    if not number.isdecimal() or int(number) >= agents:
        raise ConfigError(f"--agent {text!r}: agents are agent_0 to {agent_name(agents - 1)}")
    return int(number)


def _show_game(found: Transcript) -> None:
    result = found.result
    print(f"game {result.game_id}, seed {result.seed}: {result.outcome.value}")
    if result.error:
        print(result.error)
    rows = [
        (agent_name(a), result.roles[a], found.policies[a], _shown(result.initial[a]),
         _shown(result.held[-1][a]) if result.held else "")
        for a in range(len(result.roles))
    ]  # fmt: skip
    print_table(("agent", "role", "plays", "starts with", "ends with"), rows)
    for t in range(result.rounds):
        print(round_line(found, t + 1))


def _shown(value: int | None) -> str:
    return "-" if value is None else str(value)


def _show_turn(found: Transcript, agent: int, t: int, calls: Sequence[Call]) -> None:
    result = found.result
    print(
        f"--- {agent_name(agent)} ({result.roles[agent]}, {found.policies[agent]}), round {t + 1}: "
        f"says {_shown(result.proposed[t][agent])}, holds {_shown(result.held[t][agent])}, "
        f"votes {result.votes[t][agent]}"
    )
    for name, texts in (("says", found.texts), ("notes", found.notes)):
        if texts[t][agent]:
            print(f"{name}: {texts[t][agent]}")
    for call in calls:
        rejected = f", rejected: {call.rejected}" if call.rejected else ""
        print(f"\n[{call.phase}, attempt {call.attempt}{rejected}]")
        for name in ("system", "user"):
            if text := call.request.get(name):
                print(f"<{name}>\n{text}")
        if "system" not in call.request:
            print("(the log keeps no prompts; play with --keep-prompts full)")
        print(f"<answer>\n{call.response.get('text', '(none)')}")


def _facts(found: Transcript, agent: int | None, round_: int | None) -> dict[str, Any]:
    result = found.result
    facts = {**game_row(result), "roles": result.roles, "initial": result.initial,
             "policies": found.policies}  # fmt: skip
    if agent is None and round_ is None:
        return {**facts, "held": result.held, "proposed": result.proposed, "votes": result.votes}
    calls = [
        {"round": c.round, "phase": c.phase, "agent": c.agent, "attempt": c.attempt,
         "request": dict(c.request), "response": dict(c.response), "rejected": c.rejected}
        for c in found.calls_of(agent, round_)
    ]  # fmt: skip
    return {**facts, "calls": calls}


def classify(folder: str, taxonomy: str = "full", as_json: bool = False) -> int:
    """Counts outcomes, and groups them as the paper's text or figures do."""
    source = read_source(folder)
    outcomes = Counter(row["outcome"] for row in source.rows)
    labels: Counter[str] = Counter()
    for outcome, n in outcomes.items():
        labels[GROUPINGS[taxonomy].get(outcome.partition(".")[0], "error")] += n
    flags = Counter(
        f"{row['outcome']}: {name}"
        for row in source.rows
        for name, value in row["flags"].items()
        if value is True
    )
    if as_json:
        print_json({"games": len(source.rows), "outcomes": dict(sorted(outcomes.items())),
                    taxonomy: dict(labels), "flags": dict(sorted(flags.items()))})  # fmt: skip
        return EXIT_OK
    total = len(source.rows)
    print_table(
        ("outcome", "games", "share", taxonomy),
        [
            (name, n, f"{100 * n / total:.1f} %",
             GROUPINGS[taxonomy].get(name.partition(".")[0], "error"))
            for name, n in sorted(outcomes.items())
        ],
    )  # fmt: skip
    if flags:
        print()
        print_table(("flag", "games"), sorted(flags.items()))
    return EXIT_OK


def report(
    sources: Sequence[str],
    out: str = "report.html",
    reference: str | None = None,
    taxonomy: str = "full",
    stories: int = 6,
    as_json: bool = False,
) -> int:
    """Writes one HTML report over sweeps, runs or folders of event logs; of a game its story."""
    target = Path(out).expanduser()
    published: Sequence[Published] = () if reference is None else preset(reference).published
    if len(sources) == 1 and Path(sources[0]).expanduser().is_file():
        found = read_transcript(find_game(sources[0]))
        blocks = list(game_blocks(found.result, list(blocks_of(found))))
        write_text(target, render_html(f"Game {found.result.game_id}", blocks, {}))
        facts: dict[str, Any] = {"report": str(target), "games": 1}
    else:
        read = [read_source(name) for name in sources]
        rows = [row for source in read for row in source.rows]
        cells = collect(rows)
        tales = []
        for source in read:
            examples = Examples(source.folder, stories - len(tales))
            for _ in examples.watch(source.rows):
                pass
            tales += examples.stories()
        title = ", ".join(dict.fromkeys(source.name for source in read))
        page = render_html(
            title,
            report_blocks(cells, published=published, stories=tales, taxonomy=taxonomy),
            {"games": len(rows), "cells": len(cells)},
        )
        write_text(target, page)
        facts = {"report": str(target), "games": len(rows),
                 "cells": [cell_facts(c, published) for c in cells]}  # fmt: skip
        if not as_json:
            show_cells(cells, published)
    if as_json:
        print_json(facts)
    else:
        note(f"written: {target}")
    return EXIT_OK


def plot(kind: str, source: str, out: str | None = None, as_json: bool = False) -> int:
    """Writes one chart as SVG."""
    block: Block | None
    if kind in GAME_PLOTS:
        found = read_transcript(find_game(source))
        if not found.result.rounds:
            raise ConfigError(f"{source} has no finished round to draw")
        block = GAME_PLOTS[kind](found.result)
    elif kind in CELL_PLOTS:
        block = CELL_PLOTS[kind](collect(read_source(source).rows))
    else:
        known = [*GAME_PLOTS, *CELL_PLOTS]
        raise ConfigError(f"no plot {kind!r}{nearest(kind, known)} (plots: {', '.join(known)})")
    if block is None:
        raise ConfigError(
            "a heat map needs games of at least two sizes", hint="vary game.n_honest or n_byzantine"
        )
    target = Path(out or f"{kind}.svg").expanduser()
    write_text(target, render_svg(block))
    if as_json:
        print_json({"plot": kind, "file": str(target)})
    else:
        note(f"written: {target}")
    return EXIT_OK


def export(source: str, out: str, as_json: bool = False) -> int:
    """Writes the result table as CSV, Parquet or JSON lines, one row per game."""
    rows = read_source(source).rows
    target = Path(out).expanduser()
    export_rows(rows, target)
    if as_json:
        print_json({"file": str(target), "rows": len(rows)})
    else:
        note(f"written: {target}, {len(rows)} rows")
    return EXIT_OK
