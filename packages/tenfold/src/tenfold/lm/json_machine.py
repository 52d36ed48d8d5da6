"""JSON schemas and choices as byte machines (`tenfold.lm.byte_machine`).

The subset: objects with fixed keys in the order of the schema (optional ones may be left out),
integers between two bounds, strings with lengths, enumerations of scalars, booleans, null, and
`anyOf` of these. At most one space stands after `:` and `,`; a schema whose `x-guidance` says
`whitespace_flexible = false` gets exactly its separators. Everything else raises `NotInSubset`
and is left to a general grammar.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tenfold.lm.byte_machine import UNLIMITED, Builder, Machine, NotInSubset

_NOTES = frozenset({"title", "description", "default", "examples", "$schema", "$id", "$comment"})
_KEYS: dict[str, frozenset[str]] = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "string": frozenset({"minLength", "maxLength"}),
    "boolean": frozenset(),
    "null": frozenset(),
}
GUIDANCE = "x-guidance"
"""llguidance's own key for how JSON is laid out."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How values are separated; `flexible`: a space after a separator may be left out."""

    item: str = ","
    key: str = ":"
    flexible: bool = True


def choice_machine(choices: list[str]) -> Machine:
    """The machine of some texts."""
    builder = Builder()
    start, end = builder.place(), builder.place()
    for text in choices:
        builder.text(start, text, end)
    return builder.build(start, end)


def schema_machine(schema: Mapping[str, Any]) -> Machine:
    """The machine of a JSON schema's values.

    Raises:
        NotInSubset: the schema says more than these machines can follow.
    """
    own = dict(schema)
    layout = _layout(own.pop(GUIDANCE, {}))
    builder = Builder()
    start, end = builder.place(), builder.place()
    _Values(builder, layout).value(own, start, end)
    return builder.build(start, end)


def _layout(options: Any) -> Layout:
    known = {"whitespace_flexible", "whitespace_pattern", "item_separator", "key_separator"}
    if not isinstance(options, Mapping) or not set(options) <= known:
        raise NotInSubset(f"{GUIDANCE} with more than separators")
    if options.get("whitespace_flexible", True):
        if options.get("whitespace_pattern", " ?") != " ?":
            raise NotInSubset("a whitespace pattern of its own")
        return Layout()
    return Layout(options.get("item_separator", ","), options.get("key_separator", ":"), False)


