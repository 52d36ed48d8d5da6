"""Working on recorded items without running anything again: re-scoring and merging shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tenfold.build import Builder
from tenfold.context import RunContext
from tenfold.errors import ConfigError
from tenfold.files import write_text
from tenfold.run import Outcome
from tenfold.run_report import write_metrics, write_report
from tenfold.store import ItemWriter, RunStore

if TYPE_CHECKING:
    from tenfold.host import Host


def rescore(host: Host, store: RunStore) -> Outcome:
    """Aggregates a run's recorded items with the installed evaluator, and writes its metrics
    and reports anew.

    Raises:
        ConfigError: the run was a training run, or is in use.
    """
    config = host.recorded_config(store)
    if config.evaluator is None:
        raise ConfigError(f"{store.path} is a training run; it has no items to score")
    store.lock()
    try:
        return _rescore(host, store)
    finally:
        store.unlock()


def _rescore(host: Host, store: RunStore) -> Outcome:
    plan = host.plan(host.recorded_config(store))
    assert plan.evaluator is not None
    context = RunContext(
        seed=plan.config.seed,
        device="cpu",
        dtype=host.workspace.default("dtype"),
        run_dir=store.path,
        cache_dir=host.workspace.path("cache"),
        work_dir=store.path / "work",
    )
    record: dict[str, Any] = store.read_json("run.json")
    evaluator = Builder(plan, context, host.workspace).build(plan.evaluator)
    metrics = write_metrics(evaluator, context, store)
    write_report(evaluator, context, store, record, metrics)
    done = len(store.done_keys())
    return Outcome(store.path, store.status, 0, metrics, done=done)


def merge(host: Host, stores: Sequence[RunStore]) -> Outcome:
    """One record from the shards of a run; the shards stay as they are.

    Raises:
        ConfigError: the runs differ in configuration or data.
    """
    first = stores[0].read_json("run.json")
    for store in stores[1:]:
        other = store.read_json("run.json")
        if other.get("fingerprints") != first.get("fingerprints"):
            raise ConfigError(
                f"{store.path} is no shard of the same run as {stores[0].path}: "
                "their configuration or data differ"
            )
    merged = RunStore.create(host.runs, first["name"])
    for name in ("config.toml", "source.toml"):
        write_text(merged.path / name, (stores[0].path / name).read_text(encoding="utf-8"))
    writer = ItemWriter(merged)
    seen: set[str] = set()
    failed = 0
    for store in stores:
        for line in store.ordered_lines():
            if line.key not in seen:
                seen.add(line.key)
                writer.item(line)
        failed += len(store.failed_keys() - store.done_keys())
    writer.close()
    counts = {"done": len(seen), "failed": failed, "reused": 0}
    parents = [store.id for store in stores]
    record = {**first, "id": merged.id, "parents": parents, "counts": counts, "shard": [0, 1]}
    merged.write_json("run.json", record)
    merged.set_status("ok")
    return replace(rescore(host, merged), failed=failed, status="ok")
