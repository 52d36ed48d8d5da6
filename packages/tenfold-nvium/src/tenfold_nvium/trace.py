"""What a decoder did, token by token and in total.

Per token: row, position, token, exit, gates, widths of the segment blocks it rode in, whether a
flush followed, start and end time. Exits are 1-based here, as in reports.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tenfold.files import write_json

FORMAT = "nvium-trace/1"


def _sigmoid(log_odds: float) -> float:
    """Probability of log-odds, without overflow."""
    if log_odds >= 0:
        return 1 / (1 + math.exp(-log_odds))
    return math.exp(log_odds) / (1 + math.exp(log_odds))


@dataclass(frozen=True, slots=True)
class TokenTrace:
    """One generated token. `position` is that of the token it was predicted *from*; `log_odds`
    holds one number per visited router, `widths` one per visited segment."""

    row: int
    position: int
    token: int
    exit: int
    log_odds: tuple[float, ...]
    widths: tuple[int, ...]
    flushed: bool
    start: float
    end: float


@dataclass(slots=True)
class DecodeTrace:
    """A run's tokens, with the totals that reports need.

    Attributes:
        depths: depth of each exit in layers, the last one included.
        launches: how often each segment ran while decoding (prompts and flushes not counted).
        blocks: per segment, how often it ran on a block of each width (tokens of all rows),
            prompts and flushes not counted.
        flushes: how often deferred work was completed because of `max_deferred`.
        prefill_s, decode_s: wall-clock seconds.
    """

    depths: Sequence[int]
    tokens: list[TokenTrace] = field(default_factory=list)
    launches: list[int] = field(default_factory=list)
    blocks: list[Counter[int]] = field(default_factory=list)
    flushes: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    def __post_init__(self) -> None:
        self.launches = self.launches or [0] * len(self.depths)
        self.blocks = self.blocks or [Counter() for _ in self.depths]

    def ran(self, widths: Sequence[int]) -> None:
        """Takes note of one step: each segment's block width, 0 where it did not run."""
        for segment, width in enumerate(widths):
            if width:
                self.launches[segment] += 1
                self.blocks[segment][width] += 1

    @property
    def exit_histogram(self) -> dict[str, int]:
        """Tokens per exit, `{"1": n, ...}`, every exit listed."""
        counts = {str(k + 1): 0 for k in range(len(self.depths))}
        for token in self.tokens:
            counts[str(token.exit)] += 1
        return counts

    @property
    def mean_depth(self) -> float:
        """Mean normalised depth at which tokens left (1 = all layers)."""
        if not self.tokens:
            return 1.0
        depths = [self.depths[token.exit - 1] for token in self.tokens]
        return sum(depths) / len(depths) / self.depths[-1]

    @property
    def mean_width(self) -> float:
        """Mean width of segment blocks after the first segment: how much rides along."""
        widths = [w for token in self.tokens for w in token.widths[1:]]
        return sum(widths) / len(widths) if widths else 1.0

    def summary(self) -> dict[str, Any]:
        """Totals as JSON values."""
        return {
            "tokens": len(self.tokens),
            "exit_histogram": self.exit_histogram,
            "mean_depth": self.mean_depth,
            "mean_width": self.mean_width,
            "launches": list(self.launches),
            "flushes": self.flushes,
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
        }

    @property
    def exit_shares(self) -> list[float]:
        """Share of the tokens that left at each exit, in order."""
        counts = list(self.exit_histogram.values())
        return [count / max(1, len(self.tokens)) for count in counts]

    def append(self, later: DecodeTrace) -> None:
        """Adds the trace of a call that continued this one; its clock goes on from here."""
        offset = self.prefill_s + self.decode_s
        self.tokens += [
            replace(t, start=t.start + offset, end=t.end + offset) for t in later.tokens
        ]
        self.launches = [a + b for a, b in zip(self.launches, later.launches, strict=True)]
        self.blocks = [a + b for a, b in zip(self.blocks, later.blocks, strict=True)]
        self.flushes += later.flushes
        if self.tokens and offset:
            self.decode_s += later.prefill_s + later.decode_s
        else:
            self.prefill_s, self.decode_s = later.prefill_s, later.decode_s

    def document(self, **facts: Any) -> dict[str, Any]:
        """The trace as a JSON document, `nvium-trace/1`.

        `facts` describe the run (policy, model, dtype, device, seed). Gates are the exit
        probabilities of the visited routers; `syncs` counts what was read back from the device,
        each visited router's answer and each token.
        """
        rows = [
            {
                "row": t.row, "position": t.position, "token": t.token, "exit": t.exit,
                "gates": [_sigmoid(s) for s in t.log_odds], "segment_widths": list(t.widths),
                "flushed": t.flushed, "t_start": t.start, "t_end": t.end,
            }
            for t in self.tokens
        ]  # fmt: skip
        totals = {
            "tokens": len(rows),
            "launches": list(self.launches),
            "mean_width": self.mean_width,
            "exit_shares": self.exit_shares,
            "mean_depth": self.mean_depth,
            "flushes": self.flushes,
            "syncs": sum(len(t.log_odds) + 1 for t in self.tokens),
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
        }
        return {"format": FORMAT, **facts, "depths": list(self.depths), "totals": totals,
                "tokens": rows}  # fmt: skip

    def save(self, path: Path, **facts: Any) -> None:
        """Writes `document` as a JSON file, atomically."""
        write_json(path, self.document(**facts))
