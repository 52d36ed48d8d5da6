"""One corpus shared by processes: losses bit for bit those of one; killed passes go on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tenfold.errors import ComponentError, ConfigError, RunFailed
from tenfold.scale.deepspeed import deepspeed_config
from tenfold.store import RunStore
from tenfold_dabgo.settings import AttributionSettings
from tenfold_dabgo.shards import ShardStore
from tenfold_dabgo.team import Team, explain_failure
from tenfold_dabgo.zero3 import check_settings, spread

SUPPORT = Path(__file__).parent / "support"
sys.path.insert(0, str(SUPPORT))
import tiny_checkpoint
from attribute_worker import attribute


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny_checkpoint.write(tmp_path_factory.mktemp("files"))


@pytest.fixture
def folder(files, tmp_path):
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    return tmp_path


def work(folder, *settings, processes=1, launcher="torchrun", config="", check=True):
    """Runs the worker as the host's launcher would."""
    environment = {
        **os.environ,
        "TENFOLD_LAUNCHER": launcher,
        "TENFOLD_SCALE_CONFIG": str(config),
        "OMP_NUM_THREADS": "1",
        # DeepSpeed compiles a small operator at first use and looks for ninja on PATH.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    if launcher == "deepspeed":
        environment |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        command += [str(processes)]
    command += [str(SUPPORT / "attribute_worker.py"), str(folder), *settings]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    if check:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done


def values(folder):
    """Query id → values of all processes."""
    rows = [row for p in sorted(folder.glob("values-*.json")) for row in json.loads(p.read_text())]
    assert all(error is None for _, _, error in rows), rows
    return {name: value for name, value, _ in sorted(rows)}


def losses(folder):
    """Artifact → arrays, of all queries."""
    found = {}
    for path in sorted((folder / "run/artifacts/scores").glob("*.npz")):
        with np.load(path) as arrays:
            found[path.name] = {name: arrays[name] for name in arrays.files}
    return found


def assert_same_losses(one, other):
    assert one
    assert one.keys() == other.keys()
    for name, arrays in one.items():
        for column, array in arrays.items():
            np.testing.assert_array_equal(array, other[name][column], err_msg=f"{name} {column}")


@pytest.fixture(scope="module")
def killed(files, tmp_path_factory):
    """What SIGKILL in the second query's pass leaves behind."""
    folder = tmp_path_factory.mktemp("killed")
    shutil.copytree(files, folder, dirs_exist_ok=True)
    assert work(folder, "die=8", check=False).returncode == -9
    left = sorted(p.name for p in (folder / "run/work").rglob("*.npz"))
    assert left == ["losses-000000.npz", "losses-000001.npz"]
    assert not list((folder / "run").rglob(".*.npz*"))  # nothing half written
    return folder


@pytest.fixture
def left(killed, tmp_path):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_killed_pass_resumes_with_identical_losses(files, left, tmp_path_factory, monkeypatch):
    """Finished shards are not evaluated again."""
    whole = tmp_path_factory.mktemp("whole")
    shutil.copytree(files, whole, dirs_exist_ok=True)
    expected = attribute(whole)
    written = []
    plain = ShardStore.write
    monkeypatch.setattr(
        ShardStore, "write", lambda self, n, rows: written.append(n) or plain(self, n, rows)
    )
    # The host would not run the first query again; its item was recorded.
    assert attribute(left) == expected
    assert written == [0, 1, 2, 3, 4, 2, 3, 4, 0, 1, 2, 3, 4]
    assert_same_losses(losses(left), losses(whole))
    assert not list((left / "run/work").rglob("*.npz"))


@pytest.mark.parametrize("changed", ["corpus", "model"])
def test_a_changed_corpus_or_model_is_refused_unless_forced(left, changed):
    if changed == "corpus":
        rows = [json.loads(line) for line in (left / "corpus.jsonl").read_text().splitlines()]
        rows[3]["text"] += "zz"
        tiny_checkpoint.write_rows(left / "corpus.jsonl", rows)
    else:
        tiny_checkpoint.model(seed=1).save_pretrained(left / "model")
    with pytest.raises(ConfigError, match="holds the losses of another model, corpus") as refused:
        attribute(left)
    assert "force = true" in str(refused.value)
    assert [name for name, _, _ in attribute(left, force=True)] == ["qa", "qb", "qc"]


def test_forcing_discards_only_what_belongs_to_another_pass(tmp_path):
    ShardStore.open(tmp_path / "s", "one").write(0, {"a": np.ones(2)})
    with pytest.raises(ConfigError, match="key one, now two"):
        ShardStore.open(tmp_path / "s", "two")
    same = ShardStore(tmp_path / "s", "one")
    same.prepare(force=True)
    np.testing.assert_array_equal(same.read(0)["a"], np.ones(2))
    other = ShardStore(tmp_path / "s", "two")
    other.prepare(force=True)
    assert other.read(0) is None


def test_a_team_of_one_exchanges_nothing():
    team = Team()
    rows = {"a": np.arange(3)}
    assert team.alone
    assert team.gather(5) == [5]
    assert team.first(lambda: 3) == 3
    assert team.mine([1, 2, 3]) == [1, 2, 3]
    assert team.join_rows(rows)["a"] is rows["a"]
    assert team.sum_numbers(1, 2) == (1, 2)
    assert list(team.rounds(iter([[1, 2], [3]]))) == [[1, 2], [3]]
    assert [Team(r, 3).mine(list(range(8))) for r in range(3)] == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_failures_in_shared_work_end_the_run_with_their_message():
    error = explain_failure(RunFailed("no space left", hint="free some"), 1)
    assert isinstance(error, ComponentError)
    assert str(error) == "no space left\n  hint: free some"
    assert "process 1 failed: KeyError" in str(explain_failure(KeyError("x"), 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ('fisher="identity"', "base_losses=true"),
        ('fisher="identity"', "prefilter=0.2"),
        ('fisher="sample_mean"', 'compare=["gradient-dot","bm25"]'),
        ('method="bm25"', 'compare=["dabgo"]', 'fisher="identity"'),
        ('fisher="identity"', "early_stop=0.2", 'early_stop_by="author"', "top_k=1"),
    ],
    ids=["exact", "prefilter", "fisher", "compare", "early stop"],
)
def test_two_processes_give_the_items_of_one(folder, tmp_path_factory, settings):
    alone = tmp_path_factory.mktemp("alone")
    shutil.copytree(folder, alone, dirs_exist_ok=True)
    work(alone, *settings)
    work(folder, *settings, processes=2)
    assert len(json.loads((folder / "values-1.json").read_text())) == 1  # of three queries
    if "sample_mean" not in settings[0]:
        assert_same_losses(losses(folder), losses(alone))
        assert values(folder) == values(alone)
        return
    # The Fisher is a sum over processes: equal up to the order of additions.
    ours, theirs = losses(folder), losses(alone)
    assert ours.keys() == theirs.keys()
    for name, arrays in ours.items():
        np.testing.assert_allclose(arrays["score"], theirs[name]["score"], atol=2e-5)


@pytest.mark.slow
def test_one_query_uses_both_processes_and_a_killed_pair_resumes(folder, tmp_path_factory):
    """The only query belongs to process 0; process 1 evaluates half of the corpus for it."""
    tiny_checkpoint.write_rows(folder / "queries.jsonl", tiny_checkpoint.QUERIES[:1])
    whole = tmp_path_factory.mktemp("whole")
    shutil.copytree(folder, whole, dirs_exist_ok=True)
    work(whole, 'fisher="identity"')
    died = work(folder, 'fisher="identity"', "die=3", processes=2, check=False)
    assert died.returncode != 0
    assert len(list((folder / "run/work").rglob("*.npz"))) == 2
    work(folder, 'fisher="identity"', processes=2)
    assert json.loads((folder / "values-1.json").read_text()) == []
    assert_same_losses(losses(folder), losses(whole))
    # What a pair of processes left, one process may finish, and the other way round.
    shutil.rmtree(folder / "run")
    work(folder, 'fisher="identity"', "die=3", check=False)
    work(folder, 'fisher="identity"', processes=2)
    assert_same_losses(losses(folder), losses(whole))


@pytest.mark.slow
def test_a_full_disk_on_one_process_is_told_by_all_and_the_pass_resumes(folder):
    """Only the first process writes shards; the other learns of its failure, and goes on."""
    done = work(folder, 'fisher="identity"', "full=3", processes=2)
    rows = [row for r in (0, 1) for row in json.loads((folder / f"values-{r}.json").read_text())]
    told = {name: error for name, _, error in rows}
    assert "no space left while writing" in told["qa"], done.stderr
    assert told["qb"] is None
    assert told["qc"] is None
    assert len(list((folder / "run/work").rglob("losses-*.npz"))) == 2
    work(folder, 'fisher="identity"', processes=2)
    assert set(values(folder)) == {"qa", "qb", "qc"}
    assert not list((folder / "run/work").rglob("*.npz"))


@pytest.mark.slow
def test_a_failure_on_one_process_ends_both(folder):
    """Nobody waits for ever for a process that has failed in the shared pass."""
    (folder / "corpus.jsonl").write_text('{"id": "t", "text": ""}\n')
    done = work(folder, processes=2, check=False)
    assert done.returncode != 0
    assert "corpus is empty" in done.stderr


# --- Weights spread by DeepSpeed ZeRO-3 ---------------------------------------------------------


@pytest.fixture
def zero3(folder):
    pytest.importorskip("deepspeed")
    config = folder / "deepspeed.json"
    # A persistence threshold that a user may well set: small weights would be whole everywhere.
    config.write_text(json.dumps(deepspeed_config(3)))
    return config


def untied(folder):
    """A Llama-type model, whose head is a matrix of its own and whose loss reaches into it."""
    tiny_checkpoint.llama().save_pretrained(folder / "model")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ('fisher="identity"', "base_losses=true"),
        ('fisher="sample_mean"',),
        ('fisher="sample_sum"', 'params="mlp"', "lr=1.0", "damping=0.5"),
        ('rule="sign_sgd"', 'fisher="identity"', "fisher_max_samples=5"),
        ('fisher="identity"', "early_stop=0.2", 'early_stop_by="author"', "top_k=1"),
    ],
    ids=["identity", "fisher", "selection", "sign", "early stop"],
)
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_spread_weights_give_the_result_of_whole_ones(
    folder, zero3, tmp_path_factory, settings, head
):
    if head == "untied":
        untied(folder)
    whole = tmp_path_factory.mktemp("whole")
    shutil.copytree(folder, whole, dirs_exist_ok=True)
    expected = {name: v for name, v, _ in attribute(whole, **parsed(settings))}
    work(folder, *settings, processes=2, launcher="deepspeed", config=zero3)
    found = values(folder)
    assert found.keys() == expected.keys()
    ours, theirs = losses(folder), losses(whole)
    for name, arrays in ours.items():
        for column in ("score", "loss_ascent", "loss_descent"):
            np.testing.assert_allclose(arrays[column], theirs[name][column], atol=3e-5)
    for name, value in found.items():
        for key in ("proponents", "opponents"):
            assert [r["id"] for r in value[key]] == [r["id"] for r in expected[name][key]]
        for direction in ("ascent", "descent"):
            steps = zip(value["details"]["trace"][direction],
                        expected[name]["details"]["trace"][direction], strict=True)  # fmt: skip
            for step, other in steps:
                for key in ("loss", "distance", "max_change"):
                    assert step[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5)
        assert value["details"]["noise"]["weights_moved"] == pytest.approx(
            expected[name]["details"]["noise"]["weights_moved"], abs=0.02
        )


