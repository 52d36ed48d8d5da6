"""Sweeps: what is played, what is kept, and that interruptions change nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tenfold.errors import ConfigError
from tenfold.stats import wilson
from tenfold_byzantine.contracts import Ballot, Proposal
from tenfold_byzantine.grid import SweepPlan, differences
from tenfold_byzantine.presets import PRESETS, preset_table
from tenfold_byzantine.roster import NoModelError, Roster, by_role
from tenfold_byzantine.rows import table_text
from tenfold_byzantine.statistics import halfwidth
from tenfold_byzantine.summary import collect
from tenfold_byzantine.sweep import Sweep

TABLE = {
    "base": {
        "game": {"n_honest": 5, "n_byzantine": 1, "max_rounds": 6},
        "honest": {"use": "low-median"},
        "byzantine": {"use": "random"},
    },
    "replicates": 6,
    "seed": 11,
    "grid": {"honest.use": ["low-median", "mean"], "game.n_byzantine": [1, 2]},
}
TOML = """
base = "game.toml"
replicates = 4
seed = 2026
[grid]
"game.n_byzantine" = [0, 1]
[stop]
max_games_per_cell = 40
until_halfwidth = 0.2
[out]
dir = "q2"
keep_prompts = "none"
"""
GAME = """
[game]
n_honest = 4
max_rounds = 5
[honest]
use = "low-median"
[byzantine]
use = "collude:v=25"
"""


def plan(**changes):
    return SweepPlan.from_table({**TABLE, **changes}, name="t")


class Flaky:
    """Plays like low-median, but fails for games whose agent_0 begins with an even value."""

    label = "flaky"
    powers = frozenset()

    def __init__(self, broken=True):
        self.broken, self.calls = broken, 0

    def check(self, rules):
        del rules

    def decide_many(self, views):
        self.calls += 1
        if self.broken and any(v.round == 1 and v.agent == 0 and v.initial % 2 == 0 for v in views):
            raise RuntimeError("the backend is down")
        return [Proposal(sorted(v.values() or [v.initial])[0]) for v in views]

    def vote_many(self, views):
        return [Ballot("stop" if len(set(v.values())) == 1 else "continue") for v in views]


class Team(Roster):
    """A roster whose honest side is one given policy."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def _policy(self, group, role, config):
        return self.policy if role == "honest" else super()._policy(group, role, config)


def test_a_sweep_file_is_read_with_its_game(tmp_path):
    (tmp_path / "game.toml").write_text(GAME)
    (tmp_path / "q2.toml").write_text(TOML)
    found = SweepPlan.from_toml(tmp_path / "q2.toml")
    assert (found.name, found.replicates, found.most, found.keep_prompts) == ("q2", 4, 40, "none")
    assert [c.label for c in found.cells] == ["n_byzantine=0", "n_byzantine=1"]
    assert [c.config.agents for c in found.cells] == [4, 5]
    assert found.out == Path("q2")
    assert SweepPlan.from_table(found.to_table(), name="q2").digest == found.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replicates": 0}, "replicates is 0; it must be at least 1"),
        ({"grid": {"honst.use": ["mean"]}}, "did you mean 'honest'"),
        ({"grid": {"honest.use": []}}, "has no values"),
        ({"grid": {"game.seed": [1, 1]}}, "a value twice"),
        ({"grid": {"game.n_byzantin": [1]}}, "did you mean 'n_byzantine'"),
        ({"grid": {"game.quota": [2.0]}}, r"t \(quota=2.0\).*outside of \(0, 1\]"),
        ({"stop": {"until_halfwidth": 0.7}}, "between 0 and 0.5"),
        ({"stop": {"until": 0.1}}, "stop.until is not a setting"),
        ({"stop": {"max_games_per_cell": 2}}, "must be at least 6"),
        ({"out": {"keep_prompts": "ful"}}, "did you mean 'full'"),
        ({"paired": "yes"}, "paired is 'yes'; it must be true or false"),
        ({"base": "nowhere.toml"}, "there is no game file nowhere.toml"),
        ({"grids": {}}, "did you mean 'grid'"),
        ({"grid": {"game.seed": list(range(101)), "game.max_rounds": list(range(1, 101))}},
         "10,100 cells"),
    ],
)  # fmt: skip
def test_a_wrong_sweep_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        _ = plan(**change).cells


