"""Perplexity, exact match and throughput: what their numbers mean, and when they are the same."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenfold.builtin import throughput
from tenfold.builtin.exact_match import ExactMatch
from tenfold.builtin.matching import Extraction, Normalization, agrees, number
from tenfold.builtin.perplexity import Perplexity, windows
from tenfold.builtin.throughput import Throughput, count_tokens
from tenfold.errors import CapabilityError, ConfigError
from tenfold.records import Completion, PromptRecord, SampleRecord, TextRecord, TokenScores
from tenfold.report import render_html
from tenfold.stats import wilson
from tenfold.testing.context import FakeContext

sys.path.insert(0, str(Path(__file__).parent / "support"))
from builtin_fakes import Bytes, Records, nats


def run(evaluator, models, dataset, tmp_path):
    ctx = FakeContext(tmp_path)
    items = evaluator.plan(ctx, {"dataset": dataset})
    results = list(evaluator.run(ctx, models, items))
    good = [result for result in results if result.error is None]
    return results, evaluator.aggregate(ctx, iter(good))


def page(evaluator, results, metrics, tmp_path):
    return render_html("t", list(evaluator.report(FakeContext(tmp_path), results, metrics)))


# --- perplexity -----------------------------------------------------------------------------

TEXTS = ["short", "", "x", "a longer text that still fits", "naïve café 😀", "y" * 40 + "z" * 55]


def texts(values=TEXTS):
    return Records(
        "text",
        [TextRecord(id=f"t{i}", text=t, metadata={"half": i % 2}) for i, t in enumerate(values)],
    )


def by_name(metrics, group=""):
    return {m.name: m for m in metrics if m.group == group}


def test_perplexity_is_the_token_weighted_mean_of_the_scores(tmp_path):
    model = Bytes(context_length=200)
    results, metrics = run(Perplexity(), {"model": model}, texts(), tmp_path)
    expected = [nats(model, text) for text in TEXTS]
    scored = [max(0, len(text.encode()) - 1) for text in TEXTS]
    assert [r.values["nats"] for r in results] == pytest.approx(expected)
    assert [r.values["tokens"] for r in results] == scored
    assert [r.values["bytes"] for r in results] == scored  # one token is one byte here
    mean = sum(expected) / sum(scored)
    named = by_name(metrics)
    assert named["nats_per_token"].value == pytest.approx(mean)
    assert named["perplexity"].value == pytest.approx(math.exp(mean))
    assert named["bits_per_byte"].value == pytest.approx(mean / math.log(2))
    assert named["tokens"].value == sum(scored)
    assert named["nats_per_token"].n == 4  # texts with something to score
    low, high = named["perplexity"].interval
    assert low < named["perplexity"].value < high
    json.dumps([r.values for r in results])


def test_a_special_start_token_scores_the_first_token_too(tmp_path):
    model = Bytes(context_length=200)
    results, _ = run(Perplexity(start="special"), {"model": model}, texts(["ab"]), tmp_path)
    expected = -model.logprob([256], 97) - model.logprob([256, 97], 98)
    assert results[0].values["nats"] == pytest.approx(expected)
    assert (results[0].values["tokens"], results[0].values["bytes"]) == (2, 2)
    model.eos_id = None
    with pytest.raises(ConfigError, match='use start = "none"'):
        run(Perplexity(start="special"), {"model": model}, texts(), tmp_path)


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_perplexity_does_not_depend_on_batch_size(tmp_path, size):
    def values(batch_size):
        evaluator = Perplexity(window=16, stride=5, batch_size=batch_size)
        return [r.values for r in run(evaluator, {"model": Bytes()}, texts(), tmp_path)[0]]

    assert values(size) == values(8)


@given(st.integers(0, 80), st.integers(0, 3), st.integers(4, 20), st.integers(1, 19))
def test_windows_score_each_token_once_with_all_the_context_that_fits(length, prefix, size, stride):
    stride = min(stride, size - 1)
    ids, before = list(range(100, 100 + length)), list(range(prefix))
    tokens = [*before, *ids]
    found = windows(ids, before, size, stride)
    scored = [token for _, continuation in found for token in continuation]
    assert scored == tokens[max(1, prefix) :]
    for context, continuation in found:
        end = tokens.index(continuation[-1]) + 1
        assert len(context) + len(continuation) == min(size, end)
        assert [*context, *continuation] == tokens[end - min(size, end) : end]
        assert context
    assert all(len(continuation) <= stride for _, continuation in found[1:])


def test_windows_longer_than_the_text_change_nothing(tmp_path):
    model = Bytes(context_length=500)
    whole, _ = run(Perplexity(), {"model": model}, texts(), tmp_path)
    cut, _ = run(Perplexity(window=20, stride=4), {"model": model}, texts(), tmp_path)
    for text, a, b in zip(TEXTS, whole, cut, strict=True):
        assert a.values["tokens"] == b.values["tokens"]
        if len(text.encode()) <= 20:
            assert a.values["nats"] == b.values["nats"]
    assert cut[-1].values["windows"] > 1
    # A model that sees 3 bytes back loses nothing by windows that keep 3.
    short = Bytes(context_length=20, memory=3)
    near, _ = run(Perplexity(stride=16), {"model": short}, texts(), tmp_path)
    assert near[-1].values["nats"] == pytest.approx(nats(short, TEXTS[-1]))


def test_perplexity_of_models_that_only_score(tmp_path):
    class Scorer:
        def score(self, pairs):
            return [TokenScores([0] * 3, [-1.0, -2.0, -3.0]) for _ in pairs]

    results, metrics = run(Perplexity(), {"model": Scorer()}, texts(["abcd", "é"]), tmp_path)
    assert [r.values["bytes"] for r in results] == [4, 2]
    assert by_name(metrics)["nats_per_token"].value == 2.0


def test_perplexity_by_group(tmp_path):
    model = Bytes(context_length=200)
    evaluator = Perplexity(group_by="half")
    results, metrics = run(evaluator, {"model": model}, texts(), tmp_path)
    for half in (0, 1):
        own = [r.values for i, r in enumerate(results) if i % 2 == half]
        expected = sum(v["nats"] for v in own) / sum(v["tokens"] for v in own)
        found = by_name(metrics, f"half={half}")["nats_per_token"]
        assert found.value == pytest.approx(expected)
    assert "half=1" in page(evaluator, results, metrics, tmp_path)
    with pytest.raises(ConfigError, match=r"column 'halve'.*did you mean 'half'"):
        Perplexity(group_by="halve").plan(FakeContext(tmp_path), {"dataset": texts()})


def test_perplexity_of_nothing(tmp_path):
    results, metrics = run(Perplexity(), {"model": Bytes()}, texts(["", "x"]), tmp_path)
    assert [r.values["tokens"] for r in results] == [0, 0]
    assert metrics == []
    assert run(Perplexity(), {"model": Bytes()}, texts([]), tmp_path) == ([], [])


def test_windows_must_fit(tmp_path):
    with pytest.raises(ConfigError, match="window is 99 tokens, but the model reads at most 64"):
        run(Perplexity(window=99), {"model": Bytes()}, texts(), tmp_path)
    with pytest.raises(ConfigError, match="stride is 8 with a window of 8; it must be smaller"):
        Perplexity(window=8, stride=8)


# --- exact match ----------------------------------------------------------------------------


class Answers:
    """A model with fixed answers."""

    def __init__(self, answers):
        self.answers, self.calls = answers, []

    def generate(self, prompts, config):
        self.calls.append(len(prompts))
        return [[Completion(self.answers[p], finish_reason="eos")] for p in prompts]


QUESTIONS = Records("prompt", [
    PromptRecord(id="a", prompt="1+1", reference="2", metadata={"topic": "sums"}),
    PromptRecord(id="b", prompt="2+2", reference="4", metadata={"topic": "sums"}),
    PromptRecord(id="c", prompt="sky", reference="Blue", metadata={"topic": "colors"}),
])  # fmt: skip
ANSWERS = {"1+1": " 2\n", "2+2": "5", "sky": "blue"}


def test_exact_match_counts_with_wilson_intervals(tmp_path):
    evaluator = ExactMatch(ignore_case=True, group_by="topic")
    results, metrics = run(evaluator, {"model": Answers(ANSWERS)}, QUESTIONS, tmp_path)
    assert [r.values["correct"] for r in results] == [True, False, True]
    overall, colors, sums = metrics
    assert (overall.value, overall.n, overall.interval) == (2 / 3, 3, wilson(2, 3))
    assert overall.higher_is_better is True
    assert (colors.group, colors.value, sums.group, sums.value) == (
        "topic=colors", 1.0, "topic=sums", 0.5,
    )  # fmt: skip
    html = page(evaluator, results, metrics, tmp_path)
    assert "The first 1 of 1." in html
    assert "topic=sums" in html


@pytest.mark.parametrize("size", [1, 2, 3])
def test_exact_match_does_not_depend_on_batch_size(tmp_path, size):
    model = Answers(ANSWERS)
    results, _ = run(ExactMatch(batch_size=size), {"model": model}, QUESTIONS, tmp_path)
    again, _ = run(ExactMatch(), {"model": Answers(ANSWERS)}, QUESTIONS, tmp_path)
    assert results == again
    assert max(model.calls) == size


def test_samples_are_compared_without_a_model(tmp_path):
    samples = Records("sample", [
        SampleRecord(id="a", prompt="1+1", completion="2", reference="2", completion_ids=[5]),
        SampleRecord(id="b", prompt="2+2", completion="5", reference="4"),
    ])  # fmt: skip
    results, metrics = run(ExactMatch(), {}, samples, tmp_path)
    assert [r.values["correct"] for r in results] == [True, False]
    assert results[0].values["completion_ids"] == [5]
    assert metrics[0].value == 0.5


def test_prompts_without_a_model_or_a_reference(tmp_path):
    with pytest.raises(ConfigError, match=r"needs a model that completes them; add \[model\]"):
        run(ExactMatch(), {}, QUESTIONS, tmp_path)
    bare = Records("prompt", [PromptRecord(id="x", prompt="sky"), QUESTIONS.records[2]])
    results, metrics = run(ExactMatch(), {"model": Answers(ANSWERS)}, bare, tmp_path)
    assert {r.id: r.error for r in results} == {
        "x": "the record has no reference to compare with", "c": None,
    }  # fmt: skip
    assert metrics[0].n == 1
    with pytest.raises(CapabilityError, match="constraint"):
        run(ExactMatch(constraint={"regex": "a"}), {"model": Answers({})}, QUESTIONS, tmp_path)


def test_extraction_takes_the_last_match_of_both_sides(tmp_path):
    answers = {"q": "First #### 3, no: #### 12."}
    data = Records("prompt", [
        PromptRecord(id="a", prompt="q", reference="6 and 6\n#### 12"),
        PromptRecord(id="b", prompt="q", reference="12"),
    ])  # fmt: skip
    evaluator = ExactMatch(extract=r"#### (\d+)")
    results, _ = run(evaluator, {"model": Answers(answers)}, data, tmp_path)
    assert [(r.values["answer"], r.values["correct"]) for r in results] == [("12", True)] * 2
    nothing, metrics = run(
        ExactMatch(extract=r"= (\d)"), {"model": Answers(answers)}, data, tmp_path
    )
    assert [(r.values["answer"], r.values["correct"]) for r in nothing] == [(None, False)] * 2
    assert "Nothing could be extracted." in page(evaluator, nothing, metrics, tmp_path)
    assert Extraction("b.")("abcbd") == "bd"
    with pytest.raises(ConfigError, match="no regular expression"):
        ExactMatch(extract="(")


def test_normalisation_takes_out_what_it_says():
    text = " The  Cat,\nand a dog! "
    assert Normalization(whitespace=False)(text) == text
    assert Normalization()(text) == "The Cat, and a dog!"
    assert Normalization(case=True)(text) == "the cat, and a dog!"
    assert Normalization(punctuation=True)(text) == "The Cat and a dog"
    assert Normalization(articles=True)(text) == "Cat, and dog!"
    assert Normalization(True, True, True, True)(text) == "cat and dog"
    assert Normalization(articles=True)("another theme") == "another theme"


@pytest.mark.parametrize(
    ("compare", "answer", "reference", "agree"),
    [
        ("equal", "ab", "ab", True),
        ("equal", "ab", "abc", False),
        ("starts-with", "abc", "ab", True),
        ("starts-with", "xab", "ab", False),
        ("contains", "xaby", "ab", True),
        ("contains", "xa", "ab", False),
        ("number", "$1,000.50", "1000.5", True),
        ("number", "3.", "3", True),
        ("number", "3", "three", False),
        ("number", "nan", "nan", False),
        ("number", "0.3", "0.30000000000000004", True),
    ],
)
def test_comparisons(compare, answer, reference, agree):
    assert agrees(answer, reference, compare) is agree


def test_numbers_are_read_strictly():
    assert number("-1_000") == -1000
    assert number("12%") == 12
    assert number("1e3") == 1000
    assert number("twelve") is None
    assert number("inf") is None


# --- throughput -----------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when a model says so."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    fake = Clock()
    monkeypatch.setattr(throughput, "time", fake)
    return fake


class Timed(Bytes):
    """Takes 1 s per call and, in its first call, 100 s more."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def generate(self, prompts, config):
        self.clock.now += 1.0 if self.calls else 101.0
        return super().generate(prompts, config)


