"""Keeping libraries off the user's terminal: the host shows progress, and owns stdout."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import transformers.utils.logging as engine_logging


def _news(record: logging.LogRecord) -> bool:
    """Whether a record says more than that there is no GPU."""
    return not record.getMessage().startswith("Setting accelerator to CPU")


# Accelerate imports DeepSpeed wherever it is installed, and that logs to stdout.
logging.getLogger("DeepSpeed").addFilter(_news)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers, and what is printed goes to stderr, in the block.

    DeepSpeed, for one, prints when it has built an operator, and stdout is for results alone.
    """
    shown = engine_logging.is_progress_bar_enabled()
    engine_logging.disable_progress_bar()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if shown:
            engine_logging.enable_progress_bar()
