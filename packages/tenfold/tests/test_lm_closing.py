"""Constraints that always close, against brute force, `json` and llguidance."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llguidance")

from llguidance import LLMatcher
from scipy import stats as scipy_stats
from tenfold.errors import ConfigError
from tenfold.lm import constraints
from tenfold.lm.byte_machine import PLAIN, NotInSubset, State
from tenfold.lm.closing import NEVER, Closer, Vocabulary
from tenfold.lm.json_machine import schema_machine
from tenfold.lm.model import CausalLM
from tenfold.records import GenerationConfig

sys.path.insert(0, str(Path(__file__).parent / "support"))
from lm_models import causal_lm, network

EXACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def table(properties, required=None, **more):
    required = list(properties) if required is None else required
    return {
        "type": "object", "properties": properties, "required": required,
        "additionalProperties": False, **more,
    }  # fmt: skip


VALUE = {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 50}, {"const": "abstain"}]}
DECISION = table(
    {
        "note": {"type": "string", "minLength": 3},
        "value": VALUE,
        "why": {"type": "string", "minLength": 10, "maxLength": 40},
    },
    required=["note", "value"],
)


def follows_decision(value):
    """The schema `DECISION`, checked by hand."""
    assert list(value) in (["note", "value"], ["note", "value", "why"])
    assert len(value["note"]) >= 3
    assert value["value"] == "abstain" or value["value"] in range(51)
    assert 10 <= len(value.get("why", "0123456789")) <= 40


# --- Machines against brute force -----------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"), [(0, 50), (-17, 1234), (5, 5), (-30, -4), (99, 1002), (-1, 0), (10, 19)]
)
def test_integers_are_exactly_those_between_the_bounds(low, high):
    machine = schema_machine({"type": "integer", "minimum": low, "maximum": high})
    found = [i for i in range(-3000, 3000) if machine.accepts(str(i).encode())]
    assert found == list(range(low, high + 1))
    assert not any(
        machine.accepts(text) for text in (b"", b"-", b"-0", b"00", b"01", b"1.0", b"+1")
    )


def test_bounds_that_exclude_themselves():
    machine = schema_machine({"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 12})
    assert [i for i in range(20) if machine.accepts(str(i).encode())] == list(range(4, 12))


@pytest.mark.parametrize(("least", "most"), [(0, 2), (1, 1), (2, 5)])
def test_strings_are_those_that_json_reads(least, most):
    """All texts of up to five bytes over ten that matter."""
    machine = schema_machine({"type": "string", "minLength": least, "maxLength": most})
    alphabet = [b'"', b"\\", b"u", b"0", b"n", b"a", b"\xc3", b"\xa9", b"\x01", b"\xe0"]
    accepted = 0
    for size in range(1, 5):
        for parts in itertools.product(alphabet, repeat=size):
            text = b'"' + b"".join(parts)
            assert machine.accepts(text) == _json_string(text, least, most), text
            accepted += machine.accepts(text)
    assert accepted > 5


def _json_string(text, least, most):
    try:
        value = json.loads(text.decode())
    except ValueError:
        return False
    return isinstance(value, str) and least <= len(value) <= most


def test_every_character_can_be_written_raw_or_escaped():
    machine = schema_machine({"type": "string", "minLength": 1, "maxLength": 1})
    for code in [*range(0x20, 0x7F), *range(0x80, 0x3000, 7), 0xD7FF, 0xE000, 0xFFFF, 0x10000,
                 0x3FFFF, 0x40000, 0x10FFFF]:  # fmt: skip
        assert machine.accepts(json.dumps(chr(code), ensure_ascii=False).encode()), hex(code)
        if code < 0x10000:
            assert machine.accepts(b'"\\u%04x"' % code)
            assert machine.accepts(b'"\\u%04X"' % code)
    for raw in (b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x80", b"\xe0\x80\x80",
                b"\xf0\x80\x80\x80", b"\\ud800", b"\\uDFFF", b"\x7f", b"\n", b""):  # fmt: skip
        assert not machine.accepts(b'"' + raw + b'"'), raw


@pytest.mark.parametrize("exact", [False, True])
def test_objects_are_all_combinations_and_nothing_else(exact):
    """The machine's whole language, listed by walking it, against a list made by hand."""
    schema = table(
        {"a": {"enum": [1, "x"]}, "b": {"type": "boolean"}, "c": {"const": None}},
        required=["b"],
        **({"x-guidance": EXACT} if exact else {}),
    )
    expected = set()
    for a, b, c in itertools.product([None, "1", '"x"'], ["true", "false"], [None, "null"]):
        parts = [(k, v) for k, v in (("a", a), ("b", b), ("c", c)) if v is not None]
        gaps = 2 * len(parts) - 1
        for spaces in [[" "] * gaps] if exact else itertools.product(["", " "], repeat=gaps):
            text, rest = "{", list(spaces)
            for i, (key, value) in enumerate(parts):
                text += ("," + rest.pop() if i else "") + f'"{key}":' + rest.pop() + value
            expected.add(text + "}")
    assert _language(schema_machine(schema)) == expected


