"""What a verb works on: the model, corpus and queries of a run file, a recipe, a run, or paths."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tenfold.build import Builder, quiet_libraries
from tenfold.config import SCHEMA, RunConfig, Table, read_run_file
from tenfold.context import RunContext, resolve_device
from tenfold.errors import ConfigError
from tenfold.host import Host
from tenfold.progress import Reporter
from tenfold.store import RunStore, find_run

from tenfold_dabgo.evaluation.bench import Bench, load_records, prepare
from tenfold_dabgo.evaluation.sources import parse_sources
from tenfold_dabgo.settings import AttributionSettings

ATTRIBUTION = "dabgo:attribution"
_SETTING = re.compile(r"[\w.-]+\s*=")
_FORMATS = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}


def run_table(
    host: Host,
    source: str | None,
    *,
    model: str | None = None,
    train: str | None = None,
    queries: str | None = None,
    needs_queries: bool = True,
) -> tuple[Table, Path | None]:
    """A run table from a run file, recipe or run, with models and data replaced by paths.

    Args:
        host: the workspace.
        source: run file, `plugin:recipe`, or a run's folder, id or name; None for paths alone.
        model: checkpoint folder.
        train: file or folder of training texts.
        queries: JSON Lines, CSV or Parquet with `prompt` and `completion`, or texts.
        needs_queries: without it, a missing `queries` role is filled in by the training texts.

    Raises:
        ConfigError: nothing to work on, or a role is missing.
    """
    table: Table = {"schema": SCHEMA, "name": "dabgo"}
    path: Path | None = None
    if source is not None:
        table, path = _source_table(host, source)
    if model is not None:
        table.pop("models", None)
        table["model"] = {"use": "core:hf", "checkpoint": str(Path(model).absolute())}
    datasets = dict(table.get("datasets", {}))
    if train is not None:
        datasets["train"] = _dataset(train, prompts=False)
    if queries is not None:
        datasets["queries"] = _dataset(queries, prompts=True)
    if "train" in datasets and not needs_queries:
        datasets.setdefault("queries", {"share": "train"})
    table["datasets"] = datasets
    missing = [role for role in ("train", "queries") if role not in datasets]
    if "model" not in table and "model" not in table.get("models", {}):
        missing.insert(0, "model")
    if missing:
        options = ", ".join(f"--{name}" for name in missing)
        raise ConfigError(
            f"{source or 'the command'} says nothing about: {', '.join(missing)}",
            hint=f"give a run file, a recipe or a run that has them, or {options}",
        )
    return table, path


def _source_table(host: Host, source: str) -> tuple[Table, Path | None]:
    if Path(source).is_file() or host.registry.recipe(source) is not None:
        read = host.read(source)
        return dict(read.table), read.path
    try:
        store = find_run(host.runs, source)
    except ConfigError as error:
        raise ConfigError(
            f"{source!r} is no run file, no recipe and no run: {error}",
            hint="`tenfold recipes` and `tenfold runs list` show what there is",
        ) from None
    path = store.path / "config.toml"
    return dict(read_run_file(path)[0]), path


def _dataset(path: str, *, prompts: bool) -> Table:
    """The dataset component that reads a path."""
    form = _FORMATS.get(Path(path).suffix.lower())
    where = str(Path(path).expanduser().absolute())
    if form is None:
        return {"use": "core:text", "path": where}
    if prompts:
        return {"use": f"core:{form}-prompts", "path": where, "reference_column": "completion"}
    return {"use": f"core:{form}", "path": where}


def evaluator_table(table: Mapping[str, Any], use: str, given: Mapping[str, Any]) -> Table:
    """The table with another evaluator.

    Settings of the methods (steps, damping, windows, ...) that the source has stay; those that
    are given win, and None means not given.
    """
    shared = {f.name for f in fields(AttributionSettings)}
    if use != ATTRIBUTION:
        shared -= {"method", "view", "top_k", "columns", "how", "min_group", "compare"}
        shared.discard("base_losses")
    old = table.get("evaluator", {})
    same = old.get("use") == use
    keep = {k: v for k, v in old.items() if k != "use" and (same or k in shared)}
    if not str(old.get("use", "")).startswith("dabgo:"):
        keep = {}
    new = {k: v for k, v in given.items() if v is not None}
    return {**table, "evaluator": {"use": use, **keep, **new}}


def recorded(host: Host, source: str) -> RunStore | None:
    """The run that a name means, None when it means a file, a recipe or nothing."""
    if Path(source).is_file() or host.registry.recipe(source) is not None:
        return None
    try:
        return find_run(host.runs, source)
    except ConfigError:
        return None


@dataclass
class Composition:
    """Built objects of one run table, for verbs that work in this process."""

    ctx: RunContext
    model: Any
    bench: Bench
    settings: AttributionSettings


@contextmanager
def opened(
    host: Host,
    table: Table,
    path: Path | None,
    settings: Sequence[str],
    methods: Sequence[str],
    needs_queries: bool = True,
) -> Iterator[Composition]:
    """Builds model, corpus and queries; trained models and Fishers come from the caches.

    Raises:
        TenfoldError: the table does not resolve, plan or build.
    """
    config = host.resolve(table, whole_settings(settings), path)
    with tempfile.TemporaryDirectory(prefix="tenfold-dabgo-") as folder:
        yield _build(host, config, Path(folder), methods, needs_queries)


def whole_settings(parts: Sequence[str]) -> list[str]:
    """`key=value` settings, put together again where a value's own commas cut it."""
    out: list[str] = []
    for part in parts:
        if _SETTING.match(part) or not out:
            out.append(part)
        else:
            out[-1] += f",{part}"
    return out


def _build(
    host: Host, config: RunConfig, folder: Path, methods: Sequence[str], needs_queries: bool
) -> Composition:
    plan = host.plan(config)
    plan.require_fit()
    quiet_libraries()
    ctx = RunContext(
        seed=config.seed,
        device=resolve_device(config.scale["device"], plan.heavy_modules()),
        dtype=host.workspace.default("dtype"),
        run_dir=folder,
        cache_dir=host.workspace.path("cache"),
        work_dir=folder / "work",
        reporter=Reporter(),
    )
    builder = Builder(plan, ctx, host.workspace)
    evaluator: Any = builder.build(plan.evaluator) if plan.evaluator is not None else None
    settings = _attribution_settings(evaluator)
    model = builder.build(plan.models["model"])
    data = {role: builder.build(plan.datasets[role]) for role in ("train", "queries")}
    records = load_records(data) if needs_queries else []
    bench = prepare(ctx, model, data["train"], records, settings, parse_sources(methods))
    return Composition(ctx, model, bench, settings)


def _attribution_settings(evaluator: Any) -> AttributionSettings:
    for name in ("method_settings", "settings"):
        found = getattr(evaluator, name, None)
        if isinstance(found, AttributionSettings):
            return found
    return AttributionSettings()