def test_every_preset_plans():
    sizes = {name: [len(SweepPlan.from_table(preset_table(name)).cells),
                    preset_table(name)["replicates"]] for name in PRESETS}  # fmt: skip
    assert sizes == {
        "paper-q1": [6, 50], "paper-q2": [5, 25], "prompts-q3": [3, 35], "smoke": [8, 25],
    }  # fmt: skip


def test_paired_replicates_share_roles_and_initial_values(tmp_path):
    rows = Sweep(plan(), tmp_path / "a").run(Roster())
    assert len(rows) == 24
    seeds = {row["replicate"]: row["seed"] for row in rows}
    assert all(row["seed"] == seeds[row["replicate"]] for row in rows)
    starts = {}
    for row in rows:
        path = next((tmp_path / "a" / "events").glob(f"{row['game_id']}.jsonl"))
        first = json.loads(path.read_text().splitlines()[0])
        shared = [first["roles"], first["initial"]]
        if row["n_byzantine"] == 1:
            assert starts.setdefault(row["replicate"], shared) == shared
    apart = Sweep(plan(paired=False), tmp_path / "b").run(Roster())
    assert len({row["seed"] for row in apart}) == 24


def test_waves_shards_and_hash_seeds_change_nothing(tmp_path):
    whole = Sweep(plan(), tmp_path / "whole")
    rows = whole.run(Roster(), width=64)
    narrow = Sweep(plan(), tmp_path / "narrow").run(Roster(), width=1)
    assert narrow == rows
    parts = Sweep(plan(), tmp_path / "parts")
    for i in (2, 0, 1):
        parts.run(Roster(), shard=(i, 3), keep_events=False)
    assert parts.table() == rows
    assert parts.complete
    assert parts.write_table().read_bytes() == whole.write_table().read_bytes()
    script = (
        "import sys, json; from tenfold_byzantine.sweep import Sweep; "
        "from tenfold_byzantine.grid import SweepPlan; from tenfold_byzantine.roster import Roster;"
        "s = Sweep(SweepPlan.from_table(json.loads(sys.argv[1]), name='t'), sys.argv[2]); "
        "s.run(Roster()); s.write_table()"
    )
    for seed in ("1",):
        folder = tmp_path / f"hash{seed}"
        subprocess.run(
            [sys.executable, "-c", script, json.dumps(TABLE), str(folder)],
            env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
        )  # fmt: skip
        assert (folder / "table.csv").read_bytes() == (tmp_path / "whole/table.csv").read_bytes()
        for path in sorted((folder / "events").iterdir()):
            assert path.read_bytes() == (tmp_path / "whole/events" / path.name).read_bytes()


def test_killed_at_random_and_resumed_gives_the_same_table(tmp_path):
    """Three kills in the middle of writing a line, at random bytes."""
    expected = table_text(Sweep(plan(), tmp_path / "whole").run(Roster()))
    draw, folder = random.Random(5), tmp_path / "killed"
    script = """
import json, os, signal, sys
from tenfold import files
from tenfold_byzantine.grid import SweepPlan
from tenfold_byzantine.roster import Roster
from tenfold_byzantine.sweep import Sweep
append, left = files.LineFile.append, [int(sys.argv[3])]
def dying(self, row):
    if left[0] == 0:
        files.drop_torn_tail(self._path)
        text = json.dumps(row)
        with self._path.open("a") as file:
            file.write(text[: int(len(text) * float(sys.argv[4]))])
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, row)
    left[0] -= 1
files.LineFile.append = dying
Sweep(SweepPlan.from_table(json.loads(sys.argv[1]), name="t"), sys.argv[2]).run(
    Roster(), resume=True, width=3
)
"""
    for _ in range(3):
        arguments = [json.dumps(TABLE), str(folder), str(draw.randrange(0, 5)), str(draw.random())]
        done = subprocess.run([sys.executable, "-c", script, *arguments], check=False)
        assert done.returncode == -signal.SIGKILL
    sweep = Sweep(plan(), folder)
    assert not sweep.complete
    assert table_text(sweep.run(Roster(), resume=True)) == expected