PROMPTS = Records("prompt", [PromptRecord(id=str(i), prompt=f"p{i}") for i in range(20)])


def test_throughput_is_tokens_over_seconds_by_batch_size(tmp_path, clock):
    evaluator = Throughput((1, 4), repeats=7, prompts=8, max_new_tokens=5)
    results, metrics = run(evaluator, {"model": Timed(clock)}, PROMPTS, tmp_path)
    assert [r.id for r in results[:3]] == [
        "model/batch=1/pass=0", "model/batch=4/pass=0", "model/batch=1/pass=1",
    ]  # fmt: skip
    assert len(results) == 14
    assert all(r.values["tokens"] == 40 and r.values["counted"] == "ids" for r in results)
    rates = {m.group: m for m in metrics if m.name == "tokens_per_second"}
    assert rates["batch=1"].value == pytest.approx(5)  # 8 calls of 1 s for 40 tokens
    assert rates["batch=4"].value == pytest.approx(20)
    assert rates["batch=1"].n == 7
    assert rates["batch=1"].interval == pytest.approx((5, 5))
    assert rates["batch=1"].unit == "tokens/s"
    assert {m.value for m in metrics if m.name == "spread"} == {0.0}
    assert "batch=4" in page(evaluator, results, metrics, tmp_path)


