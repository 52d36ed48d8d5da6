"""From a resolved configuration to a checked plan, before anything heavy is imported.

The plan is a tree of component descriptions with validated parameters. Each role's needs are
matched against what its model provides, keeps from its base, or can get through an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tenfold.adapters import ADAPTERS
from tenfold.capabilities import IMPLIED
from tenfold.config import RunConfig, expand_environment
from tenfold.errors import CapabilityError, ConfigError, nearest
from tenfold.params import check_value, parse_text
from tenfold.seeds import content_hash
from tenfold.spec import REQUIRED, Param

if TYPE_CHECKING:
    from tenfold.registry import Component, Registry
    from tenfold.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Node:
    """One planned component.

    Attributes:
        where: its place in the run file, e.g. `models.honest.base`.
        params: validated values; nested components are nodes.
        train: the trainer that makes its checkpoint, or None.
        capabilities: what it can do natively (provided, implied or kept from its base).
    """

    where: str
    component: Component
    params: Mapping[str, Any]
    train: Node | None = None
    capabilities: frozenset[str] = frozenset()

    def children(self) -> Iterator[Node]:
        """Direct sub-components, in parameter order."""
        for value in self.params.values():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, Node):
                    yield item
        if self.train is not None:
            yield self.train

    def walk(self) -> Iterator[Node]:
        """This node and all below it, depth first."""
        yield self
        for child in self.children():
            yield from child.walk()

    def describe(self, *, identity: bool = False) -> dict[str, Any]:
        """A JSON-able description.

        With `identity`, only what can change results: no paths (content fingerprints stand
        for them), no batch sizes, no devices.
        """
        spec = self.component.spec
        params = {}
        for name, value in self.params.items():
            param = spec.param(name)
            free = param is not None and (not param.identity or param.element_type == "path")
            if identity and free:
                continue
            params[name] = _describe_value(value, identity)
        row: dict[str, Any] = {"id": self.component.id, "version": spec.version, "params": params}
        if self.train is not None:
            row["train"] = self.train.describe(identity=identity)
        return row

    def key(self, *, identity: bool = False) -> str:
        """Content hash of `describe`; equal keys mean one object in memory."""
        return content_hash(self.describe(identity=identity))


def _describe_value(value: Any, identity: bool) -> Any:
    if isinstance(value, Node):
        return value.describe(identity=identity)
    if isinstance(value, list | tuple):  # a default may be a tuple; JSON knows only lists
        return [_describe_value(item, identity) for item in value]
    return value


@dataclass(frozen=True, slots=True)
class Check:
    """One capability that one place needs. `via` says how it is met: `own`, `base`,
    `adapter`, or an empty string when it is not."""

    where: str
    needs: str
    by: str
    component: str
    via: str
    offered_by: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the need is met."""
        return bool(self.via)


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked run: component nodes by role, and what was found about their fit."""

    config: RunConfig
    models: Mapping[str, Node]
    datasets: Mapping[str, Node]
    evaluator: Node | None
    trainer: Node | None
    checks: Sequence[Check] = ()
    adapters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Place → capabilities that adapters add there."""

    @property
    def task(self) -> Node:
        """The evaluator or trainer."""
        node = self.evaluator or self.trainer
        assert node is not None
        return node

    def nodes(self) -> Iterator[Node]:
        """All nodes, task first."""
        for root in (self.task, *self.models.values(), *self.datasets.values()):
            yield from root.walk()

    def heavy_modules(self) -> list[str]:
        """Heavy modules that building the plan would import."""
        return sorted({module for node in self.nodes() for module in node.component.spec.modules})

    def tree(self, *, identity: bool = False) -> dict[str, Any]:
        """JSON-able component tree by role."""
        return {
            "task": self.task.describe(identity=identity),
            "models": {r: n.describe(identity=identity) for r, n in self.models.items()},
            "datasets": {r: n.describe(identity=identity) for r, n in self.datasets.items()},
        }

    def require_fit(self) -> None:
        """Raises CapabilityError naming every capability that is not met, and who offers it."""
        missing = [check for check in self.checks if not check.ok]
        if missing:
            lines = [
                f"{c.by} needs {c.needs!r} of {c.where}, which {c.component} does not offer"
                f" (offered by: {', '.join(c.offered_by) or 'no installed model'})"
                for c in missing
            ]
            raise CapabilityError("\n".join(lines))


def make_plan(config: RunConfig, registry: Registry, workspace: Workspace) -> Plan:
    """Plans a configuration against the installed components.

    Capability mismatches do not raise here: they are in `Plan.checks` (`Plan.require_fit`).

    Raises:
        ConfigError: an unknown parameter, wrong type, value out of range, missing role.
        ComponentError: an unknown component.
    """
    planner = _Planner(config, registry, workspace)
    models = {r: planner.node("model", t, f"models.{r}") for r, t in config.models.items()}
    datasets = {r: planner.node("dataset", t, f"datasets.{r}") for r, t in config.datasets.items()}
    evaluator = trainer = None
    if config.evaluator is not None:
        evaluator = planner.node("evaluator", config.evaluator, "evaluator")
    if config.trainer is not None:
        trainer = planner.node("trainer", config.trainer, "trainer")
    task = evaluator or trainer
    assert task is not None
    planner.check_roles(task, models, datasets)
    return Plan(
        config, models, datasets, evaluator, trainer, tuple(planner.checks), planner.adapters
    )


