"""Training data in every format, and the rows that are made of it."""

from __future__ import annotations

import json

import pytest
import torch
from tenfold.errors import ConfigError
from tenfold.lm.packing import IGNORED
from tenfold.testing.context import FakeContext
from tenfold_treeflash.rows import TokenRows
from tenfold_treeflash.training import DrafterTrainer
from tenfold_treeflash.training_rows import TrainingRows
from training_cases import SETTINGS, small_base

ROWS = [
    {"id": "chat", "messages": [
        {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"}, {"role": "assistant", "content": "Four."},
    ]},
    {"prompt": "Five?", "response": "Six."},
    {"prompt": [{"role": "user", "content": "Seven?"}], "completion": "Eight.",
     "prompt_ids": [1, 2], "completion_ids": [3, 4, 5]},
    {"id": 9, "input_ids": [7, 8, 9, 10], "loss_mask": [0, 1, 1, 0]},
]  # fmt: skip


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_every_form_becomes_samples(path):
    data = TrainingRows(path)
    first, second, pair, exact, tokens = data.load()
    assert [r.id for r in (first, second, pair, exact, tokens)] == [
        "chat", "chat#2", "rows.jsonl:2", "rows.jsonl:3", "9",
    ]  # fmt: skip
    assert (first.prompt, first.completion) == (ROWS[0]["messages"][:1], "Two.")
    assert (second.prompt, second.completion) == (ROWS[0]["messages"][:3], "Four.")
    assert (pair.prompt, pair.completion, pair.prompt_ids) == ("Five?", "Six.", None)
    assert (exact.prompt_ids, exact.completion_ids) == ([1, 2], [3, 4, 5])
    assert (tokens.completion_ids, tokens.metadata["loss_mask"]) == ([7, 8, 9, 10], [0, 1, 1, 0])
    assert [r.id for r in data.load(limit=2)] == ["chat", "chat#2"]
    assert sorted(r.id for r in data.load(shuffle_seed=1)) == sorted(r.id for r in data.load())


def test_prompts_to_be_answered_anew(path):
    data = TrainingRows(path, prompts=True, suffix=" /no_think", limit=4)
    records = list(data.load())
    assert data.kind == "prompt"
    assert records[1].prompt[-1] == {"role": "user", "content": "Three? /no_think"}
    assert records[1].prompt[:-1] == ROWS[0]["messages"][:2]
    assert (records[2].prompt, records[2].reference) == ("Five? /no_think", "Six.")
    with pytest.raises(ConfigError, match="'9' holds token ids alone"):
        list(TrainingRows(path, prompts=True).load())
    assert data.fingerprint() != TrainingRows(path, prompts=True, limit=4).fingerprint()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"line 1: is no training row; it has 'text'"),
        ({"prompt": "a", "response": 3}, "is no training row"),
        ({"messages": "a"}, "messages must be a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message of the assistant"),
        ({"input_ids": ["a"], "loss_mask": [1]}, "list of whole numbers"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, "a 0 or 1 for each of the 2 ids"),
        ({"input_ids": [1, 2]}, "a 0 or 1 for each of the 2 ids"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=message) as found:
        list(TrainingRows(tmp_path / "rows.jsonl").load())
    assert "rows.jsonl, line 1" in str(found.value)


def test_validation_rows_are_apart(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(
        json.dumps({"id": str(i), "prompt": "a", "response": "b"}) + "\n" for i in range(100)
    ))  # fmt: skip
    data = TrainingRows(file, validation=0.3)
    train, held = ({r.id for r in data.load(split)} for split in ("train", "validation"))
    assert train
    assert held
    assert not train & held
    assert len(train | held) == 100


# --- Token rows -----------------------------------------------------------------------------------


def test_rows_keep_tokens_and_masks():
    rows = TokenRows()
    assert rows.add([5, 6, 7, 8], [False, True, True, False])
    assert rows.add([1, 2, 3], [True, True, True])
    for ids, mask in (
        ([1, 2], [True, True]),  # the anchor has no token before it
        ([1, 2, 3, 4], [False, True, False, True]),  # never two in a row
        ([1], [True]), ([], []), ([1, 2, 3], [True, True]),
    ):  # fmt: skip
        assert not rows.add(ids, mask)
    assert (len(rows), rows.skipped) == (2, 5)
    assert rows[0]["input_ids"].tolist() == [5, 6, 7, 8]
    assert rows[0]["labels"].tolist() == [IGNORED, 6, 7, IGNORED]
    assert rows[1]["labels"].tolist() == [1, 2, 3]
    with pytest.raises(IndexError):
        rows[2]


def test_splits_are_the_rows_once():
    rows = TokenRows()
    for i in range(20):
        rows.add([i, i, i + 1], [True] * 3)
    kept, held = rows.split(6, seed=3)
    assert (len(kept), len(held)) == (14, 6)
    first = [int(part[i]["input_ids"][0]) for part in (kept, held) for i in range(len(part))]
    assert sorted(first) == list(range(20))
    assert first[:14] == sorted(first[:14])
    again = rows.split(6, seed=3)
    assert [p.fingerprint() for p in again] == [kept.fingerprint(), held.fingerprint()]
    assert held.subset([1, 0]).fingerprint() != held.subset([0, 1]).fingerprint()
    assert torch.equal(held.subset([2])[0]["input_ids"], held[2]["input_ids"])


def test_a_trainer_learns_from_every_form_and_counts_what_it_leaves_out(tmp_path):
    file = tmp_path / "rows.jsonl"
    text = [{"prompt": "def f1(", "response": "a, b):\n    return a + b"}] * 3
    tokens = [{"input_ids": [5, 6, 7, 8, 9, 10], "loss_mask": [0, 0, 1, 1, 1, 0]}] * 3
    short = [{"prompt": "a", "response": ""}, {"input_ids": [1, 2], "loss_mask": [1, 1]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*text, *tokens, *short]))
    context = FakeContext(tmp_path)
    settings = SETTINGS | {"steps": 2, "steps_b": 2, "eval_rows": 0, "batch_size": 2}
    done = DrafterTrainer(small_base(), TrainingRows(file), **settings).fit(context, None, {})
    counts = {m.name: m.value for m in done.metrics}
    assert (counts["rows"], counts["skipped_rows"]) == (6, 2)
    assert any(fields.get("skipped") == 2 for _, fields in context.events)
