"""What the host hands to evaluators and trainers: `tenfold.capabilities.Context`, for real."""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from tenfold.capabilities import ProgressBar
from tenfold.files import disk_full_is_an_error
from tenfold.progress import Reporter
from tenfold.seeds import derive


@dataclass(slots=True)
class RunContext:
    """Settings, folders and services of one process of one run."""

    seed: int
    device: str
    dtype: str
    run_dir: Path
    cache_dir: Path
    work_dir: Path
    rank: int = 0
    world_size: int = 1
    offline: bool = True
    launch_id: str = ""
    """Common to the processes of one launch, so that files of an earlier one are told apart."""
    reporter: Reporter = field(default_factory=Reporter)

    @property
    def artifacts(self) -> Path:
        """Folder for files of this run."""
        path = self.run_dir / "artifacts"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def derive(self, *labels: object) -> int:
        """A seed derived from the run's seed and labels."""
        return derive(self.seed, *labels)

    def progress(
        self, label: str, total: int | None = None, unit: str = ""
    ) -> AbstractContextManager[ProgressBar]:
        """A progress bar; only rank 0 shows one."""
        return self.reporter.bar(label, total, unit)

    def log(self, event: str, **fields: object) -> None:
        """A line in `events.jsonl`."""
        path = self.run_dir / "events.jsonl"
        row = {"time": round(time.time(), 3), "rank": self.rank, "event": event, **fields}
        line = json.dumps(row, ensure_ascii=False, default=str) + "\n"
        with disk_full_is_an_error(path), path.open("a", encoding="utf-8") as file:
            file.write(line)


def resolve_device(name: str, modules: Collection[str] = ("torch",)) -> str:
    """`auto` as `cuda`, `mps` or `cpu`.

    torch is imported to answer only when it is among `modules`, those that the run imports
    anyway: a run over HTTP should not wait seconds for it.
    """
    if name != "auto":
        return name
    if "torch" not in modules:
        return "cpu"
    try:
        import torch
    except ImportError:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
