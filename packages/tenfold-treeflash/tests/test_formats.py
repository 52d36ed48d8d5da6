"""Drafters in other layouts are the same drafters."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tenfold.cli import main
from tenfold.errors import ConfigError
from tenfold_treeflash.checkpoints import load_drafter, read_config, save_drafter
from tenfold_treeflash.formats import save_dflash, save_speculators
from treeflash_cases import drafter_for, llama


@pytest.fixture(scope="module")
def model():
    return llama(dtype=torch.float32)


def same(one, other, names=("model.",)):
    ours, theirs = one.state_dict(), other.state_dict()
    chosen = [name for name in ours if name.startswith(names)]
    assert chosen
    return all(torch.equal(ours[name], theirs[name]) for name in chosen)


FIELDS = ("block_size", "target_layer_ids", "mask_token_id", "head_dim", "num_attention_heads",
          "num_key_value_heads", "intermediate_size", "rms_norm_eps", "rope_parameters",
          "hidden_size", "vocab_size", "num_hidden_layers")  # fmt: skip


@pytest.mark.parametrize("kind", ["swiglu", None])
def test_dflash_folders_hold_the_backbone(model, tmp_path, kind):
    drafter = drafter_for(model, dtype=torch.float32, ar_approximation=kind)
    left = save_dflash(drafter, tmp_path)
    assert left == (["ar_approximation"] if kind else [])
    names = load_file(tmp_path / "model.safetensors")
    assert "layers.0.self_attn.q_proj.weight" in names
    assert not any(name.startswith(("model.", "ar_")) for name in names)
    again = load_drafter(tmp_path)
    assert again.ar_approximation is None
    assert same(again, drafter)
    assert all(getattr(again.config, f) == getattr(drafter.config, f) for f in FIELDS)


def test_speculators_folders_hold_the_backbone(model, tmp_path):
    drafter = drafter_for(model, dtype=torch.float32)
    left = save_speculators(drafter, tmp_path, model.config, "some/model")
    assert left == ["ar_approximation"]
    values = json.loads((tmp_path / "config.json").read_text())
    # Their layer 0 is the embeddings.
    assert values["aux_hidden_state_layer_ids"] == [i + 1 for i in drafter.config.target_layer_ids]
    assert values["speculators_config"]["verifier"]["name_or_path"] == "some/model"
    assert values["transformer_layer_config"]["num_hidden_layers"] == 2
    again = load_drafter(tmp_path)
    assert same(again, drafter)
    assert all(getattr(again.config, f) == getattr(drafter.config, f) for f in FIELDS)


def test_the_targets_parts_in_speculators_folders_are_left_out(model, tmp_path):
    drafter = drafter_for(model, dtype=torch.float32)
    save_speculators(drafter, tmp_path, model.config, "some/model")
    weights = load_file(tmp_path / "model.safetensors")
    for name in ("embed_tokens.weight", "lm_head.weight", "verifier_norm.weight",
                 "verifier_lm_head.weight", "t2d", "d2t"):  # fmt: skip
        weights[name] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors")
    assert same(load_drafter(tmp_path), drafter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculators_model_type": "eagle3"}, "'eagle3' speculator; only dflash"),
        ({"draft_vocab_size": 7}, "draft_vocab_size is 7 of 23"),
        ({"sample_from_anchor": True}, "sample_from_anchor"),
        ({"aux_hidden_state_layer_ids": []}, "lacks transformer_layer_config or aux"),
        ({"target_hidden_size": 5}, "target_hidden_size is 5"),
        ({"aux_hidden_state_layer_ids": [0, 2, 3]}, "must increase, from 0 up"),
    ],
)
def test_speculators_of_other_kinds_are_refused(model, tmp_path, changes, message):
    save_speculators(drafter_for(model), tmp_path, model.config, "m")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=message) as found:
        read_config(tmp_path)
    assert "config.json" in str(found.value)


def test_a_learned_mask_has_no_place_in_speculators(model, tmp_path):
    with pytest.raises(ConfigError, match="needs a mask token"):
        save_speculators(drafter_for(model, mask_token_id=None), tmp_path, model.config, "m")


# --- The verb -------------------------------------------------------------------------------------


def run(capsys, *arguments):
    capsys.readouterr()
    code = main(["treeflash", "convert", *map(str, arguments)])
    return code, capsys.readouterr()


def test_converting_there_and_back(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "target")
    drafter = drafter_for(model, dtype=torch.float32)
    save_drafter(drafter, tmp_path / "own")
    code, said = run(capsys, tmp_path / "own", tmp_path / "dflash", "--to", "dflash", "--json")
    assert code == 0
    assert json.loads(said.out)["left_out"] == ["ar_approximation"]
    code, _ = run(capsys, tmp_path / "dflash", tmp_path / "spec", "--to", "speculators",
                  "--target", tmp_path / "target")  # fmt: skip
    assert code == 0
    assert run(capsys, tmp_path / "spec", tmp_path / "again", "--to", "treeflash",
               "--approximator", "swiglu")[0] == 0  # fmt: skip
    again = load_drafter(tmp_path / "again")
    assert same(again, drafter)
    assert again.looks_back == 1
    assert not again.ar_approximation.d.weight.any()


def test_conversions_that_cannot_be_are_one_clear_error(model, tmp_path, capsys):
    save_drafter(drafter_for(model, dtype=torch.float32), tmp_path / "own")
    code, said = run(capsys, tmp_path / "own", tmp_path / "spec", "--to", "speculators")
    assert code == 2
    assert "--target" in said.err
    code, said = run(capsys, tmp_path / "own", tmp_path / "own", "--to", "dflash")
    assert code == 2
    assert "is not empty" in said.err
    assert load_drafter(tmp_path / "own").looks_back == 1
    code, said = run(capsys, tmp_path / "own", tmp_path / "x", "--to", "dflash",
                     "--approximator", "swiglu")  # fmt: skip
    assert code == 2
