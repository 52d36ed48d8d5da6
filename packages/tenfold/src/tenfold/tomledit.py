"""One careful edit of a TOML file: a string added to, or taken out of, an array.

Comments, order and layout stay. The result is parsed again and compared with what it should
be, so a layout this module does not understand is refused instead of damaged.
"""

from __future__ import annotations

import copy
import json
import re
import tomllib
from typing import Any

from tenfold.errors import ConfigError

_HEADER = re.compile(r"^[ \t]*\[\[?[^\[\]\n]+\]\]?[ \t]*(?:#[^\n]*)?\r?$", re.MULTILINE)
_TOKEN = re.compile(
    r"""(?P<string>"(?:[^"\\\n]|\\.)*"|'[^'\n]*')|(?P<comment>\#[^\n]*)|(?P<bracket>[\[\]])""",
    re.VERBOSE,
)
Span = tuple[int, int]


def set_member(text: str, table: str, key: str, member: str, *, present: bool) -> str:
    """The text with `member` in the array `table.key`, or not in it.

    Raises:
        ConfigError: the text is not TOML, or is laid out so that it must be edited by hand.
    """
    before = _parse(text)
    array = before.get(table, {}).get(key, [])
    if (member in array) == present:
        return text
    try:
        edited = _add(text, table, key, member) if present else _drop(text, table, key, member)
        good = _parse(edited) == _expected(before, table, key, member, present)
    except (ValueError, ConfigError):
        good = False
    if not good:
        verb = "add" if present else "remove"
        raise ConfigError(
            f"cannot {verb} {member!r} in this layout of {table}.{key}",
            hint=f'edit it by hand; it should read like {key} = ["{member}"] below [{table}]',
        )
    return edited


def _parse(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not valid TOML: {error}") from error


def _expected(
    before: dict[str, Any], table: str, key: str, member: str, present: bool
) -> dict[str, Any]:
    after = copy.deepcopy(before)
    array = after.setdefault(table, {}).setdefault(key, [])
    if present:
        array.append(member)
    else:
        array[:] = [item for item in array if item != member]
    return after


def _add(text: str, table: str, key: str, member: str) -> str:
    quoted = json.dumps(member)
    section = _section(text, table)
    if section is None:
        separator = "" if not text or text.endswith("\n") else "\n"
        blank = "\n" if text.strip() else ""
        return f"{text}{separator}{blank}[{table}]\n{key} = [{quoted}]\n"
    opening = _array_start(text, section, key)
    if opening is None:
        head = text[: section[0]]
        newline = "" if head.endswith("\n") else "\n"
        return f"{head}{newline}{key} = [{quoted}]\n{text[section[0] :]}"
    elements, _ = _elements(text, opening)
    if not elements:
        return f"{text[: opening + 1]}{quoted}{text[opening + 1 :]}"
    start, end = elements[-1]
    line = text[text.rfind("\n", 0, start) + 1 : start]
    gap = f"\n{line}" if not line.strip() else " "
    return f"{text[:end]},{gap}{quoted}{text[end:]}"


def _drop(text: str, table: str, key: str, member: str) -> str:
    section = _section(text, table)
    opening = _array_start(text, section, key) if section else None
    if opening is None:
        raise ValueError(key)
    while True:
        elements, closing = _elements(text, opening)
        values = [_parse(f"v = {text[start:end]}")["v"] for start, end in elements]
        if member not in values:
            return text
        text = _cut(text, elements, values.index(member), closing)


def _cut(text: str, elements: list[Span], index: int, closing: int) -> str:
    """The text without one element and the comma that belongs to it."""
    start, end = elements[index]
    comma = re.compile(r"[ \t]*,[ \t]*").match(text, end, closing)
    if comma:
        end = comma.end()
    elif index > 0:
        # The last element: the comma before it goes too, as do blanks around it.
        between = text[elements[index - 1][1] : start]
        start = elements[index - 1][1] + between.index(",") if "#" not in between else start
    line_start = text.rfind("\n", 0, start) + 1
    line_end = text.find("\n", end) + 1
    if line_end and not (text[line_start:start] + text[end:line_end]).strip():
        start, end = line_start, line_end
    return text[:start] + text[end:]


def _section(text: str, table: str) -> Span | None:
    """From behind the header line of `[table]` to the next header."""
    headers = list(_HEADER.finditer(text))
    for i, header in enumerate(headers):
        name = header.group().strip().partition("#")[0].strip()
        if re.fullmatch(rf"\[\s*{re.escape(table)}\s*\]", name):
            start = min(header.end() + 1, len(text))
            return start, headers[i + 1].start() if i + 1 < len(headers) else len(text)
    return None


def _array_start(text: str, section: Span, key: str) -> int | None:
    """Position of the `[` of `key = [...]` in a section."""
    name = rf"^[ \t]*(?:{key}|\"{key}\"|'{key}')[ \t]*=[ \t]*(?P<value>.)"
    match = re.compile(name, re.MULTILINE).search(text, *section)
    if match is None:
        return None
    if match["value"] != "[":
        raise ValueError(key)
    return match.start("value")


def _elements(text: str, opening: int) -> tuple[list[Span], int]:
    """Spans of an array's strings, and the position of its closing bracket."""
    elements: list[Span] = []
    for token in _TOKEN.finditer(text, opening + 1):
        if token.lastgroup == "string":
            elements.append(token.span())
        elif token.group() == "]":
            return elements, token.start()
        elif token.group() == "[":
            break
    raise ValueError("not a flat array")
