"""`tenfold byzantine run | sweep | reproduce`: verbs that play.

Each takes `as_json`, prints its result on stdout, and returns an exit code. Games played so far
are on disk when a verb is interrupted; `--resume` goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tenfold.cli.output import note, print_json, print_table
from tenfold.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_RUN_FAILED,
    EXIT_TOO_MANY_FAILURES,
    ConfigError,
)
from tenfold.files import write_text
from tenfold.progress import Reporter

from tenfold_byzantine.backends import backends
from tenfold_byzantine.engine import Game
from tenfold_byzantine.events import EventLog
from tenfold_byzantine.grid import SweepPlan, read_toml
from tenfold_byzantine.play import play_many
from tenfold_byzantine.presets import Published, preset, preset_table, published_for
from tenfold_byzantine.result import GameResult
from tenfold_byzantine.roster import Roster
from tenfold_byzantine.rows import game_row
from tenfold_byzantine.rules import GameConfig
from tenfold_byzantine.summary import Cell, collect
from tenfold_byzantine.sweep import Sweep


def run(
    file: str | None = None,
    honest: str | None = None,
    byzantine: str | None = None,
    n_honest: int | None = None,
    n_byzantine: int | None = None,
    max_rounds: int | None = None,
    value_range: Sequence[int] = (),
    quota: str | None = None,
    awareness: str | None = None,
    topology: str | None = None,
    seed: int | None = None,
    model: str | None = None,
    out: str | None = None,
    keep_prompts: str = "full",
    unsafe: bool = False,
    as_json: bool = False,
) -> int:
    """Plays one game and shows it round by round."""
    given = {
        "n_honest": n_honest, "n_byzantine": n_byzantine, "max_rounds": max_rounds,
        "value_range": list(value_range) or None, "quota": quota, "awareness": awareness,
        "topology": topology, "seed": seed,
    }  # fmt: skip
    config = _one_game(file, given, honest, byzantine, quota)
    with backends(model) as model_of:
        cast = Roster(model_of, unsafe=unsafe).cast(config)
        log = None
        if out is not None:
            log = EventLog(Path(out).expanduser(), cast.game_id(config.seed), keep_prompts)  # ty: ignore[invalid-argument-type]
        game = Game(config, cast, log=log)
        if not as_json:
            print(_opening(game))
        shown = None if as_json else _show_round
        result = next(play_many([game], on_round=shown))
        if log is not None:
            log.flush()
    if as_json:
        print_json(
            {**game_row(result), "events": None if log is None else str(log.path),
             "held": result.held, "proposed": result.proposed, "votes": result.votes}
        )  # fmt: skip
    else:
        print(_verdict(result))
        if log is not None:
            note(f"written: {log.path}")
    return EXIT_RUN_FAILED if result.error else EXIT_OK


def _one_game(
    file: str | None,
    given: Mapping[str, Any],
    honest: str | None,
    byzantine: str | None,
    quota: str | None,
) -> GameConfig:
    """A game file's settings below those of the command line."""
    table: dict[str, Any] = {}
    folder = None
    if file is not None:
        path = Path(file).expanduser()
        table, folder = read_toml(path, "game"), path.parent
    game: dict[str, Any] = {
        **table.get("game", {}),
        **{k: v for k, v in given.items() if v is not None},
    }
    if quota is not None and quota.isdecimal():
        game["quota"] = int(quota)
    if byzantine is not None and "n_byzantine" not in game:
        raise ConfigError("--byzantine names a policy, but there is no Byzantine agent",
                          hint="add --n-byzantine 2")  # fmt: skip
    table = {**table, "game": game}
    for side, use in (("honest", honest), ("byzantine", byzantine)):
        if use is not None:
            kept = {k: v for k, v in table.get(side, {}).items() if k not in ("use", "group")}
            table[side] = {**kept, "use": use}
    return GameConfig.from_table(table, source=file or "game", folder=folder)


def _opening(game: Game) -> str:
    roles = " ".join("B" if r == "byzantine" else "H" for r in game.roles)
    values = " ".join("-" if v is None else str(v) for v in game.initial)
    return (
        f"game {game.game_id}: {game.rules.agents} agents, {game.rules.quota} stop votes end it, "
        f"at most {game.rules.max_rounds} rounds\nroles  {roles}\nstart  {values}"
    )


def _show_round(game: Game) -> None:
    """One line: what each agent says and holds, and the votes."""
    done = len(game.vote_rows)
    if not done:
        return
    cells = []
    for said, held in zip(game.proposed_rows[-1], game.held_rows[-1], strict=True):
        text = "-" if said is None else str(said)
        cells.append(text if held in (said, None) else f"{text}({held})")
    votes = "".join({"stop": "S", "continue": ".", "abstain": "a"}[v] for v in game.vote_rows[-1])
    print(f"{done:5d}  {' '.join(cells)}  {votes}", flush=True)


def _verdict(result: GameResult) -> str:
    row = game_row(result)
    if result.error:
        return f"{result.outcome.value}: {result.error}"
    decided = "" if row["decided"] is None else f", all honest agents hold {row['decided']}"
    return f"{result.outcome.value} after {result.rounds} rounds{decided}"


def sweep(
    file: str,
    out: str | None = None,
    resume: bool = False,
    shard: str = "0/1",
    until_width: float | None = None,
    replicates: int | None = None,
    model: str | None = None,
    width: int = 64,
    events: bool = True,
    unsafe: bool = False,
    as_json: bool = False,
) -> int:
    """Plays a sweep file's grid and writes its table and report."""
    plan = SweepPlan.from_toml(Path(file).expanduser())
    return _sweep(
        plan, out, resume=resume, shard=shard, until_width=until_width, replicates=replicates,
        model=model, width=width, events=events, unsafe=unsafe, as_json=as_json,
    )  # fmt: skip


