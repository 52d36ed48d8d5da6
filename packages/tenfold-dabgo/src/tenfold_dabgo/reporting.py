"""The attribution report: what was written, what it came from, and how sure that is.

Built from items alone, so that `tenfold report` works on any finished or unfinished run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from tenfold.records import ItemResult
from tenfold.report import (
    Badges,
    Bars,
    Block,
    Columns,
    Details,
    Heading,
    Histogram,
    Lines,
    Paragraph,
    Preformatted,
    Scatter,
    Table,
    TokenHeat,
)

SHOWN_OPEN = 3
"""Texts of each kind that are not folded away."""
EXPLANATION = (
    "A training text's score is its loss after the model unlearned the generated text minus "
    "its loss after the model learned it. Positive (proponents): learning the text makes the "
    "training text likelier, so it supports it. Negative (opponents): it makes it less likely. "
    "A token's shade is its own share of that difference."
)
PLAIN = "Scores of method {method}; larger means more influential."


def report_blocks(results: Iterable[ItemResult]) -> Iterator[Block]:
    """Blocks for all queries: an overview table, then one section per query."""
    items = [r for r in results if r.error is None]
    if not items:
        yield Paragraph("No query was attributed.")
        return
    method = items[0].values["method"]
    yield Paragraph(EXPLANATION if method == "dabgo" else PLAIN.format(method=method))
    yield Table(
        ("query", "completion", "most influential", "score", "most opposed", "score"),
        [_overview_row(item.values) for item in items],
        caption="One row per generated text.",
    )
    for item in items:
        yield from query_blocks(item.values)


def _overview_row(values: Mapping[str, Any]) -> tuple[Any, ...]:
    text = " ".join(values["query"]["completion"].split())
    first = [values[d][0] if values[d] else None for d in ("proponents", "opponents")]
    cells: list[Any] = [values["query"]["id"], text[:60] + ("…" if len(text) > 60 else "")]
    for row in first:
        cells += [row["id"], _rounded(row["score"])] if row else [None, None]
    return tuple(cells)


def query_blocks(values: Mapping[str, Any]) -> Iterator[Block]:
    """One query's section."""
    query = values["query"]
    yield Heading(f"Query {query['id']}")
    yield Badges(_facts(values))
    for note in (*query.get("notes", ()), *values["details"].get("warnings", ())):
        yield Paragraph(f"Note: {note}.")
    yield Columns(
        [
            [Heading("Prompt", 3), Preformatted(query["prompt"] or "(none)")],
            [Heading("Generated text", 3), Preformatted(query["completion"])],
        ]
    )
    if exits := list(_exit_blocks(query)):
        yield Heading("Exits of the generation", 3)
        yield Columns([[block] for block in exits]) if len(exits) > 1 else exits[0]
    scale = _common_scale(values)
    for direction, title in (
        ("proponents", "Most influential training texts"),
        ("opponents", "Most opposed training texts"),
    ):
        yield Heading(title, 3)
        yield from _ranking_blocks(values[direction], values["unit"], scale)
    if any(values["rollups"].values()):
        yield Heading("Where the influence comes from", 3)
        yield Columns([[_rollup(c, rows, values)] for c, rows in values["rollups"].items() if rows])
    yield Details("How the scores came about", list(_method_blocks(values)))


def _facts(values: Mapping[str, Any]) -> dict[str, Any]:
    details, summary = values["details"], values["summary"]
    facts: dict[str, Any] = {
        "method": values["method"],
        "view": values["view"],
        "unit": values["unit"],
        "scored texts": int(summary["scored"]),
    }
    for name, label in (
        ("query_loss", "query loss"),
        ("ascent_rise", "ascent"),
        ("descent_fall", "descent"),
    ):
        if summary.get(name) is not None:
            sign = {"ascent_rise": "+", "descent_fall": "−"}.get(name, "")
            facts[label] = f"{sign}{summary[name]:.3g} nats/token"
    if "noise" in details:
        facts["score / noise"] = f"{details['noise']['ratio']:.3g}"
    if recall := details.get("prefilter", {}).get("recall"):
        facts["estimated recall"] = f"{recall:.2f}"
    if stop := details.get("early_stop"):
        facts["stopped early"] = f"{stop['scored']} of {stop['of']} texts"
        facts["top groups right"] = f"{1 - stop['delta']:.3g}"
    return facts


