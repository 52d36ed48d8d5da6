"""Several processes: equal items, checked world size, resume under another process count."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tomli_w
from tenfold.errors import RunFailed
from tenfold.run import Options
from tenfold.scale.launch import this_process
from tenfold.store import RunStore

pytest.importorskip("torch")


def items(path):
    return [(line.index, line.id, line.key, line.values) for line in RunStore(path).ordered_lines()]


@pytest.fixture
def file(workspace_dir, table):
    path = workspace_dir / "run.toml"
    path.write_text(tomli_w.dumps(table(dataset={"use": "toy:numbers", "size": 17})))
    return path


def test_two_processes_give_the_items_of_one(cli, host, file):
    whole = host.run(file, options=Options(progress=False))
    done = cli("run", file, "--quiet", "--json", "--set", "scale.processes=2", check=0)
    answer = json.loads(done.stdout)
    assert items(Path(answer["run_dir"])) == items(whole.run_dir)
    assert answer["items"] == {"done": 17, "failed": 0, "reused": 0}
    store = RunStore(Path(answer["run_dir"]))
    assert store.read_json("run.json")["scale"]["obtained"]["processes"] == 2
    assert len(store.item_files()) == 2


def test_two_processes_train_one_checkpoint(cli, workspace_dir, table):
    log = workspace_dir / "log"
    train = {"use": "toy:learn", "word": "abc", "log": str(log)}
    path = workspace_dir / "train.toml"
    path.write_text(
        tomli_w.dumps(table(model={"use": "toy:upper", "train": train}, scale={"processes": 2}))
    )
    done = cli("run", path, "--quiet", "--json", check=0)
    assert json.loads(done.stdout)["metrics"][0]["value"] == 4.0
    assert len(list((workspace_dir / "checkpoints").glob("toy-learn-*"))) == 1


def test_failures_of_all_processes_count(cli, workspace_dir, table):
    path = workspace_dir / "run.toml"
    evaluator = {"use": "toy:lengths", "fail": ["n0", "n1", "n2"]}
    path.write_text(tomli_w.dumps(table(evaluator=evaluator, scale={"processes": 2})))
    done = cli("run", path, "--quiet", "--json")
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["items"]["failed"], answer["items"]["done"]) == (5, 3, 2)


@pytest.mark.parametrize(("obtained", "expected"), [("1", 2), ("4", 2)])
def test_another_world_size_than_asked_for_is_an_error(monkeypatch, obtained, expected):
    monkeypatch.setenv("WORLD_SIZE", obtained)
    with pytest.raises(RunFailed, match=f"asked for {expected} processes and got {obtained}"):
        this_process(expected)


def test_accelerate_that_starts_one_process_is_an_error(cli, workspace_dir, file):
    """Accelerate's CPU configuration silently starts one process; the run must not."""
    config = workspace_dir / "accelerate.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nuse_cpu: true\n"
        "num_processes: 2\nnum_machines: 1\nmachine_rank: 0\nmixed_precision: 'no'\n"
    )
    done = cli(
        "run", file, "--quiet", "--set", "scale.processes=2", "--set",
        "scale.launcher=accelerate", "--set", f"scale.config={config}",
    )  # fmt: skip
    assert done.returncode == 1
    assert "asked for 2 processes and got 1" in done.stderr
    assert "Traceback" not in done.stderr


def test_worker_is_told_how_many_processes_to_expect(cli, file, host):
    first = host.run(file, options=Options(progress=False, limit=1))
    done = cli("worker", first.run_dir, "--expect", "2", "--resume", "--quiet")
    assert done.returncode == 1
    assert "asked for 2 processes and got 1" in done.stderr
    assert sys.executable not in done.stderr
