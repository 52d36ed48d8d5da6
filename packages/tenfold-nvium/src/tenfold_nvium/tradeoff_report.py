"""Blocks of `nvium:tradeoff`'s report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tenfold.capabilities import Context
from tenfold.files import write_text
from tenfold.report import Block, Heading, Lines, Paragraph, Scatter, Table, table_csv
from tenfold.stats import median

from tenfold_nvium.tradeoff import DENSE, ORACLE, TRAINED
from tenfold_nvium.tradeoff_curve import Curve, CurvePoint

CSV = "tradeoff.csv"

EXPLANATION = (
    "One checkpoint, many models: a number is added to the log-odds of all its routers, so that "
    "tokens leave earlier (positive) or later (negative). Losses and expected depths are exact "
    "on the given texts; offset 0 is the model as it was trained. A fixed exit is one head "
    "alone. The oracle looks at the next token and takes the head that likes it best: no way of "
    "choosing exits can do better, and no model can do this."
)
SPEED = (
    "Every point continued the same prompts by equally many tokens, taking turns, with the same "
    "decoder; only tokens after the first count, so reading the prompt does not. The bound "
    "1 / depth is what the same layers would give if time were nothing but layers run one after "
    "the other; routers, heads and per-token overhead keep the measured speed below it."
)


def tradeoff_blocks(ctx: Context, curve: Curve) -> Iterator[Block]:
    """The curve, everything else around it, speed where it was measured, and the table."""
    yield Paragraph(EXPLANATION)
    if not curve.points:
        yield Paragraph("No text had a token to score.")
        return
    yield Paragraph(_summary(curve))
    yield Heading("Loss against depth")
    yield _lines(curve, everything=False)
    yield Heading("With fixed exits and the oracle")
    yield _lines(curve, everything=True)
    timed = [p for p in curve.points if p.speed is not None]
    if timed:
        yield Heading("Speed")
        yield Paragraph(SPEED)
        yield _speed_chart(curve, timed)
    table = point_table(curve)
    yield Heading("Every point")
    yield from _narrow_tables(table)
    write_text(Path(ctx.artifacts) / CSV, table_csv(table))
    yield Paragraph(f"The same numbers in full precision: artifacts/{CSV}")


def _summary(curve: Curve) -> str:
    """What a reader wants to know first, in words."""
    parts = [f"{curve.tokens} tokens of {curve.texts} texts"]
    if curve.cut:
        parts[0] += f" ({curve.cut} were longer and cut)"
    trained, dense = curve.point(TRAINED), curve.point(DENSE)
    if trained is not None:
        parts.append(
            f"as trained, perplexity {trained.perplexity:.4g} at expected depth "
            f"{trained.depth:.3f}, so at most {1 / trained.depth:.2f} times as fast"
        )
    if dense is not None:
        parts.append(f"the dense twin's perplexity is {dense.perplexity:.4g}")
        depth = curve.depth_at(dense.loss)
        parts.append(
            "no offset reaches it"
            if depth is None
            else f"the curve reaches it at depth {depth:.3f} (bound {1 / depth:.2f})"
        )
    return "; ".join(parts) + "."


def _lines(curve: Curve, *, everything: bool) -> Lines:
    """Nats per token by depth; the first chart leaves out what would flatten the curve."""
    series = {"shifted routers": [_place(p) for p in curve.shifted()]}
    for title, names in (("as trained", (TRAINED,)), ("dense twin", (DENSE,))):
        chosen = [_place(p) for p in curve.points if p.name in names]
        if chosen:
            series[title] = chosen
    if everything:
        series["fixed exits"] = [_place(p) for p in curve.points if p.name.startswith("exit=")]
        series["oracle"] = [_place(p) for p in curve.points if p.name == ORACLE]
    caption = "Lower and further left is better." if not everything else "The same, from afar."
    return Lines(series, "expected depth (share of the layers)", "nats per token", caption)


def _place(point: CurvePoint) -> tuple[float, float]:
    return point.depth, point.loss


def _speed_chart(curve: Curve, timed: list[CurvePoint]) -> Scatter:
    """Measured speed-up against the bound of the layers that really ran."""
    points = [
        (1 / max(median(p.speed.depths), 1e-9), median(p.speed.ratios), p.name)
        for p in timed
        if p.speed is not None
    ]
    base = "the dense twin" if curve.reference == DENSE else "the last exit alone"
    return Scatter(
        points, "bound: 1 / depth of the decoded tokens", f"speed relative to {base}",
        "Medians over the passes; the diagonal is the bound.", diagonal=True,
    )  # fmt: skip


def point_table(curve: Curve) -> Table:
    """One row per point."""
    exits = max(len(p.shares) for p in curve.points)
    columns = ["point", "perplexity", "low", "high", "nats per token", "depth", "bound"]
    columns += [f"exit {k + 1}" for k in range(exits)]
    columns += ["gap to dense", "tokens/s", "speed-up", "decoded depth", "Pareto"]
    metrics: dict[tuple[str, str], float] = {}
    for metric in curve.metrics():
        metrics[metric.group, metric.name] = metric.value
    intervals = {m.group: m.interval for m in curve.metrics() if m.name == "perplexity"}
    rows = []
    for point in curve.points:
        found = {name: value for (group, name), value in metrics.items() if group == point.name}
        low, high = intervals[point.name] or (None, None)
        rows.append(
            [
                point.name, point.perplexity, low, high, point.loss, point.depth, 1 / point.depth,
                *(point.shares + [None] * (exits - len(point.shares))),
                *map(found.get, ("gap_to_dense", "tokens_per_second", "speedup", "decoded_depth")),
                "" if point.name == ORACLE else point.pareto,
            ]
        )  # fmt: skip
    return Table(columns, rows)


def _narrow_tables(table: Table) -> Iterator[Table]:
    """The wide table in parts that fit on a page; a part without any number is left out."""
    shares = [name for name in table.columns if name.startswith("exit ")]
    parts = [
        (["perplexity", "low", "high", "depth", "bound", "gap to dense", "Pareto"],
         "Low and high: 95 %, resampling texts. Gap: nats per token over the dense twin's."),
        (["tokens/s", "speed-up", "decoded depth"], "Medians over the passes."),
        (shares, "Share of each exit: its mean mixture weight."),
    ]  # fmt: skip
    for names, caption in parts:
        places = [table.columns.index(name) for name in names]
        filled = [i for i in places if any(row[i] is not None for row in table.rows)]
        rows = [
            [row[0], *(row[i] for i in filled)]
            for row in table.rows
            if any(row[i] is not None for i in filled)
        ]
        if filled:
            yield Table([table.columns[0], *(table.columns[i] for i in filled)], rows, caption)
