"""Progress on stderr: bars on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tenfold.capabilities import ProgressBar

if TYPE_CHECKING:
    from rich.progress import Progress

_LINE_INTERVAL_S = 10.0


class Reporter:
    """Hands out progress bars; nested ones share one display. `enabled=False` is silent."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self._display: Progress | None = None
        self._open = 0

    @contextmanager
    def bar(self, label: str, total: int | None = None, unit: str = "") -> Iterator[ProgressBar]:
        """A bar for a part of the work."""
        if not self.enabled:
            yield _Silent()
        elif sys.stderr.isatty():
            yield from self._rich_bar(label, total, unit)
        else:
            bar = _Lines(label, total, unit)
            yield bar
            bar.close()

    def _rich_bar(self, label: str, total: int | None, unit: str) -> Iterator[ProgressBar]:
        display = self._start()
        task = display.add_task(label, total=total, unit=unit, note="")
        try:
            yield _RichBar(display, task)
        finally:
            display.stop_task(task)
            self._open -= 1
            if self._open == 0:
                display.stop()
                self._display = None

    def _start(self) -> Progress:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._open += 1
        if self._display is None:
            self._display = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}", markup=False),
                TimeElapsedColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[note]}", markup=False),
                console=Console(stderr=True),
            )
            self._display.start()
        return self._display


def _note(fields: dict[str, object]) -> str:
    return " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in fields.items()
    )


class _Silent:
    def advance(self, n: int = 1, **fields: object) -> None:
        del n, fields


class _RichBar:
    def __init__(self, display: Progress, task: Any) -> None:
        self._display = display
        self._task = task

    def advance(self, n: int = 1, **fields: object) -> None:
        if fields:
            self._display.update(self._task, advance=n, note=_note(fields))
        else:
            self._display.advance(self._task, n)


class _Lines:
    """Plain lines for logs and pipes, at most one every ten seconds."""

    def __init__(self, label: str, total: int | None, unit: str) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done = 0
        self._fields: dict[str, object] = {}
        self._started = self._last = time.monotonic()
        self._printed = False

    def advance(self, n: int = 1, **fields: object) -> None:
        self._done += n
        self._fields.update(fields)
        now = time.monotonic()
        if now - self._last >= _LINE_INTERVAL_S:
            self._print(now)

    def _print(self, now: float) -> None:
        self._last = now
        self._printed = True
        of = f"/{self._total}" if self._total is not None else ""
        seconds = now - self._started
        rate = f"{self._done / seconds:.3g}/s" if seconds > 0 else ""
        note = _note(self._fields)
        parts = (f"{self._label}: {self._done}{of} {self._unit}".rstrip(), rate, note)
        print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._printed or self._done:
            self._print(time.monotonic())