def reproduce(
    name: str,
    model: str | None = None,
    honest: str | None = None,
    byzantine: str | None = None,
    out: str | None = None,
    resume: bool = False,
    shard: str = "0/1",
    until_width: float | None = None,
    replicates: int | None = None,
    width: int = 64,
    events: bool = True,
    as_json: bool = False,
) -> int:
    """Plays one of the paper's experiments, its published rates beside ours."""
    found, table = preset(name), preset_table(name)
    for side, use in (("honest", honest), ("byzantine", byzantine)):
        if use is not None:
            table["base"][side] = {"use": use}
            table["grid"].pop(f"{side}.use", None)
    plan = SweepPlan.from_table(table, source=name, name=name)
    return _sweep(
        plan, out or f"runs/{name}", resume=resume, shard=shard, until_width=until_width,
        replicates=replicates, model=model, width=width, events=events, unsafe=False,
        as_json=as_json, published=found.published,
    )  # fmt: skip


def _sweep(
    plan: SweepPlan,
    out: str | None,
    *,
    resume: bool,
    shard: str,
    until_width: float | None,
    replicates: int | None,
    model: str | None,
    width: int,
    events: bool,
    unsafe: bool,
    as_json: bool,
    published: Sequence[Published] = (),
) -> int:
    if replicates is not None:
        plan = replace(plan, replicates=replicates)
    if until_width is not None:
        plan = replace(plan, until_halfwidth=until_width)
    task = Sweep(plan, out)
    try:
        with backends(model) as model_of:
            rows = task.run(
                Roster(model_of, unsafe=unsafe), resume=resume, shard=_shard(shard), width=width,
                keep_events=events, reporter=Reporter(),
            )  # fmt: skip
    except KeyboardInterrupt:
        note(f"interrupted; {task.folder} has every finished game, --resume goes on")
        return EXIT_INTERRUPTED
    cells = collect(rows)
    table = task.write_table()
    report = write_report(task, cells, rows, published)
    errors = sum(cell.errors for cell in cells)
    if as_json:
        print_json(
            {"folder": str(task.folder), "complete": task.complete, "table": str(table),
             "report": str(report), "cells": [cell_facts(c, published) for c in cells]}
        )  # fmt: skip
    else:
        show_cells(cells, published)
        note(f"table:  {table}\nreport: {report}")
        if errors:
            note(f"{errors} games failed, since their backend did; --resume plays them again")
    return EXIT_TOO_MANY_FAILURES if errors else EXIT_OK


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ConfigError(f"--shard {text!r}: write I/K with 0 <= I < K, e.g. 0/4")
    return int(index), int(count)


def write_report(
    task: Sweep,
    cells: Sequence[Cell],
    rows: Sequence[Mapping[str, Any]],
    published: Sequence[Published] = (),
) -> Path:
    """Writes a sweep's `report.html`."""
    from tenfold.report import render_html

    from tenfold_byzantine.reports import report_blocks
    from tenfold_byzantine.stories import Examples

    examples = Examples(task.folder)
    for _ in examples.watch(rows):
        pass
    blocks = report_blocks(
        cells, published=published, stories=examples.stories(), paired=task.plan.paired
    )
    facts = {"games": len(rows), "cells": len(cells), "seed": task.plan.seed}
    path = task.folder / "report.html"
    write_text(path, render_html(task.plan.name, blocks, facts))
    return path


def cell_facts(cell: Cell, published: Sequence[Published] = ()) -> dict[str, Any]:
    """A cell's rates and times as plain values."""
    from tenfold.stats import wilson

    n = cell.games
    facts: dict[str, Any] = {
        "cell": dict(cell.coordinates),
        "games": n,
        "errors": cell.errors,
        "outcomes": dict(sorted(cell.outcomes.items())),
    }
    if n:
        rounds = cell.rounds
        facts |= {
            "valid": cell.valid[0] / n,
            "valid_interval": wilson(*cell.valid),
            "restricted_mean_rounds": cell.survival.restricted_mean(cell.deadline),
            "rounds_when_valid": None if rounds is None else rounds.value,
        }
    reference = published_for(cell.coordinates, tuple(published))
    if reference:
        facts["published"] = [
            {"model": p.model, "runs": p.runs, "valid": p.valid / 100, "interval": p.interval}
            for p in reference
        ]
    return facts


def show_cells(cells: Sequence[Cell], published: Sequence[Published] = ()) -> None:
    """Prints rates per cell, with the paper's where there are any."""
    from tenfold_byzantine.reports import mean_text, percent

    rows = []
    for cell in cells:
        n = cell.games
        counts = [percent(cell.count(k), n) for k in ("VALID",)]
        counts += [str(cell.count(k)) for k in ("INVALID", "PREMATURE", "TIMEOUT")]
        row = [cell.label, n, *counts, mean_text(cell.rounds), cell.errors or ""]
        if published:
            found = published_for(cell.coordinates, tuple(published))
            row.append(", ".join(f"{p.model} {p.valid} %" for p in found))
        rows.append(row)
    columns = ["cell", "games", "valid", "invalid", "premature", "time-out", "rounds when valid",
               "errors"]  # fmt: skip
    print_table([*columns, "published"] if published else columns, rows)