def _language(machine):
    found, waiting = set(), [(machine.start, b"")]
    while waiting:
        state, text = waiting.pop()
        if machine.ends(state):
            found.add(text.decode())
        for byte, place in machine.edges[state.place].items():
            waiting.append((State(place), text + bytes([byte])))
    return found


def test_an_object_may_be_empty_and_nested():
    inner = table({"n": {"type": "null"}}, required=[])
    machine = schema_machine(table({"o": inner}, required=[], **{"x-guidance": EXACT}))
    assert _language(machine) == {"{}", '{"o": {}}', '{"o": {"n": null}}'}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer"},
        {"type": "number", "minimum": 0, "maximum": 1},
        {"type": "string", "pattern": "a+"},
        {"type": "array", "items": {"type": "null"}},
        {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]},
        {"anyOf": [{"type": "string"}, {"const": "abstain"}]},
        {"enum": [[1]]},
        {"$ref": "#/x"},
        {"type": "integer", "minimum": 3, "maximum": 2},
        table({"a": {"type": "null"}}, required=["b"]),
    ],
)
def test_other_schemas_are_left_to_the_general_grammar(schema):
    with pytest.raises(NotInSubset):
        schema_machine(schema)


# --- Distances and masks against brute force --------------------------------------------------


def odd_tokens(*texts):
    return [b"", *[t if isinstance(t, bytes) else t.encode() for t in texts]]


VOCABULARIES = {
    "bytes": [b"", *(bytes([b]) for b in range(256))],
    "merged": odd_tokens(
        '{"', 'a": ', '"a', '":', ' "', '"', "{", "}", "a", "b", "ab", "aab", '"}', '","', ',"',
        ",", 'b": "', '":"', 'a","b":"a"}', ":", " ", "\\", 'n"', "u00", "0", b"\xc3",
        b"\xa9", b"\xa9a",
        "12", "1", "2", "é\"", "n", "t", "\\n\"",
    ),
    "pairs": odd_tokens(
        '{"a', '":', '"', "aa", "bbb", ",", '"b', "}", "1", "12", b"\xc3", b"\xa9\xc3", b"\xa9"
    ),
}  # fmt: skip

SCHEMAS = {
    "decision": table(
        {
            "a": {"type": "string", "minLength": 2, "maxLength": 5},
            "b": {"type": "string", "maxLength": 2},
        }
    ),
    "number": table({"a": {"type": "integer", "minimum": 1, "maximum": 12}}),
    "free": table({"a": {"type": "string", "minLength": 1}}),
    "optional": table({"a": {"type": "string", "minLength": 1, "maxLength": 1},
                       "b": {"enum": ["a", "ab", 1]}}, required=["b"]),
}  # fmt: skip


def closer_of(name, tokens):
    machine = schema_machine(SCHEMAS[name])
    return Closer(machine, Vocabulary(tokens, [0], lambda run: []))


def states_of(closer):
    """Reachable states by tokens, and successor lists; strings without end up to 9 characters."""
    machine, tokens = closer.machine, closer.vocabulary.tokens
    after, waiting = {}, [machine.start]
    while waiting:
        state = waiting.pop()
        if state in after:
            continue
        after[state] = {}
        for i, token in enumerate(tokens):
            end = machine.run(token, state) if token else None
            if end is not None and end.chars <= 9:
                after[state][i] = end
                waiting.append(end)
    return after