def plan_component(
    config: RunConfig,
    registry: Registry,
    workspace: Workspace,
    kind: str,
    table: Mapping[str, Any],
    where: str,
) -> tuple[Node, Plan]:
    """One component's node, and a plan without a task to build it with.

    Raises:
        ConfigError: an unknown parameter, wrong type, value out of range.
        ComponentError: an unknown component.
    """
    planner = _Planner(config, registry, workspace)
    node = planner.node(kind, table, where)
    plan = Plan(config, {}, {}, None, None, tuple(planner.checks), planner.adapters)
    return node, plan


class _Planner:
    """Builds nodes and collects checks; one instance per plan."""

    def __init__(self, config: RunConfig, registry: Registry, workspace: Workspace) -> None:
        self.config = config
        self.registry = registry
        self.workspace = workspace
        self.checks: list[Check] = []
        self.adapters: dict[str, tuple[str, ...]] = {}

    def node(self, kind: str, table: Mapping[str, Any], where: str) -> Node:
        component = self.registry.component(kind, _use(table, where))
        spec = component.spec
        given = {k: v for k, v in table.items() if k not in ("use", "train")}
        known = [p.name for p in spec.params]
        for name in given:
            if name not in known:
                raise ConfigError(
                    f"{where}: {component.id} has no parameter {name!r}{nearest(name, known)} "
                    f"(it has: {', '.join(known) or 'none'})"
                )
        defaults = self.registry.defaults(component)
        train = self._train_node(component, table, where)
        params = {
            p.name: self._param(p, {**defaults, **given}, where, trained=train is not None)
            for p in spec.params
        }
        node = Node(where, component, params, train, self._capabilities(component, params))
        self._check_params(node)
        return node

    def _param(self, param: Param, given: Mapping[str, Any], where: str, *, trained: bool) -> Any:
        here = f"{where}.{param.name}"
        if param.name not in given:
            if param.name in ("seed", "dtype") and param.default is None:
                return self._from_run(param.name)
            if param.default is REQUIRED:
                if trained and param.name == "checkpoint":
                    return None
                what = f" ({param.help})" if param.help else ""
                raise ConfigError(f"{here} is required{what}; add {param.name} = <{param.type}>")
            value = param.default
            if param.component_kind and isinstance(value, (str, Mapping)):
                return self.node(param.component_kind, _table(value, here), here)
            return value
        value = given[param.name]
        kind = param.component_kind
        if kind is None:
            scalar(param, value, here)  # checked now, replaced only on build
            return value
        if not param.is_list:
            return self.node(kind, _table(value, here), here)
        if not isinstance(value, list):
            raise ConfigError(f"{here} is {value!r}; it must be a list of component tables")
        return [
            self.node(kind, _table(v, f"{here}.{i}"), f"{here}.{i}") for i, v in enumerate(value)
        ]

    def _from_run(self, name: str) -> Any:
        if name == "seed":
            return self.config.seed
        return self.workspace.default(name)

    def _train_node(
        self, component: Component, table: Mapping[str, Any], where: str
    ) -> Node | None:
        spec = component.spec
        train = table.get("train")
        if component.kind != "model" or (train is None and not spec.trainer):
            if train is not None:
                raise ConfigError(f"{where}.train: only models are trained, not {component.kind}s")
            return None
        if table.get("checkpoint") is not None:
            if train is None:
                return None
            raise ConfigError(f"{where}: has both checkpoint and train; keep one")
        if spec.param("checkpoint") is None:
            raise ConfigError(f"{where}.train: {component.id} takes no checkpoint")
        if not isinstance(train or {}, Mapping):
            raise ConfigError(f'{where}.train must be a table with use = "plugin:trainer"')
        settings = dict(train or {})
        settings.setdefault("use", spec.trainer)
        return self.node("trainer", _table(settings, f"{where}.train"), f"{where}.train")

    @staticmethod
    def _capabilities(component: Component, params: Mapping[str, Any]) -> frozenset[str]:
        own = set(component.spec.provides) if component.kind == "model" else set()
        base = params.get(component.spec.inherits) if component.spec.inherits else None
        if isinstance(base, Node):
            own |= base.capabilities
        return frozenset(with_implied(own))

    def _check_params(self, node: Node) -> None:
        """A component's needs of its own component parameters."""
        spec = node.component.spec
        for name, needs in spec.requires.items():
            child = node.params.get(name.rstrip("?"))
            if isinstance(child, Node):
                self._check(child, needs, node.component.id)
        for name, kinds in spec.data.items():
            child = node.params.get(name.rstrip("?"))
            if isinstance(child, Node):
                self._check_kind(child, kinds, node.component.id)

    def check_roles(
        self, task: Node, models: Mapping[str, Node], datasets: Mapping[str, Node]
    ) -> None:
        """The task's needs of the run's roles, and roles that nobody asked for."""
        spec = task.component.spec
        own = {param.name for param in spec.params}
        roots = (task, *models.values(), *datasets.values())
        for needs, given, group in (
            (spec.requires, models, "models"),
            (spec.data, datasets, "datasets"),
        ):
            roles = {name: value for name, value in needs.items() if name.rstrip("?") not in own}
            _check_missing(task, roles, given, group)
            for role, node in given.items():
                wanted = roles.get(role, roles.get(f"{role}?", roles.get("*", roles.get("*?"))))
                if wanted is None:
                    if not _used_elsewhere(node, roots):
                        raise _unknown_role(task, role, roles, group)
                elif group == "models":
                    self._check(node, wanted, task.component.id)
                else:
                    self._check_kind(node, wanted, task.component.id)

    def _check(self, node: Node, needs: Iterable[str], by: str) -> None:
        for capability in needs:
            via = self._via(node, capability)
            if via == "adapter":
                added = self.adapters.get(node.where, ())
                self.adapters[node.where] = tuple(dict.fromkeys((*added, capability)))
            offered = () if via else self._offers(capability)
            self.checks.append(Check(node.where, capability, by, node.component.id, via, offered))

    @staticmethod
    def _via(node: Node, capability: str) -> str:
        if capability in node.capabilities:
            own = with_implied(node.component.spec.provides)
            return "own" if capability in own else "base"
        return "adapter" if _adaptable(capability, node.capabilities) else ""

    def _offers(self, capability: str) -> tuple[str, ...]:
        """Installed models that offer the capability natively or through an adapter."""
        ids = []
        for component in self.registry.components("model"):
            own = with_implied(component.spec.provides)
            if capability in own or _adaptable(capability, own):
                ids.append(component.id)
        return tuple(ids)

    def _check_kind(self, node: Node, kinds: Sequence[str], by: str) -> None:
        kind = node.component.spec.provides[0]
        if kinds and kind not in kinds:
            offers = [
                c.id for c in self.registry.components("dataset") if c.spec.provides[0] in kinds
            ]
            raise ConfigError(
                f"{by} needs {' or '.join(kinds)} records in {node.where}, but "
                f"{node.component.id} gives {kind} records (datasets that fit: "
                f"{', '.join(offers) or 'none installed'})"
            )