def parsed(settings):
    """`name=JSON` words as keywords."""
    return {k: json.loads(v) for k, v in (pair.split("=", 1) for pair in settings)}


@pytest.mark.slow
def test_a_fisher_file_is_taken_apart_and_the_cache_is_found_again(folder, zero3, tmp_path_factory):
    whole = tmp_path_factory.mktemp("whole")
    shutil.copytree(folder, whole, dirs_exist_ok=True)
    attribute(whole)
    (path,) = (whole / "cache").rglob("*.safetensors")
    settings = ('fisher="file"', f"fisher_path={json.dumps(str(path))}")
    work(folder, *settings, processes=2, launcher="deepspeed", config=zero3)
    for name, arrays in losses(folder).items():
        np.testing.assert_allclose(arrays["score"], losses(whole)[name]["score"], atol=3e-5)


CONFLICTS = {
    "prefilter": ({"prefilter": 0.1}, r"prefilter = 0\.1 does not work .* \(what works: none\)"),
    "method": ({"method": "bm25"}, r"method = 'bm25' does not work .*dabgo"),
    "rule": ({"rule": "ewc_adamw"}, r"rule = 'ewc_adamw' .*natural_gradient, sgd, sign_sgd"),
    "fisher": ({"fisher": "token"}, r"fisher = 'token' .*sample_mean, sample_sum"),
    "precision": ({"precision": "bfloat16"}, r"precision = 'bfloat16' .*float32"),
    "compare": ({"compare": ("bm25",)}, r"compare = \['bm25'\]"),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_what_needs_whole_weights_is_refused_before_they_are_spread(case):
    settings, message = CONFLICTS[case]
    with pytest.raises(ConfigError, match=message) as told:
        check_settings(AttributionSettings(**settings))
    assert 'launcher = "torchrun"' in str(told.value)


def test_weights_stay_whole_without_stage_3(monkeypatch, tmp_path):
    model = object()
    assert spread(model, AttributionSettings(), Team()) == (model, Team())
    monkeypatch.setenv("TENFOLD_LAUNCHER", "deepspeed")
    monkeypatch.delenv("TENFOLD_SCALE_CONFIG", raising=False)
    team = Team(0, 2)
    assert spread(model, AttributionSettings(), team) == (model, team)  # stage 2 is the default
    config = tmp_path / "three.json"
    config.write_text(json.dumps(deepspeed_config(3)))
    monkeypatch.setenv("TENFOLD_SCALE_CONFIG", str(config))
    with pytest.raises(ConfigError, match="prefilter"):
        spread(model, AttributionSettings(prefilter=0.5), team)


def test_everyone_takes_equally_many_batches_of_spread_weights():
    parts = [Team(r, 3, sharded=True).mine(list(range(7))) for r in range(3)]
    assert parts == [[0, 3, 6], [1, 4, 0], [2, 5, 0]]
    assert Team(1, 3, sharded=True).mine([]) == []


# --- As the host runs it ------------------------------------------------------------------------


def run_host(folder, *settings):
    """`tenfold run` in the folder; the run's items by id, and its record."""
    (folder / "workspace.toml").write_text("")
    (folder / "run.toml").write_text(
        'schema = "tenfold-run/1"\nname = "shared"\n'
        '[model]\nuse = "core:hf"\ncheckpoint = "model"\n'
        '[datasets.train]\nuse = "core:jsonl"\npath = "corpus.jsonl"\n'
        '[datasets.queries]\nuse = "core:jsonl-prompts"\npath = "queries.jsonl"\n'
        '[evaluator]\nuse = "dabgo:attribution"\nfisher = "identity"\ntop_k = 3\n'
        'columns = ["author"]\ntoken_budget = 60\nexport = ["jsonl"]\n'
        '[scale]\ndevice = "cpu"\n'
    )
    words = [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, "-m", "tenfold", "run", "run.toml", "--quiet", "--json", *words],
        cwd=folder, capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "TENFOLD_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    answer = json.loads(done.stdout)
    store = RunStore(Path(answer["run_dir"]))
    items = {line.id: line.values for line in store.ordered_lines()}
    return items, store


@pytest.mark.slow
def test_the_hosts_processes_share_the_corpus(folder, tmp_path_factory):
    """One query on two processes: nobody is idle, and the item is that of one process."""
    tiny_checkpoint.write_rows(folder / "queries.jsonl", tiny_checkpoint.QUERIES[:1])
    alone = tmp_path_factory.mktemp("alone")
    shutil.copytree(folder, alone, dirs_exist_ok=True)
    expected, _ = run_host(alone)
    found, store = run_host(folder, "scale.processes=2")
    assert store.read_json("run.json")["scale"]["obtained"]["processes"] == 2
    assert found == expected
    assert (store.path / "report.html").is_file()
    lines = (store.path / "artifacts" / found["qa"]["exports"]["jsonl"]).read_text().splitlines()
    assert len(lines) == 41  # a header, and every text


@pytest.mark.slow
def test_the_host_spreads_weights_where_the_run_file_says_so(folder, zero3, tmp_path_factory):
    alone = tmp_path_factory.mktemp("alone")
    shutil.copytree(folder, alone, dirs_exist_ok=True)
    expected, _ = run_host(alone)
    found, store = run_host(
        folder, "scale.processes=2", 'scale.launcher="deepspeed"', f'scale.config="{zero3}"'
    )
    assert store.read_json("run.json")["scale"]["obtained"]["processes"] == 2
    assert found.keys() == expected.keys()
    for name, value in found.items():
        ours, theirs = value["proponents"], expected[name]["proponents"]
        assert [row["id"] for row in ours] == [row["id"] for row in theirs]
        for row, other in zip(ours, theirs, strict=True):
            assert row["score"] == pytest.approx(other["score"], abs=1e-4)