def exact_distances(closer, after):
    """Shortest paths, backwards from the accepting states."""
    distance = {state: 0 for state in after if closer.machine.ends(state)}
    for steps in itertools.count(1):
        new = [
            state for state, ends in after.items()
            if state not in distance and any(distance.get(e, NEVER) < steps for e in ends.values())
        ]  # fmt: skip
        if not new:
            return distance
        distance.update(dict.fromkeys(new, steps))


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("schema", SCHEMAS)
def test_distances_and_masks_are_exact(schema, vocabulary):
    closer = closer_of(schema, VOCABULARIES[vocabulary])
    after = states_of(closer)
    exact = exact_distances(closer, after)
    assert len(after) > 3
    for state, ends in after.items():
        if state.chars > 3:  # the brute force cuts longer strings
            continue
        assert closer.distance(state) == exact.get(state, NEVER), state
        for left in range(1, 10):
            allowed = {i for i, end in ends.items() if exact.get(end, NEVER) <= left - 1}
            if closer.machine.ends(state):
                allowed.add(0)
            assert set(np.flatnonzero(closer.mask(state, left))) == allowed, (state, left)


def test_states_that_no_token_closes_are_never_entered():
    """Without a byte that ends a character, its first byte is forbidden, also far from the end."""
    tokens = odd_tokens('"', "a", b"\xc3", b"b\xc3", "\\", "n")
    closer = Closer(schema_machine({"type": "string"}), Vocabulary(tokens, [0], lambda run: []))
    inside = closer.advance(closer.start, 1)
    assert set(np.flatnonzero(closer.mask(inside, 1000))) == {1, 2, 5, 6}
    nothing = Closer(schema_machine({"type": "null"}), Vocabulary(tokens, [0], lambda run: []))
    assert nothing.least_tokens == NEVER
    with pytest.raises(ConfigError, match="cannot write any text"):
        constraints.check_limits(nothing, [100])


def test_prescribed_tokens_are_the_tokenizers_own():
    model = causal_lm()
    closer = constraints.closer(model, {"json_schema": {**DECISION, "x-guidance": EXACT}}, [0])
    state, written = closer.start, []
    while (token := closer.prescribed(state, 100)) is not None:
        written.append(token)
        state = closer.advance(state, token)
    assert written == model.encode('{"note": "')
    ends = State(next(iter(closer.machine.accepting)))
    assert closer.prescribed(ends, 1) == 0
    # Where the tokenizer's own way is too long for the limit, a shorter one stays open.
    longest = model.encode('{"note": "')
    assert closer.prescribed(closer.start, closer.least_tokens) in (None, longest[0])


# --- Against llguidance -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schema",
    [
        {**DECISION, "x-guidance": EXACT},
        {"type": "integer", "minimum": -20, "maximum": 1234},
        {"enum": ["stop", "continue", 3, None, True]},
        {"type": "string", "maxLength": 3},
    ],
)
def test_masks_agree_with_llguidance(schema):
    """Equal wherever both leave a choice. Within bytes that must come llguidance allows the
    tokenizer's own token alone, which is the one prescribed here; and it writes -0."""
    model = causal_lm()
    constraint = {"json_schema": schema}
    closer = constraints.closer(model, constraint, [0])
    grammar = constraints.compile_grammar(constraint)
    rng = np.random.default_rng(5)
    compared = 0
    for _ in range(25):
        matcher, state = LLMatcher(model._grammar_tokenizer, grammar), closer.start
        for _ in range(60):
            ours = closer.mask(state, 10**6)
            theirs = constraints._allowed(matcher, len(ours))
            forced = closer.prescribed(state, 10**6)
            differ = [closer.vocabulary.tokens[i] for i in np.flatnonzero(ours != theirs)]
            if state.inside != PLAIN:  # it escapes control characters alone
                assert not (theirs & ~ours).any()
            elif forced is None:
                assert set(differ) <= {b"0"}
                assert not differ or not ours[closer.vocabulary.tokens.index(b"0")]
            else:
                assert theirs[forced]
                assert not (theirs & ~ours).any()
            compared += 1
            both = np.flatnonzero(ours & theirs)
            token = int(rng.choice(both)) if forced is None else forced
            if token == 0:
                break
            state = closer.advance(state, token)
            assert matcher.consume_token(token)
    assert compared > 40


# --- Generated texts ----------------------------------------------------------------------------


def byte_model():
    """A network over a tokenizer that knows single bytes only."""
    from tenfold.lm.tokenizer import train_bpe

    return CausalLM(network(), train_bpe(["a"], 257))


