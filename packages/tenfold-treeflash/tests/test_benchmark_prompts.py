"""Benchmark rows as prompts: the published choice, every format, and the recipe over them."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tenfold.errors import ConfigError
from tenfold.lm.tokenizer import train_bpe
from tenfold.records import Completion
from tenfold_treeflash.benchmark_prompts import BENCHMARKS, BenchmarkPrompts, sample
from tenfold_treeflash.checkpoints import save_drafter
from treeflash_cases import drafter_for, llama

ROWS = {
    "gsm8k": {"question": "One and one?", "answer": "1 + 1 = 2\n#### 2"},
    "math500": {"problem": "What is $x$?", "solution": "One.", "answer": "1", "unique_id": "a/1"},
    "humaneval": {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": " pass"},
    "mbpp": {"task_id": 11, "prompt": "Write a function.", "code": "def g(): pass"},
    "mt-bench": {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]},
}
WANTED = {
    "gsm8k": ("gsm8k:0", "1 + 1 = 2\n#### 2"),
    "math500": ("math500:a/1", "One."),
    "humaneval": ("humaneval:HumanEval/0", " pass"),
    "mbpp": ("mbpp:11", "def g(): pass"),
    "mt-bench": ("mt-bench:81", None),
}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_of_each_benchmark_become_prompts(name, tmp_path):
    data = BenchmarkPrompts(name, jsonl(tmp_path / "rows.jsonl", [ROWS[name]]), suffix=" /no_think")
    [record] = data.load()
    assert (record.id, record.reference) == WANTED[name]
    [message] = record.prompt
    assert message["role"] == "user"
    question = next(v for v in ROWS[name].values() if isinstance(v, str | list) and v != record.id)
    asked = {"humaneval": "def f():\n", "mbpp": "Write a function.", "mt-bench": "Write."}
    assert asked.get(name, question) in message["content"]
    assert message["content"].endswith(" /no_think")
    assert ("boxed" in message["content"]) == (name in ("gsm8k", "math500"))
    assert ("```python\ndef f():\n\n```" in message["content"]) == (name == "humaneval")


def test_the_choice_is_the_published_one(tmp_path):
    assert sample(1319, 64, 42) == sorted(random.Random(42).sample(range(1319), 64))
    assert sample(3, 64, 42) == [0, 1, 2]
    assert sample(3, None, 42) == [0, 1, 2]
    rows = [{"question": f"Question {i}?", "answer": str(i)} for i in range(200)]
    data = BenchmarkPrompts("gsm8k", jsonl(tmp_path / "rows.jsonl", rows))
    numbers = [record.metadata["row"] for record in data.load()]
    assert numbers == sorted(random.Random(42).sample(range(200), 64))
    assert [r.reference for r in data.load(limit=3)] == [str(i) for i in numbers[:3]]
    other = BenchmarkPrompts("gsm8k", jsonl(tmp_path / "rows.jsonl", rows), sample_seed=43)
    assert data.fingerprint() != other.fingerprint()
    again = BenchmarkPrompts("gsm8k", str(tmp_path / "rows.jsonl"))
    assert data.fingerprint() == again.fingerprint()
    assert sorted(r.id for r in data.load(shuffle_seed=1)) == sorted(r.id for r in data.load())


def test_every_format_gives_the_same_records(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"question": f"Question {i}?", "answer": str(i)} for i in range(80)]
    jsonl(tmp_path / "rows.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "disk"))
    read = [
        [r.to_json() for r in BenchmarkPrompts("gsm8k", str(tmp_path / where)).load()]
        for where in ("rows.jsonl", "rows.parquet", "disk")
    ]
    assert len(read[0]) == 64
    assert read[0] == read[1] == read[2]


class Answering:
    """Answers with the number of messages and the last one's length."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts, config):
        self.asked += [list(p) for p in prompts]
        return [[Completion(text=f"{len(p)}:{len(p[-1]['content'])}")] for p in prompts]


