"""Parameter values: what fits is returned as the component gets it, what does not is one error."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenfold.errors import ConfigError
from tenfold.params import check_value, describe_type, parse_text
from tenfold.spec import Param

ACCEPTED = [
    (Param("p", "int"), 3, 3),
    (Param("p", "float"), 3, 3.0),
    (Param("p", "float"), math.inf, math.inf),
    (Param("p", "bool"), True, True),
    (Param("p", "str"), "", ""),
    (Param("p", "path"), "a/b", "a/b"),
    (Param("p", "table"), {"a": 1}, {"a": 1}),
    (Param("p", "int", None), None, None),
    (Param("p", "list[int]"), [1, 2], [1, 2]),
    (Param("p", "list[int]"), (), []),
    (Param("p", "list[float]"), [1, 0.5], [1.0, 0.5]),
    (Param("p", "str", choices=("a", "b")), "b", "b"),
    (Param("p", "int", minimum=1, maximum=3), 3, 3),
    (Param("p", "component:model"), "core:hf", {"use": "core:hf"}),
    (Param("p", "component:model"), {"use": "x:y", "n": 1}, {"use": "x:y", "n": 1}),
    (Param("p", "component:model"), {"share": "honest"}, {"share": "honest"}),
    (Param("p", "list[component:dataset]"), ["a:b"], [{"use": "a:b"}]),
]
REFUSED = [
    (Param("p", "int"), 3.0, "it must be an integer"),
    (Param("p", "int"), True, "it must be an integer"),
    (Param("p", "float"), True, "it must be a number"),
    (Param("p", "float"), "1", "it must be a number"),
    (Param("p", "float"), 10**400, "it must be a number"),
    (Param("p", "bool"), 1, "it must be true or false"),
    (Param("p", "str"), 1, "it must be a string"),
    (Param("p", "path"), "", "is empty"),
    (Param("p", "table"), [1], "it must be a table"),
    (Param("p", "int"), None, "has no value"),
    (Param("p", "int", 3), None, "has no value"),
    (Param("p", "list[int]"), 3, "it must be a list"),
    (Param("p", "list[int]"), "12", "it must be a list"),
    (Param("p", "list[int]"), [1, "2"], r"\[1\] is '2'; it must be an integer"),
    (Param("p", "str", choices=("sum", "mean")), "maen", "did you mean 'mean'"),
    (Param("p", "int", choices=(1, 2)), 3, "it must be one of 1, 2"),
    (Param("p", "int", minimum=1), 0, "at least 1"),
    (Param("p", "float", maximum=0.5), 0.6, "at most 0.5"),
    (Param("p", "float", minimum=0, maximum=1), math.nan, "from 0 to 1"),
    (Param("p", "list[int]", minimum=1), [2, 0], r"\[1\] is 0; .*at least 1"),
    (Param("p", "component:model"), {"uses": "x:y"}, "add use = .*did you mean"),
    (Param("p", "component:model"), 3, "a table with use"),
    (Param("p", "component:evaluator"), "", "an evaluator"),
]


@pytest.mark.parametrize(("param", "value", "result"), ACCEPTED)
def test_a_fitting_value_is_accepted_as_its_own_type(param, value, result):
    checked = check_value(param, value, "evaluator.p")
    assert checked == result
    assert type(checked) is type(result)


@pytest.mark.parametrize(("param", "value", "message"), REFUSED)
def test_a_wrong_value_is_one_error_that_says_where_and_what_is_right(param, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_value(param, value, "evaluator.p")
    assert str(caught.value).startswith("evaluator.p")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("param", "text", "result"),
    [
        (Param("p", "int"), " 12 ", 12),
        (Param("p", "float"), "1e-3", 0.001),
        (Param("p", "bool"), "Yes", True),
        (Param("p", "bool"), "off", False),
        (Param("p", "str"), " spaces kept ", " spaces kept "),
        (Param("p", "list[int]"), "1, 2,3", [1, 2, 3]),
        (Param("p", "list[int]"), "[1, 2]", [1, 2]),
        (Param("p", "list[str]"), "", []),
        (Param("p", "list[str]"), "a,b", ["a", "b"]),
        (Param("p", "table"), "{ a = 1 }", {"a": 1}),
        (Param("p", "component:model"), "core:hf", {"use": "core:hf"}),
        (Param("p", "component:model"), '{ use = "a:b", n = 2 }', {"use": "a:b", "n": 2}),
    ],
)
def test_command_line_text_is_read_as_the_type(param, text, result):
    assert parse_text(param, text) == result


@pytest.mark.parametrize(
    ("param", "text"),
    [
        (Param("the_steps", "int"), "1.5"),
        (Param("the_steps", "int", minimum=2), "1"),
        (Param("the_steps", "bool"), "maybe"),
        (Param("the_steps", "float"), "x"),
        (Param("the_steps", "table"), "{ a = "),
        (Param("the_steps", "list[int]"), "1,,2"),
        (Param("the_steps", "list[int]"), "[1"),
    ],
)
def test_unreadable_text_names_the_option(param, text):
    with pytest.raises(ConfigError, match=r"^--the-steps"):
        parse_text(param, text)


@given(st.integers() | st.floats(allow_nan=False) | st.booleans() | st.text() | st.none())
def test_each_value_fits_exactly_the_types_that_name_it(value):
    expected = {
        "int": isinstance(value, int) and not isinstance(value, bool),
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
        "table": False,
    }
    for kind, fits in expected.items():
        try:
            assert check_value(Param("p", kind), value, "p") == value
            accepted = True
        except ConfigError:
            accepted = False
        assert accepted == fits


@given(st.lists(st.integers()))
def test_text_of_a_list_reads_back(values):
    param = Param("p", "list[int]")
    assert parse_text(param, json.dumps(values)) == values
    assert parse_text(param, ",".join(map(str, values))) == values


def test_types_are_described_in_words():
    assert describe_type(Param("p", "int", minimum=1)) == "an integer, at least 1"
    assert describe_type(Param("p", "list[float]", minimum=0, maximum=1)) == (
        "a list, each element a number from 0 to 1"
    )
    assert describe_type(Param("p", "str", choices=("a", "b"))) == "one of 'a', 'b'"
