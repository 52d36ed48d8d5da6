"""Running: records, failures, resume, shards, sharing, training cache."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w
from tenfold.errors import CapabilityError, ComponentError, ConfigError, RunFailed
from tenfold.files import drop_torn_tail
from tenfold.host import Host
from tenfold.run import Options
from tenfold.store import RunStore

QUIET = Options(progress=False)


def items(path):
    return [(line.index, line.id, line.values) for line in RunStore(path).ordered_lines()]


def test_run_writes_a_complete_record(host, table):
    outcome = host.run(table(), options=QUIET)
    assert outcome.exit_code == 0
    assert (outcome.done, outcome.failed, outcome.reused) == (5, 0, 0)
    assert outcome.metrics[0].value == 1.0
    for name in (
        "run.json",
        "config.toml",
        "source.toml",
        "items.jsonl",
        "events.jsonl",
        "metrics.json",
        "report.html",
        "report.md",
    ):
        assert (outcome.run_dir / name).is_file(), name
    assert (outcome.run_dir / "STATUS").read_text() == "ok\n"
    record = json.loads((outcome.run_dir / "run.json").read_text())
    assert record["counts"] == {"done": 5, "failed": 0, "reused": 0}
    assert record["components"]["models"]["model"]["id"] == "toy:upper"
    assert record["fingerprints"]["datasets"]["dataset"]
    assert record["peak_memory"]["rss_bytes"] > 0
    assert set(record["seconds"]) == {"build", "plan", "run", "aggregate", "report"}


def test_recorded_config_gives_the_same_run(host, table):
    first = host.run(table(), options=QUIET)
    second = host.run(first.run_dir / "config.toml", options=QUIET)
    assert items(first.run_dir) == items(second.run_dir)


@pytest.mark.parametrize("batch", [1, 2, 5, 7])
def test_only_the_guilty_item_of_a_batch_fails(host, table, batch):
    evaluator = {"use": "toy:lengths", "batch": batch, "fail": ["n2"]}
    outcome = host.run(table(evaluator=evaluator), options=QUIET)
    assert outcome.exit_code == 5
    assert (outcome.done, outcome.failed) == (4, 1)
    assert [row[1] for row in items(outcome.run_dir)] == ["n0", "n1", "n3", "n4"]
    [failure] = (outcome.run_dir / "failures.jsonl").read_text().splitlines()
    assert "cannot work on n2" in json.loads(failure)["error"]
    assert "n2" in outcome.message


def test_allowed_failures_end_well(host, table):
    evaluator = {"use": "toy:lengths", "fail": ["n2"]}
    outcome = host.run(table(evaluator=evaluator, limits={"max_failures": 1}), options=QUIET)
    assert outcome.exit_code == 0
    assert outcome.failed == 1


def test_slow_item_times_out_and_the_run_goes_on(host, table):
    evaluator = {"use": "toy:lengths", "slow": 0.3}
    limits = {"item_timeout_s": 0.05, "max_failures": 9}
    outcome = host.run(table(evaluator=evaluator, limits=limits), options=QUIET)
    assert outcome.failed == 5
    assert "item_timeout_s" in (outcome.run_dir / "failures.jsonl").read_text()


def test_resume_runs_only_what_is_missing(host, table, tmp_path):
    trace = tmp_path / "trace"
    evaluator = {"use": "toy:lengths", "trace": str(trace)}
    first = host.run(table(evaluator=evaluator), options=Options(progress=False, limit=2))
    again = host.resume(str(first.run_dir), Options(progress=False, limit=5))
    assert (again.done, again.reused) == (3, 2)
    assert trace.read_text().split() == ["n0", "n1", "n2", "n3", "n4"]
    whole = host.run(table(evaluator=evaluator), options=QUIET)
    assert items(first.run_dir) == items(whole.run_dir)
    assert again.metrics == whole.metrics


def test_resume_retries_failed_items(host, table, workspace_dir):
    evaluator = {"use": "toy:lengths", "fail": ["n1"]}
    first = host.run(table(evaluator=evaluator), options=QUIET)
    again = host.resume(str(first.run_dir), QUIET)
    assert (again.done, again.reused, again.failed) == (0, 4, 1)
    assert again.exit_code == 5


def test_resume_refuses_changed_data(host, table, workspace_dir):
    salt = workspace_dir / "salt"
    salt.write_text("a")
    dataset = {"use": "toy:numbers", "salt": str(salt)}
    first = host.run(table(dataset=dataset), options=Options(progress=False, limit=2))
    salt.write_text("b")
    with pytest.raises(ConfigError, match=r"dataset 'dataset' changed since the run began"):
        host.resume(str(first.run_dir), QUIET)
    assert items(first.run_dir)  # nothing was lost


def test_shards_together_equal_the_whole(host, table):
    dataset = {"use": "toy:numbers", "size": 11}
    whole = host.run(table(dataset=dataset), options=QUIET)
    shards = [
        host.run(table(dataset=dataset), options=Options(progress=False, shard=(i, 3)))
        for i in range(3)
    ]
    from tenfold.rescore import merge

    merged = merge(host, [RunStore(s.run_dir) for s in shards])
    assert items(merged.run_dir) == items(whole.run_dir)
    assert merged.metrics == whole.metrics


def test_run_in_use_is_refused(host, table):
    first = host.run(table(), options=Options(progress=False, limit=1))
    store = RunStore(first.run_dir)
    store.lock()
    with pytest.raises(ConfigError, match=r"in use by process"):
        host.resume(str(first.run_dir), QUIET)
    store.unlock()
    assert host.resume(str(first.run_dir), QUIET).exit_code == 0


def test_equal_components_are_one_object(host, table):
    from tenfold.build import Builder
    from tenfold.context import RunContext

    nested = table(
        models={
            "model": {"use": "toy:twice", "base": {"use": "toy:upper", "prefix": "x"}},
            "other": {"share": "model.base"},
        }
    )
    del nested["model"]
    plan = host.plan(host.resolve(nested))
    context = RunContext(0, "cpu", "float32", host.runs, host.runs, host.runs)
    builder = Builder(plan, context, host.workspace)
    model = builder.build(plan.models["model"])
    assert builder.build(plan.models["other"]) is model.base


def test_decoder_runs_over_its_base(host, table):
    model = {"use": "toy:twice", "base": {"use": "toy:upper", "prefix": "abc"}}
    outcome = host.run(table(model=model), options=QUIET)
    assert outcome.metrics[0].value == 8.0


def test_train_once_then_reuse_the_checkpoint(host, table, workspace_dir):
    log = workspace_dir / "log"
    model = {"use": "toy:upper", "train": {"use": "toy:learn", "word": "abc", "log": str(log)}}
    first = host.run(table(model=model), options=QUIET)
    second = host.run(table(model=model), options=QUIET)
    assert first.metrics == second.metrics
    assert first.metrics[0].value == 4.0
    assert log.read_text() == "trained\n"
    trained = json.loads((second.run_dir / "run.json").read_text())["trained"]["models.model"]
    assert trained["reused"] is True
    changed = {"use": "toy:upper", "train": {**model["train"], "word": "abcd"}}
    assert host.run(table(model=changed), options=QUIET).metrics[0].value == 5.0
    other_data = {**model["train"], "dataset": {"use": "toy:numbers", "size": 6}}
    host.run(table(model={"use": "toy:upper", "train": other_data}), options=QUIET)
    assert log.read_text() == "trained\n" * 3


def test_model_with_a_default_trainer_trains_itself(host, table):
    assert host.run(table(model={"use": "toy:learner"}), options=QUIET).metrics[0].value == 3.0


def test_trainer_run_leaves_a_checkpoint(host, table):
    training = table(trainer={"use": "toy:learn", "word": "w"})
    for key in ("evaluator", "model", "dataset"):
        del training[key]
    outcome = host.run(training, options=QUIET)
    assert (outcome.checkpoint / "prefix.txt").read_text() == "w"
    assert outcome.metrics[0].name == "loss"


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("toy:broken", ComponentError, "building toy:broken .* no luck"),
        ("toy:lies", ComponentError, "provides 'generate', but the built object has no generate"),
        ("toy:missing", ComponentError, "'no_such_module', which is not installed(.|\n)*toy"),
    ],
)
def test_component_that_does_not_build_is_one_clear_error(host, table, model, error, message):
    with pytest.raises(error, match=message):
        host.run(table(model={"use": model}), options=QUIET)


def test_values_that_are_no_json_name_the_item(host, table, monkeypatch):
    import toy_components
    from tenfold.records import ItemResult

    def run(self, ctx, models, work):
        for item in work:
            yield ItemResult(item.id, {"length": object()})

    monkeypatch.setattr(toy_components.Lengths, "run", run)
    with pytest.raises(RunFailed, match=r"'n0'.*cannot be written as JSON"):
        host.run(table(), options=QUIET)


def test_component_that_cannot_work_ends_the_run(host, table, monkeypatch):
    import toy_components

    asked = []

    def generate(self, prompts, config):
        asked.append(prompts)
        raise ComponentError("the endpoint is down")

    monkeypatch.setattr(toy_components.Upper, "generate", generate)
    with pytest.raises(ComponentError, match="the endpoint is down"):
        host.run(table(), options=QUIET)
    assert len(asked) == 1


def test_capability_mismatch_is_found_before_anything_is_built(host, table):
    with pytest.raises(CapabilityError, match=r"'grad' of models.model.*toy:broken"):
        host.run(table(model={"use": "toy:broken"}, evaluator={"use": "toy:gradients"}))


def test_full_disk_is_one_clear_error(cli, workspace_dir, table):
    big = table(dataset={"use": "toy:numbers", "size": 3000})
    (workspace_dir / "run.toml").write_text(tomli_w.dumps(big))
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000));"
        "from tenfold.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, "run", "run.toml", "--quiet"],
        capture_output=True,
        text=True,
        cwd=workspace_dir,
    )
    assert done.returncode == 1, done.stderr
    assert "no space left while writing" in done.stderr
    assert "Traceback" not in done.stderr
    cli("run", "run.toml", "--resume", "--quiet", check=0)
    [path] = (workspace_dir / "runs" / "toy").iterdir()
    assert [row[0] for row in items(path)] == list(range(3000))


def test_killed_runs_lose_and_double_nothing(cli, workspace_dir, table):
    size, rng = 60, random.Random(5)
    dataset = {"use": "toy:numbers", "size": size}
    file = workspace_dir / "run.toml"
    file.write_text(tomli_w.dumps(table(dataset=dataset)))
    whole = Host().run(file, options=QUIET)
    file.write_text(tomli_w.dumps(table(name="killed", dataset=dataset)))
    for kill in range(20):
        _run_and_kill(file, workspace_dir, rng.uniform(0, 4), first=kill == 0)
    cli("run", file, "--resume", "--quiet", check=0)
    store = RunStore(_only(workspace_dir / "runs/killed"))
    assert items(store.path) == items(whole.run_dir)
    written = [json.loads(line)["id"] for line in (store.path / "items.jsonl").open()]
    assert sorted(written) == sorted(f"n{i}" for i in range(size))
    assert store.read_json("metrics.json") == RunStore(whole.run_dir).read_json("metrics.json")


def _only(folder):
    [path] = folder.iterdir()
    return path


def _run_and_kill(file, folder, wanted, *, first):
    """Starts or resumes the run; kills it in the middle of writing an item's line.

    `wanted` whole items are written first; its fraction says how much of the next line is.
    """
    script = f"""
