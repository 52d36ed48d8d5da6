"""Training that can be interrupted: what is saved, when it counts, and what Ctrl-C does."""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from tenfold.capabilities import Context, ProgressBar
from tenfold.errors import ConfigError, RunFailed
from tenfold.files import write_json
from tenfold.scale import process

_MARKER = "complete.json"
_IDENTITY = "training.json"


def claim_folder(folder: Path, identity: dict[str, Any]) -> None:
    """Makes sure that the states in `folder` belong to this very training.

    Raises:
        ConfigError: they were left by another plan, model, dataset or number of processes.
    """
    path = folder / _IDENTITY
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if known is not None and known != identity:
        changed = sorted(k for k in identity if known.get(k) != identity[k])
        raise ConfigError(
            f"{folder} holds the state of another training: {', '.join(changed)} changed",
            hint="undo the change to resume it, or delete that folder to start again",
        )
    process.barrier()  # every process has read before rank 0 writes
    if known is None and process.rank() == 0:
        write_json(path, identity)


def latest_state(folder: Path) -> Path | None:
    """The newest complete state, the same on every process; unfinished ones are removed."""
    states = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    complete = [p for p in states if (p / _MARKER).is_file()]
    chosen = process.from_rank_zero(str(complete[-1]) if complete else "")
    if process.rank() == 0:
        for path in states:
            if path not in complete:
                shutil.rmtree(path, ignore_errors=True)
    process.barrier()
    return Path(chosen) if chosen else None


class Interruption:
    """Turns the first SIGINT or SIGTERM into a wish to stop after the current step.

    A second SIGINT interrupts at once, except among several processes: there the launcher
    passes the user's signal on once more, and it is the one that loses patience.
    """

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        del frame
        if self.requested and number == signal.SIGINT and process.asked_world_size() == 1:
            raise KeyboardInterrupt
        self.requested = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles both signals while the block runs; does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {n: signal.signal(n, self) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class HostCallback(TrainerCallback):
    """Connects a training to the host: progress, events, complete states, interruption."""

    def __init__(self, ctx: Context, bar: ProgressBar, interruption: Interruption) -> None:
        self._ctx = ctx
        self._bar = bar
        self._interruption = interruption

    def _advance(self, steps: int, **fields: object) -> None:
        """Moves the bar; an interruption that shows itself here waits for the step's end."""
        try:
            self._bar.advance(steps, **fields)
        except KeyboardInterrupt:
            self._interruption.requested = True

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shows the steps that a resumed training has behind it."""
        if state.global_step:
            self._advance(state.global_step)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advances the bar; once interrupted, saves and stops, on all processes alike."""
        self._advance(1)
        if state.global_step == state.max_steps:
            control.should_log = True
        self._interruption.requested = process.any_process(self._interruption.requested)
        if self._interruption.requested and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Shows and records losses.

        Raises:
            RunFailed: the loss is no number any more.
        """
        numbers = {k: v for k, v in (logs or {}).items() if k in _SHOWN or k.startswith("eval_")}
        loss = numbers.get("loss")
        if loss is not None and not math.isfinite(loss):
            raise RunFailed(
                f"the training loss is {loss} at step {state.global_step}",
                hint="lower learning_rate, lengthen warmup_ratio, or turn bf16 off",
            )
        shown = {_SHOWN[k]: v for k, v in numbers.items() if k in _SHOWN}
        if shown:
            self._advance(0, **shown)
        if state.is_world_process_zero:
            self._ctx.log("training", step=state.global_step, **(logs or {}))

    def on_save(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Marks a state as complete once every process has written its part."""
        process.barrier()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / _MARKER, {"step": state.global_step})
        process.barrier()


_SHOWN = {"loss": "loss", "learning_rate": "lr", "eval_loss": "eval_loss"}
