"""Datasets: Spec-Bench files with every kind of bad line, and texts of known difficulty."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter

import pytest
from nvium_cases import tiny_model
from tenfold.errors import ConfigError
from tenfold.lm.tokenizer import train_bpe
from tenfold.testing.context import FakeContext
from tenfold_nvium.lm import NviumLM
from tenfold_nvium.mixed_difficulty import LETTERS, SYMBOLS, MixedDifficulty, bigram_entropy
from tenfold_nvium.profile import Profile
from tenfold_nvium.spec_bench import SpecBench
from tenfold_nvium.tokens import ordered_classes, piece_classes

GOOD = [
    {"question_id": 81, "category": "writing", "turns": ["Compose a post.", "Rewrite it."]},
    {"question_id": "q-2", "category": "rag", "turns": ["Answer: é"], "reference": ["x"]},
    {"question_id": 83, "category": "writing", "turns": ["Third."]},
]


def written(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_first_turn_is_the_prompt(tmp_path):
    data = SpecBench(written(tmp_path / "q.jsonl", ["", GOOD[0], "", *GOOD[1:]]))
    records = list(data.load())
    assert [r.id for r in records] == ["81", "q-2", "83"]
    assert [r.prompt for r in records] == ["Compose a post.", "Answer: é", "Third."]
    assert records[0].metadata == {"category": "writing", "turns": 2}
    assert records[1].metadata["reference"] == ["x"]
    assert list(data.load(limit=1)) == records[:1]
    shuffled = [r.id for r in data.load(shuffle_seed=5)]
    assert sorted(shuffled) == sorted(r.id for r in records)
    assert shuffled == [r.id for r in SpecBench(data.path, shuffle_seed=5).load()]
    writing = SpecBench(data.path, categories=["writing"], limit=5)
    assert [r.id for r in writing.load()] == ["81", "83"]
    assert writing.fingerprint() != data.fingerprint() == SpecBench(data.path).fingerprint()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "not valid JSON"),
        ("[1]", "is a JSON list, not an object"),
        ({"category": "a", "turns": ["x"]}, "'question_id' is missing"),
        ({"question_id": 1, "turns": ["x"]}, "'category' is missing"),
        ({"question_id": 1, "category": "a", "turn": ["x"]},
         r"'turns' is missing.*did you mean 'turn'"),
        ({"question_id": 1, "category": "a", "turns": None}, "'turns' is missing"),
        ({"question_id": 1.5, "category": "a", "turns": ["x"]}, "question_id is 1.5"),
        ({"question_id": True, "category": "a", "turns": ["x"]}, "question_id is True"),
        ({"question_id": 1, "category": ["a"], "turns": ["x"]}, "category is .*must be a string"),
        ({"question_id": 1, "category": "a", "turns": "x"}, "turns is 'x'; it must be a list"),
        ({"question_id": 1, "category": "a", "turns": []}, "at least one string"),
        ({"question_id": 1, "category": "a", "turns": [" "]}, r"turns\[0\] is ' '"),
        ({"question_id": 1, "category": "a", "turns": ["x", 3]}, r"turns\[1\] is 3"),
        (GOOD[0], "question_id 81 was already used in line 1"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_before_any_record_is_given(tmp_path, row, words):
    path = written(tmp_path / "q.jsonl", [GOOD[0], "", row])
    with pytest.raises(ConfigError, match=words) as error:
        next(SpecBench(path).load())
    assert f"{path}, line 3" in str(error.value)


def test_bad_files_and_choices_are_one_clear_error(tmp_path):
    path = written(tmp_path / "q.jsonl", GOOD)
    with pytest.raises(ConfigError, match="is no file"):
        SpecBench(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match=r"no category 'writting'.*did you mean 'writing'"):
        next(SpecBench(path, categories=["writting"]).load())
    with pytest.raises(ConfigError, match="no split 'train'"):
        SpecBench(path).load("train")
    path.write_bytes(b'{"question_id": "\xff"}\n')
    with pytest.raises(ConfigError, match="line 1: byte 0xff is not UTF-8"):
        next(SpecBench(path).load())
    path.write_text("\n \n")
    with pytest.raises(ConfigError, match="holds no question"):
        next(SpecBench(path).load())


def parts(record):
    return {name: record.text[begin:end] for name, begin, end in record.metadata["token_classes"]}


def test_texts_are_what_they_claim():
    data = MixedDifficulty(count=300, min_period=6, max_period=14)
    follows, total, random_symbols = Counter(), 0, Counter()
    for record in data.load():
        assert len(record.text) == 96
        found = parts(record)
        assert "".join(found.values()) == record.text
        period = record.metadata["period"]
        assert 6 <= period <= 14
        assert len(found["bigram"]) == 48
        assert len(found["random"]) == period
        whole = found["random"] + found["repeat"]
        assert all(whole[i] == whole[i - period] for i in range(period, len(whole)))
        for a, b in itertools.pairwise(found["bigram"]):
            follows[data.table[a] == b] += 1
            total += 1
        random_symbols.update(found["random"])
    assert {r.metadata["period"] for r in data.load()} == set(range(6, 15))
    # 0.9 + 0.1 / 16, within four standard deviations of that many draws.
    assert follows[True] / total == pytest.approx(0.90625, abs=4 * math.sqrt(0.09 / total))
    assert set(random_symbols) == set(SYMBOLS)
    assert len(SYMBOLS) == 32
    assert sorted(data.table.values()) == sorted(LETTERS)
    assert bigram_entropy(0.1) == pytest.approx(0.565, abs=5e-4)
    assert bigram_entropy(0.0) == 0.0
    assert bigram_entropy(1.0) == pytest.approx(math.log(16))


def test_texts_are_a_function_of_seed_split_and_number():
    one, more = MixedDifficulty(count=10), MixedDifficulty(count=50)
    assert list(one.load()) == list(more.load(limit=10))
    assert [r.text for r in one.load()] != [r.text for r in MixedDifficulty(10, seed=1).load()]
    splits = {name: {r.text for r in more.load(name)} for name in more.splits()}
    assert [len(texts) for texts in splits.values()] == [50, 5, 5]
    assert not splits["train"] & splits["test"]
    shuffled = [r.id for r in more.load(shuffle_seed=2)]
    assert shuffled != sorted(shuffled) == [r.id for r in more.load()]
    assert one.fingerprint() != more.fingerprint()
    assert one.fingerprint() == MixedDifficulty(count=10).fingerprint()
    with pytest.raises(ConfigError, match="min_period is 9 and max_period 8"):
        MixedDifficulty(min_period=9, max_period=8)
    with pytest.raises(ConfigError, match="raise length to at least 80"):
        MixedDifficulty(length=60, max_period=20)
    with pytest.raises(ConfigError, match="no split 'dev'"):
        MixedDifficulty(split="dev")


def test_profiles_go_by_the_classes_of_the_dataset(tmp_path):
    data = MixedDifficulty(count=20, split="test")
    tokenizer = train_bpe([r.text for r in data.load()], 257)
    lm = NviumLM(tiny_model(vocab_size=257, eos_token_id=0), tokenizer)
    evaluator, ctx = Profile(max_new_tokens=0), FakeContext(tmp_path)
    results = list(evaluator.run(ctx, {"model": lm}, evaluator.plan(ctx, {"dataset": data})))
    metrics = {m.group: m for m in evaluator.aggregate(ctx, results) if m.name == "expected_depth"}
    assert list(metrics)[1:] == ["class=bigram", "class=random", "class=repeat"]
    assert [metrics[f"class={c}"].n for c in ("bigram", "random", "repeat")] == [96, 24, 72]
    depths = [d for r in results for d in r.values["scored"]["depth"][48:60]]
    assert metrics["class=random"].value == pytest.approx(sum(depths) / 24)


def test_classes_of_pieces():
    assert piece_classes(["ab", "", "c", "d"], [["x", 0, 2], ["y", 2, 3]]) == [
        "x", "y", "y", "other",
    ]  # fmt: skip
    assert piece_classes(["return", "+"]) == ["keyword", "punctuation"]
    assert piece_classes(["return"], [["x", 0]]) == ["keyword"]
    assert ordered_classes(["z", "number", "blank", "z"]) == ["blank", "number", "z"]
