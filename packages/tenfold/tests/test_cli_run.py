"""The commands that run: output, exit codes, and every mistake in one clear message."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
from tenfold.store import RunStore


@pytest.fixture
def file(workspace_dir, table):
    path = workspace_dir / "run.toml"
    path.write_text(tomli_w.dumps(table()))
    return path


def write(workspace_dir, table, **changes):
    path = workspace_dir / "run.toml"
    path.write_text(tomli_w.dumps(table(**changes)))
    return path


def test_json_is_one_object_and_nothing_else(cli, file):
    done = cli("run", file, "--json", check=0)
    answer = json.loads(done.stdout)
    assert answer["status"] == "ok"
    assert Path(answer["run_dir"]).is_dir()
    assert answer["metrics"][0]["name"] == "mean_length"
    assert answer["items"]["done"] == 5


def test_installed_script_is_the_same_program(file, workspace_dir):
    script = Path(sys.executable).parent / "tenfold"
    outputs = [
        subprocess.run([*command, "show", "toy:lengths"], capture_output=True, text=True).stdout
        for command in ([sys.executable, "-m", "tenfold"], [str(script)])
    ]
    assert outputs[0] == outputs[1] != ""


def test_runs_go_to_the_current_folder_outside_a_workspace(cli, workspace_dir, file):
    (workspace_dir / "workspace.toml").unlink()
    answer = json.loads(cli("run", file, "--json", check=0).stdout)
    assert Path(answer["run_dir"]).parent.parent == workspace_dir / "runs"


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"model": {"use": "toy:uper"}}, 3, "did you mean"),
        ({"evaluator": {"use": "toy:lengths", "factr": 1}}, 2, "did you mean 'factor'"),
        ({"evaluator": {"use": "toy:lengths", "factor": "x"}}, 2, "it must be a number"),
        ({"evaluator": {"use": "toy:lengths", "factor": 11}}, 2, "from 0 to 10"),
        ({"evaluator": {"use": "toy:gradients"}}, 4, "needs 'grad' of models.model"),
        ({"model": {"use": "toy:broken"}}, 3, "building toy:broken"),
        ({"evaluator": {"use": "toy:lengths", "fail": ["n1"]}}, 5, "1 items failed"),
        ({"model": {"use": "gone:model"}}, 3, "no plugin 'gone'"),
    ],
)
def test_mistake_has_its_exit_code_and_no_traceback(
    cli, workspace_dir, table, changes, code, message
):
    done = cli("run", write(workspace_dir, table, **changes), "--quiet")
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run",), "nothing to run"),
        (("run", "missing.toml"), "no such run file: missing.toml"),
        (("run", "--resume", "nothing"), "no run 'nothing'"),
        (("run", "run.toml", "--limit", "0"), "whole number of at least 1"),
        (("run", "run.toml", "--shard", "2/2"), "write I/K with 0 <= I < K"),
        (("run", "run.toml", "--set", "seed"), "table.key=value"),
        (("runs", "show", "nothing"), "no run 'nothing'"),
        (("train", "run.toml"), "has no [trainer]"),
        (("train",), "either a run file or --trainer"),
        (("eval", "--model", "toy:upper", "x", "--dataset", "toy:numbers", "--evaluator", "e"),
         "write key=value"),
    ],
)  # fmt: skip
def test_wrong_usage_is_exit_2(cli, file, arguments, message):
    done = cli(*arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_dry_run_shows_the_plan_and_runs_nothing(cli, workspace_dir, table):
    model = {"use": "toy:twice", "base": {"use": "toy:upper"}}
    path = write(workspace_dir, table, model=model)
    done = cli("run", path, "--dry-run", "--limit", "3", check=0)
    assert "models.model: toy:twice" in done.stdout
    assert "✓ generate" in done.stdout
    assert "at most 3" in done.stdout
    assert not (workspace_dir / "runs").exists()
    planned = json.loads(cli("run", path, "--dry-run", "--json", check=0).stdout)
    assert planned["checks"][0] == {
        "where": "models.model.base", "needs": "generate", "by": "toy:twice", "ok": True,
        "via": "own",
    }  # fmt: skip


def test_an_evaluator_may_tell_its_cost(cli, workspace_dir, table):
    path = write(workspace_dir, table, evaluator={"use": "toy:lengths", "factor": 5})
    done = cli("run", path, "--dry-run", "--limit", "3", check=0)
    assert "work:          1.00 of 3" in done.stdout
    planned = json.loads(cli("run", path, "--dry-run", "--json", check=0).stdout)
    assert planned["cost"] == {"work": "1.00 of None"}
    path = write(workspace_dir, table, evaluator={"use": "toy:lengths", "factor": 10})
    failed = cli("run", path, "--dry-run")
    assert failed.returncode == 3
    assert "cost estimate toy_components:cost failed: ZeroDivisionError" in failed.stderr


def test_dry_run_of_a_mismatch_shows_the_tree_and_exits_4(cli, workspace_dir, table):
    path = write(workspace_dir, table, evaluator={"use": "toy:gradients"})
    done = cli("run", path, "--dry-run")
    assert done.returncode == 4
    assert "✗ grad (missing)" in done.stdout


def test_eval_needs_no_run_file(cli):
    done = cli(
        "eval", "--model", "toy:upper", "prefix=ab", "--dataset", "toy:numbers", "size=3",
        "--evaluator", "toy:lengths", "--json", check=0,
    )  # fmt: skip
    assert json.loads(done.stdout)["metrics"][0]["value"] == 3.0


def test_train_names_a_trainer_and_leaves_a_checkpoint(cli):
    done = cli("train", "--trainer", "toy:learn", "word=xyz", "--json", check=0)
    checkpoint = Path(json.loads(done.stdout)["checkpoint"])
    assert (checkpoint / "prefix.txt").read_text() == "xyz"


def test_sweep_runs_every_point_and_resume_keeps_finished_ones(cli, workspace_dir, table):
    sweep = {"grid": {"model.prefix": ["", "a", "ab"]}}
    path = write(workspace_dir, table, sweep=sweep)
    assert cli("run", path).returncode == 2
    rows = json.loads(cli("sweep", path, "--json", check=0).stdout)
    assert [row["metrics"][0]["value"] for row in rows] == [1.0, 2.0, 3.0]
    again = json.loads(cli("sweep", path, "--resume", "--json", check=0).stdout)
    assert [row["run_dir"] for row in again] == [row["run_dir"] for row in rows]


def test_sweep_checks_every_point_before_it_runs_one(cli, workspace_dir, table):
    path = write(workspace_dir, table, sweep={"grid": {"evaluator.factor": [1.0, 99.0]}})
    assert cli("sweep", path).returncode == 2
    assert not (workspace_dir / "runs").exists()


def test_rerun_of_the_same_is_identical_and_of_a_change_is_not(cli, file):
    cli("run", file, "--quiet", check=0)
    assert "identical: 5 items" in cli("rerun", "toy", "--quiet", check=0).stdout
    changed = cli("rerun", "toy", "--quiet", "--set", "model.prefix=zz", check=0)
    assert "5 changed" in changed.stdout
    assert "metrics: mean_length: 1.0 → 3.0" in changed.stdout


def test_runs_are_listed_shown_compared_exported_and_removed(cli, file, workspace_dir):
    first = json.loads(cli("run", file, "--json", check=0).stdout)["run_dir"]
    second = json.loads(
        cli("run", file, "--json", "--set", "evaluator.factor=2", check=0).stdout
    )["run_dir"]  # fmt: skip
    listed = json.loads(cli("runs", "list", "--json", check=0).stdout)
    assert {row["path"] for row in listed} == {first, second}
    assert "mean_length" in cli("runs", "show", first, check=0).stdout
    difference = json.loads(cli("runs", "diff", first, second, "--json", check=0).stdout)
    assert difference["metrics"] == {"mean_length": [1.0, 2.0]}
    assert difference["items"]["equal"] == 5
    assert difference["config"] == {"components.task.params.factor": [1.0, 2.0]}
    cli("runs", "export", first, "-o", "items.csv", check=0)
    assert (workspace_dir / "items.csv").read_text().splitlines()[0] == "id,length,noise"
    cli("runs", "export", first, "-o", "items.jsonl", check=0)
    rows = [json.loads(line) for line in (workspace_dir / "items.jsonl").open()]
    assert [row["id"] for row in rows] == ["n0", "n1", "n2", "n3", "n4"]
    assert cli("runs", "rm", first).returncode == 2
    cli("runs", "rm", first, "--yes", check=0)
    assert not Path(first).exists()


def test_rescore_and_report_use_the_recorded_items(cli, file, workspace_dir):
    path = Path(json.loads(cli("run", file, "--json", check=0).stdout)["run_dir"])
    before = RunStore(path).read_json("metrics.json")
    (path / "metrics.json").unlink()
    (path / "report.html").unlink()
    cli("runs", "rescore", path, check=0)
    assert RunStore(path).read_json("metrics.json") == before
    cli("report", path, "-o", "out.md", check=0)
    assert r"mean\_length" in (workspace_dir / "out.md").read_text()
    cli("run", file, "--quiet", "--set", "model.prefix=q", check=0)
    ids = [row["id"] for row in json.loads(cli("runs", "list", "--json").stdout)]
    for name in ("c.html", "c.md", "c.csv"):
        cli("report", *ids, "-o", name, check=0)
        text = (workspace_dir / name).read_text().replace("\\_", "_")
        assert "mean_length" in text


def test_shards_merge_into_the_whole(cli, file):
    whole = json.loads(cli("run", file, "--json", check=0).stdout)
    shards = [
        json.loads(cli("run", file, "--json", "--shard", f"{i}/2", check=0).stdout)["run_dir"]
        for i in range(2)
    ]
    merged = json.loads(cli("runs", "merge", *shards, "--json", check=0).stdout)
    assert merged["metrics"] == whole["metrics"]
    assert merged["items"]["done"] == 5


def test_resume_of_changed_data_is_exit_2(cli, workspace_dir, table):
    salt = workspace_dir / "salt"
    salt.write_text("a")
    path = write(workspace_dir, table, dataset={"use": "toy:numbers", "salt": str(salt)})
    evaluator = "evaluator.fail=['n1']"
    assert cli("run", path, "--quiet", "--set", evaluator).returncode == 5
    salt.write_text("b")
    done = cli("run", path, "--quiet", "--resume", "--set", evaluator)
    assert done.returncode == 2
    assert "changed since the run began" in done.stderr
