"""Runs a plan item by item and leaves a record that can be resumed, compared and repeated."""

from __future__ import annotations

import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold import facts, reproducible
from tenfold.build import Builder, quiet_libraries
from tenfold.context import RunContext, resolve_device
from tenfold.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    ComponentError,
    ConfigError,
    RunFailed,
    TenfoldError,
    TooManyFailures,
)
from tenfold.plan import Node, Plan
from tenfold.progress import Reporter
from tenfold.records import ItemResult, Metric, WorkItem
from tenfold.seeds import content_hash
from tenfold.store import ItemLine, ItemWriter, RunStore, key_number
from tenfold.workspace import Workspace

if TYPE_CHECKING:
    from tenfold.observers import Observers


class ItemTimeoutError(Exception):
    """An item took longer than `limits.item_timeout_s`."""


@dataclass(frozen=True, slots=True)
class Process:
    """This process's place among those of one launch.

    `recorded` is how many items the run had when the launch began; the processes cannot count
    them afterwards, since others may have begun to write.
    """

    rank: int = 0
    world_size: int = 1
    launch_id: str = ""
    recorded: int = 0


@dataclass(frozen=True, slots=True)
class Options:
    """How to run: none of this changes results.

    `shard=(i, k)` takes every k-th item starting at i (0-based); `limit` takes the first items
    of the plan.
    """

    limit: int | None = None
    shard: tuple[int, int] = (0, 1)
    resume: bool = False
    progress: bool = True
    process: Process = field(default_factory=Process)
    parents: tuple[str, ...] = ()
    argv: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run gave."""

    run_dir: Path
    status: str
    exit_code: int
    metrics: Sequence[Metric] = ()
    done: int = 0
    failed: int = 0
    reused: int = 0
    checkpoint: Path | None = None
    message: str = ""

    def to_json(self) -> dict[str, Any]:
        """The object that `run --json` prints."""
        return {
            "run_dir": str(self.run_dir),
            "status": self.status,
            "exit_code": self.exit_code,
            "metrics": [asdict(metric) for metric in self.metrics],
            "items": {"done": self.done, "failed": self.failed, "reused": self.reused},
            "checkpoint": str(self.checkpoint) if self.checkpoint else None,
            "message": self.message,
        }


def execute(
    plan: Plan,
    store: RunStore,
    workspace: Workspace,
    options: Options | None = None,
    observers: Observers | None = None,
) -> Outcome:
    """Runs a plan into a run folder (new or resumed), in this process.

    The caller holds the folder's lock. Interruption and failure are part of the outcome, with
    everything finished so far recorded; only `TenfoldError` of the set-up is raised.
    """
    return _Execution(plan, store, workspace, options or Options(), observers).execute()


class _Execution:
    """State of one run in one process."""

    def __init__(
        self,
        plan: Plan,
        store: RunStore,
        workspace: Workspace,
        options: Options,
        observers: Observers | None,
    ) -> None:
        self.plan = plan
        self.store = store
        self.options = options
        self.observers = observers
        self.process = options.process
        config = plan.config
        self.context = RunContext(
            seed=config.seed,
            device=resolve_device(config.scale["device"], plan.heavy_modules()),
            dtype=workspace.default("dtype"),
            run_dir=store.path,
            cache_dir=workspace.path("cache"),
            work_dir=store.path / "work",
            rank=self.process.rank,
            world_size=self.process.world_size,
            offline=bool(workspace.default("offline")),
            launch_id=self.process.launch_id,
            reporter=Reporter(enabled=options.progress and self.process.rank == 0),
        )
        self.builder = Builder(plan, self.context, workspace)
        self.phases: dict[str, float] = {}
        self.counts = {"done": 0, "failed": 0, "reused": 0}
        self.first_failure = ""
        self.record: dict[str, Any] = {}

    def execute(self) -> Outcome:
        quiet_libraries()
        self.context.work_dir.mkdir(parents=True, exist_ok=True)
        reproducible.prepare(self.plan.config.reproducibility)
        self._begin()
        try:
            with _terminate_as_interrupt():
                outcome = self._train() if self.plan.trainer else self._evaluate()
        except KeyboardInterrupt:
            outcome = self._outcome("interrupted", EXIT_INTERRUPTED, "interrupted; state saved")
        except TenfoldError as error:
            self._log_traceback()
            self._end("failed", str(error), error.exit_code)
            raise
        except Exception as error:
            self._log_traceback()
            message = f"{type(error).__name__}: {error}"
            self._end("failed", message, RunFailed.exit_code)
            raise RunFailed(
                f"the run failed: {message}",
                hint=f"the full traceback is in {self.store.path / 'log.txt'}",
            ) from error
        self._end(outcome.status, outcome.message, outcome.exit_code)
        return outcome

    # --- phases ---

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.phases[name] = round(self.phases.get(name, 0.0) + spent, 4)

    def _evaluate(self) -> Outcome:
        assert self.plan.evaluator is not None
        with self._phase("build"):
            evaluator = self.builder.build(self.plan.evaluator)
            models, data = self._build_roles()
        prints = self._fingerprints(data, models)
        with self._phase("plan"):
            items = evaluator.plan(self.context, data)
            total = items.total
        with self._phase("run"):
            self._run_items(evaluator, models, items, total, content_hash(prints))
        if not self._join():
            return self._outcome("ok", EXIT_OK)
        return self._finish(evaluator)

    def _build_roles(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Models and datasets by role.

        Plain datasets come first: a missing file should be told before a model is trained.
        """
        plan, build = self.plan, self.builder.build
        plain = {r: n for r, n in plan.datasets.items() if not _has_model(n)}
        built = {role: build(node) for role, node in plain.items()}
        models = {role: build(node) for role, node in plan.models.items()}
        data = {r: built[r] if r in built else build(n) for r, n in plan.datasets.items()}
        return models, data

    def _train(self) -> Outcome:
        assert self.plan.trainer is not None
        with self._phase("build"):
            trainer = self.builder.build(self.plan.trainer)
            models, data = self._build_roles()
        self._fingerprints(data, models)
        with self._phase("train"):
            checkpoint = trainer.fit(self.context, models.get("model"), data)
        if self.process.rank != 0:
            return self._outcome("ok", EXIT_OK)
        target = self.context.artifacts / "checkpoint"
        if checkpoint.path != target and checkpoint.path.exists():
            checkpoint.path.rename(target)
        self.store.write_json("metrics.json", [asdict(m) for m in checkpoint.metrics])
        return self._outcome("ok", EXIT_OK, metrics=checkpoint.metrics, checkpoint=target)

    def _finish(self, evaluator: Any) -> Outcome:
        """Aggregates what all processes recorded, writes metrics and reports."""
        with self._phase("aggregate"):
            from tenfold.run_report import write_metrics, write_report

            metrics = write_metrics(evaluator, self.context, self.store)
        with self._phase("report"):
            write_report(evaluator, self.context, self.store, self.record, metrics)
        allowed = self.plan.config.limits["max_failures"]
        done = self.store.done_keys()
        failed = len(self.store.failed_keys() - done)
        self.counts.update(failed=failed, done=len(done) - self.counts["reused"])
        if failed > allowed:
            message = (
                f"{failed} items failed (limits.max_failures = {allowed}); first: "
                f"{self.first_failure or 'see failures.jsonl'}"
            )
            return self._outcome("failed", TooManyFailures.exit_code, message, metrics)
        return self._outcome("ok", EXIT_OK, metrics=metrics)

    # --- items ---

    def _run_items(
        self, evaluator: Any, models: Mapping[str, Any], items: Any, total: int | None, base: str
    ) -> None:
        done = self.store.done_keys()
        writer = ItemWriter(self.store, self.process.rank)
        feed = _Feed(items, base, done, self.options)
        label = self.plan.task.component.id
        if total is not None:
            share = self.process.world_size * self.options.shard[1]
            total = -(-min(total, self.options.limit or total) // share)
        try:
            with self.context.progress(label, total, "items") as bar:
                while self._run_until_error(evaluator, models, feed, writer, bar):
                    pass
        finally:
            alone = self.process.world_size == 1
            self.counts["reused"] = feed.reused if alone else self.process.recorded
            writer.close()

    def _run_until_error(
        self, evaluator: Any, models: Mapping[str, Any], feed: _Feed, writer: ItemWriter, bar: Any
    ) -> bool:
        """Runs items until the feed is empty (False) or an item broke the evaluator (True).

        An evaluator may hold several items in a batch when it fails. Those are run again one
        by one, so that only the guilty item is recorded as failed.
        """
        queue = feed.take_suspects()
        alone = queue is not None
        source = iter([queue]) if queue is not None else iter(feed)
        reused = feed.reused
        started = time.perf_counter()
        try:
            with _Deadline(self.plan.config.limits["item_timeout_s"]) as deadline:
                given = _each(source, deadline.watch)
                for result in evaluator.run(self.context, models, given):
                    now = time.perf_counter()
                    self._record(result, feed, writer, now - started)
                    deadline.watch(bool(feed.outstanding))
                    started = now
                    bar.advance(1 + feed.reused - reused)
                    reused = feed.reused
        except (KeyboardInterrupt, TenfoldError) as error:
            if not _is_item_error(error, feed):
                raise
            self._blame(feed, writer, error, alone)
            return True
        except Exception as error:
            if not feed.outstanding:
                raise
            self._blame(feed, writer, error, alone)
            return True
        if feed.outstanding:
            lost = next(iter(feed.outstanding))
            message = f"the evaluator gave no result for item {lost!r}"
            self._blame(feed, writer, RunFailed(message), alone)
            return True
        bar.advance(feed.reused - reused)
        return feed.has_suspects or alone

    def _record(self, result: ItemResult, feed: _Feed, writer: ItemWriter, seconds: float) -> None:
        place = feed.outstanding.pop(result.id, None)
        if place is None:
            raise RunFailed(
                f"the evaluator gave a result for {result.id!r}, which it was not given"
            )
        index, key, _ = place
        if result.error is not None:
            self._fail(writer, index, result.id, key, result.error)
            return
        row = writer.item(ItemLine(index, result.id, key, result.values, seconds))
        self.counts["done"] += 1
        if self.observers is not None:
            self.observers.item_end(self.record, row)

    def _blame(self, feed: _Feed, writer: ItemWriter, error: BaseException, alone: bool) -> None:
        """Records the guilty item, or queues a failed batch for one-by-one runs."""
        if alone or len(feed.outstanding) == 1:
            item_id, (index, key, _) = feed.outstanding.popitem()
            self._log_traceback()
            self._fail(writer, index, item_id, key, f"{type(error).__name__}: {error}")
        else:
            feed.suspect_all()

    def _fail(self, writer: ItemWriter, index: int, item_id: str, key: str, error: str) -> None:
        self.counts["failed"] += 1
        self.first_failure = self.first_failure or f"{item_id}: {error}"
        writer.failure({"index": index, "id": item_id, "key": key, "error": error})

    # --- record ---

    def _fingerprints(self, data: Mapping[str, Any], models: Mapping[str, Any]) -> dict[str, Any]:
        """What results depend on; compared with the record when a run is resumed.

        Raises:
            ConfigError: a dataset or model changed since the run began.
        """
        prints: dict[str, Any] = {
            "tree": self.plan.tree(identity=True),
            "seed": self.plan.config.seed,
            "datasets": {role: _fingerprint(d, "") for role, d in data.items()},
            "models": {role: _fingerprint(m) for role, m in models.items()},
        }
        if self.process.rank == 0:
            before = self.record.get("fingerprints")
            if self.options.resume and before:
                _check_unchanged(before, prints, self.store.path)
            trained = {w: asdict(t) for w, t in self.builder.trained.items()}
            self.record["fingerprints"] = prints
            self.record["trained"] = trained
            self.store.write_json("run.json", self.record)
        return prints

    def _begin(self) -> None:
        plan = self.plan
        if self.options.resume:
            self.record = self.store.read_json("run.json")
            self.record["resumed"] = [*self.record.get("resumed", []), _now()]
        else:
            distributions = {n.component.distribution for n in plan.nodes()}
            self.record = {
                "schema": "tenfold-record/1",
                "name": plan.config.name,
                "id": self.store.id,
                "summary": plan.config.summary,
                "started": _now(),
                "argv": list(self.options.argv),
                "config_digest": plan.config.digest(),
                "seed": plan.config.seed,
                "limit": self.options.limit,
                "shard": list(self.options.shard),
                "host": facts.host_facts(),
                "versions": facts.versions(sorted(d for d in distributions if d)),
                "git": facts.git_state(Path.cwd()),
                "components": plan.tree(),
                "adapters": dict(plan.adapters),
                "parents": list(self.options.parents),
            }
        scale = {"asked": dict(plan.config.scale)}
        scale["obtained"] = {
            "processes": self.process.world_size,
            "device": self.context.device,
        }
        self.record["scale"] = scale
        if self.process.rank == 0:
            self.record["status"] = "running"
            self.store.write_json("run.json", self.record)
            self.store.set_status("running")
        self.context.log("start", resumed=self.options.resume)
        if self.observers is not None:
            self.observers.run_start(self.record)

    def _end(self, status: str, message: str, exit_code: int) -> None:
        self.context.log("end", status=status, message=message)
        if self.process.rank == 0:
            self.record.update(
                status=status,
                message=message,
                exit_code=exit_code,
                ended=_now(),
                counts=dict(self.counts),
                seconds=self.phases,
                peak_memory=facts.peak_memory(),
            )
            self.store.write_json("run.json", self.record)
            self.store.set_status(status)
        if self.observers is not None:
            self.observers.run_end(self.record, status)

    def _outcome(
        self,
        status: str,
        exit_code: int,
        message: str = "",
        metrics: Sequence[Metric] = (),
        checkpoint: Path | None = None,
    ) -> Outcome:
        return Outcome(
            self.store.path,
            status,
            exit_code,
            metrics,
            message=message,
            checkpoint=checkpoint,
            **self.counts,
        )

    def _log_traceback(self) -> None:
        with (self.store.path / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"--- {_now()} rank {self.process.rank}\n{traceback.format_exc()}\n")

    def _join(self) -> bool:
        """Waits until every process is done; True on the one that finishes the run."""
        if self.process.world_size == 1:
            return True
        folder = self.store.path / f".done-{self.process.launch_id}"
        folder.mkdir(exist_ok=True)
        (folder / str(self.process.rank)).touch()
        if self.process.rank != 0:
            return False
        while len(list(folder.iterdir())) < self.process.world_size:
            time.sleep(0.02)
        return True


class _Feed:
    """This process's items: sharded, without those already recorded.

    `outstanding` maps the ids of items handed out and not yet answered to (index, key, item).
    """

    def __init__(
        self, items: Iterable[WorkItem], base: str, done: set[int], options: Options
    ) -> None:
        self._items = iter(items)
        self._base = base
        self._done = done
        self._limit = options.limit
        shard, shards = options.shard
        # Processes of one launch split their shard further.
        self._stride = shards * options.process.world_size
        self._offset = shard + shards * options.process.rank
        self._index = -1
        self._suspects: list[WorkItem] = []
        self._places: dict[str, tuple[int, str]] = {}
        self.outstanding: dict[str, tuple[int, str, WorkItem]] = {}
        self.reused = 0

    def __iter__(self) -> Iterator[WorkItem]:
        for item in self._items:
            self._index += 1
            if self._limit is not None and self._index >= self._limit:
                return
            if self._index % self._stride != self._offset:
                continue
            key = content_hash([self._base, item.id])
            number = key_number(key)
            if number in self._done:
                self.reused += 1
                continue
            self._done.add(number)  # a second item with the same id must not be recorded twice
            self.outstanding[item.id] = (self._index, key, item)
            yield item

    @property
    def has_suspects(self) -> bool:
        """Whether items of a failed batch wait to be run alone."""
        return bool(self._suspects)

    def suspect_all(self) -> None:
        """Queues every outstanding item to be run alone."""
        for item_id, (index, key, item) in self.outstanding.items():
            self._places[item_id] = (index, key)
            self._suspects.append(item)
        self.outstanding.clear()

    def take_suspects(self) -> WorkItem | None:
        """The next item to run alone, handed out, or None."""
        if not self._suspects:
            return None
        item = self._suspects.pop(0)
        index, key = self._places.pop(item.id)
        self.outstanding[item.id] = (index, key, item)
        return item


def _has_model(node: Node) -> bool:
    return any(child.component.kind == "model" for child in node.walk())


def _each(items: Iterable[WorkItem], before: Callable[[], None]) -> Iterator[WorkItem]:
    """The items, with a call before each is handed out."""
    for item in items:
        before()
        yield item


def _is_item_error(error: BaseException, feed: _Feed) -> bool:
    """Whether an error belongs to the items in hand.

    User errors do. Interruption does not, nor does a component that cannot work at all (an
    endpoint that is down): trying every other item would only repeat it.
    """
    about_items = isinstance(error, TenfoldError) and not isinstance(error, ComponentError)
    return about_items and bool(feed.outstanding)


def _check_unchanged(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    for kind in ("datasets", "models"):
        for role, value in now[kind].items():
            if before[kind].get(role) != value:
                raise ConfigError(
                    f"cannot resume {path}: the {kind[:-1]} {role!r} changed since the run began",
                    hint="start a new run, or restore the old content",
                )
    if before["tree"] != now["tree"] or before["seed"] != now["seed"]:
        raise ConfigError(
            f"cannot resume {path}: the configuration changed since the run began",
            hint="start a new run, or use the recorded config.toml",
        )


def _fingerprint(component: Any, *arguments: Any) -> str | None:
    method = getattr(component, "fingerprint", None)
    return method(*arguments) if callable(method) else None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: state saved, exit 130."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class _Deadline:
    """Raises ItemTimeoutError when items are in hand and no result comes for `seconds`.

    0 seconds never do. It uses the interval timer, so it works only in the main thread of a
    POSIX process. Set-up work before the first item is taken does not count.
    """

    def __init__(self, seconds: float) -> None:
        main = threading.current_thread() is threading.main_thread()
        self._seconds = seconds if main else 0.0

    def __enter__(self) -> _Deadline:
        if self._seconds > 0:
            self._previous = signal.signal(signal.SIGALRM, self._expire)
        return self

    def __exit__(self, *_: object) -> None:
        if self._seconds > 0:
            self.watch(False)
            signal.signal(signal.SIGALRM, self._previous)

    def watch(self, waiting: bool = True) -> None:
        """Starts the time again, or stops it when nothing is awaited."""
        if self._seconds > 0:
            signal.setitimer(signal.ITIMER_REAL, self._seconds if waiting else 0)

    def _expire(self, *_: object) -> None:
        raise ItemTimeoutError(f"no result within limits.item_timeout_s = {self._seconds:g} s")
