"""Training on two CPU processes: losses and weights of one, resumed or not, by every launcher."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tenfold.scale.deepspeed import deepspeed_config
from tenfold.testing.processes import launch

SUPPORT = Path(__file__).parent / "support"
SCRIPT = SUPPORT / "train_drafter.py"
sys.path.insert(0, str(SUPPORT))
from train_drafter import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def record(folder, phase=""):
    name = f"phase-{phase}/checkpoint" if phase else "checkpoint"
    return json.loads((Path(folder) / "run/work" / name / "training.json").read_text())


def weights(folder):
    return load_file(Path(folder) / "run/work/checkpoint/model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Both phases on one process, by kind of rows."""
    folders = {}
    for data in ("texts", "samples"):
        folders[data] = tmp_path_factory.mktemp(data)
        train(folders[data], data=data)
    return folders


def assert_trained_alike(one, other):
    """Equal logs of both phases and equal weights, up to the order of sums."""
    for phase in ("dflash", ""):
        logs = record(one, phase)["log"], record(other, phase)["log"]
        assert len(logs[0]) >= 2
        for a, b in zip(*logs, strict=True):
            for key in ("loss", "eval_loss"):
                assert a.get(key) == (b.get(key) and pytest.approx(b[key], abs=1e-4)), (key, a, b)
    assert_same_weights(one, other)


def assert_same_weights(one, other):
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=5e-4)


@pytest.mark.parametrize("data", ["texts", "samples"])
def test_two_processes_train_the_drafter_of_one(alone, tmp_path, data):
    launch(SCRIPT, str(tmp_path), f'data="{data}"')
    assert record(tmp_path)["engine"] == "DistributedDataParallel"
    assert record(tmp_path)["processes"] == 2
    assert_trained_alike(alone[data], tmp_path)


def test_so_they_do_from_stored_features_which_they_share_out(alone, tmp_path):
    launch(SCRIPT, str(tmp_path), 'data="samples"', 'features="stored"', "gradient_accumulation=2")
    assert (tmp_path / "run/work/features/train/features.json").is_file()
    assert_trained_alike(alone["samples"], tmp_path)


def deepspeed_file(folder, stage):
    settings = deepspeed_config(stage)
    if stage == 3:  # small models would otherwise keep every weight on every process
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 10
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(settings))
    return path


def test_deepspeed_trains_the_drafter_of_one(alone, tmp_path):
    pytest.importorskip("deepspeed")
    config = deepspeed_file(tmp_path, 2)
    launch(SCRIPT, str(tmp_path), 'data="texts"', launcher="deepspeed", config=config)
    assert record(tmp_path)["engine"] == "DeepSpeedEngine"
    assert_trained_alike(alone["texts"], tmp_path)


def test_a_learned_mask_under_zero_3_is_one_clear_error(tmp_path):
    pytest.importorskip("deepspeed")
    config = deepspeed_file(tmp_path, 3)
    done = launch(
        SCRIPT, str(tmp_path), 'mask="learned"', launcher="deepspeed", config=config, fails=True
    )
    assert "mask is a learned vector, which ZeRO-3 splits" in done.stderr


@pytest.mark.parametrize("stop", [5, 17])
def test_two_processes_go_on_where_they_were_interrupted(alone, tmp_path, stop):
    """In the first phase, and in the second. (Logged losses are means since the last log or the
    resumption, so they are not compared.)"""
    launch(SCRIPT, str(tmp_path), "save_steps=3", f"stop={stop}", fails=True)
    done = tmp_path / "run/work/phase-dflash/checkpoint/training.json"
    assert done.is_file() == (stop > 12)
    assert not (tmp_path / "run/work/checkpoint").exists()
    launch(SCRIPT, str(tmp_path), "save_steps=3")
    assert_same_weights(alone["texts"], tmp_path)


def test_a_frozen_backbone_trains_on_two_processes(alone, tmp_path):
    start = alone["texts"] / "run/work/phase-dflash/checkpoint"
    settings = {"phase": "treeflash", "init": str(start), "freeze_backbone": True}
    train(tmp_path / "one", **settings)
    launch(SCRIPT, str(tmp_path / "two"), *(f"{k}={json.dumps(v)}" for k, v in settings.items()))
    one, two, before = (
        weights(tmp_path / "one"),
        weights(tmp_path / "two"),
        load_file(start / "model.safetensors"),
    )
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=5e-4)
        if name.startswith("model."):
            assert torch.equal(two[name], before[name])
    assert not torch.equal(two["ar_approximation.d.weight"], before["ar_approximation.d.weight"])
