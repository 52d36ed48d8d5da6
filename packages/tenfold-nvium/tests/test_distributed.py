"""Training and continued training on two CPU processes: losses, weights and beta of one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from nvium_cases import TEXTS
from safetensors.torch import load_file
from tenfold.lm.tokenizer import train_bpe
from tenfold.scale.deepspeed import deepspeed_config
from tenfold.testing.processes import launch
from tenfold_nvium.convert import convert_folder

SUPPORT = Path(__file__).parent / "support"
SCRIPT = SUPPORT / "train_nvium.py"
sys.path.insert(0, str(SUPPORT))
from finetune_nvium import finetune
from train_nvium import train
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.slow


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
    """Equal logs and weights, up to the order of sums."""
    for a, b in zip(record(one)["log"], record(other)["log"], strict=True):
        for key in ("loss", "eval_loss"):
            assert a.get(key) == (b.get(key) and pytest.approx(b[key], abs=5e-5)), (key, a, b)
    ours = load_file(Path(one) / "run/work/checkpoint/model.safetensors")
    theirs = load_file(Path(other) / "run/work/checkpoint/model.safetensors")
    # DeepSpeed's stages 1 and 2 write the tied head a second time.
    tied = theirs.pop("lm_head.weight", None) if "lm_head.weight" not in ours else None
    assert ours.keys() == theirs.keys()
    assert tied is None or torch.equal(tied, theirs["model.embed_tokens.weight"])
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=2e-4)


def assert_controlled_alike(one, other):
    """Equal betas, too."""
    # The two processes agree to the last bit, or they would drift apart.
    assert betas(other, 0) == betas(other, 1)
    for mine, theirs in zip(betas(one, 0), betas(other, 0), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    assert_trained_alike(one, other)


def test_the_controller_moves_on_one_process(alone):
    """Or the other tests would compare a constant."""
    values = [beta for _, _, beta in betas(alone, 0)]
    assert len(values) >= 3
    assert len({0.3, *values}) >= 3


@pytest.mark.parametrize("parts", [1, 2])
def test_two_processes_train_the_nvium_of_one(alone, tmp_path, parts):
    launch(SCRIPT, str(tmp_path), f"gradient_accumulation={parts}")
    assert record(tmp_path)["engine"] == "DistributedDataParallel"
    assert_controlled_alike(alone, tmp_path)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_stages_train_the_nvium_of_one(alone, tmp_path, stage):
    pytest.importorskip("deepspeed")
    config = tmp_path / "deepspeed.json"
    settings = deepspeed_config(stage)
    if stage == 3:  # small models would otherwise keep every weight on every process
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 10
    config.write_text(json.dumps(settings))
    launch(SCRIPT, str(tmp_path), launcher="deepspeed", config=config)
    assert record(tmp_path)["engine"] == "DeepSpeedEngine"
    assert_controlled_alike(alone, tmp_path)


# --- Continued training ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    tokenizer = train_bpe(TEXTS, 300)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=64, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(folder / "base")  # fmt: skip
    tokenizer.save_pretrained(folder / "base")
    convert_folder(folder / "base", folder / "nvium", exit_layers=[1, 2], gate_init=-4.0)
    return folder / "nvium"


@pytest.mark.parametrize("parts", ["exits", "routers", "all"])
@pytest.mark.parametrize("stage", [0, 2])
def test_two_processes_continue_the_nvium_of_one(converted, tmp_path, parts, stage):
    finetune(tmp_path / "one", converted, parts)
    how = {}
    if stage:
        pytest.importorskip("deepspeed")
        config = tmp_path / "deepspeed.json"
        config.write_text(json.dumps(deepspeed_config(stage)))
        how = {"launcher": "deepspeed", "config": config}
    launch(SUPPORT / "finetune_nvium.py", str(tmp_path / "two"), str(converted), parts, **how)
    engine = "DeepSpeedEngine" if stage else "DistributedDataParallel"
    assert record(tmp_path / "two")["engine"] == engine
    assert_trained_alike(tmp_path / "one", tmp_path / "two")
    before = load_file(converted / "model.safetensors")
    after = load_file(tmp_path / "two/run/work/checkpoint/model.safetensors")
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert ("model" in moved) == (parts == "all")
    assert "exits" in moved
