"""Fewer forward passes under a constraint, and never another text."""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llguidance")

from tenfold.lm.batching import pad_batch
from tenfold.lm.prefixes import LEAST_SAVED, shared_prefixes
from tenfold.records import GenerationConfig

sys.path.insert(0, str(Path(__file__).parent / "support"))
from lm_models import KINDS, causal_lm

SCHEMA = {
    "type": "object",
    "properties": {
        "note": {"type": "string", "minLength": 3, "maxLength": 20},
        "value": {
            "anyOf": [{"type": "integer", "minimum": 0, "maximum": 50}, {"const": "abstain"}]
        },
        "why": {"type": "string", "minLength": 10, "maxLength": 30},
    },
    "required": ["note", "value"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
}
VOTE = {
    "type": "object",
    "properties": {"decision": {"enum": ["stop", "continue"]}},
    "required": ["decision"],
    "additionalProperties": False,
    "x-guidance": SCHEMA["x-guidance"],
}
SYSTEM = "def add(a, b):\n    return a + b\n" * 3
PROMPTS = [*(SYSTEM + end for end in ("def", "hello 你好", "print(i)", "12")), "x", "for i"]


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return causal_lm(request.param, context=256)


def counted(model, prompts, config, jump):
    """Completions, and the number of forward passes that they took."""
    passes = []
    handle = model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    model.jump_forward = jump
    try:
        return [row[0] for row in model.generate(prompts, config)], len(passes)
    finally:
        handle.remove()
        model.jump_forward = True


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("limit", [24, 31, 90])
def test_texts_are_those_of_the_plain_loop_in_fewer_passes(model, temperature, limit):
    config = GenerationConfig(
        max_new_tokens=limit, temperature=temperature, seed=3, constraint={"json_schema": SCHEMA}
    )
    jumped, few = counted(model, PROMPTS, config, jump=True)
    plain, many = counted(model, PROMPTS, config, jump=False)
    assert [c.token_ids for c in jumped] == [c.token_ids for c in plain]
    assert [c.finish_reason for c in jumped] == [c.finish_reason for c in plain]
    assert few < many
    for fast, slow in zip(jumped, plain, strict=True):
        json.loads(fast.text)
        written, stats = len(fast.token_ids), fast.stats
        assert stats["forced_tokens"] >= len(model.encode('{"note": "'))
        # Each pass lets one token be chosen; the others were forced.
        assert stats["forward_passes"] + stats["forced_tokens"] == written
        assert slow.stats == {"forward_passes": written, "forced_tokens": 0}


def test_batch_neighbours_change_no_text(model):
    config = GenerationConfig(
        max_new_tokens=60, temperature=1.5, seed=3, constraint={"json_schema": SCHEMA}
    )
    together = [row[0].token_ids for row in model.generate(PROMPTS, config)]
    assert [model.generate([p], config)[0][0].token_ids for p in PROMPTS] == together
    backwards = [row[0].token_ids for row in model.generate(PROMPTS[::-1], config)]
    assert backwards == together[::-1]


def test_a_vote_of_one_token_takes_one_pass():
    """Where the tokenizer has a token for each option's first letters that leaves no choice."""
    model = causal_lm(context=256)
    constraint = {"json_schema": VOTE}
    config = GenerationConfig(max_new_tokens=40, constraint=constraint)
    [vote], passes = counted(model, ["who?"], config, jump=True)
    assert json.loads(vote.text)["decision"] in ("stop", "continue")
    assert passes == vote.stats["forward_passes"] == 1
    assert vote.finish_reason == "eos"


def test_a_text_without_any_choice_takes_no_pass():
    model = causal_lm()
    constraint = {"json_schema": {"const": "fixed"}}
    [fixed], passes = counted(model, ["a"], GenerationConfig(constraint=constraint), jump=True)
    assert (fixed.text, passes, fixed.finish_reason) == ('"fixed"', 0, "eos")


def test_shared_beginnings_are_read_once(model):
    config = GenerationConfig(max_new_tokens=24, constraint={"json_schema": SCHEMA})
    tokens = []

    def record(module, args, kwargs):
        tokens.append(int(kwargs["attention_mask"][:, -kwargs["input_ids"].shape[1] :].sum()))

    handle = model.model.register_forward_pre_hook(record, with_kwargs=True)
    done = [row[0] for row in model.generate(PROMPTS, config)]
    handle.remove()
    ids = [model.prompt_ids(p) for p in PROMPTS]
    saved = sum(c.stats.get("reused_tokens", 0) for c in done)
    system = len(model.encode(SYSTEM))
    assert saved >= 3 * (system - 3)
    forced = len(model.encode('{"note": "'))
    assert sum(tokens[:2]) == sum(map(len, ids)) + forced * len(ids) - saved


def test_stop_texts_and_log_probabilities_are_as_in_the_plain_loop():
    model = causal_lm(context=256)
    constraint = {"json_schema": SCHEMA}
    stopped = GenerationConfig(max_new_tokens=60, stop=('", "va',), constraint=constraint)
    jumped, _ = counted(model, PROMPTS, stopped, jump=True)
    plain, _ = counted(model, PROMPTS, stopped, jump=False)
    assert [(c.text, c.finish_reason) for c in jumped] == [(c.text, c.finish_reason) for c in plain]
    assert {c.finish_reason for c in jumped} == {"stop"}
    scored = GenerationConfig(max_new_tokens=60, logprobs=1, constraint=constraint)
    [first], _ = counted(model, PROMPTS[:1], scored, jump=True)
    assert len(first.logprobs) == len(first.token_ids)


def test_models_with_a_window_take_the_plain_loop():
    model = causal_lm("gemma2", context=256)
    config = GenerationConfig(max_new_tokens=60, constraint={"json_schema": SCHEMA})
    [done], passes = counted(model, PROMPTS[:1], config, jump=True)
    assert passes == len(done.token_ids)
    json.loads(done.text)


def test_compacting_a_session_changes_no_logits():
    model = causal_lm("llama", context=256)
    texts = [[5, 6, 7, 8, 9, 10], [11, 12], [13]]
    more = [[20], [21, 22, 23, 24], [25, 26]]
    last = [[30], [31], [32]]
    outputs = []
    for compact in (False, True):
        start = pad_batch(texts, 0, side="left")
        session, _ = model.start(start.input_ids, start.attention_mask)
        batch = pad_batch(more, 0, side="left")
        session.begin(batch.input_ids, batch.attention_mask)
        if compact:
            before = session.length
            session.compact()
            assert session.length == 7 < before == 10
        outputs.append(session.extend(torch.tensor(last)).logits)
    assert torch.allclose(*outputs, atol=1e-5)
    for row in range(3):
        whole = torch.tensor([texts[row] + more[row] + last[row]])
        with torch.no_grad():
            alone = model.model(whole).logits[0, -1]
        assert torch.allclose(outputs[1][row, -1], alone, atol=1e-4)


# --- Which rows share --------------------------------------------------------------------------


def partitions(items):
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for size in range(len(rest) + 1):
        for mates in itertools.combinations(rest, size):
            others = [i for i in rest if i not in mates]
            for inner in partitions(others):
                yield [[first, *mates], *inner]


def saved_by(prompts, rows):
    length = 0
    texts = [prompts[i] for i in rows]
    while all(len(t) > length + 1 for t in texts) and len({t[length] for t in texts}) == 1:
        length += 1
    return length * (len(rows) - 1)


def test_groups_save_as_much_as_any_partition():
    draws = random.Random(4)
    shared_at_all = 0
    for _ in range(60):
        base = [draws.randrange(2) for _ in range(80)]
        prompts = []
        for _ in range(draws.randrange(1, 7)):
            cut = draws.choice([0, 10, 40, 40, 60])
            tail = [draws.randrange(2, 4) for _ in range(draws.choice([0, 0, 3, 30]))]
            prompts.append((base[:cut] + tail) or [9])
        groups = shared_prefixes(prompts)
        assert sorted(i for g in groups for i in g.rows) == list(range(len(prompts)))
        for group in groups:
            assert len({tuple(prompts[i][: group.length]) for i in group.rows}) == 1
            assert all(len(prompts[i]) > group.length for i in group.rows)
        best = max(
            sum(saved_by(prompts, rows) for rows in p)
            for p in partitions(list(range(len(prompts))))
        )
        saved = sum(g.saved for g in groups)
        assert saved == (best if best >= LEAST_SAVED * len(prompts) else 0)
        shared_at_all += saved > 0
    assert shared_at_all > 10
