"""Training on two CPU processes, really run: the losses and weights of one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from safetensors.torch import load_file
from tenfold.errors import ConfigError
from tenfold.scale import process
from tenfold.scale.deepspeed import active_config, deepspeed_config
from tenfold.testing.processes import launch as run_processes

SUPPORT = Path(__file__).parent / "support"
sys.path.insert(0, str(SUPPORT))
from train_worker import train


def launch(folder, *settings, **how):
    """Trains on several processes."""
    return run_processes(SUPPORT / "train_worker.py", str(folder), *settings, **how)


def record(folder):
    return json.loads((Path(folder) / "run/work/checkpoint/training.json").read_text())


def assert_trained_alike(one, other):
    """Equal logs and weights, up to the order of sums."""
    for a, b in zip(record(one)["log"], record(other)["log"], strict=True):
        # DeepSpeed clips by itself, and logs no norm.
        assert a.keys() - {"grad_norm"} == b.keys() - {"grad_norm"}
        for key in a.keys() - {"grad_norm"}:
            assert a[key] == pytest.approx(b[key], abs=2e-5), (key, a, b)
    ours = load_file(Path(one) / "run/work/checkpoint/model.safetensors")
    theirs = load_file(Path(other) / "run/work/checkpoint/model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=5e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same training on one process."""
    folder = tmp_path_factory.mktemp("alone")
    train(folder, dropout=0.0)
    return folder


def test_two_processes_train_the_model_of_one(alone, tmp_path):
    launch(tmp_path, "gradient_accumulation=2")
    assert record(tmp_path)["processes"] == 2
    assert record(tmp_path)["engine"] == "DistributedDataParallel"
    assert_trained_alike(alone, tmp_path)


def test_deepspeed_zero_2_trains_the_model_of_one(alone, tmp_path):
    pytest.importorskip("deepspeed")
    done = launch(tmp_path, launcher="deepspeed")
    assert record(tmp_path)["engine"] == "DeepSpeedEngine"
    assert done.stdout == ""  # DeepSpeed prints what it builds; stdout is for results
    assert_trained_alike(alone, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("parts", [1, 2])
def test_every_deepspeed_stage_trains_the_model_of_one(alone, tmp_path, stage, parts):
    pytest.importorskip("deepspeed")
    config = tmp_path / "deepspeed.json"
    settings = deepspeed_config(stage)
    if stage == 3:  # small models would otherwise keep every weight on every process
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 10
    config.write_text(json.dumps(settings))
    launch(tmp_path, f"gradient_accumulation={parts}", launcher="deepspeed", config=config)
    assert_trained_alike(alone, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "stage"), [("torchrun", 0), ("deepspeed", 2), ("deepspeed", 3)]
)
def test_a_killed_process_loses_no_more_than_the_last_steps(alone, tmp_path, launcher, stage):
    """Kill -9 after step 5; the state of step 3 is complete, and the end is the same."""
    config = ""
    if launcher == "deepspeed":
        pytest.importorskip("deepspeed")
        config = tmp_path / "deepspeed.json"
        config.write_text(json.dumps(deepspeed_config(stage)))
    launch(tmp_path, "kill=5", launcher=launcher, config=config, fails=True)
    states = [p.name for p in (tmp_path / "run/work/trainer").glob("checkpoint-*")]
    assert states == ["checkpoint-3"]
    launch(tmp_path, launcher=launcher, config=config)
    assert [r["step"] for r in record(tmp_path)["log"] if "loss" in r] == list(range(1, 9))
    assert_trained_alike(alone, tmp_path)


@pytest.mark.slow
def test_an_interruption_of_one_process_saves_on_all(alone, tmp_path):
    """SIGTERM reaches one worker; both stop after the same step, and go on together later."""
    done = launch(tmp_path, "term=4", fails=True)
    assert "KeyboardInterrupt" in done.stderr
    assert (tmp_path / "run/work/trainer/checkpoint-4/complete.json").is_file()
    launch(tmp_path)
    assert_trained_alike(alone, tmp_path)


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    process.init_process_group("cpu")
    process.barrier()
    assert process.obtained_world_size() == 1
    assert process.gather_objects({"a": 1}) == [{"a": 1}]
    assert process.from_rank_zero(3) == 3
    assert process.any_process(True)
    assert not process.any_process(False)


def test_each_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert process.local_device("cuda") == "cuda:3"
    assert process.local_device("cpu") == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert process.local_device("cuda") == "cuda"


def test_deepspeed_configurations_come_from_the_run(monkeypatch, tmp_path):
    monkeypatch.delenv(process.LAUNCHER, raising=False)
    assert active_config() is None
    monkeypatch.setenv(process.LAUNCHER, "deepspeed")
    monkeypatch.delenv(process.CONFIG, raising=False)
    assert active_config()["zero_optimization"]["stage"] == 2
    path = tmp_path / "own.json"
    monkeypatch.setenv(process.CONFIG, str(path))
    path.write_text('{"zero_optimization": {"stage": 1}}')
    own = active_config()
    assert own["zero_optimization"] == {"stage": 1}
    assert own["train_batch_size"] == "auto"
    for text in ("{", "[1]"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"own\.json"):
            active_config()
    with pytest.raises(ConfigError, match="known: 0, 1, 2, 3"):
        deepspeed_config(4)


def test_offloading_needs_something_to_offload():
    assert "offload_optimizer" not in deepspeed_config(0, offload=True)["zero_optimization"]
    assert "offload_optimizer" in deepspeed_config(1, offload=True)["zero_optimization"]
    assert "offload_param" in deepspeed_config(3, offload=True)["zero_optimization"]