def _exit_blocks(query: Mapping[str, Any]) -> Iterator[Block]:
    """Histogram of the exits used, and the text shaded by exit."""
    if counts := query.get("exit_histogram"):
        ordered = {str(k): float(counts[k]) for k in sorted(counts, key=_as_number)}
        yield Histogram(ordered, caption="Tokens of the generated text by exit (1 is earliest).")
    exits, pieces = query.get("exits"), query["completion_pieces"]
    if exits and len(exits) == len(pieces):
        yield TokenHeat(
            pieces,
            [float(e) for e in exits],
            caption="The generated text, shaded by the exit of each token.",
            positive="late exit",
            negative="",
        )


def _as_number(name: Any) -> tuple[int, str]:
    text = str(name)
    return (int(text), text) if text.lstrip("-").isdigit() else (10**9, text)


def _common_scale(values: Mapping[str, Any]) -> float | None:
    """One color scale for all heat maps of a query, so that they can be compared."""
    sizes = [
        abs(score)
        for direction in ("proponents", "opponents")
        for row in values[direction]
        for score in row.get("token_scores", ())
        if score is not None
    ]
    sizes.sort()
    # A single extreme token would turn all others white.
    return sizes[int(0.98 * (len(sizes) - 1))] or None if sizes else None


def _ranking_blocks(
    rows: Sequence[Mapping[str, Any]], unit: str, scale: float | None
) -> Iterator[Block]:
    for row in rows[:SHOWN_OPEN]:
        yield _sample_block(row, unit, scale)
    rest = [_sample_block(row, unit, scale) for row in rows[SHOWN_OPEN:]]
    if rest:
        yield Details(f"{len(rest)} more", rest)


def _sample_block(row: Mapping[str, Any], unit: str, scale: float | None) -> Block:
    cut = row["tokens"] - len(row["pieces"])
    caption = f"{row['rank']}. {row['id']}: {row['score']:+.4g} {unit}"
    caption += f" (first {len(row['pieces'])} of {row['tokens']} tokens)" if cut else ""
    if "token_scores" not in row:
        return Preformatted("".join(row["pieces"]), caption=caption)
    return TokenHeat(
        row["pieces"],
        row["token_scores"],
        caption=caption,
        scale=scale,
        positive="supports",
        negative="opposes",
    )


def _rollup(column: str, rows: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> Block:
    intervals = [None if r["interval"] is None else tuple(r["interval"]) for r in rows]
    return Bars(
        [f"{r['name']} ({r['n']})" for r in rows],
        [r["value"] for r in rows],
        intervals,
        unit="" if values["how"] == "share" else values["unit"],
        caption=f"By {column}: {values['how']} of scores with 95 % bootstrap intervals "
        "(number of texts in brackets).",
    )


def _method_blocks(values: Mapping[str, Any]) -> Iterator[Block]:
    details = values["details"]
    if trace := details.get("trace"):
        yield Lines(
            {name: [(s["step"], s["loss"]) for s in steps] for name, steps in trace.items()},
            x_label="step",
            y_label="query loss (nats/token)",
            caption="The query's loss while the model unlearns (ascent) and learns (descent) it.",
        )
        yield Table(
            ("direction", "step", "query loss", "distance", "largest change", "KL(base, now)"),
            [
                (name, s["step"], _rounded(s["loss"]), _rounded(s["distance"]),
                 _rounded(s["max_change"]), _rounded(s["kl"]))
                for name, steps in trace.items()
                for s in steps
            ],
            caption="distance: ‖θ − θ₀‖; largest change: over its tensor's root mean square.",
        )  # fmt: skip
    if points := values["points"]:
        yield Scatter(
            [(descent, ascent, name) for ascent, descent, name in points],
            x_label="loss after descent (nats/token)",
            y_label="loss after ascent (nats/token)",
            caption="Training texts: above the diagonal are proponents, below it opponents.",
            diagonal=True,
        )
    histogram = values["histogram"]
    if histogram["counts"]:
        edges = histogram["edges"]
        middles = [(a + b) / 2 for a, b in pairwise(edges)]
        counts = dict(zip((f"{m:.3g}" for m in middles), histogram["counts"], strict=False))
        yield Histogram(counts, caption="Scores of all training texts.")
    settings = {
        k: details[k]
        for k in ("lr", "step_size", "damping", "backtracks", "precision")
        if k in details
    }
    if settings:
        yield Table(("setting", "value"), [(k, _rounded(v)) for k, v in settings.items()])
    for method, agreement in values["compare"].items():
        yield Badges({"compared with": method, **{k: _rounded(v) for k, v in agreement.items()}})
    files = [values["artifact"], *values.get("exports", {}).values()]
    yield Paragraph("All scores and losses: " + ", ".join(f"artifacts/{name}" for name in files))


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