def test_later_turns_follow_the_models_own_answers(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [ROWS["mt-bench"]])
    model = Answering()
    data = BenchmarkPrompts("mt-bench", path, model=model)
    first, second = data.load()
    assert (first.id, second.id) == ("mt-bench:81", "mt-bench:81#2")
    assert second.prompt == [
        {"role": "user", "content": "Write."},
        {"role": "assistant", "content": "1:6"},
        {"role": "user", "content": "Rewrite."},
    ]
    assert model.asked == [first.prompt]
    assert data.fingerprint() != BenchmarkPrompts("mt-bench", path).fingerprint()


def test_bad_sources_are_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'gsm8k'"):
        BenchmarkPrompts("gsm9k")
    with pytest.raises(ConfigError, match="does not exist; give a JSON Lines"):
        BenchmarkPrompts("mbpp", str(tmp_path / "none.jsonl"))
    wrong = BenchmarkPrompts("mbpp", jsonl(tmp_path / "rows.jsonl", [{"question": "a"}]))
    with pytest.raises(ConfigError, match=r"mbpp, row 1: .* prompt or text .*question"):
        list(wrong.load())
    with pytest.raises(ConfigError, match="no split 'train'"):
        list(wrong.load("train"))
    blank = tmp_path / "blank.jsonl"
    blank.write_text("\n")
    with pytest.raises(ConfigError, match="holds no row"):
        BenchmarkPrompts("mbpp", str(blank)).fingerprint()


def test_offline_the_hub_is_not_asked():
    pytest.importorskip("datasets")
    with pytest.raises(ConfigError, match=r"openai/gsm8k") as found:
        list(BenchmarkPrompts("gsm8k").load())
    assert "set path to your own copy of gsm8k" in found.value.hint


# --- The recipe -----------------------------------------------------------------------------------


def tenfold(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "tenfold", *map(str, arguments)],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_papers_recipes_plan_without_anything_at_hand(tmp_path):
    printed = tenfold(tmp_path, "run", "treeflash:paper", "--dry-run")
    assert "✗" not in printed
    assert "treeflash:benchmark" in printed
    cells = tenfold(tmp_path, "sweep", "treeflash:paper-grid", "--dry-run").splitlines()
    assert len(cells) == 10
    assert all(f"dataset.name={name}" in "".join(cells) for name in BENCHMARKS)


@pytest.mark.slow
def test_the_papers_recipe_runs_on_small_stand_ins(tmp_path):
    """The same run file, with a random model, drafters of the published layouts, and local rows."""
    tokenizer = train_bpe(["def f1(a, b):\n    return a + b\n"] * 9, 280)
    model = llama(dtype=torch.float32, vocab_size=len(tokenizer), eos_token_id=0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    save_drafter(drafter_for(model, dtype=torch.float32), tmp_path / "treeflash")
    dflash = drafter_for(model, dtype=torch.float32, ar_approximation=None)
    save_drafter(dflash, tmp_path / "dflash")
    jsonl(tmp_path / "rows.jsonl", [ROWS["mt-bench"]])
    settings = {
        "models.plain.checkpoint": "model", "models.treeflash.drafter.checkpoint": "treeflash",
        "models.dflash.drafter.checkpoint": "dflash", "dataset.name": "mt-bench",
        "dataset.path": "rows.jsonl", "dataset.answer_tokens": 4, "evaluator.max_new_tokens": 4,
        "models.plain.dtype": "float32", "models.treeflash.drafter.dtype": "float32",
        "models.dflash.drafter.dtype": "float32",
    }  # fmt: skip
    changes = [x for key, value in settings.items() for x in ("--set", f"{key}={value}")]
    answer = json.loads(tenfold(tmp_path, "run", "treeflash:paper", "--json", "--quiet", *changes))
    assert answer["items"] == {"done": 4, "failed": 0, "reused": 0}  # two turns, two temperatures
    equal = {m["group"]: m["value"] for m in answer["metrics"] if m["name"] == "equal_texts"}
    roles = ("treeflash", "treeflash-16", "dflash", "ddtree", "ddtree-16")
    assert equal == {f"{role} T=0": 1.0 for role in roles}
