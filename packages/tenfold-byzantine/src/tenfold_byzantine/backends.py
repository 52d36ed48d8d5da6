"""Models for the verbs that play games: from `[backend]` tables, folders or run files.

A run file names its models by role; game files have a `[backend]` table instead, and the command
line a folder. All of them become components of the host, so any installed model plays.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tenfold.build import Builder, quiet_libraries
from tenfold.config import SCHEMA
from tenfold.context import RunContext, resolve_device
from tenfold.errors import CapabilityError, ConfigError, nearest
from tenfold.host import Host
from tenfold.plan import plan_component
from tenfold.progress import Reporter
from tenfold.seeds import content_hash

from tenfold_byzantine.contracts import Role
from tenfold_byzantine.roster import ModelOf, NoModelError
from tenfold_byzantine.rules import GameConfig, Group

USES: Mapping[str, tuple[str, str]] = {
    "transformers": ("core:hf", "checkpoint"),
    "openai": ("core:openai", "model"),
    "replay": ("core:replay", "path"),
}
"""Short name of a backend → component, and its parameter that `model` means."""
ROLES = ("honest", "byzantine", "model")


def component_table(backend: Mapping[str, Any]) -> dict[str, Any]:
    """The host's component table of a `[backend]` table.

    `use` is a short name of `USES`, `host:<component>`, or a component id with a colon; `model` is
    what the short name's component loads; settings of value "auto" are left to the host.

    Raises:
        ConfigError: an unknown short name.
    """
    use = backend.get("use")
    rest = {k: v for k, v in backend.items() if k not in ("use", "role") and v != "auto"}
    if not isinstance(use, str) or (":" not in use and use not in USES):
        raise ConfigError(
            f"backend use is {use!r}{nearest(str(use), USES)}; known: {', '.join(USES)}, or "
            "host:<component> such as host:treeflash:tree"
        )
    if use not in USES:
        return {"use": use.removeprefix("host:"), **rest}
    component, parameter = USES[use]
    if "model" in rest:
        rest[parameter] = rest.pop("model")
    return {"use": component, **rest}


def given_backends(host: Host, text: str | None) -> dict[str, dict[str, Any]]:
    """Component tables by role of a `--model`: a folder, or a run file or recipe with models."""
    if text is None:
        return {}
    path = Path(text).expanduser()
    if path.is_dir():
        return {"model": {"use": "core:hf", "checkpoint": str(path.absolute())}}
    if path.suffix == ".toml" or host.registry.recipe(text) is not None:
        source = host.read(text)
        table = {k: source.table[k] for k in ("model", "models") if k in source.table}
        config = host.resolve({**_BARE, **table}, source=source.path)
        if not config.models:
            raise ConfigError(f"{text} has no [model] and no [models.<role>]")
        return {role: dict(table) for role, table in config.models.items()}
    raise ConfigError(
        f"--model {text!r} is no checkpoint folder, no run file and no recipe",
        hint="a run file with [models.honest] can name any component",
    )


_BARE: Mapping[str, Any] = {
    "schema": SCHEMA,
    "name": "byzantine",
    "datasets": {"games": {"use": "byzantine:games"}},
    "evaluator": {"use": "byzantine:consensus"},
}


class Backends:
    """Builds models when a game asks for them, each once.

    Args:
        host: the workspace.
        folder: for what building needs to write.
        given: component tables by role, which win over `[backend]` tables of games.
    """

    def __init__(
        self, host: Host, folder: Path, given: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        self._host, self._folder, self._given = host, folder, dict(given or {})
        self._built: dict[str, Any] = {}

    def model_of(self, group: Group, role: Role, config: GameConfig) -> Any:
        """The model of a group; see `ModelOf`.

        Raises:
            NoModelError: nothing says which model plays.
        """
        return self._build(self._table(group, role, config))

    def _table(self, group: Group, role: Role, config: GameConfig) -> dict[str, Any]:
        named = group.backend.get("role")
        for name in (named,) if named is not None else (role, "model"):
            if name in self._given:
                return dict(self._given[name])
        for backend in (group.backend, config.backend):
            if "use" in backend:
                return component_table(backend)
        raise NoModelError(
            f"the {role} agents are language models, but nothing says which",
            hint="give --model FOLDER (or a run file with [models.honest]), a [backend] table in "
            f'the game file, or a scripted policy: [{role}] use = "low-median"',
        )

    def _build(self, table: dict[str, Any]) -> Any:
        key = content_hash(table, 64)
        if key not in self._built:
            host = self._host
            config = host.resolve(dict(_BARE))
            node, plan = plan_component(
                config, host.registry, host.workspace, "model", table, "backend"
            )
            if "generate" not in node.capabilities:
                raise CapabilityError(f"{node.component.id} cannot generate text; agents must")
            quiet_libraries()
            context = RunContext(
                seed=config.seed,
                device=resolve_device(config.scale["device"], node.component.spec.modules),
                dtype=host.workspace.default("dtype"),
                run_dir=self._folder,
                cache_dir=host.workspace.path("cache"),
                work_dir=self._folder / "work",
                reporter=Reporter(),
            )
            self._built[key] = Builder(plan, context, host.workspace).build(node)
        return self._built[key]


@contextmanager
def backends(model: str | None = None, host: Host | None = None) -> Iterator[ModelOf]:
    """Models for the length of a verb.

    Args:
        model: what `--model` says, see `given_backends`.
        host: the workspace; None finds it.

    Raises:
        ConfigError: `--model` names nothing.
    """
    host = host or Host()
    given = given_backends(host, model)
    with tempfile.TemporaryDirectory(prefix="tenfold-byzantine-") as folder:
        yield Backends(host, Path(folder), given).model_of
