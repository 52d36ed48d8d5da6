"""A context for tests of evaluators and trainers, without a host or a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenfold.capabilities import ProgressBar
from tenfold.seeds import derive


class RecordedBar:
    """A progress bar that remembers what it was told.

    `on_advance` is called with the number of units done so far; tests raise from it to
    interrupt work at a chosen moment.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str,
        on_advance: Callable[[int], None] | None = None,
    ) -> None:
        self.label = label
        self.total = total
        self.unit = unit
        self.done = 0
        self.fields: list[dict[str, object]] = []
        self._on_advance = on_advance

    def advance(self, n: int = 1, **fields: object) -> None:
        """`n` more units are done."""
        self.done += n
        self.fields.append(fields)
        if self._on_advance is not None:
            self._on_advance(self.done)


@dataclass
class FakeContext:
    """`tenfold.capabilities.Context` over one folder; keeps bars and logged events in lists.

    A second context over the same folder sees the same `work_dir`, as a resumed run does.
    """

    root: Path
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    rank: int = 0
    world_size: int = 1
    on_advance: Callable[[int], None] | None = None
    bars: list[RecordedBar] = field(default_factory=list)
    events: list[tuple[str, dict[str, object]]] = field(default_factory=list)
    run_dir: Path = field(init=False)
    artifacts: Path = field(init=False)
    work_dir: Path = field(init=False)
    cache_dir: Path = field(init=False)

    def __post_init__(self) -> None:
        self.run_dir = self._folder("run")
        self.artifacts = self._folder("run/artifacts")
        self.work_dir = self._folder("run/work")
        self.cache_dir = self._folder("cache")

    def _folder(self, name: str) -> Path:
        path = Path(self.root) / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def derive(self, *labels: object) -> int:
        """A seed derived from the context's seed and labels."""
        return derive(self.seed, *labels)

    @contextmanager
    def progress(
        self, label: str, total: int | None = None, unit: str = ""
    ) -> Iterator[ProgressBar]:
        """A bar that is kept in `bars`."""
        bar = RecordedBar(label, total, unit, self.on_advance)
        self.bars.append(bar)
        yield bar

    def log(self, event: str, **fields: Any) -> None:
        """Keeps the event in `events`."""
        self.events.append((event, fields))
