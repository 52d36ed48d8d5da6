"""The evaluator and the dataset in real runs."""

from __future__ import annotations

import json
import re

import pytest
import tomli_w
from tenfold.errors import ConfigError
from tenfold.host import Host
from tenfold.run import Options
from tenfold.store import RunStore
from tenfold.testing import FakeContext, check_plugin
from tenfold.workspace import find_workspace
from tenfold_byzantine.consensus import Consensus
from tenfold_byzantine.games import Games
from tenfold_byzantine.grid import SweepPlan
from tenfold_byzantine.roster import NoModelError, Roster
from tenfold_byzantine.rows import COLUMNS
from tenfold_byzantine.rules import GameConfig
from tenfold_byzantine.sweep import Sweep
from tenfold_byzantine.transcript import read_transcript, round_line

BASE = {
    "game": {"n_honest": 5, "n_byzantine": 1, "max_rounds": 6},
    "honest": {"use": "low-median"},
    "byzantine": {"use": "random"},
}
GRID = {"honest.use": ["low-median", "mean"]}


@pytest.fixture
def host(tmp_path, monkeypatch):
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "workspace.toml").write_text("[defaults]\ndevice = 'cpu'\n")
    return Host(find_workspace(tmp_path))


def run_table(**changes):
    return {
        "schema": "tenfold-run/1",
        "name": "games",
        "seed": 4,
        "datasets": {"games": {"use": "byzantine:games", **BASE, "grid": GRID, "replicates": 5}},
        "evaluator": {"use": "byzantine:consensus", "width": 3},
        **changes,
    }


def rows_of(outcome):
    return {line.id: line.values for line in RunStore(outcome.run_dir).ordered_lines()}


def test_a_run_plays_every_game_and_reports(host):
    outcome = host.run(run_table(), options=Options(progress=False))
    rows = rows_of(outcome)
    assert outcome.done == len(rows) == 10
    assert list(rows)[:3] == ["honest=low-median#0", "honest=mean#0", "honest=low-median#1"]
    assert set(next(iter(rows.values()))) == set(COLUMNS)
    valid = {m.group: m for m in outcome.metrics if m.name == "valid"}
    for label, metric in valid.items():
        mine = [r for name, r in rows.items() if name.startswith(f"{label}#")]
        assert metric.value == sum(r["outcome"] == "VALID" for r in mine) / 5
    page = (outcome.run_dir / "report.html").read_text()
    for part in ("How games ended", "McNemar p", "Round by round", "agent_0"):
        assert part in page
    events = sorted((outcome.run_dir / "artifacts" / "events").iterdir())
    assert [p.stem for p in events] == sorted(r["game_id"] for r in rows.values())


def test_the_run_and_the_sweep_play_the_same_games(host, tmp_path):
    """Seeds and cells come from one plan, so both give one table."""
    rows = rows_of(host.run(run_table(), options=Options(progress=False)))
    plan = SweepPlan.from_table({"base": BASE, "grid": GRID, "replicates": 5, "seed": 4})
    assert Sweep(plan, tmp_path / "s").run(Roster(), keep_events=False) == sorted(
        rows.values(), key=lambda r: (r["cell"]["honest.use"] != "low-median", r["replicate"])
    )


def test_an_interrupted_run_resumes_to_the_same_rows(host):
    whole = host.run(run_table(), options=Options(progress=False))
    part = host.run(run_table(name="part"), options=Options(limit=4, progress=False))
    store = RunStore(part.run_dir)
    store.set_status("interrupted")
    again = host.resume(str(part.run_dir), Options(limit=10, progress=False))
    assert (again.reused, again.done) == (4, 6)
    assert rows_of(again) == rows_of(whole)
    names = {m.name: m.value for m in whole.metrics if not m.group}
    assert names == {m.name: m.value for m in again.metrics if not m.group}


def test_policies_can_be_given_to_the_evaluator(host):
    table = run_table(
        evaluator={"use": "byzantine:consensus", "honest": "mean", "byzantine": "silent"}
    )
    outcome = host.run(table, options=Options(progress=False))
    store = outcome.run_dir / "artifacts" / "events"
    for path in store.iterdir():
        assert set(read_transcript(path).policies) == {"mean", "silent"}
    # Both cells are now the same games: one log each, whole.
    assert len(list(store.iterdir())) == 5