def test_stopping_by_width_counts_replicates_in_order(tmp_path):
    """The number of games per cell is the first prefix that is narrow enough, by brute force."""
    stop = {"until_halfwidth": 0.17, "max_games_per_cell": 40}
    rows = Sweep(plan(stop=stop), tmp_path / "a").run(Roster(), width=7, keep_events=False)
    full = Sweep(plan(replicates=40), tmp_path / "full").run(Roster(), keep_events=False)
    for cell, whole in zip(collect(rows), collect(full), strict=True):
        valid = [whole.valid_by_replicate[r] for r in range(40)]
        narrow = [n for n in range(6, 41) if halfwidth(sum(valid[:n]), n) <= 0.17]
        assert cell.games == min([*narrow, 40])
        interval = wilson(*cell.valid)
        assert interval is not None
        assert cell.games == 40 or (interval[1] - interval[0]) / 2 <= 0.17
    assert len({cell.games for cell in collect(rows)}) > 1
    sharded = Sweep(plan(stop=stop), tmp_path / "b")
    for i in range(2):
        sharded.run(Roster(), shard=(i, 2), keep_events=False)
    assert sharded.table() == rows


def test_a_sweep_can_be_made_wider_later(tmp_path):
    first = Sweep(plan(replicates=2), tmp_path).run(Roster())
    more = Sweep(plan(replicates=3), tmp_path).run(Roster(), resume=True)
    assert (len(first), len(more)) == (8, 12)
    assert [row for row in more if row["replicate"] < 2] == first
    assert Sweep.open(tmp_path).plan.replicates == 3


def test_a_failing_backend_loses_no_game_and_is_tried_again(tmp_path):
    policy = Flaky()
    sweep = Sweep(plan(grid={}, replicates=12), tmp_path)
    rows = sweep.run(Team(policy), width=4)
    [cell] = collect(rows)
    assert 0 < cell.errors < 12
    assert cell.errors + cell.games == 12
    assert {row["error"] for row in rows} == {"", "RuntimeError: the backend is down"}
    policy.broken = False
    before = [row for row in rows if not row["error"]]
    again = sweep.run(Team(policy), resume=True)
    assert [row for row in again if row in before] == before
    assert collect(again)[0].errors == 0


def test_resuming_refuses_what_changed(tmp_path):
    Sweep(plan(), tmp_path).run(Roster(), keep_events=False)
    with pytest.raises(ConfigError, match="already holds 24 games"):
        Sweep(plan(), tmp_path).run(Roster())
    base = {**TABLE["base"], "game": {**TABLE["base"]["game"], "max_rounds": 9}}
    with pytest.raises(ConfigError, match=r"base\.game\.max_rounds: 6 → 9"):
        Sweep(plan(base=base), tmp_path).run(Roster(), resume=True)
    single = Sweep(plan(grid={}, replicates=2), tmp_path / "players")
    single.run(Team(Flaky(broken=False)))
    with pytest.raises(ConfigError, match="a model, its prompts or the package changed"):
        single.run(Roster(), resume=True)
    path = tmp_path / "games.jsonl"
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(ConfigError, match=r"games\.jsonl, line 1 is damaged"):
        Sweep(plan(), tmp_path).table()
    with pytest.raises(ConfigError, match="shard 4/3 does not exist"):
        Sweep(plan(), tmp_path).run(Roster(), shard=(4, 3))
    with pytest.raises(ConfigError, match="says not where"):
        Sweep(plan())


def test_policies_are_made_once_and_refused_clearly():
    roster = Roster()
    cells = plan().cells
    policies = {id(p) for c in cells for p in roster.cast(c.config).seats["honest"]}
    assert len(policies) == 2
    with pytest.raises(NoModelError, match="there is no model"):
        roster.cast(replace(cells[0].config, honest=(), n_honest=3))
    named = {"honest.group": [[{"count": 5, "use": "llm", "backend": {"role": "judg"}}]]}
    grouped = plan(grid=named, base={**TABLE["base"], "honest": {"use": "mixed"}})
    with pytest.raises(NoModelError, match="did you mean 'judge'"):
        Roster(by_role({"judge": object()})).cast(grouped.cells[0].config)


def test_differences_are_told_by_setting():
    assert list(differences({"a": {"b": 1}, "c": [1]}, {"a": {"b": 2}, "d": 3})) == [
        "a.b: 1 → 2", "c: [1] → (not set)", "d: (not set) → 3",
    ]  # fmt: skip
