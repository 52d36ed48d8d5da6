"""An exported folder loads where this package cannot be imported, and computes the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from nvium_cases import tiny_model
from tenfold.errors import ConfigError
from tenfold.lm.tokenizer import train_bpe
from tenfold_nvium.export import export_folder, model_code
from tenfold_nvium.lm import load
from transformers import LlamaConfig, LlamaForCausalLM

ELSEWHERE = """
import json, sys
sys.modules["tenfold"] = sys.modules["tenfold_nvium"] = None  # importing either fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
trusted = {"trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", **trusted)
ids = torch.tensor([[1, 2, 3, 4]])
settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "pad_token_id": 0}
torch.manual_seed(5)
drawn = model.generate(ids, do_sample=True, top_k=0, **settings)
print(json.dumps({
    "module": type(model).__module__,
    "words": len(AutoTokenizer.from_pretrained(sys.argv[1], **trusted)),
    "logits": model(ids).logits[0, -1].tolist(),
    "greedy": model.generate(ids, do_sample=False, **settings)[0].tolist(),
    "drawn": drawn[0].tolist(),
    "loss": float(model(ids, labels=ids).loss),
}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "nvium"
    model = tiny_model(exit_head_tying="lm_head", vocab_size=257)
    model.save_pretrained(folder)
    train_bpe(["def add(a, b): return a + b"] * 20, 257).save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "model"
    return out, export_folder(checkpoint[0], out)


def test_the_folder_computes_the_same_without_the_package(checkpoint, exported, tmp_path):
    folder, model = exported[0], checkpoint[1]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(folder)],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["module"].startswith("transformers_modules.")
    assert seen["words"] == 257
    ids = torch.tensor([[1, 2, 3, 4]])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "pad_token_id": 0}
    with torch.no_grad():
        assert seen["logits"] == model(ids).logits[0, -1].tolist()
        assert seen["loss"] == float(model(ids, labels=ids).loss)
    assert seen["greedy"] == model.generate(ids, do_sample=False, **settings)[0].tolist()
    torch.manual_seed(5)
    drawn = model.generate(ids, do_sample=True, top_k=0, **settings)
    assert seen["drawn"] == drawn[0].tolist()


def test_the_folder_is_still_a_checkpoint_for_this_package(checkpoint, exported):
    again = load(str(exported[0]))
    assert type(again.model).__module__ == "tenfold_nvium.modeling"
    for name, tensor in checkpoint[1].state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_the_code_names_no_module_outside_the_folder(exported):
    folder, files = exported
    code = model_code()
    assert {name for name in files if name.endswith(".py")} == {
        f"{module.rpartition('.')[2]}_nvium.py" for module in code
    }
    assert len(code) > 10
    for module in code:
        text = (folder / f"{module.rpartition('.')[2]}_nvium.py").read_text()
        assert "from tenfold" not in text
        assert ".register(" not in text


def test_bad_input_is_one_clear_error(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="not empty"):
        export_folder(checkpoint[0], checkpoint[0])
    with pytest.raises(ConfigError, match="is no checkpoint"):
        export_folder(tmp_path / "none", tmp_path / "out")
    LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                    num_attention_heads=1)
    ).save_pretrained(tmp_path / "llama")  # fmt: skip
    with pytest.raises(ConfigError, match="not an N-vium"):
        export_folder(tmp_path / "llama", tmp_path / "out")
    assert not (tmp_path / "out").exists()