import io, os, signal, sys
from tenfold import files
append, count = files.LineFile.append, [0]
def dying(self, row):
    if count[0] >= {int(wanted)}:
        files.drop_torn_tail(self._path)
        text = files.json.dumps(row)
        with self._path.open("a") as file:
            file.write(text[: int(len(text) * {wanted % 1})])
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, row)
    count[0] += 1
files.LineFile.append = dying
from tenfold.cli import main
sys.exit(main(sys.argv[1:]))
"""
    arguments = ["run", str(file), "--quiet", *([] if first else ["--resume"])]
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=folder)
    assert done.returncode == -9


def test_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_bytes(b'{"a":1}\n{"b":2}\n{"c"')
    drop_torn_tail(path)
    assert path.read_bytes() == b'{"a":1}\n{"b":2}\n'
    path.write_bytes(b"no newline at all")
    drop_torn_tail(path)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_items_do_not_depend_on_hash_seed_or_batch(cli, host, workspace_dir, table, hash_seed):
    file = workspace_dir / "run.toml"
    file.write_text(tomli_w.dumps(table(dataset={"use": "toy:numbers", "size": 23})))
    whole = host.run(file, options=QUIET)
    done = cli(
        "run",
        file,
        "--quiet",
        "--json",
        "--set",
        "evaluator.batch=4",
        check=0,
        PYTHONHASHSEED=hash_seed,
    )
    path = Path(json.loads(done.stdout)["run_dir"])
    assert items(path) == items(whole.run_dir)
    keys = [[line.key for line in RunStore(p).ordered_lines()] for p in (path, whole.run_dir)]
    assert keys[0] == keys[1]


def test_interrupted_run_is_resumable(cli, workspace_dir, table):
    file = workspace_dir / "run.toml"
    evaluator = {"use": "toy:lengths", "slow": 0.05}
    dataset = {"use": "toy:numbers", "size": 40}
    file.write_text(tomli_w.dumps(table(dataset=dataset, evaluator=evaluator)))
    process = subprocess.Popen(
        [sys.executable, "-m", "tenfold", "run", str(file), "--quiet"],
        cwd=workspace_dir,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not list(workspace_dir.glob("runs/toy/*/items.jsonl")):
        time.sleep(0.05)
    process.terminate()
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert "tenfold run --resume" in stderr
    path = _only(workspace_dir / "runs/toy")
    assert RunStore(path).status == "interrupted"
    cli("run", "--resume", path, "--quiet", check=0)
    assert [row[0] for row in items(path)] == list(range(40))


def test_observer_that_fails_is_silenced(capsys):
    from tenfold.observers import Observers

    seen = []

    class Bad:
        @staticmethod
        def tenfold_item_end(run, item):
            raise ValueError("no")

    class Good:
        @staticmethod
        def tenfold_item_end(item):
            seen.append(item)

    observers = Observers([("bad", Bad), ("good", Good)])
    observers.item_end({}, {"id": 1})
    observers.item_end({}, {"id": 2})
    assert seen == [{"id": 1}, {"id": 2}]
    assert capsys.readouterr().err.count("no longer watches") == 1