@pytest.mark.parametrize("make", [causal_lm, byte_model])
@pytest.mark.parametrize("spaced", [False, True])
def test_texts_are_whole_at_every_limit(make, spaced):
    """1,000 hot samples over the limits from the least one up all parse and fit."""
    model = make()
    schema = {**DECISION, "x-guidance": EXACT} if spaced else DECISION
    least = constraints.closer(model, {"json_schema": schema}, [0]).least_tokens
    limits = [*range(least, least + 12), least + 20, least + 28]
    count = 0
    for limit in limits:
        config = GenerationConfig(
            max_new_tokens=limit, temperature=2.0, n=18, seed=limit,
            constraint={"json_schema": schema},
        )  # fmt: skip
        for row in model.generate(["def", ""], config):
            for completion in row:
                assert len(completion.token_ids) <= limit
                follows_decision(json.loads(completion.text))
                count += 1
    assert count == 36 * len(limits) > 500


def test_a_limit_too_small_is_refused_before_any_work():
    model = causal_lm()
    model.model.forward = None  # nothing may be computed
    least = constraints.closer(model, {"json_schema": DECISION}, [0]).least_tokens
    config = GenerationConfig(max_new_tokens=least - 1, constraint={"json_schema": DECISION})
    with pytest.raises(ConfigError, match=f"takes {least} tokens; at most {least - 1} may"):
        model.generate(["def"], config)


def test_choices_close_within_one_token_of_room():
    model = causal_lm()
    choices = ["12", "1234", "123"]
    config = GenerationConfig(
        max_new_tokens=2, temperature=2.0, n=40, seed=1, constraint={"choice": choices}
    )
    [row] = model.generate(["def"], config)
    assert {c.text for c in row} <= set(choices)


def exact_probabilities(model, closer, prompt, limit):
    """Text → probability, by all token paths and the model's own logits."""
    found: dict[str, float] = defaultdict(float)
    waiting = [((), closer.start, 0.0)]
    while waiting:
        written, state, log_p = waiting.pop()
        text = b"".join(closer.vocabulary.tokens[i] for i in written).decode()
        if len(written) == limit:
            found[text] += math.exp(log_p)
            continue
        ids = torch.tensor([[*model.encode(prompt), *written]])
        with torch.no_grad():
            logits = model.model(ids).logits[0, -1].double()
        token = closer.prescribed(state, limit - len(written))
        allowed = np.flatnonzero(closer.mask(state, limit - len(written)))
        options = allowed if token is None else [token]
        log_probs = logits[list(options)].log_softmax(-1)
        for option, value in zip(options, log_probs.tolist(), strict=True):
            if option == 0:
                found[text] += math.exp(log_p + value)
            else:
                after = closer.advance(state, int(option))
                waiting.append(((*written, int(option)), after, log_p + value))
    return found


@pytest.mark.parametrize("jump", [True, False])
def test_sampled_frequencies_are_the_renormalised_probabilities(jump):
    model = causal_lm(scale=0.05)
    model.jump_forward = jump
    constraint = {"choice": ["10", "12", "1", "(9)", "(9", "ab"]}
    closer = constraints.closer(model, constraint, [0])
    exact = exact_probabilities(model, closer, "def", 4)
    assert sum(exact.values()) == pytest.approx(1)
    n = 1500
    config = GenerationConfig(
        max_new_tokens=4, temperature=1.0, n=n, seed=11, constraint=constraint
    )
    [row] = model.generate(["def"], config)
    seen = Counter(c.text for c in row)
    texts = sorted(exact)
    assert set(seen) <= set(texts)
    test = scipy_stats.chisquare([seen[t] for t in texts], [n * exact[t] for t in texts])
    assert test.pvalue > 0.001
    # The test can fail: uniform frequencies are refused.
    assert scipy_stats.chisquare([seen[t] for t in texts]).pvalue < 1e-6


def test_every_prompt_may_have_a_seed_of_its_own():
    model = causal_lm()
    constraint = {"json_schema": {"type": "integer", "minimum": 0, "maximum": 9999}}
    config = GenerationConfig(
        max_new_tokens=5, temperature=2.0, seeds=(1, 2, 3, 1), constraint=constraint
    )
    texts = [row[0].text for row in model.generate(["a"] * 4, config)]
    assert texts[0] == texts[3]
    assert len(set(texts)) > 1
    alone = GenerationConfig(max_new_tokens=5, temperature=2.0, seed=2, constraint=constraint)
    assert model.generate(["a"], alone)[0][0].text == texts[1]
    with pytest.raises(ConfigError, match="4 seeds for 1 prompts"):
        model.generate(["a"], config)
