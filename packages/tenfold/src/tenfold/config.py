"""Run files: from TOML to one resolved configuration.

Resolution order: the file, on top of what it `extends`, on top of the workspace's defaults,
below `--set a.b=value`. Then `share` and `${run:...}` / `${file}` are replaced. `${env:NAME}`
stays as written until a component is built, so that no secret reaches a record.
"""

from __future__ import annotations

import copy
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenfold.errors import ConfigError, nearest
from tenfold.seeds import content_hash
from tenfold.workspace import DEFAULTS, Workspace, read_toml

SCHEMA = "tenfold-run/1"
_TOP_LEVEL = (
    "schema",
    "name",
    "summary",
    "seed",
    "extends",
    "model",
    "models",
    "dataset",
    "datasets",
    "evaluator",
    "trainer",
    "scale",
    "limits",
    "reproducibility",
    "sweep",
)
_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Table = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RunConfig:
    """A resolved run: component tables by role, still unplanned.

    `models` and `datasets` map roles to component tables; `[model]` is the role `model`.
    """

    name: str
    seed: int
    models: Mapping[str, Table]
    datasets: Mapping[str, Table]
    evaluator: Table | None
    trainer: Table | None
    scale: Table
    limits: Table
    reproducibility: Table
    sweep: Table = field(default_factory=dict)
    summary: str = ""
    source: Path | None = None

    def table(self) -> Table:
        """The run file that gives this configuration again."""
        table: Table = {"schema": SCHEMA, "name": self.name, "seed": self.seed}
        optional = {
            "summary": self.summary,
            "model": self.models.get("model"),
            "models": {role: t for role, t in self.models.items() if role != "model"},
            "dataset": self.datasets.get("dataset"),
            "datasets": {role: t for role, t in self.datasets.items() if role != "dataset"},
            "evaluator": self.evaluator,
            "trainer": self.trainer,
            "scale": dict(self.scale),
            "limits": dict(self.limits),
            "reproducibility": dict(self.reproducibility),
        }
        table.update({key: value for key, value in optional.items() if value})
        return copy.deepcopy(table)

    def digest(self) -> str:
        """Hash of what determines the results (scale and limits do not)."""
        table = self.table()
        for key in ("scale", "limits", "summary"):
            table.pop(key, None)
        return content_hash(table)


def read_run_file(
    path: Path, recipes: Callable[[str], Path | None] = lambda name: None
) -> tuple[Table, str]:
    """A run file's merged table (with `extends` applied) and its source text.

    Raises:
        ConfigError: missing file, bad TOML, wrong schema, circular `extends`.
    """
    table = _read_extended(path, recipes, ())
    return table, path.read_text(encoding="utf-8")


def _read_extended(
    path: Path, recipes: Callable[[str], Path | None], seen: tuple[Path, ...]
) -> Table:
    path = path.absolute()
    if path in seen:
        raise ConfigError(f"{seen[-1]}: `extends` goes in a circle through {path}")
    table = read_toml(path)
    _anchor_paths(table, path.parent)
    parent = table.pop("extends", None)
    if parent is None:
        return table
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends is {parent!r}; it must be a path or a recipe name")
    parent_path = recipes(parent) or path.parent / parent
    return merge(_read_extended(parent_path, recipes, (*seen, path)), table)


def _anchor_paths(value: Any, folder: Path) -> None:
    """Replaces `${file}` by the folder of the file that holds it."""
    for container, key, text in _strings(value):
        if "${file}" in text:
            container[key] = text.replace("${file}", str(folder))


def _strings(value: Any) -> Iterator[tuple[Any, Any, str]]:
    """Every string in nested tables and lists, as (container, key, text)."""
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    for key, child in pairs:
        if isinstance(child, str):
            yield value, key, child
        else:
            yield from _strings(child)


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> Table:
    """Tables merged key by key; lists and scalars of `top` replace those of `base`.

    A table that changes `use` replaces the whole base table: parameters of another component
    would not fit.
    """
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            other = "use" in value and value["use"] != old.get("use", value["use"])
            merged[key] = dict(value) if other else merge(old, value)
        else:
            merged[key] = value
    return merged


def parse_setting(text: str) -> tuple[list[str], Any]:
    """`a.b=value` as a key path and a TOML value; a value that is no TOML is a string.

    Raises:
        ConfigError: there is no `=` or an empty key.
    """
    key, equals, value = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"--set {text!r}: write it as table.key=value")
    try:
        return path, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return path, value


