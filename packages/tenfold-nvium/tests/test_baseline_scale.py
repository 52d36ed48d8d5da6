"""The baselines on two processes, and what their training is good for; minutes, so marked slow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nvium_cases import TEXTS, Texts
from safetensors.torch import load_file
from tenfold.records import GenerationConfig
from tenfold.testing.context import FakeContext
from tenfold_nvium.baselines.lm import load_calm, load_layerskip
from tenfold_nvium.baselines.trainers import CalmPretrainer, LayerSkipPretrainer
from tenfold_nvium.trainers import DensePretrainer

pytestmark = pytest.mark.slow

WORKER = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_baseline_scale import trained
trained(sys.argv[1], Path(sys.argv[2]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
"""


def trained(kind: str, folder: Path, rank: int = 0, world: int = 1) -> Path:
    settings = {"preset": "tiny", "steps": 6, "eval_rows": 0}
    ctx = FakeContext(folder, rank=rank, world_size=world)
    if kind == "calm":
        return CalmPretrainer(Texts(), exit_ramp=0.5, **settings).fit(ctx, None, {}).path
    trainer = LayerSkipPretrainer(
        Texts(), early_exits=[1, 2], layer_dropout=0.9, dropout_curriculum="constant", **settings
    )
    return trainer.fit(ctx, None, {}).path


@pytest.mark.parametrize("kind", ["calm", "layerskip"])
def test_two_processes_train_the_model_of_one(kind, tmp_path):
    """Layers that one process drops and the other runs included."""
    alone = load_file(trained(kind, tmp_path / "one") / "model.safetensors")
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent)))
    environment = {
        **os.environ,
        "TENFOLD_LAUNCHER": "torchrun",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(script), kind, str(tmp_path / "two"),
    ]  # fmt: skip
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (file,) = (tmp_path / "two").rglob("checkpoint/model.safetensors")
    both = load_file(file)
    for name, tensor in alone.items():
        torch.testing.assert_close(tensor, both[name], rtol=0, atol=5e-5)


def test_training_makes_drafts_stand_and_exits_confident(tmp_path):
    """A LayerSkip drafts better than its dense twin from every trained depth; a CALM leaves
    early, and the less often the higher its threshold."""
    settings = {"preset": "tiny", "steps": 300, "layers": 4}
    kinds = {
        "dense": DensePretrainer(Texts(), **settings),
        "skip": LayerSkipPretrainer(Texts(), early_exits=[1, 2], **settings),
        "calm": CalmPretrainer(Texts(), **settings),
    }
    paths = {
        name: str(trainer.fit(FakeContext(tmp_path / name), None, {}).path)
        for name, trainer in kinds.items()
    }
    config = GenerationConfig(max_new_tokens=24, temperature=0.0)

    def traces(model):
        return [model.trace(model.encode(text[:20]), config).trace for text in TEXTS[:60:3]]

    for depth in (1, 2):
        share = {}
        for name in ("dense", "skip"):
            found = traces(load_layerskip(paths[name], exit_layer=depth))
            share[name] = sum(t.kept for t in found) / sum(t.drafted for t in found)
        assert share["skip"] > share["dense"] + 0.1
        assert share["skip"] > 0.5
    depths = []
    for threshold in (0.1, 0.9, 1.0):
        found = traces(load_calm(paths["calm"], threshold=threshold))
        depths.append(sum(t.mean_depth for t in found) / len(found))
    assert depths == sorted(depths)
    assert depths[0] < 0.8
    assert depths[-1] == 1
