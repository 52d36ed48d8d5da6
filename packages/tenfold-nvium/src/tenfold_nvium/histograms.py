"""Counts behind the charts of `nvium:profile`: gates, queues, block widths, gain of depth.

Sums per item, so that they add up over any number of items. Shapes: `n` tokens, `K` exits.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tenfold.report import Block, Columns, Heading, Histogram, Lines, Paragraph, Table
from torch import Tensor

from tenfold_nvium.tokens import ordered_classes

GATE_BINS = 10
POSITION_EDGES = (8, 16, 32, 64, 128, 256, 512, 1024)
"""Upper ends of the bins of positions; a last bin takes the rest."""
QUEUE_EDGES = (0, 1, 2, 4, 8, 16, 32)
WIDTH_EDGES = (1, 2, 4, 8, 16, 32)


def gate_counts(gates: Tensor) -> list[list[int]]:
    """How many of `gates [n, K-1]` lie in each tenth of [0, 1], per early exit; a gate of 1
    is in the last."""
    tenths = (gates * GATE_BINS).long().clamp(0, GATE_BINS - 1)
    return [torch.bincount(column, minlength=GATE_BINS).tolist() for column in tenths.T]


def gain_by_position(heads: Tensor, start: int) -> list[list[float]]:
    """Per bin of positions `[tokens, gain of exit 1, ..., gain of exit K-1]`, summed: how many
    nats the last head is better than each early one.

    `heads [n, K]` are log-probabilities of the tokens at positions `start + 1 ...` (1-based).
    """
    sums = [[0.0] * heads.shape[-1] for _ in range(len(POSITION_EDGES) + 1)]
    gains = (heads[:, -1:] - heads[:, :-1]).tolist()
    for i, gain in enumerate(gains):
        line = sums[bisect.bisect_left(POSITION_EDGES, start + i + 1)]
        line[0] += 1
        for k, value in enumerate(gain):
            line[k + 1] += value
    return sums


def queue_lengths(
    exits: Sequence[int],
    num_exits: int,
    max_deferred: int | None = None,
    *,
    deep_start: bool = True,
) -> Iterator[tuple[int, list[int]]]:
    """What decoding with these exits (1-based, one per token) defers: after each token the
    number of positions that have not passed all layers, and the widths of the blocks that it
    rode in, one per segment visited.

    The first token is not counted. With `deep_start` it comes from a prompt of several tokens,
    which runs all layers and leaves nothing behind; a prompt of one token is decoded like any.
    """
    behind = [0] * num_exits
    """Positions that each segment has not processed."""
    for number, leaves in enumerate(exits):
        behind = [n + 1 for n in behind]
        widths = behind[:leaves]
        reached = num_exits if deep_start and number == 0 else leaves
        behind = [0 if m < reached else n for m, n in enumerate(behind)]
        waiting = behind[-1]
        if max_deferred is not None and waiting > max_deferred:
            behind, waiting = [0] * num_exits, 0
        if number:
            yield waiting, widths


def shares_by_class(classes: Sequence[str], weights: Tensor) -> dict[str, list[float]]:
    """Per class of token `[tokens, weight of exit 1, ..., exit K]`, summed; from the tokens'
    classes and mixture weights `[n, K]`."""
    sums: dict[str, list[float]] = {}
    for name, line in zip(classes, weights.tolist(), strict=True):
        total = sums.setdefault(name, [0.0] * (len(line) + 1))
        for i, value in enumerate((1.0, *line)):
            total[i] += value
    return sums


@dataclass(slots=True)
class Histograms:
    """Running sums over items, and the charts that they become."""

    gates: list[list[int]] = field(default_factory=list)
    gain: list[list[float]] = field(default_factory=list)
    classes: dict[str, list[float]] = field(default_factory=dict)
    queue: list[int] = field(default_factory=lambda: [0] * (len(QUEUE_EDGES) + 1))
    widths: list[int] = field(default_factory=lambda: [0] * (len(WIDTH_EDGES) + 1))

    def add(self, values: Mapping[str, Any]) -> None:
        """One item of `nvium:profile`."""
        generated, scored = values.get("generated"), values.get("scored")
        if generated:
            steps = queue_lengths(
                generated["exits"],
                len(values["depths"]),
                generated["max_deferred"],
                deep_start=generated["prompt_tokens"] > 1,
            )
            for waiting, widths in steps:
                self.queue[bisect.bisect_left(QUEUE_EDGES, waiting)] += 1
                # The first segment reads one token at a time.
                for width in widths[1:]:
                    self.widths[bisect.bisect_left(WIDTH_EDGES, width)] += 1
        if scored:
            self.gates = _sum(self.gates, scored["gates"])
            self.gain = _sum(self.gain, scored["gain"])
            for name, line in scored["class_shares"].items():
                before = self.classes.get(name, [0.0] * len(line))
                self.classes[name] = [a + b for a, b in zip(before, line, strict=True)]

    def blocks(self) -> Iterator[Block]:
        """The charts, as far as there is something to show."""
        if any(self.queue):
            yield Heading("Deferred work while generating")
            yield Columns([
                [Histogram(_named(QUEUE_EDGES, self.queue),
                           caption="Positions that wait after a token.")],
                [Histogram(_named(WIDTH_EDGES, self.widths),
                           caption="Width of the blocks above the first exit: tokens that run "
                                   "together.")],
            ])  # fmt: skip
        if self.gates:
            yield Heading("What the routers answer")
            tenths = [f"{i / 10:.1f}-{(i + 1) / 10:.1f}" for i in range(GATE_BINS)]
            yield Paragraph(
                "Probability of leaving at an exit once it is reached, on the given texts. "
                "Mass at both ends means that the router tells tokens apart."
            )
            yield Columns(
                [
                    [Histogram(dict(zip(tenths, line, strict=True)), caption=f"Exit {k + 1}")]
                    for k, line in enumerate(self.gates)
                ]
            )
        if self.classes:
            exits = len(next(iter(self.classes.values()))) - 1
            yield Heading("Exits by class of token")
            yield Table(
                ["class", "tokens", *(f"exit {k + 1}" for k in range(exits))],
                [
                    [name, int(line[0]), *(share / line[0] for share in line[1:])]
                    for name in ordered_classes(self.classes)
                    for line in [self.classes[name]]
                ],
                "Mean mixture weight of each exit on the given texts.",
            )
        lines = _gain_lines(self.gain)
        if lines:
            yield Heading("What depth gains")
            yield Lines(
                lines, "position in the text", "nats per token",
                "How much worse each early head predicts than the last one, by position.",
                log_x=True,
            )  # fmt: skip


def _sum(total: list[list[Any]], more: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Sums of numbers, line by line."""
    if not total:
        return [list(line) for line in more]
    return [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(total, more, strict=True)]


def _named(edges: Sequence[int], counts: Sequence[int]) -> dict[str, float]:
    """Counts by the name of their bin: `0`, `1`, `3-4`, `33+`."""
    names = [str(edges[0])]
    names += [str(b) if b == a + 1 else f"{a + 1}-{b}" for a, b in itertools.pairwise(edges)]
    names.append(f"{edges[-1] + 1}+")
    return dict(zip(names, map(float, counts), strict=True))


def _gain_lines(gain: Sequence[Sequence[float]]) -> dict[str, list[tuple[float, float]]]:
    """Mean gain by the upper end of each bin of positions, one line per early exit."""
    ends = [*POSITION_EDGES, 2 * POSITION_EDGES[-1]]
    lines: dict[str, list[tuple[float, float]]] = {}
    for end, (tokens, *sums) in zip(ends, gain, strict=False):
        for k, total in enumerate(sums):
            if tokens:
                lines.setdefault(f"head {k + 1}", []).append((float(end), total / tokens))
    return lines