def apply_settings(table: Table, settings: Iterable[str]) -> Table:
    """The table with `--set` options applied, in order."""
    for text in settings:
        path, value = parse_setting(text)
        path = _as_written(table, path)
        change: Any = value
        for key in reversed(path):
            change = {key: change}
        blocking = _scalar_on_path(table, path[:-1])
        if blocking:
            raise ConfigError(f"--set {text!r}: {blocking} is a value, not a table")
        table = merge(table, change)
    return table


def _as_written(table: Mapping[str, Any], path: list[str]) -> list[str]:
    """`model.x` and `models.model.x` are one place; the path that the table uses."""
    for kind in ("model", "dataset"):
        group = table.get(f"{kind}s", {})
        if path[0] == kind and kind not in table and isinstance(group, Mapping) and kind in group:
            return [f"{kind}s", *path]
        if path[:2] == [f"{kind}s", kind] and kind in table:
            return path[1:]
    return path


def _scalar_on_path(table: Any, path: list[str]) -> str:
    for depth, key in enumerate(path):
        if key not in table:
            return ""
        table = table[key]
        if not isinstance(table, Mapping):
            return ".".join(path[: depth + 1])
    return ""


def resolve(
    table: Mapping[str, Any],
    workspace: Workspace,
    *,
    source: Path | None = None,
    runs: Callable[[str], Any] | None = None,
) -> RunConfig:
    """The resolved configuration of a run table.

    Args:
        runs: answers `${run:NAME.field}` lookups (`tenfold.store.run_field`).

    Raises:
        ConfigError: an unknown key, a wrong type, a bad `share` or variable.
    """
    where = str(source) if source else "run"
    table = copy.deepcopy(dict(table))
    _check_top_level(table, where)
    for container, key, text in _strings(table):
        container[key] = _expand(text, f"{where}: {key}", runs)
    roles = {kind: _roles(table, kind, where) for kind in ("model", "dataset")}
    tree: Table = {"models": roles["model"], "datasets": roles["dataset"]}
    for key in ("evaluator", "trainer"):
        if key in table:
            tree[key] = _component_table(table[key], key, where)
    _resolve_shares(tree, tree, "", where, ())
    settings = {
        name: _settings(table, workspace, name, where)
        for name in ("scale", "limits", "reproducibility")
    }
    return RunConfig(
        name=_name(table, source, where),
        seed=_integer(table.get("seed", workspace.default("seed")), "seed", where),
        models=tree["models"],
        datasets=tree["datasets"],
        evaluator=tree.get("evaluator"),
        trainer=tree.get("trainer"),
        sweep=table.get("sweep", {}),
        summary=table.get("summary", ""),
        source=source,
        **settings,
    )


def _check_top_level(table: Table, where: str) -> None:
    for key in table:
        if key not in _TOP_LEVEL:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(key, _TOP_LEVEL)}")
    schema = table.get("schema")
    if schema != SCHEMA:
        found = "is missing" if schema is None else f"is {schema!r}"
        raise ConfigError(f'{where}: schema {found}; write schema = "{SCHEMA}"')
    if "evaluator" in table and "trainer" in table:
        raise ConfigError(f"{where}: has both [evaluator] and [trainer]; keep one")
    if "evaluator" not in table and "trainer" not in table:
        raise ConfigError(f"{where}: has neither [evaluator] nor [trainer]; add one")


def _roles(table: Table, kind: str, where: str) -> Table:
    """`[model]` and `[models.*]` (or the same for datasets) as one mapping by role."""
    roles = table.get(f"{kind}s", {})
    if not isinstance(roles, dict):
        raise ConfigError(f"{where}: {kind}s is {roles!r}; it must be tables [{kind}s.<role>]")
    roles = dict(roles)
    if kind in table:
        if kind in roles:
            raise ConfigError(f"{where}: [{kind}] and [{kind}s.{kind}] are the same role")
        roles[kind] = table[kind]
    return {role: _component_table(t, f"{kind}s.{role}", where) for role, t in roles.items()}


def _component_table(value: Any, key: str, where: str) -> Table:
    if isinstance(value, str):
        return {"use": value}
    if not isinstance(value, dict):
        raise ConfigError(f'{where}: [{key}] must be a table with use = "plugin:name"')
    if "use" not in value and "share" not in value:
        raise ConfigError(
            f'{where}: [{key}] names no component; add use = "plugin:name"{nearest("use", value)}'
        )
    return value


