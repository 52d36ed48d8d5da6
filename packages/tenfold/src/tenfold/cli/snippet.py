"""A run file that uses a component, made from descriptions alone.

Roles are filled with installed components that fit and need no further parameters; what only
the user can know stays as a marked placeholder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tenfold.registry import Component, Registry
from tenfold.spec import ComponentSpec, Param

_PLACEHOLDERS = {"int": 1, "float": 1.0, "bool": True, "table": {}}
_INDENT_COMMENT = 34


def snippet(component: Component, registry: Registry) -> str:
    """TOML text; it plans as it stands unless a required parameter says `change me`."""
    spec = component.spec
    lines = ['schema = "tenfold-run/1"', f'name = "{spec.name}"']
    task = component
    if component.kind in ("model", "dataset"):
        task = _task_for(component, registry) or component
    for kind, needs in (("model", task.spec.requires), ("dataset", task.spec.data)):
        for role, wanted in _roles(task.spec, needs):
            filler = component if component.kind == kind else None
            if filler is None or not _fits(filler, wanted):
                filler = _candidate(registry, kind, wanted)
            lines += ["", f"[{_table(kind, role)}]", *_body(filler, registry, filler is component)]
    if task.kind in ("evaluator", "trainer"):
        lines += ["", f"[{task.kind}]", *_body(task, registry, task is component)]
    else:
        lines += ["", f"[{component.kind}]", *_body(component, registry, True)]
        lines += ["", "# change me: no installed evaluator or trainer takes it; add [evaluator]"]
    return "\n".join(lines)


def _roles(
    spec: ComponentSpec, needs: Mapping[str, tuple[str, ...]]
) -> list[tuple[str, tuple[str, ...]]]:
    """Required roles of the run file, with what each needs."""
    own = {param.name for param in spec.params}
    roles = []
    for role, wanted in needs.items():
        if role.endswith("?") or role in own:
            continue
        roles.append(("model" if role == "*" else role, wanted))
    return roles


def _table(kind: str, role: str) -> str:
    return kind if role == kind else f"{kind}s.{role}"


def _fits(component: Component, wanted: tuple[str, ...]) -> bool:
    provides = set(component.spec.provides)
    if component.kind == "dataset":
        return not wanted or bool(provides & set(wanted))
    from tenfold.plan import with_implied

    return set(wanted) <= set(with_implied(provides)) or bool(component.spec.inherits)


def _candidate(registry: Registry, kind: str, wanted: tuple[str, ...]) -> Component | None:
    """The fitting component that asks least of the user."""
    fitting = [c for c in registry.components(kind) if _fits(c, wanted) and not c.spec.inherits]
    return min(fitting, key=lambda c: (_missing(c.spec), c.plugin != "core"), default=None)


def _task_for(component: Component, registry: Registry) -> Component | None:
    """An evaluator (or else a trainer) that accepts this model or dataset and asks least
    besides."""

    def accepts(task: Component) -> bool:
        needs = task.spec.requires if component.kind == "model" else task.spec.data
        roles = _roles(task.spec, needs)
        return bool(roles) and all(_fits(component, wanted) for _, wanted in roles)

    def cost(task: Component) -> tuple[int, bool]:
        spec = task.spec
        roles = len(_roles(spec, spec.requires)) + len(_roles(spec, spec.data))
        return _missing(spec) * 10 + roles, task.plugin != component.plugin

    for kind in ("evaluator", "trainer"):
        if tasks := list(filter(accepts, registry.components(kind))):
            return min(tasks, key=cost)
    return None


def _missing(spec: ComponentSpec) -> int:
    """How many parameters the user must give."""
    free = ("checkpoint",) if spec.trainer else ()
    return sum(param.required and param.name not in free for param in spec.params)


def _body(component: Component | None, registry: Registry, explain: bool) -> list[str]:
    """Lines of a component's table; optional parameters as comments when it is the subject."""
    if component is None:
        return ['use = "plugin:name"  # change me: nothing installed fits']
    spec = component.spec
    lines = [f'use = "{component.id}"', *_training(spec, registry)]
    for param in spec.params:
        if param.required and not (param.name == "checkpoint" and spec.trainer):
            value = toml_value(_placeholder(param, spec, registry))
            mark = "" if param.component_kind else "change me: "
            lines.append(_commented(f"{param.name} = {value}", mark + param.help))
        elif explain:
            optional = param.required or param.default is None
            default = "" if optional else toml_value(param.default)
            lines.append(_commented(f"# {param.name} = {default}".rstrip(), param.help))
    return lines


def _training(spec: ComponentSpec, registry: Registry) -> list[str]:
    """The `train` table of a model whose trainer does not do with its defaults."""
    trainer = next((c for c in registry.components("trainer") if c.id == spec.trainer), None)
    if trainer is None or not _missing(trainer.spec):
        return []
    train: dict[str, Any] = {"use": trainer.id}
    for param in trainer.spec.params:
        if param.required:
            train[param.name] = _placeholder(param, trainer.spec, registry)
    return [f"train = {toml_value(train)}"]


def _commented(text: str, comment: str) -> str:
    comment = " ".join(comment.split())
    return f"{text:<{_INDENT_COMMENT}}  # {comment}" if comment else text


def _placeholder(param: Param, spec: ComponentSpec, registry: Registry) -> Any:
    value: Any
    if param.component_kind is not None:
        wanted = spec.requires.get(param.name, spec.data.get(param.name, ()))
        filler = _candidate(registry, param.component_kind, tuple(wanted))
        value = {"use": filler.id if filler else "plugin:name"}
    elif param.choices:
        value = param.choices[0]
    elif param.minimum is not None and param.element_type in ("int", "float"):
        value = param.minimum if param.element_type == "float" else int(param.minimum)
    else:
        value = _PLACEHOLDERS.get(param.element_type, "...")
    return [value] if param.is_list else value


def toml_value(value: Any) -> str:
    """A plain value as inline TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{_key(key)} = {toml_value(item)}" for key, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, int | float):
        return repr(value)
    # TOML basic strings take JSON's escapes; characters outside ASCII stay as they are.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(key: str) -> str:
    bare = key.replace("-", "").replace("_", "")
    return key if bare.isascii() and bare.isalnum() else json.dumps(key)