def _check_missing(
    task: Node, roles: Mapping[str, Any], given: Mapping[str, Node], group: str
) -> None:
    """Raises ConfigError for a required role that the run file does not fill."""
    singular = group[:-1]
    for role in roles:
        if role == "*" and not given:
            raise ConfigError(f"{task.component.id} needs at least one {singular}")
        if not role.endswith("?") and role != "*" and role not in given:
            table = f"[{singular}]" if role == singular else f"[{group}.{role}]"
            raise ConfigError(
                f"{task.component.id} needs the {singular} role {role!r}; add {table}"
                f"{nearest(role, given)}"
            )


def _used_elsewhere(node: Node, roots: Iterable[Node]) -> bool:
    """Whether another place of the run uses an equal node (it is a `share` target)."""
    key = node.key()
    return any(n is not node and n.key() == key for root in roots for n in root.walk())


def _unknown_role(task: Node, role: str, roles: Mapping[str, Any], group: str) -> ConfigError:
    known = [name.rstrip("?") for name in roles]
    return ConfigError(
        f"{task.component.id} has no {group[:-1]} role {role!r}{nearest(role, known)} "
        f"(its {group[:-1]} roles: {', '.join(known) or 'none'})"
    )


def _adaptable(capability: str, own: Iterable[str]) -> bool:
    """Whether an adapter makes the capability from these."""
    needs, _ = ADAPTERS.get(capability, (None, ""))
    return needs is not None and set(needs) <= set(own)


def with_implied(capabilities: Iterable[str]) -> set[str]:
    """Capabilities together with those that come with them (`grad` brings `loss`)."""
    found = set(capabilities)
    pending = list(found)
    while pending:
        for implied in IMPLIED.get(pending.pop(), ()):
            if implied not in found:
                found.add(implied)
                pending.append(implied)
    return found


def _use(table: Mapping[str, Any], where: str) -> str:
    use = table.get("use")
    if not isinstance(use, str) or not use:
        raise ConfigError(f'{where}: use is {use!r}; it must name a component, "plugin:name"')
    return use


def _table(value: Any, where: str) -> Mapping[str, Any]:
    """A nested component table; a bare string is its `use`."""
    if isinstance(value, str):
        return {"use": value}
    if not isinstance(value, Mapping):
        raise ConfigError(f'{where} is {value!r}; it must be a table {{ use = "plugin:name" }}')
    return value


def scalar(param: Param, value: Any, where: str) -> Any:
    """The value a builder passes on: `${env:NAME}` replaced, then read as the type asks.

    Raises:
        ConfigError: wrong type or out of range.
    """
    expanded = expand_environment(value)
    if isinstance(value, str) and expanded != value and param.type not in ("str", "path"):
        expanded = parse_text(param, expanded)
    return check_value(param, expanded, where)