def _resolve_shares(tree: Table, value: Any, path: str, where: str, seen: tuple[str, ...]) -> None:
    """Replaces `{share = "role.param"}` by a copy of that table; equal tables are built once."""
    if isinstance(value, list):
        for child in value:
            _resolve_shares(tree, child, path, where, seen)
    if not isinstance(value, dict):
        return
    for key, child in list(value.items()):
        here = f"{path}.{key}" if path else key
        links: tuple[str, ...] = ()
        while isinstance(child, dict) and "share" in child:
            extra = set(child) - {"share"}
            if extra:
                raise ConfigError(f"{where}: [{here}] has share and {sorted(extra)}; keep one")
            target = str(child["share"])
            if target in (*seen, *links) or _absolute(tree, target) == here:
                raise ConfigError(f"{where}: [{here}] share = {target!r} goes in a circle")
            links = (*links, target)
            child = _lookup(tree, target, f"{where}: [{here}]")
        if links:
            child = copy.deepcopy(child)
            value[key] = child
        _resolve_shares(tree, child, here, where, (*seen, *links))


def _absolute(tree: Table, target: str) -> str:
    """The full path of a share target: `honest.base` means `models.honest.base`."""
    head = target.split(".")[0]
    if head in tree:
        return target
    group = "models" if head in tree["models"] else "datasets"
    return f"{group}.{target}"


def _lookup(tree: Table, target: str, where: str) -> Any:
    found: Any = tree
    for key in _absolute(tree, target).split("."):
        if not isinstance(found, dict) or key not in found:
            known = [*tree["models"], *tree["datasets"]]
            raise ConfigError(
                f"{where} share = {target!r}: no such component{nearest(target, known)} "
                f"(roles here: {', '.join(known) or 'none'})"
            )
        found = found[key]
    if not isinstance(found, dict):
        raise ConfigError(f"{where} share = {target!r} is a value, not a component")
    return found


def _expand(text: str, where: str, runs: Callable[[str], Any] | None) -> Any:
    """Replaces `${run:...}`; checks that `${env:...}` exists; refuses anything else."""

    def value(match: re.Match[str]) -> str:
        kind, _, argument = match[1].partition(":")
        if kind == "env" and argument:
            if argument not in os.environ:
                raise ConfigError(f"{where}: environment variable {argument} is not set")
            return match[0]
        if kind == "run" and argument and runs is not None:
            return str(runs(argument))
        raise ConfigError(
            f"{where}: cannot resolve {match[0]}; known: ${{env:NAME}}, ${{run:NAME.field}}, "
            "${file}"
        )

    return _VARIABLE.sub(value, text)


def expand_environment(value: Any) -> Any:
    """A parameter value with `${env:NAME}` replaced; only builders call this."""
    if isinstance(value, str):
        return _VARIABLE.sub(
            lambda m: os.environ.get(m[1][4:], "") if m[1].startswith("env:") else m[0], value
        )
    if isinstance(value, list):
        return [expand_environment(item) for item in value]
    if isinstance(value, dict):
        return {key: expand_environment(item) for key, item in value.items()}
    return value


def _settings(table: Table, workspace: Workspace, name: str, where: str) -> Table:
    known = DEFAULTS[name]
    given = table.get(name, {})
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: {name} must be a table [{name}]")
    for key, value in given.items():
        if key not in known:
            raise ConfigError(f"{where}: unknown key {name}.{key}{nearest(key, known)}")
        kind = type(known[key])
        number = kind is float and isinstance(value, int)
        if not (isinstance(value, kind) or number) or (
            isinstance(value, bool) and kind is not bool
        ):
            raise ConfigError(
                f"{where}: {name}.{key} is {value!r}; it must be of type {kind.__name__}"
            )
    merged = {**workspace.tables[name], **given}
    if name == "scale":
        _check_scale(merged, where)
        if merged["device"] == "auto":
            merged["device"] = workspace.default("device")
    return merged


LAUNCHERS = ("auto", "none", "torchrun", "accelerate", "deepspeed")


def _check_scale(scale: Table, where: str) -> None:
    if scale["processes"] < 1:
        raise ConfigError(f"{where}: scale.processes is {scale['processes']}; at least 1")
    launcher = scale["launcher"]
    if launcher not in LAUNCHERS:
        raise ConfigError(
            f"{where}: scale.launcher is {launcher!r}{nearest(launcher, LAUNCHERS)} "
            f"(known: {', '.join(LAUNCHERS)})"
        )
    if launcher == "none" and scale["processes"] > 1:
        raise ConfigError(f'{where}: scale.launcher "none" starts one process, not several')


def _name(table: Table, source: Path | None, where: str) -> str:
    name = table.get("name") or (source.stem if source else "run")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: name is {name!r}; use letters, digits, '.', '_' and '-' only")
    return name


def _integer(value: Any, key: str, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{where}: {key} is {value!r}; it must be an integer")
    return value
