"""Building components one at a time, the way a run would."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tenfold.build import Builder, quiet_libraries
from tenfold.config import RunConfig
from tenfold.context import RunContext
from tenfold.errors import CapabilityError, ComponentError, ConfigError, TenfoldError
from tenfold.plan import Node, Plan, plan_component
from tenfold.progress import Reporter
from tenfold.registry import Component, Registry
from tenfold.testing.findings import LawBrokenError, NotApplicableError
from tenfold.workspace import DEFAULTS, Workspace

SERVICE_TAG = "http"
"""Tag of components that need a service to answer; they are built only when told how."""
SEED = 5

Settings = Mapping[str, Mapping[str, Any]]
"""Component id → parameters it is built with."""


class Workbench:
    """A temporary workspace in which components are built and evaluators run."""

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self.registry = registry
        self.settings = settings
        self._folder = tempfile.TemporaryDirectory(prefix="tenfold-check-")
        self.root = Path(self._folder.name)
        tables = {name: dict(values) for name, values in DEFAULTS.items()}
        tables["paths"]["cache"] = str(self.root / "cache")
        tables["defaults"] |= {"device": "cpu", "progress": False}
        self.workspace = Workspace(self.root, tables, registry.workspace.policy)

    def __enter__(self) -> Workbench:
        quiet_libraries()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._folder.cleanup()

    def table(self, component: Component) -> dict[str, Any]:
        """The component's table of a run file: its id and the given settings."""
        return {"use": component.id, **self.settings.get(component.id, {})}

    def obstacle(self, component: Component) -> str:
        """Why the component cannot be built cheaply from what is known; empty when it can."""
        spec = component.spec
        given = self.settings.get(component.id, {})
        if spec.trainer and "checkpoint" not in given and "train" not in given:
            return "building it would train a model; give a checkpoint"
        defaults = self.registry.defaults(component)
        missing = [
            p.name
            for p in spec.params
            if p.required and p.name not in given and p.name not in defaults
        ]
        if missing and "train" not in given:
            return f"needs {', '.join(missing)}"
        if SERVICE_TAG in spec.tags and not given:
            return "needs a service to talk to"
        return ""

    def build(self, component: Component) -> Any:
        """A fresh object of the component.

        Raises:
            NotApplicableError: parameters or libraries are missing.
            LawBrokenError: it should build with its defaults and does not.
        """
        if reason := self.obstacle(component):
            raise NotApplicableError(reason)
        try:
            return self._build(component, self.table(component))
        except (ConfigError, CapabilityError) as error:
            # A component may need one of several optional parameters.
            if component.id in self.settings:
                raise LawBrokenError(f"did not build: {error}") from error
            raise NotApplicableError(f"does not build with defaults alone: {error}") from error
        except ComponentError as error:
            if isinstance(error.__cause__, ModuleNotFoundError):
                raise NotApplicableError(str(error).splitlines()[0]) from error
            raise LawBrokenError(f"did not build: {error}") from error

    def build_with(self, component: Component, **params: Any) -> Any:
        """An object with other parameters, without translating errors."""
        return self._build(component, {**self.table(component), **params})

    def plan(self, component: Component, table: Mapping[str, Any]) -> tuple[Node, Plan]:
        """The component's node, checked but not built."""
        where = f"{component.kind}s.{component.spec.name}"
        return plan_component(
            self._config(), self.registry, self.workspace, component.kind, table, where
        )

    def _build(self, component: Component, table: Mapping[str, Any]) -> Any:
        node, plan = self.plan(component, table)
        missing = [check for check in plan.checks if not check.ok]
        if missing:
            raise CapabilityError(f"{missing[0].where} lacks {missing[0].needs!r}")
        return Builder(plan, self.context(), self.workspace).build(node)

    def context(self) -> RunContext:
        """A context of one CPU process."""
        folders = [self.root / name for name in ("run", "cache", "work")]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        run, cache, work = folders
        return RunContext(
            seed=SEED,
            device="cpu",
            dtype="float32",
            run_dir=run,
            cache_dir=cache,
            work_dir=work,
            reporter=Reporter(enabled=False),
        )

    def _config(self) -> RunConfig:
        tables = self.workspace.tables
        return RunConfig(
            name="check",
            seed=SEED,
            models={},
            datasets={},
            evaluator=None,
            trainer=None,
            scale=dict(tables["scale"]),
            limits=dict(tables["limits"]),
            reproducibility=dict(tables["reproducibility"]),
        )


def refuses_bad_values(bench: Workbench, component: Component) -> None:
    """Every described limit is enforced, and a path that is not there is a clear error."""
    for param in component.spec.params:
        for value in _bad_values(param):
            try:
                bench.plan(component, {**bench.table(component), param.name: value})
            except TenfoldError:
                continue
            raise LawBrokenError(f"accepts {param.name} = {value!r}")
    _refuses_missing_path(bench, component)


def _bad_values(param: Any) -> list[Any]:
    if param.component_kind is not None:
        return ["no-such-plugin:no-such-component"] if not param.is_list else []
    values: list[Any] = []
    if param.minimum is not None:
        values.append(type(param.minimum)(param.minimum - 1))
    if param.maximum is not None:
        values.append(type(param.maximum)(param.maximum + 1))
    if param.choices:
        values.append("no such choice")
    if param.element_type in ("int", "float", "bool"):
        values.append("no such value")
    return [[value] if param.is_list else value for value in values]


def _refuses_missing_path(bench: Workbench, component: Component) -> None:
    """Targets get a path that is not there; a raw traceback would be the plugin's fault."""
    given = bench.settings.get(component.id, {})
    required = [p for p in component.spec.params if p.required and p.name not in given]
    if len(required) != 1 or required[0].type != "path":
        return
    name = required[0].name
    try:
        bench.build_with(component, **{name: str(bench.root / "no" / "such" / "path")})
    except TenfoldError as error:
        cause = error.__cause__
        if isinstance(cause, Exception) and not isinstance(
            cause, TenfoldError | ModuleNotFoundError | OSError
        ):
            raise LawBrokenError(
                f"a missing {name} raises {type(cause).__name__}; raise a ConfigError that "
                "names the path"
            ) from error
