"""Report of `nvium:speed`: rates, speed-ups, and measured against possible speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tenfold.records import ItemResult, Metric, Metrics

from tenfold_nvium.speed import limit_of, times_of

if TYPE_CHECKING:
    from tenfold.report import Block


def blocks(results: Sequence[ItemResult], metrics: Metrics, baseline: str) -> Iterator[Block]:
    """All blocks of the page."""
    from tenfold.report import Bars, Heading, Paragraph

    yield Heading("Speed")
    yield Paragraph(
        "Models took turns on every prompt. Decoding is the time after the first token, one text "
        "at a time; the first token's time is the prompt's. Texts differ between models, so rates "
        "are per token."
    )
    yield from _bars(metrics, "decode_tokens_per_second", "Decoding, tokens per second")
    rows = [m for m in metrics if m.name == "speedup"]
    if rows:
        yield Bars(
            [m.group for m in rows], [m.value for m in rows], [m.interval for m in rows], "x",
            f"Speed-up over {baseline}, with bootstrap intervals over prompts.",
        )  # fmt: skip
    yield from _inside(results, metrics)


def _bars(metrics: Sequence[Metric], name: str, caption: str) -> Iterator[Block]:
    from tenfold.report import Bars

    chosen = [m for m in metrics if m.name == name]
    if chosen:
        yield Bars(
            [m.group for m in chosen], [m.value for m in chosen], [m.interval for m in chosen],
            chosen[0].unit, caption,
        )  # fmt: skip


def _inside(results: Sequence[ItemResult], metrics: Metrics) -> Iterator[Block]:
    """What the time model says about the N-viums among the models."""
    from tenfold.report import Heading, Histogram, Scatter, Table

    roles = [m.group for m in metrics if m.name == "mean_depth"]
    if not roles:
        return
    yield Heading("Against the limit")
    named = {(m.name, m.group): m.value for m in metrics}
    columns = ("model", "mean depth", "bound 1/d", "reached of the limit")
    names = ("mean_depth", "depth_bound", "speed_of_limit")
    yield Table(columns, [(r, *(round(named[n, r], 3) for n in names)) for r in roles])
    for role in roles:
        points = []
        for result in results:
            values = result.values["roles"][role]
            times = times_of(values)
            if times.tokens:
                measured = 1000 * times.decoding / times.tokens
                points.append((1000 * limit_of(values), measured, result.id))
        yield Scatter(
            points, "possible ms per token", "measured ms per token",
            f"{role}, one point per prompt. Possible: segments timed alone on blocks of the widths "
            "that really occurred, plus one head per token; routers and bookkeeping are not in it.",
            diagonal=True,
        )  # fmt: skip
        widths: Counter[int] = Counter()
        for result in results:
            for by_width in result.values["roles"][role]["blocks"]:
                widths.update({int(w): n for w, n in by_width.items()})
        yield Histogram(
            {str(w): float(n) for w, n in sorted(widths.items())},
            f"{role}: tokens per block that a segment ran on.",
        )
