"""Values of parameters: the one place that says whether a value fits its `Param`.

Run files bring TOML values (`check_value`), command lines bring text (`parse_text`). Both give
the same value or one `ConfigError` that says where, what was wrong, and what would be right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tenfold.errors import ConfigError, nearest
from tenfold.spec import Param

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_TYPE_WORDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "path": "a path (a string)",
    "bool": "true or false",
    "table": "a table",
}


def check_value(param: Param, value: Any, where: str) -> Any:
    """The value as the component receives it.

    Types are strict: an integer is accepted for a float (and becomes one), a bool is no
    number, nothing is parsed from strings. `list[...]` checks each element. A component
    parameter takes a table with `use` (or `share`), or a bare component name, which becomes
    `{"use": name}`. None is accepted where the default is None.

    Args:
        where: full dotted name of the value, e.g. `evaluator.steps`.

    Raises:
        ConfigError: the value does not fit.
    """
    if value is None:
        if param.default is None:
            return None
        raise ConfigError(f"{where} has no value; it must be {describe_type(param)}")
    if not param.is_list:
        return _check_one(param, value, where)
    if not isinstance(value, list | tuple):
        raise _wrong(param, value, where)
    return [_check_one(param, item, f"{where}[{i}]") for i, item in enumerate(value)]


def parse_text(param: Param, text: str, where: str = "") -> Any:
    """The value of a command-line argument.

    Lists are written with commas (`a,b,c`) or as a TOML array, tables as a TOML inline table
    (`{ use = "core:hf" }`), booleans as true/false, yes/no, on/off or 1/0.

    Args:
        where: how the argument is called in messages; `--<name>` by default.

    Raises:
        ConfigError: the text cannot be read as the parameter's type, or is out of range.
    """
    where = where or option_name(param)
    if not param.is_list:
        return check_value(param, _parse_one(param, text, where), where)
    if text.lstrip().startswith("["):
        return check_value(param, _toml_value(param, text, where), where)
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    return check_value(param, [_parse_one(param, part, where) for part in parts], where)


def option_name(param: Param) -> str:
    """How a parameter is written on a command line: `--max-tokens`, or `MAX_TOKENS`."""
    if param.positional:
        return param.name.upper()
    return f"--{param.name.replace('_', '-')}"


def describe_type(param: Param) -> str:
    """What the parameter accepts, in words: `an integer from 1 to 10`."""
    if param.is_list:
        return f"a list, each element {_describe_element(param)}"
    return _describe_element(param)


def _describe_element(param: Param) -> str:
    if param.choices:
        return "one of " + ", ".join(map(repr, param.choices))
    if (kind := param.component_kind) is not None:
        article = "an" if kind[0] in "aeiou" else "a"
        return f'{article} {kind}: a table with use = "plugin:name", or a component name'
    words = _TYPE_WORDS.get(param.element_type, param.element_type)
    low, high = param.minimum, param.maximum
    if low is not None and high is not None:
        return f"{words} from {low:g} to {high:g}"
    if low is not None:
        return f"{words}, at least {low:g}"
    if high is not None:
        return f"{words}, at most {high:g}"
    return words


def _wrong(param: Param, value: Any, where: str) -> ConfigError:
    expected = describe_type(param) if "[" not in where else _describe_element(param)
    return ConfigError(f"{where} is {_show(value)}; it must be {expected}")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_one(param: Param, value: Any, where: str) -> Any:
    if param.component_kind is not None:
        return _check_component(param, value, where)
    value = _check_type(param, value, where)
    if param.choices and value not in param.choices:
        suggestion = nearest(value, map(str, param.choices)) if isinstance(value, str) else ""
        raise ConfigError(
            f"{where} is {_show(value)}{suggestion}"
            f"{' (' if suggestion else '; it must be '}{_describe_element(param)}"
            f"{')' if suggestion else ''}"
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        _check_range(param, value, where)
    return value


def _check_type(param: Param, value: Any, where: str) -> Any:
    kind = param.element_type
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "float" and number:
        try:
            return float(value)
        except OverflowError:
            raise _wrong(param, value, where) from None
    fits = {
        "int": number and isinstance(value, int),
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
        "path": isinstance(value, str),
        "table": isinstance(value, Mapping),
    }
    if not fits.get(kind, False):
        raise _wrong(param, value, where)
    if kind == "path" and not value:
        raise ConfigError(f"{where} is empty; it must be {describe_type(param)}")
    return value


def _check_range(param: Param, value: float, where: str) -> None:
    low, high = param.minimum, param.maximum
    if low is None and high is None:
        return
    below = low is not None and value < low
    above = high is not None and value > high
    if below or above or math.isnan(value):
        raise _wrong(param, value, where)


def _check_component(param: Param, value: Any, where: str) -> Mapping[str, Any]:
    if isinstance(value, str) and value:
        return {"use": value}
    if isinstance(value, Mapping):
        if "use" in value or "share" in value:
            return value
        raise ConfigError(
            f'{where} names no component; add use = "plugin:name"{nearest("use", value)}'
        )
    raise _wrong(param, value, where)


def _parse_one(param: Param, text: str, where: str) -> Any:
    kind = param.element_type
    stripped = text.strip()
    if kind == "table" or (param.component_kind is not None and stripped.startswith("{")):
        return _toml_value(param, text, where)
    if kind == "bool":
        if stripped.lower() in _TRUE + _FALSE:
            return stripped.lower() in _TRUE
        raise _wrong(param, text, where)
    if kind in ("int", "float"):
        try:
            return int(stripped) if kind == "int" else float(stripped)
        except ValueError:
            raise _wrong(param, text, where) from None
    return text


def _toml_value(param: Param, text: str, where: str) -> Any:
    import tomllib  # only tables and arrays need it

    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        raise _wrong(param, text, where) from None
