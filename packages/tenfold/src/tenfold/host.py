"""The host: what the command line and Python callers use to plan and run a run file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.config import RunConfig, Table, apply_settings, read_run_file, resolve
from tenfold.errors import ConfigError, TenfoldError, nearest
from tenfold.files import write_text
from tenfold.plan import Plan, make_plan
from tenfold.store import RunStore, all_runs, find_run, run_field
from tenfold.workspace import Workspace, find_workspace

if TYPE_CHECKING:
    from tenfold.registry import Registry
    from tenfold.run import Options, Outcome


@dataclass(frozen=True, slots=True)
class Source:
    """A run file as read: its merged table, its own text, and where it lies."""

    table: Table
    text: str
    path: Path | None


class Host:
    """One workspace and the plugins found in it.

    host = Host()
    outcome = host.run("who-wrote-this.toml", settings=["evaluator.steps=5"])
    print(outcome.metrics)
    """

    def __init__(
        self, workspace: Workspace | None = None, registry: Registry | None = None
    ) -> None:
        self.workspace = workspace or find_workspace()
        if registry is not None:
            self.registry = registry

    @cached_property
    def registry(self) -> Registry:
        """Installed components, found on first use."""
        from tenfold.registry import load_registry

        return load_registry(self.workspace)

    @property
    def runs(self) -> Path:
        """The folder of run records."""
        return self.workspace.path("runs")

    # --- from a name to a plan ---

    def read(self, name: str | Path) -> Source:
        """A run file by path, or a recipe by `plugin:name`.

        Raises:
            ConfigError: neither exists.
        """
        path = Path(name)
        if not path.is_file():
            recipe = self.registry.recipe(str(name))
            if recipe is None:
                recipes = [recipe.id for recipe in self.registry.recipes()]
                raise ConfigError(
                    f"no such run file: {name}{nearest(str(name), recipes)}",
                    hint="give a TOML file or a recipe (`tenfold recipes` lists them)",
                )
            path = recipe
        table, text = read_run_file(path, self.registry.recipe)
        return Source(table, text, path)

    def resolve(
        self, table: Mapping[str, Any], settings: Iterable[str] = (), source: Path | None = None
    ) -> RunConfig:
        """A run table with `--set` options, resolved."""
        return resolve(
            apply_settings(dict(table), settings),
            self.workspace,
            source=source,
            runs=lambda reference: run_field(self.runs, reference),
        )

    def plan(self, config: RunConfig) -> Plan:
        """A resolved configuration, planned against installed components."""
        return make_plan(config, self.registry, self.workspace)

    # --- running ---

    def run(
        self,
        run: str | Path | Mapping[str, Any],
        settings: Iterable[str] = (),
        options: Options | None = None,
    ) -> Outcome:
        """Runs a run file, recipe or table.

        Raises:
            TenfoldError: the file, plan or set-up is wrong. Failed items are in the outcome.
        """
        source = Source(dict(run), "", None) if isinstance(run, Mapping) else self.read(run)
        if source.table.get("sweep"):
            raise ConfigError(
                f"{source.path or 'the run'} has a [sweep]", hint="use `tenfold sweep`"
            )
        config = self.resolve(source.table, settings, source.path)
        return self.run_config(config, options, source.text)

    def run_config(
        self, config: RunConfig, options: Options | None = None, text: str = ""
    ) -> Outcome:
        """Runs a resolved configuration in a new run folder, or resumes its newest unfinished
        one when `options.resume` is set."""
        from tenfold.run import Options

        options = options or Options()
        plan = self.plan(config)
        plan.require_fit()
        if options.resume:
            unfinished = self.unfinished(config)
            if unfinished is not None:
                return self._execute(plan, unfinished, options)
            options = replace(options, resume=False)
        store = RunStore.create(self.runs, config.name)
        _write_sources(store, config, text)
        return self._execute(plan, store, options)

    def resume(self, name: str, options: Options) -> Outcome:
        """Continues the run that `name` means, with its recorded configuration."""
        store = find_run(self.runs, name)
        config = self.recorded_config(store)
        record = store.read_json("run.json")
        limit = record.get("limit") if options.limit is None else options.limit
        shard = tuple(record.get("shard", (0, 1)))
        options = replace(options, resume=True, limit=limit, shard=shard)
        plan = self.plan(config)
        plan.require_fit()
        return self._execute(plan, store, options)

    def recorded_config(self, store: RunStore) -> RunConfig:
        """The configuration that a run folder holds."""
        table, _ = read_run_file(store.path / "config.toml")
        return resolve(table, self.workspace, source=store.path / "config.toml")

    def unfinished(self, config: RunConfig) -> RunStore | None:
        """The newest run of the same name and configuration that did not finish."""
        return next((s for s in self._equal_runs(config) if s.status != "ok"), None)

    def finished(self, config: RunConfig) -> RunStore | None:
        """The newest finished run of the same name and configuration."""
        return next((s for s in self._equal_runs(config) if s.status == "ok"), None)

    def _equal_runs(self, config: RunConfig) -> Iterator[RunStore]:
        digest = config.digest()
        for store in reversed(all_runs(self.runs)):
            same_name = store.path.parent.name == config.name
            if same_name and store.read_json("run.json").get("config_digest") == digest:
                yield store

    def _execute(self, plan: Plan, store: RunStore, options: Options) -> Outcome:
        scale = plan.config.scale
        store.lock()
        try:
            if scale["processes"] > 1:
                return self._launch(plan, store, options)
            from tenfold.run import execute

            return execute(plan, store, self.workspace, options, self.registry.observers())
        finally:
            store.unlock()

    def _launch(self, plan: Plan, store: RunStore, options: Options) -> Outcome:
        from tenfold.context import resolve_device
        from tenfold.scale.launch import launch

        device = resolve_device(plan.config.scale["device"], plan.heavy_modules())
        arguments = [*_worker_arguments(options), "--recorded", str(len(store.done_keys()))]
        code = launch(store.path, plan.config.scale, device, arguments)
        return recorded_outcome(store, code)


def _worker_arguments(options: Options) -> list[str]:
    arguments = ["--shard", f"{options.shard[0]}/{options.shard[1]}"]
    if options.limit is not None:
        arguments += ["--limit", str(options.limit)]
    if options.resume:
        arguments.append("--resume")
    if not options.progress:
        arguments.append("--quiet")
    return arguments


def recorded_outcome(store: RunStore, exit_code: int) -> Outcome:
    """The outcome of a run that other processes executed.

    The record's own exit code counts; launchers turn every failure into 1.
    """
    from tenfold.errors import EXIT_INTERRUPTED, EXIT_RUN_FAILED
    from tenfold.records import Metric
    from tenfold.run import Outcome

    record: dict[str, Any] = {}
    if (store.path / "run.json").is_file():
        record = store.read_json("run.json")
    status = record.get("status", "failed")
    if status == "running":  # no process lived to say how it ended
        exit_code = exit_code or EXIT_RUN_FAILED
        status = "interrupted" if exit_code == EXIT_INTERRUPTED else "failed"
        store.set_status(status)
    else:
        exit_code = record.get("exit_code", exit_code)
    metrics: Sequence[Metric] = ()
    if (store.path / "metrics.json").is_file():
        metrics = [Metric(**row) for row in store.read_json("metrics.json")]
    checkpoint = store.path / "artifacts" / "checkpoint"
    return Outcome(
        run_dir=store.path,
        status=status,
        exit_code=exit_code,
        metrics=metrics,
        checkpoint=checkpoint if checkpoint.is_dir() else None,
        message=record.get("message", ""),
        **record.get("counts", {}),
    )


def _write_sources(store: RunStore, config: RunConfig, text: str) -> None:
    import tomli_w

    write_text(store.path / "source.toml", text or tomli_w.dumps(config.table()))
    write_text(store.path / "config.toml", tomli_w.dumps(config.table()))


__all__ = ["Host", "Source", "TenfoldError", "recorded_outcome"]
