"""From a model alone to a drafter on the command line: data, training, measurement."""

from __future__ import annotations

import json

import pytest
import torch
from tenfold.cli import main
from tenfold.lm.model import CausalLM
from tenfold.records import GenerationConfig
from tenfold_treeflash.checkpoints import load_drafter, save_drafter
from training_cases import small_base
from treeflash_cases import drafter_for

PROMPTS = [f"def f{i}(a, b" for i in range(6)]
LENGTH = 12


@pytest.fixture(scope="module")
def base():
    return small_base()


@pytest.fixture
def place(base, tmp_path, monkeypatch):
    """A folder with a model and prompts, which commands run in."""
    base.model.save_pretrained(tmp_path / "target")
    base.tokenizer.save_pretrained(tmp_path / "target")
    rows = [{"id": f"p{i}", "prompt": text, "response": ""} for i, text in enumerate(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *arguments, code=0):
    capsys.readouterr()
    got = main(["treeflash", *map(str, arguments)])
    said = capsys.readouterr()
    assert got == code, said.err
    return said


def build(capsys, out, *more, **keywords):
    return run(capsys, "build-data", "target", out, "--prompts", "prompts.jsonl",
               "--max-new-tokens", LENGTH, "--batch-size", 2, "--seed", 5, "--device", "cpu",
               *more, **keywords)  # fmt: skip


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_what_the_model_writes(base, place, capsys):
    build(capsys, "data.jsonl", "--temperature", "0")
    rows = lines(place / "data.jsonl")
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(6)]
    for row, prompt in zip(rows, PROMPTS, strict=True):
        [[plain]] = base.generate([prompt], GenerationConfig(max_new_tokens=LENGTH))
        assert row["completion_ids"] == plain.token_ids
        assert row["completion"] == plain.text
        assert row["prompt_ids"] == base.prompt_ids(prompt)
    about = json.loads((place / "data.about.json").read_text())
    assert (about["seed"], about["temperature"], about["samples"]) == (5, 0, 6)


def test_building_goes_on_where_it_was_interrupted(place, capsys, monkeypatch):
    build(capsys, "whole.jsonl")
    calls = []
    plain = CausalLM.generate

    def generate(self, prompts, config):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, prompts, config)

    (place / "runs").rename(place / "other")
    monkeypatch.setattr(CausalLM, "generate", generate)
    build(capsys, "cut.jsonl", code=130)
    assert not (place / "cut.jsonl").exists()
    said = build(capsys, "cut.jsonl", "--json")
    assert json.loads(said.out)["samples"] == 6
    assert sum(calls) == 2 + 2 + 4  # two were done, two interrupted, four were left
    assert (place / "cut.jsonl").read_text() == (place / "whole.jsonl").read_text()


def test_from_a_model_to_a_measured_drafter(place, capsys):
    build(capsys, "data.jsonl", "--n", 2)
    said = run(
        capsys, "train", "target", "data.jsonl", "drafter", "--layers", 1, "--block-size", 5,
        "--steps", 3, "--steps-b", 2, "--batch-size", 2, "--context-length", 32, "--device", "cpu",
        "--set", "trainer.anchors=4", "--set", "trainer.eval_rows=0", "--json",
    )  # fmt: skip
    assert json.loads(said.out)["drafter"] == "drafter"
    drafter = load_drafter("drafter")
    assert (drafter.config.block_size, drafter.config.num_hidden_layers) == (5, 1)
    assert drafter.looks_back == 1
    assert json.loads((place / "drafter/training.json").read_text())["plan"]["steps"] == 2
    assert not list(place.glob(".drafter*"))
    said = run(capsys, "evaluate", "target", "drafter", "--data", "data.jsonl", "--tree-sizes", 1,
               "--tree-sizes", 6, "--device", "cpu", "--json")  # fmt: skip
    metrics = {(m["name"], m["group"]): m["value"] for m in json.loads(said.out)["metrics"]}
    assert metrics["block_efficiency", "tree_size=1"] == 1
    assert metrics["block_efficiency", "tree_size=6"] >= 1
    assert 0 < metrics["tvd", "corrected depth=1"] < 1


def test_commands_compute_in_the_type_that_is_asked_for(base, place, capsys):
    save_drafter(drafter_for(base.model, dtype=torch.float32), place / "drafter")
    texts = {}
    for dtype in ("float32", "float64"):
        said = run(
            capsys, "generate", "target", "drafter", "--prompt", "def f1(", "--tree-size", 4,
            "--max-new-tokens", 6, "--dtype", dtype, "--device", "cpu", "--json",
        )  # fmt: skip
        texts[dtype] = json.loads(said.out)["token_ids"]
    assert texts["float32"] == texts["float64"]
    run(capsys, "verify", "target", "drafter", "--tree-size", 4, "--num-prompts", 1,
        "--max-new-tokens", 4, "--dtype", "bfloat16")  # fmt: skip
    said = run(capsys, "generate", "target", "drafter", "--prompt", "a", "--device", "nowhere",
               code=2)  # fmt: skip
    assert "nowhere" in said.err


def test_wrong_arguments_are_one_clear_error(place, capsys):
    said = run(capsys, "build-data", "target", "data.json", code=2)
    assert "ends in .jsonl" in said.err
    said = run(capsys, "build-data", "target", "d.jsonl", "--prompts", "none.jsonl", code=2)
    assert "none.jsonl is no file; give JSON Lines" in said.err
    said = run(capsys, "train", "target", "prompts.jsonl", "target", code=2)
    assert "target is not empty" in said.err
    said = run(capsys, "build-data", "nowhere", "d.jsonl", code=2)
    assert "nowhere" in said.err
    assert not (place / "d.jsonl").exists()


def test_texts_of_the_catalogue_are_data_too(base, place, capsys):
    save_drafter(drafter_for(base.model, dtype=torch.float32), place / "drafter")
    said = run(capsys, "evaluate", "target", "drafter", "--limit", 1, "--anchors", 2,
               "--max-text-tokens", 40, "--set", "dataset.packages=['json']", "--device", "cpu",
               "--json")  # fmt: skip
    assert json.loads(said.out)["items"]["done"] == 1
