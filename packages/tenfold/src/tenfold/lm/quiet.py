"""Keeping transformers' own progress bars off the user's terminal; the host shows progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import transformers.utils.logging as engine_logging


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers while the block runs."""
    shown = engine_logging.is_progress_bar_enabled()
    engine_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            engine_logging.enable_progress_bar()
