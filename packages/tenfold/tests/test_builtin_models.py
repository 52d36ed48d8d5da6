"""The models that need nothing: what they repeat, and what they refuse."""

from __future__ import annotations

import json

import pytest
from tenfold.builtin.echo import Echo
from tenfold.builtin.replay import Replay
from tenfold.errors import CapabilityError, ConfigError
from tenfold.records import GenerationConfig
from tenfold.testing.kit import check_model

GREEDY = GenerationConfig()


def said(model, *prompts, **settings):
    rows = model.generate(list(prompts), GenerationConfig(**settings))
    return [[(c.text, c.finish_reason) for c in row] for row in rows]


def test_echo_passes_the_conformance_kit():
    for model in (Echo(), Echo(prefix="> ", reverse=True, upper=True), Echo(text="yes")):
        findings = check_model(model, ("generate",))
        assert findings
        assert {f.status for f in findings} == {"pass"}, findings


def test_echo_repeats_prompts_and_last_messages():
    assert said(Echo(), "a b", "") == [[("a b", "eos")], [("", "eos")]]
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    assert said(Echo(prefix="re: "), chat) == [[("re: hi", "eos")]]
    assert said(Echo(upper=True, reverse=True), "one two", n=2) == [[("TWO ONE", "eos")] * 2]
    assert said(Echo(text="fixed"), "one", "two") == [[("fixed", "eos")]] * 2


def test_echo_stops_where_a_model_would():
    assert said(Echo(), "a b c", max_new_tokens=2) == [[("a b", "length")]]
    assert said(Echo(), "a b c", max_new_tokens=3) == [[("a b c", "eos")]]
    assert said(Echo(), "a b c ", max_new_tokens=4) == [[("a b c ", "eos")]]
    assert said(Echo(), "one, two; x", stop=(";", ",")) == [[("one", "stop")]]
    # The stop text lies beyond the limit, so it is never reached.
    assert said(Echo(), "a b c;", stop=(";",), max_new_tokens=2) == [[("a b", "length")]]


def test_echo_refuses_what_it_cannot_do():
    with pytest.raises(CapabilityError, match="cannot follow a constraint"):
        Echo().generate(["x"], GenerationConfig(constraint={"choice": ["a"]}))
    with pytest.raises(ConfigError, match="no tokenizer"):
        Echo().generate([[1, 2]], GREEDY)


@pytest.fixture
def recorded(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    rows = [
        {"prompt": "2+2?", "completion": "4", "finish_reason": "stop", "stats": {"x": 1},
         "completion_ids": [7], "logprobs": [-0.5]},
        {"prompt": "name a color", "completion": "red"},
        {"prompt": "name a color", "completion": "blue"},
        {"prompt": chat, "completion": "hello"},
    ]  # fmt: skip
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_replay_gives_what_was_recorded(recorded):
    model = Replay(path=recorded)
    [[first], [chat]] = model.generate(["2+2?", [{"content": "hi", "role": "user"}]], GREEDY)
    assert (first.text, first.token_ids, first.logprobs) == ("4", [7], [-0.5])
    assert (first.finish_reason, first.stats) == ("stop", {"x": 1})
    assert chat.text == "hello"
    [colors] = model.generate(["name a color"], GenerationConfig(n=2, temperature=1.0))
    assert [c.text for c in colors] == ["red", "blue"]
    [same] = model.generate(["2+2?"], GenerationConfig(n=3))
    assert [c.text for c in same] == ["4"] * 3
    assert model.generate([], GREEDY) == []


def test_replay_names_the_nearest_prompt_and_missing_samples(recorded):
    model = Replay(path=recorded)
    with pytest.raises(ConfigError, match=r"no answer to the prompt 'name a colour'; the nearest "
                                          r"recorded one is 'name a color'"):  # fmt: skip
        model.generate(["name a colour"], GREEDY)
    with pytest.raises(ConfigError, match="has 2 answers to the prompt 'name a color', not n = 3"):
        model.generate(["name a color"], GenerationConfig(n=3, temperature=1.0))


def test_replay_says_which_line_is_wrong(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p", "completion": "c"}\n{"prompt": "p", "completoin": "c"}\n')
    with pytest.raises(ConfigError, match="line 2: the column 'completion' is missing; did you "
                                          "mean 'completoin'"):  # fmt: skip
        Replay(path=path)


@pytest.mark.parametrize("arguments", [{}, {"path": "a", "run": "b"}])
def test_replay_needs_exactly_one_source(arguments):
    with pytest.raises(ConfigError, match="either path or run"):
        Replay(**arguments)


def test_fingerprints_follow_the_answers(recorded):
    first = Replay(path=recorded).fingerprint()
    assert first == Replay(path=recorded).fingerprint()
    recorded.write_text(recorded.read_text().replace("red", "green"))
    assert Replay(path=recorded).fingerprint() != first
    assert Echo().fingerprint() != Echo(prefix="x").fingerprint()
