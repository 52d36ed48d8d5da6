"""Checks of what plugins say: names, types, capabilities, record kinds, targets, API range.

Every check returns messages instead of raising, so that a plugin's author sees all of them at
once, with the nearest known name for each misspelt one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any

from tenfold.capabilities import CAPABILITIES
from tenfold.errors import ConfigError, nearest
from tenfold.params import check_value
from tenfold.records import RECORD_KINDS
from tenfold.spec import (
    API_VERSION,
    REQUIRED,
    CommandSpec,
    ComponentSpec,
    Param,
    check_component,
    check_label,
    check_param,
)

_CLAUSE = re.compile(r"(>=|<=|==|!=|>|<)\s*(\d+)(?:\.(\d+))?")
_STRINGS = ("name", "target", "summary", "inherits", "trainer")
_TUPLES = ("provides", "modules", "extras", "tags")


@dataclass(frozen=True, slots=True)
class Description:
    """What a plugin describes: components as (kind, spec), and commands."""

    components: tuple[tuple[str, ComponentSpec], ...]
    commands: tuple[CommandSpec, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with one component or command."""

    where: str
    cause: str


def describe(
    components: Iterable[tuple[str, ComponentSpec]], commands: Iterable[CommandSpec]
) -> tuple[Description, list[str]]:
    """A plugin's checked description and every problem found in it."""
    components, commands = tuple(components), tuple(commands)
    problems: list[str] = []
    for kind, spec in components:
        shape = _check_fields(kind, spec)
        problems += shape or check_spec(kind, spec)
    for spec in commands:
        problems += check_command(spec)
    if not problems:
        problems += _check_names(components, commands)
    return Description(components, commands), problems


def check_spec(kind: str, spec: ComponentSpec) -> list[str]:
    """Problems of a component's description, capability and record-kind names included."""
    where = f"{kind} {spec.name!r}"
    problems = check_component(kind, spec)
    offers: Mapping[str, Any] = RECORD_KINDS if kind == "dataset" else CAPABILITIES
    problems += _unknown(spec.provides, offers, f"{where} provides")
    for role, needs in spec.requires.items():
        problems += _unknown(needs, CAPABILITIES, f"{where} requires of {role!r}")
    for role, kinds in spec.data.items():
        problems += _unknown(kinds, RECORD_KINDS, f"{where} takes as {role!r}")
    for param in spec.params:
        problems += [f"{where}: {message}" for message in _check_default(param)]
    if spec.trainer and not re.fullmatch(r"[a-z0-9-]+:[a-z0-9-]+", spec.trainer):
        problems.append(f"{where}: trainer {spec.trainer!r} is not a full component id")
    if type(spec.version) is not int or spec.version < 1:
        problems.append(f"{where}: version is {spec.version!r}; it must be 1, 2, ...")
    return problems


def check_command(spec: CommandSpec) -> list[str]:
    """Problems of a command's description."""
    where = f"command {spec.name!r}"
    if not all(isinstance(getattr(spec, name), str) for name in ("name", "target", "summary")):
        return [f"{where}: name, target and summary must be strings"]
    problems = check_label(where, spec)
    if not _is_tuple_of(spec.params, Param):
        return [*problems, f"{where}: params must be a tuple of Param"]
    for param in spec.params:
        problems += [f"{where}: {m}" for m in (*check_param(param), *_check_default(param))]
    return problems


def check_api(text: str) -> str:
    """Why an API range such as `>=1.0,<2.0` excludes this host; empty when it includes it."""
    ours = ".".join(map(str, API_VERSION))
    clauses = [clause.strip() for clause in text.split(",") if clause.strip()]
    if not clauses:
        return f"the API range is empty; write it as '>={ours},<{API_VERSION[0] + 1}.0'"
    for clause in clauses:
        match = _CLAUSE.fullmatch(clause)
        if match is None:
            return f"cannot read the API range {text!r}; write it like '>=1.0,<2.0'"
        bound = (int(match[2]), int(match[3] or 0))
        holds = {
            ">=": bound <= API_VERSION,
            "<=": bound >= API_VERSION,
            ">": bound < API_VERSION,
            "<": bound > API_VERSION,
            "==": bound == API_VERSION,
            "!=": bound != API_VERSION,
        }
        if not holds[match[1]]:
            return f"needs plugin API {text}, this tenfold has {ours}"
    return ""


def missing_target(target: str) -> str:
    """Why the module of a target cannot exist; empty when its file is there.

    Nothing is imported: only the top-level package is looked up, then its folders.
    """
    module = target.partition(":")[0]
    return "" if _module_exists(module) else f"there is no module {module!r}"


@cache
def _module_exists(module: str) -> bool:
    top, _, rest = module.partition(".")
    try:
        found = find_spec(top)
        name = top
        for part in filter(None, rest.split(".")):
            if found is None or found.submodule_search_locations is None:
                return False
            name = f"{name}.{part}"
            found = PathFinder.find_spec(name, list(found.submodule_search_locations))
    except (ImportError, ValueError):
        return False
    return found is not None


def _check_fields(kind: str, spec: ComponentSpec) -> list[str]:
    """Fields of the wrong type; a lone string where a tuple belongs is the usual one."""
    where = f"{kind} {spec.name!r}"
    problems = [
        f"{where}: {name} must be a string"
        for name in _STRINGS
        if not isinstance(getattr(spec, name), str)
    ]
    problems += [
        f"{where}: {name} is {getattr(spec, name)!r}; write a tuple of strings"
        for name in _TUPLES
        if not _is_tuple_of(getattr(spec, name), str)
    ]
    if not _is_tuple_of(spec.params, Param):
        problems.append(f"{where}: params must be a tuple of Param")
    for name in ("requires", "data"):
        table = getattr(spec, name)
        if not isinstance(table, Mapping) or not all(
            isinstance(role, str) and _is_tuple_of(values, str) for role, values in table.items()
        ):
            problems.append(f"{where}: {name} must map roles to tuples of strings")
    if not isinstance(spec.deprecated, Mapping):
        problems.append(f"{where}: deprecated must map old names to messages")
    return problems


def _is_tuple_of(value: Any, kind: type) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(item, kind) for item in value)


def _unknown(names: Sequence[str], known: Mapping[str, Any], where: str) -> list[str]:
    return [
        f"{where} {name!r}, which is unknown{nearest(name, known)}"
        for name in names
        if name not in known
    ]


def _check_default(param: Param) -> list[str]:
    """A default must be plain data that the parameter itself would accept."""
    if param.default is REQUIRED or param.default is None:
        return []
    if not _is_plain(param.default):
        return [f"the default of {param.name!r} is no plain data (numbers, strings, lists, dicts)"]
    try:
        check_value(param, param.default, f"the default of {param.name!r}")
    except ConfigError as error:
        return [str(error)]
    return []


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _check_names(
    components: Sequence[tuple[str, ComponentSpec]], commands: Sequence[CommandSpec]
) -> list[str]:
    """Each name once per kind, old names included."""
    counts = Counter((kind, name) for kind, s in components for name in (s.name, *s.deprecated))
    counts.update(("command", spec.name) for spec in commands)
    return [
        f"{kind} {name!r} is described {n} times" for (kind, name), n in counts.items() if n > 1
    ]
