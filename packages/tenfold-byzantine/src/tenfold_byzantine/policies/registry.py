"""Policies by their text: `policy("dlpsw:f=2")`, `policy("mimic:rule=(trimmed-mean:f=1)")`.

`name:key=value,key=value`; a value that is itself such a text stands in parentheses where it has
parameters. Policies of one's own are passed as objects or, from Python only, named
`package.module:Class`; files cannot name code.
"""

from __future__ import annotations

import importlib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, Union, get_args, get_origin

from tenfold.errors import ConfigError, nearest

from tenfold_byzantine.contracts import POWERS, Policy, Role
from tenfold_byzantine.policies import adaptive, adversaries, averaging, one_round
from tenfold_byzantine.policies.base import Scripted, as_text
from tenfold_byzantine.policies.ben_or import BenOr
from tenfold_byzantine.policies.eig import Eig
from tenfold_byzantine.policies.filters import DlpswFilter, Filter, Filtered, WmsrFilter
from tenfold_byzantine.policies.phase_king import PhaseKing
from tenfold_byzantine.policies.surrogate import Surrogate

HONEST: tuple[type[Scripted], ...] = (
    one_round.Leader,
    one_round.ModeMin,
    one_round.ModeMinId,
    one_round.ModeOwn,
    one_round.LowMedian,
    one_round.TrimmedLowMedian,
    one_round.Mean,
    one_round.Median,
    one_round.Midrange,
    one_round.Min,
    one_round.Max,
    one_round.TrimmedMean,
    averaging.Dlpsw,
    averaging.Wmsr,
    PhaseKing,
    Eig,
    BenOr,
    one_round.Voter,
    one_round.ThreeMajority,
    one_round.Stubborn,
    one_round.Constant,
    one_round.Random,
    Surrogate,
)
BYZANTINE: tuple[type[Scripted], ...] = (*adversaries.ADVERSARIES, *adaptive.ADAPTIVE)
FILTERS: tuple[type[Filter], ...] = (WmsrFilter, DlpswFilter)

OF_ROLE: Mapping[Role, Mapping[str, type[Scripted]]] = {
    "honest": {c.name: c for c in HONEST},
    "byzantine": {c.name: c for c in BYZANTINE},
}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a policy, for listings."""

    name: str
    type: str
    default: str
    help: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One policy or filter, for listings.

    Attributes:
        name: as in texts.
        kind: `honest`, `byzantine` or `filter`.
        summary: one line: what it does.
        guarantee: what is proven about it; empty for adversaries and filters.
        bound: where that holds, and where the game refuses it otherwise; empty for anywhere.
        powers: powers it needs with its default parameters.
        parameters: in order.
    """

    name: str
    kind: str
    summary: str
    guarantee: str
    bound: str
    powers: tuple[str, ...]
    parameters: tuple[Parameter, ...]


def entries(kind: str | None = None) -> list[Entry]:
    """All policies and filters, or those of one kind (`honest`, `byzantine`, `filter`)."""
    groups: dict[str, Sequence[type[Scripted] | type[Filter]]] = {
        "honest": HONEST,
        "byzantine": BYZANTINE,
        "filter": FILTERS,
    }
    if kind is not None and kind not in groups:
        raise ConfigError(f"unknown kind {kind!r}; kinds are {', '.join(groups)}")
    return [
        Entry(
            name=c.name,
            kind=k,
            summary=c.summary,
            guarantee=getattr(c, "guarantee", ""),
            bound=c.bound,
            powers=tuple(sorted(getattr(c(), "powers", ()))),
            parameters=tuple(parameters(c)),
        )
        for k, classes in groups.items()
        if kind in (None, k)
        for c in classes
    ]


def parameters(cls: type[Scripted] | type[Filter]) -> list[Parameter]:
    """The parameters of a policy's or filter's class."""
    hints = typing.get_type_hints(cls)
    return [
        Parameter(
            name=f.name,
            type=type_name(hints[f.name]),
            default="" if f.default is None else as_text(f.default),
            help=f.metadata.get("help", ""),
            choices=tuple(f.metadata.get("choices", ())),
        )
        for f in fields(cls)
    ]


def type_name(hint: Any) -> str:
    """A parameter's type as people write it."""
    kind = without_none(hint)
    return kind.__name__ if kind in (int, float, str, bool) else "policy"


def without_none(hint: Any) -> Any:
    """`X` of `X | None`."""
    if get_origin(hint) in (Union, UnionType):
        return next(a for a in get_args(hint) if a is not type(None))
    return hint


def policy(
    text: str, *, role: Role | None = None, unsafe: bool = False, imports: bool = False
) -> Policy:
    """The policy that a text names.

    Args:
        text: `name` or `name:key=value,...`, or with `imports` also `package.module:Class` with
            parameters behind another colon.
        role: only policies made for this role; without it an honest one wins over an adversary
            of the same name (`random`).
        unsafe: run algorithms outside of their bounds.
        imports: whether the text may name code. True only for texts from Python.

    Raises:
        ConfigError: unknown name, parameter or value; each with what is known.
    """
    name, _, rest = text.strip().partition(":")
    name = name.strip()
    if imports and "." in name:
        return imported(name, rest)
    cls = found(name, role, imports)
    given = pairs(text, rest)
    built = build(cls, text, given)
    if unsafe and hasattr(built, "unsafe") and "unsafe" not in given:
        built = build(cls, text, {**given, "unsafe": "true"})
    return built