def test_language_models_without_a_model_stop_the_run(host):
    table = run_table()
    table["datasets"]["games"]["honest"] = {"use": "llm"}
    table["datasets"]["games"]["grid"] = {}
    with pytest.raises(NoModelError, match=r"\[models\.honest\]"):
        host.run(table, options=Options(progress=False))


def test_an_algorithm_outside_its_bound_fails_its_games_alone(host):
    table = run_table()
    table["datasets"]["games"]["grid"] = {"honest.use": ["low-median", "phase-king:f=2"]}
    table["datasets"]["games"]["game"] = {**BASE["game"], "max_rounds": 8}
    outcome = host.run(table, options=Options(progress=False))
    assert (outcome.done, outcome.failed, outcome.exit_code) == (5, 5, 5)
    assert "phase-king" in outcome.message
    table["evaluator"] = {**table["evaluator"], "unsafe": True}
    assert host.run(table, options=Options(progress=False)).failed == 0


def test_the_base_cell_and_the_taxonomy_can_be_chosen(tmp_path):
    context = FakeContext(tmp_path)
    games = Games(game=BASE["game"], honest=BASE["honest"], byzantine=BASE["byzantine"],
                  grid=GRID, replicates=4)  # fmt: skip
    items = list(Consensus().plan(context, {"games": games}))
    results = list(Consensus().run(context, {}, items))
    metrics = Consensus(base="honest=mean").aggregate(context, results)
    assert {m.group for m in metrics if m.name == "fisher_p"} == {"honest=low-median"}
    text = Consensus(taxonomy="paper-text").aggregate(context, results)
    assert {"valid", "invalid", "no_consensus"} <= {m.name for m in text}
    with pytest.raises(ConfigError, match="did you mean 'honest=mean'"):
        Consensus(base="honest=men").aggregate(context, results)
    with pytest.raises(ConfigError, match="did you mean 'paper-text'"):
        Consensus(taxonomy="paper-txt")


def test_games_of_a_file_and_of_a_preset(tmp_path):
    (tmp_path / "game.toml").write_text(tomli_w.dumps(BASE))
    [record] = Games(str(tmp_path / "game.toml")).load()
    assert record.id == "all#0"
    config = GameConfig.from_table(record.settings)
    assert (config.n_honest, config.honest[0].use) == (5, "low-median")
    sweep = {"base": "game.toml", "replicates": 3, "grid": GRID, "seed": 9}
    (tmp_path / "sweep.toml").write_text(tomli_w.dumps(sweep))
    games = Games(str(tmp_path / "sweep.toml"), game={"n_honest": 7})
    assert len(games) == len(list(games.load())) == 6
    assert {GameConfig.from_table(r.settings).n_honest for r in games.load()} == {7}
    assert games.fingerprint() != Games(str(tmp_path / "sweep.toml")).fingerprint()
    assert len(Games(preset="paper-q2")) == 125
    json.dumps(next(iter(Games(preset="paper-q2").load())).to_json())
    with pytest.raises(ConfigError, match="keep one"):
        Games(str(tmp_path / "sweep.toml"), preset="smoke")
    with pytest.raises(ConfigError, match="there is no game or sweep file"):
        Games("nowhere.toml")
    with pytest.raises(ConfigError, match="no split 'train'"):
        list(games.load("train"))


def test_a_transcript_is_the_game_that_was_played(host):
    outcome = host.run(run_table(), options=Options(progress=False))
    for values in rows_of(outcome).values():
        path = outcome.run_dir / "artifacts" / "events" / f"{values['game_id']}.jsonl"
        found = read_transcript(path)
        assert found.complete
        result = found.result
        assert (result.outcome.value, result.rounds) == (values["outcome"], values["rounds"])
        assert result.state_hash == values["state_hash"]
        assert result.proposed[0][result.honest[0]] == result.initial[result.honest[0]]
        assert re.match(r"Round 1: .*hold .*; votes: ", round_line(found, 1))
        lines = path.read_bytes().splitlines(keepends=True)
        torn = path.with_name("torn.jsonl")
        torn.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
        cut = read_transcript(torn)
        assert (cut.complete, cut.result.error) == (False, "the game was cut off")
        assert cut.result.held == result.held
        torn.unlink()


def test_the_plugin_conforms():
    found = check_plugin("byzantine", params={"byzantine:games": {**BASE, "replicates": 3}})
    assert not [f.line() for f in found if f.status == "fail"]
