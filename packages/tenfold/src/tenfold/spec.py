"""What a plugin says about itself: plain data, importable without any heavy library.

A plugin's `plugin.py` builds these descriptions from the standard library and this module
alone. The host plans a whole run from them, and imports a component's `target` only when it
builds that component.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

API_VERSION: Final = (1, 0)
"""Version of the plugin contract; `PluginInfo.api` names the range a plugin was written for."""

KINDS: Final = ("model", "dataset", "evaluator", "trainer")
"""Component kinds; each has its own name space."""

NAME_PATTERN: Final = re.compile(r"[a-z0-9][a-z0-9-]*")
TARGET_PATTERN: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
SCALAR_TYPES: Final = ("int", "float", "str", "bool", "path", "table")
HEAVY_MODULES: Final = (
    "torch",
    "numpy",
    "transformers",
    "torch_geometric",
    "speechbrain",
    "accelerate",
    "deepspeed",
)
"""Modules that no command short of building a component may import."""


class _Required:
    """Sentinel type of `REQUIRED`; prints as the word in help and error messages."""

    def __repr__(self) -> str:
        return "required"

    def __reduce__(self) -> str:
        return "REQUIRED"


REQUIRED: Final = _Required()
"""Default of a parameter that has none."""


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter of a component or command.

    `type` is one of `int float str bool path table`, `component:<kind>`, or `list[<type>]`.
    A default of `None` makes the parameter optional; `REQUIRED` makes it mandatory.
    `minimum` and `maximum` are inclusive and apply to numbers (each element of a list).
    `identity=False` marks a parameter that cannot change results (batch size, device), so
    it stays out of cache keys. `positional` matters for commands only.
    """

    name: str
    type: str = "str"
    default: Any = REQUIRED
    help: str = ""
    choices: tuple[Any, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    identity: bool = True
    positional: bool = False

    @property
    def required(self) -> bool:
        """Whether a value must be given."""
        return self.default is REQUIRED

    @property
    def element_type(self) -> str:
        """`type` without its `list[...]` wrapper."""
        return self.type[5:-1] if self.is_list else self.type

    @property
    def is_list(self) -> bool:
        """Whether `type` is `list[...]`."""
        return self.type.startswith("list[") and self.type.endswith("]")

    @property
    def component_kind(self) -> str | None:
        """The kind for `component:<kind>` parameters (also inside a list), else None."""
        head, _, kind = self.element_type.partition(":")
        return kind if head == "component" else None


@dataclass(frozen=True, slots=True)
class ComponentSpec:
    """Description of one component.

    Attributes:
        name: bare name; the full id is `<plugin>:<name>`.
        target: `package.module:callable`, imported and called with the parameters on build.
        summary: one line for lists.
        params: parameters, in the order shown to users.
        provides: capabilities (models), or the record kind (datasets: exactly one).
        requires: what the component needs of models: `{role: capabilities}`. A key that
            names one of its own `component:model` parameters speaks of that parameter; any
            other key is a model role of the run file (`model`, or `models.<role>`). A
            trailing `?` makes the role optional; the key `*` stands for every role given.
        data: what it needs of datasets: `{role: accepted record kinds}`, same key rules.
        inherits: name of the `component:model` parameter whose capabilities are kept
            (decoders), or an empty string.
        trainer: id of the trainer used when a model has neither `checkpoint` nor
            `train.use` (models only).
        modules: heavy modules that building it imports, for `--dry-run`.
        extras: pip requirements that must be installed, e.g. `tenfold[hf]`.
        tags: free words for search.
        version: version of the *behaviour*; part of every cache key.
        deprecated: `{old name: message}`: names that still resolve, with a warning.
        cost: `package.module:callable` for `--dry-run`, called with the plan and an upper bound
            of the number of items (or None); gives `{what: text or number}`. It must import
            nothing heavy (evaluators only).
    """

    name: str
    target: str
    summary: str
    params: tuple[Param, ...] = ()
    provides: tuple[str, ...] = ()
    requires: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    data: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    inherits: str = ""
    trainer: str = ""
    modules: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    version: int = 1
    deprecated: Mapping[str, str] = field(default_factory=dict)
    cost: str = ""

    def param(self, name: str) -> Param | None:
        """The parameter called `name`, or None."""
        return next((p for p in self.params if p.name == name), None)


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """A plugin's own card. `name` must equal its entry-point name; `api` is a range such as
    `>=1.0,<2.0` of `API_VERSION` values."""

    name: str
    summary: str
    paper: str = ""
    api: str = ">=1.0,<2.0"
    homepage: str = ""


@dataclass(frozen=True, slots=True)
class CommandSpec:
    """A sub-command `tenfold <plugin> <name>`; `target` is imported when it is invoked and
    called with the parameters as keywords. It returns None, an exit code, or a result to print
    (text as it is, anything else as JSON). A keyword `as_json` that it takes besides says
    whether `--json` was given; such a target prints its results itself."""

    name: str
    target: str
    summary: str
    params: tuple[Param, ...] = ()


def check_param(param: Param) -> list[str]:
    """Problems of a parameter description, as messages; empty when it is sound."""
    problems = []
    if not param.name.isidentifier():
        problems.append(f"parameter name {param.name!r} is not a Python identifier")
    kind = param.component_kind
    if kind is not None and kind not in KINDS:
        problems.append(f"parameter {param.name!r}: unknown component kind {kind!r}")
    if kind is None and param.element_type not in SCALAR_TYPES:
        problems.append(
            f"parameter {param.name!r}: unknown type {param.type!r} "
            f"(known: {', '.join(SCALAR_TYPES)}, component:<kind>, list[...])"
        )
    return problems


def check_label(where: str, spec: ComponentSpec | CommandSpec) -> list[str]:
    """Problems of a description's name, target and summary, as messages."""
    problems = []
    if not NAME_PATTERN.fullmatch(spec.name):
        problems.append(f"{where}: names match [a-z0-9][a-z0-9-]*")
    if not TARGET_PATTERN.fullmatch(spec.target):
        problems.append(f"{where}: target {spec.target!r} is not 'package.module:callable'")
    if not spec.summary:
        problems.append(f"{where}: the summary is empty")
    return problems


def check_component(kind: str, spec: ComponentSpec) -> list[str]:
    """Problems of a component description, as messages; empty when it is sound.

    Capability and record-kind names are checked by the registry, which knows them.
    """
    where = f"{kind} {spec.name!r}"
    problems = check_label(where, spec)
    names = [param.name for param in spec.params]
    problems += [f"{where}: parameter {n!r} twice" for n in set(names) if names.count(n) > 1]
    for param in spec.params:
        problems += [f"{where}: {message}" for message in check_param(param)]
    if spec.cost and not TARGET_PATTERN.fullmatch(spec.cost):
        problems.append(f"{where}: cost {spec.cost!r} is not 'package.module:callable'")
    if kind == "dataset" and len(spec.provides) != 1:
        problems.append(f"{where}: a dataset provides exactly one record kind")
    if spec.inherits:
        base = spec.param(spec.inherits)
        if base is None or base.component_kind != "model":
            problems.append(f"{where}: inherits {spec.inherits!r}, no component:model parameter")
    return problems