def found(name: str, role: Role | None, imports: bool) -> type[Scripted]:
    """The class of a name, or an error that helps."""
    roles: tuple[Role, ...] = ("honest", "byzantine") if role is None else (role,)
    for r in roles:
        if name in OF_ROLE[r]:
            return OF_ROLE[r][name]
    if name == "llm":
        raise ConfigError(
            "policy 'llm' needs a model; give the game a LanguagePolicy or name a model role"
        )
    if "." in name and not imports:
        raise ConfigError(
            f"policy {name!r} would import code; files and options name only what is listed",
            hint='from Python: policy("package.module:Class", imports=True), or pass the object',
        )
    what = {None: "policy", "honest": "honest policy", "byzantine": "adversary"}[role]
    known = [n for r in roles for n in OF_ROLE[r]]
    other: Role = "byzantine" if role == "honest" else "honest"
    if role is not None and name in OF_ROLE[other]:
        advice = (
            f"mimic:rule={name} plays it as a Byzantine agent"
            if role == "byzantine"
            else f"{name} is an adversary; use it under [byzantine]"
        )
        raise ConfigError(f"{name!r} is no {what}", hint=advice)
    raise ConfigError(
        f"unknown {what} {name!r}{nearest(name, known)}", hint=f"known: {', '.join(known)}"
    )


def imported(module: str, rest: str) -> Policy:
    """A user's policy class, built with the parameters behind another colon."""
    cls_name, _, options = rest.partition(":")
    text = f"{module}:{rest}"
    try:
        cls = getattr(importlib.import_module(module), cls_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"policy {text!r} cannot be loaded: {error}",
            hint="write package.module:Class with a class that can be imported",
        ) from error
    if issubclass(cls, Scripted):
        built: Any = build(cls, text, pairs(text, options))
    else:
        if options:
            raise ConfigError(
                f"policy {text!r}: parameters need a subclass of policies.base.Scripted",
                hint="or build the object yourself and pass it",
            )
        built = cls()
    if not isinstance(built, Policy):
        raise ConfigError(f"policy {text!r} lacks what contracts.Policy asks for")
    if not built.powers <= POWERS:
        raise ConfigError(
            f"policy {text!r} declares unknown powers {sorted(built.powers - POWERS)}; "
            f"powers are {', '.join(sorted(POWERS))}"
        )
    return built


def pairs(text: str, rest: str) -> dict[str, str]:
    """`key=value` parts, split at commas outside of parentheses."""
    given: dict[str, str] = {}
    for part in split(text, rest):
        key, equals, value = part.partition("=")
        key, value = key.strip(), value.strip()
        if not equals or not key or not value:
            raise ConfigError(
                f"policy {text!r}: {part.strip()!r} is no parameter; write name:key=value,key=value"
            )
        if key in given:
            raise ConfigError(f"policy {text!r}: {key} is given twice")
        given[key] = value
    return given


def split(text: str, rest: str) -> list[str]:
    """Splits at commas outside of parentheses."""
    if not rest.strip():
        return []
    parts, depth = [""], 0
    for ch in rest:
        depth += (ch == "(") - (ch == ")")
        if depth < 0:
            break
        if ch == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += ch
    if depth != 0:
        raise ConfigError(f"policy {text!r}: parentheses do not match")
    return parts


def build(cls: type[Scripted] | type[Filter], text: str, given: Mapping[str, str]) -> Any:
    """An object of the class with parameters read from texts."""
    hints = typing.get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    values = {}
    for key, value in given.items():
        if key not in known:
            has = f"; it has {', '.join(known)}" if known else "; it has none"
            raise ConfigError(
                f"policy {text!r}: unknown parameter {key!r}{nearest(key, known)}{has}"
            )
        values[key] = read(text, key, value, hints[key])
    return cls(**values)


def read(text: str, key: str, value: str, hint: Any) -> Any:
    """One parameter's value."""
    kind = without_none(hint)
    if kind is not hint and value == "none":
        return None
    if kind is str:
        return value
    if kind is bool:
        if value not in ("true", "false"):
            raise ConfigError(f"policy {text!r}: {key} is {value!r}; it must be true or false")
        return value == "true"
    if kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ConfigError(f"policy {text!r}: {key} is {value!r}; it must be {what}") from None
    inner = policy(value.removeprefix("(").removesuffix(")"), role="honest")
    if kind is not Policy and not isinstance(inner, kind):
        fitting = [c.name for c in HONEST if issubclass(c, kind)]
        raise ConfigError(
            f"policy {text!r}: {key} cannot be {value!r}; it must be one of {', '.join(fitting)}"
        )
    return inner


def filter_of(text: str) -> Filter | None:
    """The filter that a text names; None for `none`."""
    name, _, rest = text.strip().partition(":")
    if name in ("", "none"):
        return None
    known = {c.name: c for c in FILTERS}
    if name not in known:
        raise ConfigError(
            f"unknown filter {name!r}{nearest(name, known)}",
            hint=f"known: none, {', '.join(known)}",
        )
    return build(known[name], text, pairs(text, rest))


def with_filter(policy: Policy, text: str) -> Policy:
    """The policy behind the filter that a text names; itself for `none`."""
    filter = filter_of(text)
    return policy if filter is None else Filtered(policy, filter)