def test_warm_up_is_not_timed(tmp_path, clock):
    cold, _ = run(
        Throughput((8,), repeats=1, prompts=8, warmup=0), {"model": Timed(clock)}, PROMPTS, tmp_path
    )
    warm, _ = run(
        Throughput((8,), repeats=1, prompts=8, warmup=1), {"model": Timed(clock)}, PROMPTS, tmp_path
    )
    assert cold[0].values["seconds"] == pytest.approx(101)
    assert warm[0].values["seconds"] == pytest.approx(1)


def test_models_race_in_turns(tmp_path, clock):
    evaluator = Throughput((2,), repeats=2, prompts=2, roles=("a", "b"))
    models = {"a": Timed(clock), "b": Timed(clock)}
    results, metrics = run(evaluator, models, PROMPTS, tmp_path)
    assert [r.values["role"] for r in results] == ["a", "b", "a", "b"]
    assert {m.group for m in metrics} == {"a batch=2", "b batch=2"}
    assert all(m.interval is None for m in metrics)  # two passes give no interval


@pytest.mark.parametrize(
    ("completion", "counted"),
    [
        (Completion("a b", [1, 2, 3]), (3, "ids")),
        (Completion("a b", stats={"completion_tokens": 9}), (9, "usage")),
        (Completion("a b c"), (5, "encoded")),
    ],
)
def test_tokens_are_counted_by_the_best_means(completion, counted):
    assert count_tokens(Bytes(), [completion]) == counted
    assert count_tokens(object(), [Completion("a b c")]) == (3, "words")


def test_throughput_needs_prompts_and_batch_sizes(tmp_path):
    with pytest.raises(ConfigError, match="no records"):
        Throughput().plan(FakeContext(tmp_path), {"dataset": Records("prompt", [])})
    with pytest.raises(ConfigError, match="batch_sizes is empty"):
        Throughput(())
