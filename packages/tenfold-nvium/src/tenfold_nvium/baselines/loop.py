"""What the baselines' decoders share: checked limits, rows that end, the trace, the result.

The interface is `PiggybackDecoder`'s, so that evaluators and benchmarks call dense models,
N-viums, CALM and LayerSkip alike (`tenfold_nvium.decode.Decodes`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold_nvium.decode import DecodedRow, Stop
from tenfold_nvium.mixture import in_full_precision
from tenfold_nvium.trace import DecodeTrace, TokenTrace


@dataclass(slots=True)
class ExitDecoded:
    """Result of a baseline's decoder; `rows` and `trace` as in `Decoded`."""

    rows: list[DecodedRow]
    trace: DecodeTrace


def own_log_probs(scores: Tensor, tokens: Tensor) -> list[Any]:
    """Log-probabilities of `tokens [n]` under the unwarped distributions `scores [n, V]`."""
    log_probs = in_full_precision(scores).log_softmax(-1)
    return log_probs.gather(-1, tokens[:, None])[:, 0].tolist()


class Writer:
    """Rows as they are written, and the trace.

    Args:
        limits: most new tokens per row.
        eos_ids: ids that end a row.
        stop: see `tenfold_nvium.decode.Stop`.
        trace: filled with one entry per token.
    """

    def __init__(
        self,
        limits: Sequence[int],
        eos_ids: Sequence[int],
        stop: Stop | None,
        trace: DecodeTrace,
    ) -> None:
        self.rows = [DecodedRow() for _ in limits]
        self.trace = trace
        self._limits, self._eos, self._stop = list(limits), set(eos_ids), stop
        self._began = time.perf_counter()

    def left(self, row: int) -> int:
        """How many tokens a row may still get."""
        return self._limits[row] - len(self.rows[row].tokens)

    def write(
        self,
        row: int,
        token: int,
        score: float,
        exit_index: int,
        position: int,
        widths: Sequence[int],
        start: float,
        log_prob: float | None = None,
    ) -> bool:
        """Adds a token, drawn from the prediction of `position` at an exit (0-based); whether
        the row goes on after it."""
        written = self.rows[row]
        written.tokens.append(token)
        written.exits.append(exit_index)
        written.scores.append(score)
        if log_prob is not None:
            written.log_probs = [*(written.log_probs or ()), log_prob]
        self.trace.tokens.append(
            TokenTrace(
                row, position, token, exit_index + 1, (), tuple(widths), False,
                start - self._began, time.perf_counter() - self._began,
            )
        )  # fmt: skip
        reason = "eos" if token in self._eos else ""
        if not reason and self._stop is not None:
            reason = self._stop(row, written.tokens)
        written.finish_reason = reason or written.finish_reason
        return not reason and self.left(row) > 0


def synchronized(device: torch.device) -> float:
    """The time when all work queued on a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
