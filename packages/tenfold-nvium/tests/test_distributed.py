"""An N-vium with a controlled penalty on two CPU processes: losses, weights and beta of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tenfold.scale.deepspeed import deepspeed_config

SUPPORT = Path(__file__).parent / "support"
sys.path.insert(0, str(SUPPORT))
from train_nvium import train

pytestmark = pytest.mark.slow


def launch(folder, *settings, launcher="torchrun", config=""):
    """Trains on two processes, with the environment that the host gives its workers."""
    environment = {
        **os.environ,
        "TENFOLD_LAUNCHER": launcher,
        "TENFOLD_SCALE_CONFIG": str(config),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        # DeepSpeed compiles a small operator at first use and looks for ninja on PATH.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    if launcher == "deepspeed":
        environment |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(SUPPORT / "train_nvium.py"), str(folder), *settings,
    ]  # fmt: skip
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def record(folder):
    return json.loads((Path(folder) / "run/work/checkpoint/training.json").read_text())


def betas(folder, rank):
    return json.loads((Path(folder) / f"betas-{rank}.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    train(folder)
    return folder


def assert_trained_alike(one, other):
    """Equal logs, betas and weights, up to the order of sums."""
    # The two processes agree to the last bit, or they would drift apart.
    assert betas(other, 0) == betas(other, 1)
    for mine, theirs in zip(betas(one, 0), betas(other, 0), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    for a, b in zip(record(one)["log"], record(other)["log"], strict=True):
        for key in ("loss", "eval_loss"):
            assert a.get(key) == (b.get(key) and pytest.approx(b[key], abs=5e-5)), (key, a, b)
    ours = load_file(Path(one) / "run/work/checkpoint/model.safetensors")
    theirs = load_file(Path(other) / "run/work/checkpoint/model.safetensors")
    # DeepSpeed's stages 1 and 2 write the tied head a second time.
    tied = theirs.pop("lm_head.weight", None)
    assert ours.keys() == theirs.keys()
    assert tied is None or torch.equal(tied, theirs["model.embed_tokens.weight"])
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=2e-4)


def test_the_controller_moves_on_one_process(alone):
    """Or the other tests would compare a constant."""
    values = [beta for _, _, beta in betas(alone, 0)]
    assert len(values) >= 3
    assert len({0.3, *values}) >= 3


@pytest.mark.parametrize("parts", [1, 2])
def test_two_processes_train_the_nvium_of_one(alone, tmp_path, parts):
    launch(tmp_path, f"gradient_accumulation={parts}")
    assert record(tmp_path)["engine"] == "DistributedDataParallel"
    assert_trained_alike(alone, tmp_path)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_stages_train_the_nvium_of_one(alone, tmp_path, stage):
    pytest.importorskip("deepspeed")
    config = tmp_path / "deepspeed.json"
    settings = deepspeed_config(stage)
    if stage == 3:  # small models would otherwise keep every weight on every process
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 10
    config.write_text(json.dumps(settings))
    launch(tmp_path, launcher="deepspeed", config=config)
    assert record(tmp_path)["engine"] == "DeepSpeedEngine"
    assert_trained_alike(alone, tmp_path)
