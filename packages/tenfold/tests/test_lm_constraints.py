"""Constrained generation: finished texts are always inside the grammar."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llguidance")

from tenfold.errors import ConfigError
from tenfold.lm.constraints import compile_grammar
from tenfold.records import GenerationConfig

sys.path.insert(0, str(Path(__file__).parent / "support"))
from lm_models import causal_lm

SCHEMA = {
    "type": "object",
    "properties": {
        "vote": {"enum": ["yes", "nö", 3]},
        "round": {"type": "integer", "minimum": 0, "maximum": 99},
        "why": {"type": "string", "maxLength": 8},
        "sure": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["vote", "round", "why", "sure"],
    "additionalProperties": False,
}
PROMPTS = ["def", "", "你好", "for i in range(10):\n    print"]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    return causal_lm(request.param, context=256)


def config(constraint, **changes):
    settings = {"max_new_tokens": 150, "temperature": 1.5, "n": 4, "seed": 3, **changes}
    return GenerationConfig(constraint=constraint, **settings)


@pytest.mark.parametrize("greedy", [True, False])
def test_json_always_parses_and_fits_its_schema(model, greedy):
    changes = {"temperature": 0.0, "n": 1} if greedy else {}
    for row in model.generate(PROMPTS, config({"json_schema": SCHEMA}, **changes)):
        for completion in row:
            assert completion.finish_reason == "eos"
            value = json.loads(completion.text)
            assert list(value) == list(SCHEMA["properties"])
            assert value["vote"] in ["yes", "nö", 3]
            assert 0 <= value["round"] <= 99
            assert len(value["why"]) <= 8
            assert all(isinstance(v, bool) for v in value["sure"])
            assert len(value["sure"]) in (1, 2)


def test_regular_expressions_match_the_whole_text(model):
    pattern = r"[0-9]{3}-(ab|c){1,4}z"
    for row in model.generate(PROMPTS, config({"regex": pattern})):
        assert all(re.fullmatch(pattern, completion.text) for completion in row)


def test_choices_are_chosen_from(model):
    choices = ["yes", 'no "quoted"\n', "维 maybe"]
    texts = [c.text for row in model.generate(PROMPTS, config({"choice": choices})) for c in row]
    assert set(texts) <= set(choices)
    assert len(set(texts)) > 1


def test_an_unfinished_text_says_so(model):
    short = config({"json_schema": SCHEMA}, max_new_tokens=5)
    for row in model.generate(PROMPTS, short):
        for completion in row:
            assert completion.finish_reason == "length"


def test_neighbours_change_nothing(model):
    settings = config({"json_schema": SCHEMA})
    together = model.generate(PROMPTS, settings)
    assert [model.generate([p], settings)[0] for p in PROMPTS] == together
    assert model.generate(PROMPTS[::-1], settings) == together[::-1]


def test_grammar_that_everything_fits_changes_nothing(model):
    """The constraint only excludes: where it excludes nothing, the text is the free one."""
    free = model.generate(["def"], GenerationConfig(max_new_tokens=10))[0][0]
    wide = GenerationConfig(max_new_tokens=10, constraint={"regex": r"(?s:.*)"})
    held = model.generate(["def"], wide)[0][0]
    if "\ufffd" not in free.text:  # broken characters are outside every grammar
        assert held.token_ids == free.token_ids


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"json_schema": {"type": "nonsense"}}, "json_schema cannot be used"),
        ({"json_schema": "{not json"}, "json_schema is not JSON"),
        ({"json_schema": [1]}, "must be a table"),
        ({"regex": "(unclosed"}, "regex cannot be used"),
        ({"regex": ""}, "non-empty string"),
        ({"choice": []}, "non-empty list"),
        ({"choice": "yes"}, "non-empty list"),
        ({"choice": ["a", 1]}, "got 1"),
        ({"json_shema": {}}, "did you mean 'json_schema'"),
        ({"regex": "a", "choice": ["b"]}, "exactly one of"),
        ({}, "exactly one of"),
    ],
)
def test_unusable_constraints_are_explained_before_any_work(constraint, message):
    model = causal_lm()
    model.model = None  # nothing may be computed
    with pytest.raises(ConfigError, match=message):
        model.generate(["def"], GenerationConfig(constraint=constraint))


def test_schemas_may_come_as_text():
    assert compile_grammar({"json_schema": json.dumps(SCHEMA)}) == compile_grammar(
        {"json_schema": SCHEMA}
    )
