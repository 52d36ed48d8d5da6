"""Generation as data: recorded, read back, generated on demand."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from tenfold.builtin.generate import Generate
from tenfold.builtin.generated import Generated
from tenfold.builtin.prompting import PromptCut, batches
from tenfold.builtin.replay import Replay
from tenfold.builtin.run_samples import RunSamples
from tenfold.errors import CapabilityError, ConfigError, RunFailed
from tenfold.records import (
    Completion,
    ItemResult,
    PromptRecord,
    SampleRecord,
    TextRecord,
)
from tenfold.seeds import content_hash
from tenfold.store import ItemLine, ItemWriter, RunStore
from tenfold.testing.context import FakeContext

sys.path.insert(0, str(Path(__file__).parent / "support"))
from builtin_fakes import Bytes, Records

PROMPTS = [
    PromptRecord(id=f"p{i}", prompt=f"prompt {i}", reference=str(i), metadata={"i": i})
    for i in range(7)
]
TEXTS = [TextRecord(id=f"t{i}", text=f"line {i}\nmore\nlast {i}") for i in range(3)]


def results(evaluator, models, dataset, tmp_path, **context):
    ctx = FakeContext(tmp_path, **context)
    items = evaluator.plan(ctx, {"dataset": dataset})
    return list(evaluator.run(ctx, models, items))


def test_batches_cover_everything_lazily():
    seen = []
    source = (seen.append(i) or i for i in range(7))
    parts = batches(source, 3)
    assert next(parts) == [0, 1, 2]
    assert seen == [0, 1, 2]
    assert list(parts) == [[3, 4, 5], [6]]


@pytest.mark.parametrize(
    ("cut", "prompt", "reference"),
    [
        (PromptCut(), "ab\ncd\nef", None),
        (PromptCut(chars=4), "ab\nc", "d\nef"),
        (PromptCut(lines=2), "ab\ncd\n", "ef"),
        (PromptCut(lines=9), "ab\ncd\nef", None),
    ],
)
def test_text_becomes_prompt_and_reference(cut, prompt, reference):
    assert cut.apply(TextRecord(id="x", text="ab\ncd\nef")) == (prompt, reference)


def test_prompt_cuts_exclude_each_other_and_other_records():
    with pytest.raises(ConfigError, match="keep one"):
        PromptCut(chars=1, lines=1)
    with pytest.raises(ConfigError, match="is a sample record"):
        PromptCut().apply(SampleRecord(id="x", prompt="p", completion="c"))


def test_generated_items_hold_prompt_completion_and_ids(tmp_path):
    model = Bytes()
    rows = results(
        Generate(max_new_tokens=5), {"model": model}, Records("prompt", PROMPTS), tmp_path
    )
    assert [row.id for row in rows] == [p.id for p in PROMPTS]
    values = rows[2].values
    assert values["prompt"] == "prompt 2"
    assert values["prompt_ids"] == list(b"prompt 2")
    assert values["completion_ids"] == list(values["completion"].encode())
    assert len(values["completion"]) == 5
    assert (values["reference"], values["metadata"], values["role"]) == ("2", {"i": 2}, "model")
    assert values["finish_reason"] == "length"
    json.dumps(values)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_items_do_not_depend_on_batch_size(tmp_path, temperature):
    def run(size):
        evaluator = Generate(n=3, temperature=temperature, batch_size=size, max_new_tokens=6)
        return results(evaluator, {"model": Bytes()}, Records("prompt", PROMPTS), tmp_path, seed=4)

    whole = run(7)
    assert run(1) == run(2) == run(5) == whole
    model = Bytes()
    evaluator = Generate(batch_size=3)
    results(evaluator, {"model": model}, Records("prompt", PROMPTS), tmp_path)
    assert [len(call) for call in model.calls] == [3, 3, 1]


def test_samples_follow_the_runs_seed_unless_they_have_their_own(tmp_path):
    def run(seed, own):
        evaluator = Generate(temperature=1.0, seed=own)
        rows = results(
            evaluator, {"model": Bytes()}, Records("prompt", PROMPTS), tmp_path, seed=seed
        )
        return [row.values["completion"] for row in rows]

    assert run(1, None) != run(2, None)
    assert run(1, 9) == run(2, 9)
    assert run(1, None) == run(5, 1)


def test_roles_write_side_by_side(tmp_path):
    evaluator = Generate(roles=("a", "b"), max_new_tokens=4)
    models = {"a": Bytes(), "b": Bytes()}
    rows = results(evaluator, models, Records("prompt", PROMPTS[:2]), tmp_path)
    assert [row.id for row in rows] == ["p0@a", "p1@a", "p0@b", "p1@b"]
    assert [row.values["role"] for row in rows] == ["a", "a", "b", "b"]
    metrics = evaluator.aggregate(FakeContext(tmp_path), rows)
    assert {m.group for m in metrics} == {"role=a", "role=b"}
    with pytest.raises(ConfigError, match=r"roles names 'b', but the run's models are: a"):
        results(evaluator, {"a": Bytes()}, Records("prompt", PROMPTS), tmp_path)


def test_metrics_count_what_was_written(tmp_path):
    evaluator = Generate()
    rows = [
        ItemResult("a", {"prompt": "p", "completion": "1234", "completion_ids": [1, 2],
                         "finish_reason": "eos"}),
        ItemResult("b", {"prompt": "p", "completion": "12", "completion_ids": [1],
                         "finish_reason": "length"}),
    ]  # fmt: skip
    metrics = {m.name: m for m in evaluator.aggregate(FakeContext(tmp_path), iter(rows))}
    assert metrics["completion_length"].value == 3
    assert metrics["completion_tokens"].value == 1.5
    assert metrics["finished"].value == 0.5
    assert metrics["finished"].n == 2
    assert evaluator.aggregate(FakeContext(tmp_path), []) == []


def test_reported_errors_fail_their_item_only(tmp_path):
    class Half(Bytes):
        def generate(self, prompts, config):
            return [
                [Completion("", finish_reason="error", stats={"error": "too long"})]
                if prompt.endswith("1") else super(Half, self).generate([prompt], config)[0]
                for prompt in prompts
            ]  # fmt: skip

    rows = results(Generate(), {"model": Half()}, Records("prompt", PROMPTS), tmp_path)
    assert [(row.id, row.error) for row in rows if row.error] == [("p1", "too long")]
    with pytest.raises(RunFailed, match="prompt 'p1': too long"):
        list(Generated(Half(), Records("prompt", PROMPTS)).load())


def test_constraints_need_a_model_that_follows_them(tmp_path):
    evaluator = Generate(constraint={"regex": "a+"})
    with pytest.raises(CapabilityError, match=r"cannot follow a regex constraint \(kinds .*: none"):
        results(evaluator, {"model": Bytes()}, Records("prompt", PROMPTS), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 0.0}, "'top_p' is 0.0"),
        ({"stop": [""]}, "stop holds an empty text"),
        ({"prompt_chars": 1, "prompt_lines": 1}, "keep one"),
    ],
)
def test_wrong_settings_are_found_when_the_run_is_built(settings, message):
    with pytest.raises(ConfigError, match=message):
        Generate(**settings)


def test_report_shows_the_first_samples_and_every_ending(tmp_path):
    from tenfold.report import render_html, render_markdown

    records = [PromptRecord(id=f"<{i}>", prompt=f"<b>{i}</b>") for i in range(30)]
    evaluator = Generate(n=2)
    rows = results(evaluator, {"model": Bytes()}, Records("prompt", records), tmp_path)
    blocks = list(evaluator.report(FakeContext(tmp_path), rows, []))
    page = render_html("t", blocks)
    assert "The first 20 of 60 samples." in page
    assert "<b>0</b>" not in page
    assert "Exits" in page
    assert re.search(r"length\D+60", render_markdown("t", blocks))


# --- generated ------------------------------------------------------------------------------


def test_generated_samples_carry_what_their_prompts_did():
    model = Bytes()
    data = Generated(model, Records("prompt", PROMPTS), max_new_tokens=5, batch_size=3)
    records = list(data.load())
    assert [r.id for r in records] == [p.id for p in PROMPTS]
    assert records[1].reference == "1"
    assert records[1].metadata == {"i": 1}
    assert records[1].prompt_ids == list(b"prompt 1")
    assert len(records[1].completion_ids) == 5
    assert [len(call) for call in model.calls] == [3, 3, 1]
    assert list(data.load()) == records
    assert len(model.calls) == 3  # nothing was written again


def test_generated_reads_no_further_than_asked():
    model = Bytes()
    data = Generated(model, Records("prompt", PROMPTS), n=2, batch_size=2, temperature=1.0)
    part = list(data.load(limit=3))
    assert [r.id for r in part] == ["p0#0", "p0#1", "p1#0"]
    assert [len(call) for call in model.calls] == [2]
    assert list(data.load())[:3] == part


@pytest.mark.parametrize("size", [1, 3, 8])
def test_generated_does_not_depend_on_batches_order_or_limit(size):
    def data(**more):
        settings = {"n": 2, "temperature": 1.0, "seed": 3, "batch_size": size, **more}
        return Generated(Bytes(), Records("prompt", PROMPTS), **settings)

    whole = {r.id: r for r in Generated(Bytes(), Records("prompt", PROMPTS), n=2,
                                        temperature=1.0, seed=3).load()}  # fmt: skip
    shuffled = list(data().load(shuffle_seed=1))
    assert {r.id: r for r in shuffled} == whole
    assert [r.id for r in shuffled] != list(whole)
    assert list(data(limit=5).load()) == list(whole.values())[:5]


def test_generated_continues_texts():
    data = Generated(Bytes(), Records("text", TEXTS), prompt_lines=1)
    [first, *_] = data.load()
    assert (first.prompt, first.reference) == ("line 0\n", "more\nlast 0")


def test_generated_fingerprint_needs_no_generation():
    class Marked(Bytes):
        mark = "w1"

        def fingerprint(self):
            return self.mark

    def mark(model, records=PROMPTS, **settings):
        return Generated(model, Records("prompt", records), **settings).fingerprint()

    model = Marked()
    first = mark(model)
    assert first == mark(model, batch_size=2)
    others = [mark(model, seed=1), mark(model, max_new_tokens=2), mark(model, PROMPTS[:2])]
    model.mark = "w2"
    others.append(mark(model))
    assert len({first, *others}) == 5
    assert model.calls == []


# --- run samples ----------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path, monkeypatch):
    (tmp_path / "workspace.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def record_run(runs, name, results, status="ok"):
    store = RunStore.create(runs, name)
    writer = ItemWriter(store)
    for index, result in reversed(list(enumerate(results))):  # written out of order
        writer.item(ItemLine(index, result.id, content_hash(index), result.values))
    writer.close()
    store.write_json("run.json", {"name": name})
    store.set_status(status)
    return store


def generate_rows(tmp_path, **settings):
    models = {"model": Bytes(), "a": Bytes(), "b": Bytes(memory=1)}
    return results(Generate(**settings), models, Records("prompt", PROMPTS), tmp_path)


def test_a_run_is_read_back_as_it_was_written(runs, tmp_path):
    rows = generate_rows(tmp_path, max_new_tokens=5)
    store = record_run(runs, "first", rows)
    records = list(RunSamples("first").load())
    assert [r.id for r in records] == [p.id for p in PROMPTS]
    for row, record in zip(rows, records, strict=True):
        for name in ("prompt", "completion", "prompt_ids", "completion_ids", "finish_reason",
                     "reference", "metadata", "stats"):  # fmt: skip
            assert getattr(record, name) == row.values[name]
    for name in (str(store.path), f"runs/first/{store.id}", store.id):
        assert list(RunSamples(name).load()) == records


def test_several_samples_of_a_prompt_are_told_apart(runs, tmp_path):
    record_run(runs, "many", generate_rows(tmp_path, n=2, temperature=1.0))
    records = list(RunSamples("many").load())
    assert [r.id for r in records[:3]] == ["p0#0", "p0#1", "p1#0"]
    assert records[0].completion != records[1].completion
    assert list(RunSamples("many", limit=3).load()) == records[:3]
    shuffled = list(RunSamples("many").load(shuffle_seed=1))
    assert shuffled != records
    assert sorted(r.id for r in shuffled) == sorted(r.id for r in records)


def test_roles_are_read_apart(runs, tmp_path):
    record_run(runs, "two", generate_rows(tmp_path, roles=("a", "b")))
    assert [r.id for r in RunSamples("two", role="b").load()] == [f"p{i}@b" for i in range(7)]
    with pytest.raises(ConfigError, match=r"no samples of the role 'c' \(roles: a, b\)"):
        list(RunSamples("two", role="c").load())


def test_a_name_means_its_newest_finished_run(runs, tmp_path, monkeypatch):
    import time

    stamps = iter(["20250101-000000", "20250102-000000", "20250103-000000"])
    monkeypatch.setattr(time, "strftime", lambda *_: next(stamps))
    rows = generate_rows(tmp_path)
    record_run(runs, "job", rows[:2])
    good = record_run(runs, "job", rows[:3])
    bad = record_run(runs, "job", rows[:4], status="interrupted")
    assert RunSamples("job").store.path == good.path
    assert RunSamples("job", partial=True).store.path == bad.path
    with pytest.raises(ConfigError, match="has not finished well: its status is 'interrupted'"):
        RunSamples(str(bad.path))
    assert len(list(RunSamples(str(bad.path), partial=True).load())) == 4


def test_runs_that_are_not_there_or_hold_no_samples(runs, tmp_path):
    record_run(runs, "broken", [], status="failed")
    with pytest.raises(ConfigError, match=r"no run 'broken' .* has finished well; the newest"):
        RunSamples("broken")
    with pytest.raises(ConfigError, match=r"no run 'brokem'.*did you mean 'broken'"):
        RunSamples("brokem")
    record_run(runs, "other", [ItemResult("x", {"nats": 3})])
    with pytest.raises(ConfigError, match=r"item 'x' holds no prompt .*\(it holds: nats\)"):
        list(RunSamples("other").load())
    record_run(runs, "empty", [])
    with pytest.raises(ConfigError, match="has no items"):
        list(RunSamples("empty").load())


def test_fingerprint_is_of_the_content_not_of_the_run(runs, tmp_path):
    rows = generate_rows(tmp_path)
    record_run(runs, "one", rows)
    record_run(runs, "two", rows)
    record_run(runs, "three", rows[:-1])
    prints = [RunSamples(name).fingerprint() for name in ("one", "two", "three")]
    assert prints[0] == prints[1] != prints[2]


def test_replay_of_a_run_answers_as_its_model_did(runs, tmp_path):
    rows = generate_rows(tmp_path, n=2, temperature=1.0)
    record_run(runs, "job", rows)
    again = results(
        Generate(n=2, temperature=1.0), {"model": Replay(run="job")},
        Records("prompt", PROMPTS), tmp_path,
    )  # fmt: skip
    texts = [[s["completion"] for s in row.values["samples"]] for row in rows]
    assert [[s["completion"] for s in row.values["samples"]] for row in again] == texts