class _Values:
    """Writes values into a builder, from one place to another."""

    def __init__(self, builder: Builder, layout: Layout) -> None:
        self._builder, self._layout = builder, layout

    def value(self, schema: Any, source: int, target: int) -> None:
        """Any value of a schema."""
        if not isinstance(schema, Mapping):
            raise NotInSubset("a schema that is no table")
        rules = {key: value for key, value in schema.items() if key not in _NOTES}
        if "anyOf" in rules:
            if set(rules) != {"anyOf"}:
                raise NotInSubset("anyOf beside other rules")
            for part in rules["anyOf"]:
                self.value(part, source, target)
        elif "const" in rules or "enum" in rules:
            self._enumeration(rules, source, target)
        else:
            kinds = rules.pop("type", None)
            kinds = [kinds] if isinstance(kinds, str) else kinds
            if not isinstance(kinds, list) or not kinds or not set(kinds) <= set(_KEYS):
                raise NotInSubset(f"type {kinds!r}")
            if not set(rules) <= frozenset().union(*(_KEYS[kind] for kind in kinds)):
                raise NotInSubset(f"rules {sorted(rules)}")
            for kind in kinds:
                getattr(self, f"_{kind}")(rules, source, target)

    def _enumeration(self, rules: Mapping[str, Any], source: int, target: int) -> None:
        if not set(rules) <= {"const", "enum", "type"} or {"const", "enum"} <= set(rules):
            raise NotInSubset("an enumeration beside other rules")
        values = rules["enum"] if "enum" in rules else [rules["const"]]
        kinds = rules.get("type", list(_KEYS))
        kinds = [kinds] if isinstance(kinds, str) else kinds
        texts = [_scalar(value, kinds) for value in values]
        if not any(texts):
            raise NotInSubset("an enumeration without values")
        for text in texts:
            if text:
                self._builder.text(source, text, target)

    def _boolean(self, rules: Mapping[str, Any], source: int, target: int) -> None:
        self._builder.text(source, "true", target)
        self._builder.text(source, "false", target)

    def _null(self, rules: Mapping[str, Any], source: int, target: int) -> None:
        self._builder.text(source, "null", target)

    def _string(self, rules: Mapping[str, Any], source: int, target: int) -> None:
        least, most = rules.get("minLength", 0), rules.get("maxLength", UNLIMITED)
        if not (_is_integer(least) and _is_integer(most) and 0 <= least <= most):
            raise NotInSubset("lengths that no string has")
        self._builder.string(source, least, most, target)

    def _integer(self, rules: Mapping[str, Any], source: int, target: int) -> None:
        lows = [rules.get("minimum"), _plus(rules.get("exclusiveMinimum"), 1)]
        highs = [rules.get("maximum"), _plus(rules.get("exclusiveMaximum"), -1)]
        lows = [low for low in lows if low is not None]
        highs = [high for high in highs if high is not None]
        bounds = [*lows, *highs]
        if not lows or not highs or not all(map(_is_integer, bounds)):
            raise NotInSubset("an integer without two integer bounds")
        low, high = max(lows), min(highs)
        if low > high:
            raise NotInSubset("an integer between no bounds")
        if low < 0:
            minus = self._builder.place()
            self._builder.text(source, "-", minus)
            self._digits(max(1, -high), -low, minus, target)
        if high >= 0:
            self._digits(max(0, low), high, source, target)

    def _digits(self, low: int, high: int, source: int, target: int) -> None:
        """Decimal numbers from low to high, both 0 or more, without leading zeros."""
        for width in range(len(str(low)), len(str(high)) + 1):
            first = max(low, 10 ** (width - 1) if width > 1 else 0)
            last = min(high, 10**width - 1)
            self._range(str(first), str(last), source, target)

    def _range(self, low: str, high: str, source: int, target: int) -> None:
        """Numbers between two of the same width."""
        if not low:
            return
        rest = len(low) - 1
        full = [low[1:] == "0" * rest, high[1:] == "9" * rest]
        start, stop = int(low[0]), int(high[0])
        if start == stop and not all(full):
            self._leading(start, low[1:], high[1:], source, target)
            return
        if not full[0]:
            self._leading(start, low[1:], "9" * rest, source, target)
            start += 1
        if not full[1]:
            self._leading(stop, "0" * rest, high[1:], source, target)
            stop -= 1
        if start > stop:
            return
        for _ in range(rest):
            following = self._builder.place()
            self._builder.any_of(source, (0x30 + d for d in range(start, stop + 1)), following)
            source, start, stop = following, 0, 9
        self._builder.any_of(source, (0x30 + d for d in range(start, stop + 1)), target)

    def _leading(self, digit: int, low: str, high: str, source: int, target: int) -> None:
        following = self._builder.place()
        self._builder.text(source, str(digit), following)
        self._range(low, high, following, target)

    def _object(self, rules: Mapping[str, Any], source: int, target: int) -> None:
        properties, required = rules.get("properties", {}), rules.get("required", [])
        if rules.get("additionalProperties") is not False:
            raise NotInSubset("an object with keys of any name")
        if not isinstance(properties, Mapping) or not set(required) <= set(properties):
            raise NotInSubset("required keys that have no rules")
        b = self._builder
        # Two tracks: nothing written yet, or something, so that a comma comes first.
        first, later = b.place(), b.place()
        b.text(source, "{", first)
        for name, schema in properties.items():
            key, value, after, skipped = b.place(), b.place(), b.place(), b.place()
            b.skip(first, key)
            self._separator(later, self._layout.item, key)
            colon = b.place()
            b.text(key, json.dumps(name, ensure_ascii=False), colon)
            self._separator(colon, self._layout.key, value)
            self.value(schema, value, after)
            if name not in required:
                b.skip(first, skipped)
                b.skip(later, after)
            first, later = skipped, after
        b.text(first, "}", target)
        b.text(later, "}", target)

    def _separator(self, source: int, text: str, target: int) -> None:
        self._builder.text(source, text, target)
        if self._layout.flexible:
            self._builder.text(source, text + " ", target)


def _scalar(value: Any, kinds: list[str]) -> str:
    """A scalar as JSON; empty where it is of another type than asked for."""
    names: list[tuple[Any, str]] = [
        (bool, "boolean"), (int, "integer"), (str, "string"), (type(None), "null"),
    ]  # fmt: skip
    for python, name in names:
        if isinstance(value, python):
            return json.dumps(value, ensure_ascii=False) if name in kinds else ""
    raise NotInSubset(f"an enumeration with {value!r}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plus(value: Any, change: int) -> Any:
    return value + change if _is_integer(value) else value
