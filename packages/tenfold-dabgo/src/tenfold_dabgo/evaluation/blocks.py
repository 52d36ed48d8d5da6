"""Report blocks of the quality evaluators; built from items alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from tenfold.records import ItemResult, Metric
from tenfold.report import Bars, Block, Columns, Details, Heading, Lines, Paragraph, Table

from tenfold_dabgo.evaluation.outcomes import LDS, LOO, QLD, Outcomes
from tenfold_dabgo.evaluation.ranking import Comparison, Measure, by_k, rounded

if TYPE_CHECKING:
    from tenfold_dabgo.evaluation.retraining import RetrainingSettings

TAIL_PATCH = (
    "The model takes one small training step on the samples that a method ranks first; then the "
    "query's log-probability is read again. A method that finds what the query came from raises "
    "it. Random samples, strings of random tokens, and the lowest-ranked samples are controls: "
    "no method should lose to them."
)
PUBLISHED = (
    "The published number is 100 |P' - P| / P. It does not see the sign: samples that make the "
    "query less likely count as much as those that make it likelier, so it is no measure of "
    "quality by itself."
)
VARIANT = {
    "joint": "One step on all k samples together",
    "individual": "One step per sample, mean over the first k",
}
RETRAINING = (
    "Models are trained from scratch on parts of the corpus, with equal initial weights, "
    "optimizer and schedule; the query's loss under each says what the missing samples were "
    "worth. Intervals are over queries (95 %, bootstrap); p-values are paired Wilcoxon tests."
)
NOTHING = "No query has been evaluated yet."
MAX_HISTOGRAMS = 4


def chart(
    comparison: Comparison, name: str, y_label: str, prefix: str = "", caption: str = ""
) -> Iterator[Block]:
    """One line per method over k, with 95 % intervals; bars when there is but one k."""
    series, intervals = by_k(comparison, name, prefix)
    if len({k for points in series.values() for k, _ in points}) == 1:
        order = sorted(series, key=lambda method: -series[method][0][1])
        values = [series[method][0][1] for method in order]
        yield Bars(order, values, [intervals[m][0] for m in order], caption=caption or y_label)
    elif series:
        yield Lines(series, "k", y_label, caption, intervals=intervals)


def bars(comparison: Comparison, measure: Measure, caption: str) -> Bars:
    """One bar per method with its interval, best first."""
    found = {m: comparison.estimate(measure, m) for m in comparison.values[measure]}
    order = sorted((m for m in found if found[m].n), key=lambda m: -found[m].value)
    return Bars(
        order,
        [found[m].value for m in order],
        [found[m].interval for m in order],
        measure.unit,
        caption,
    )


# --- Tail-patch -----------------------------------------------------------------------------------


def tail_patch_blocks(comparison: Comparison) -> Iterator[Block]:
    """Change of log P over k and ranked methods, by variant; the published layout at the end."""
    yield Paragraph(TAIL_PATCH)
    if not comparison.values:
        yield Paragraph(NOTHING)
        return
    variants = dict.fromkeys(m.condition.split(",")[0] for m in comparison.values)
    for variant in variants:
        name = variant.partition("=")[2]
        yield Heading(VARIANT.get(name, name))
        yield from chart(
            comparison, "d_log_p", "change of log P (nats)", f"{variant},",
            "Higher is better; vertical lines are 95 % intervals over queries.",
        )  # fmt: skip
        measures = [m for m in comparison.measures("d_log_p") if m.condition.startswith(variant)]
        last = max(measures, key=_k)
        yield comparison.ranked(last, f"Change of log P at k = {_k(last)}, ranked.")
    yield Heading("Relative change of the probability")
    yield Paragraph(PUBLISHED)
    for variant in variants:
        for name, title in (("percent", "Signed"), ("published_percent", "Published, unsigned")):
            yield Details(
                f"{title} relative change in %, {variant}",
                [k_table(comparison, name, f"{variant},")],
            )


def k_table(comparison: Comparison, name: str, prefix: str = "") -> Table:
    """Methods by k: the mean of each."""
    series, _ = by_k(comparison, name, prefix)
    ks = sorted({k for points in series.values() for k, _ in points})
    rows = [
        [method, *(rounded(dict(points).get(k)) for k in ks)] for method, points in series.items()
    ]
    return Table(["method", *(f"k = {k:g}" for k in ks)], rows, "Means over queries.")


def _k(measure: Measure) -> int:
    return int(measure.condition.rpartition("k=")[2])


# --- Retraining -----------------------------------------------------------------------------------


def retraining_blocks(outcomes: Outcomes, settings: RetrainingSettings) -> Iterator[Block]:
    """Removal curves, QLD, LDS, LOO: what was measured."""
    yield Paragraph(RETRAINING)
    comparison = outcomes.comparison
    if not comparison.values:
        yield Paragraph(NOTHING)
        return
    removals = comparison.measures("removal_rise")
    if removals:
        yield Heading("Without the top k")
        yield Paragraph(_removal_facts(outcomes, settings))
        yield from chart(
            comparison, "removal_rise", "rise of the query's loss (nats/token)", "",
            "Higher is better: what was removed mattered.",
        )  # fmt: skip
        for measure in sorted(removals, key=_k):
            yield comparison.ranked(measure, f"k = {_k(measure)} units of {settings.unit!r}.")
    if QLD in comparison.values:
        yield Heading("Query loss difference")
        share = f"{100 * settings.qld_share:g} %"
        yield comparison.ranked(
            QLD, f"Loss without the top {share} minus loss without a random {share}."
        )
    if LDS in comparison.values:
        yield Heading("Linear datamodeling score")
        yield Paragraph(_lds_facts(outcomes, settings))
        yield bars(comparison, LDS, "Mean over queries with 95 % intervals.")
        yield comparison.ranked(LDS)
        yield Details("LDS of each query", [_per_query(comparison, LDS)])
    if LOO in comparison.values:
        yield Heading("Leave-one-out correlation")
        yield comparison.ranked(
            LOO, f"Rank correlation over {len(outcomes.loo)} removals of single samples."
        )
    yield Details("Training sets", [_sizes(outcomes)])


def _removal_facts(outcomes: Outcomes, settings: RetrainingSettings) -> str:
    known = [v for v in outcomes.spread.values() if np.isfinite(v)]
    seeds = f"{settings.seeds} seeds ({settings.vary} varies)"
    text = f"Unit {settings.unit}, {settings.removal_rule}, {seeds}. "
    if known:
        text += (
            "With nothing removed, the loss of a query varies by "
            f"{float(np.mean(known)):.3g} nats/token (standard deviation) from seed to seed; "
            "“no removal” is one seed against the others."
        )
    return text


def _lds_facts(outcomes: Outcomes, settings: RetrainingSettings) -> str:
    text = (
        f"Spearman correlation over {len(outcomes.lds)} random subsets of "
        f"{100 * settings.subset_share:g} % between the sum of the scores kept and minus the "
        f"query's loss; {settings.lds_seeds} trainings each, {settings.lds_rule}."
    )
    known = [v for v in outcomes.ceiling.values() if np.isfinite(v)]
    if known:
        text += (
            f" Two halves of the training seeds agree with {float(np.mean(known)):.3f}: "
            "no method can be expected to correlate much better than the square root of that."
        )
    return text


def _per_query(comparison: Comparison, measure: Measure) -> Table:
    rows = comparison.values[measure]
    queries = list(dict.fromkeys(q for by_query in rows.values() for q in by_query))
    return Table(
        ["query", *rows],
        [[q, *(rounded(by_query.get(q)) for by_query in rows.values())] for q in queries],
    )


def _sizes(outcomes: Outcomes) -> Table:
    rows: list[list[Any]] = [[name, size] for name, size in outcomes.sizes.items()]
    for query, values in outcomes.queries.items():
        for method, by_size in values.get("removal", {}).items():
            total = next(iter(outcomes.sizes.values()), 0)
            full = [size for name, size in outcomes.sizes.items() if name.startswith("full/")]
            for label, row in by_size.items():
                size = (full[0] if full else total) - int(row["removed"])
                rows.append([f"query {query}: {method} without {label}", size])
    return Table(["training set", "samples"], rows)


# --- Labels ---------------------------------------------------------------------------------------


def label_blocks(
    comparison: Comparison,
    items: Sequence[ItemResult],
    metrics: Sequence[Metric],
) -> Iterator[Block]:
    """Ranked methods, precision and recall by k, scores against the null, sanity checks."""
    if not comparison.values:
        yield Paragraph(NOTHING)
        return
    yield from _source_blocks(comparison)
    yield from _null_blocks(comparison, items)
    if comparison.measures("randomized_spearman"):
        yield Heading("Untrained weights")
        yield Paragraph(
            "Scores of the same method on the same architecture before training. Tokens that "
            "query and sample share drive both, so the agreement is not zero; it should be far "
            "below that of two runs."
        )
        for name in ("randomized_spearman", "randomized_overlap"):
            for measure in comparison.measures(name):
                yield comparison.ranked(measure, "Lower is better.")
    rows = [
        [m.group.partition("=")[2].rpartition(",")[0], m.group.rpartition("k=")[2],
         rounded(m.value), m.n]
        for m in metrics
        if m.name == "top_k_cardinality"
    ]  # fmt: skip
    if rows:
        yield Heading("Do queries get samples of their own?")
        yield Table(
            ["method", "k", "cardinality", "queries"], rows,
            "Different samples among all queries' top k over the most there could be; "
            "1 / queries means that all get the same.",
        )  # fmt: skip


def _source_blocks(comparison: Comparison) -> Iterator[Block]:
    """Against the known sources."""
    if not comparison.measures("precision"):
        return
    yield Heading("Known sources")
    for name, title in (
        ("auprc", "Area under the precision-recall curve."),
        ("reciprocal_rank", "1 / rank of the first relevant sample."),
    ):
        for measure in comparison.measures(name):
            yield comparison.ranked(measure, title)
    for name in ("precision", "recall"):
        yield from chart(comparison, name, f"{name} at k")


def _null_blocks(comparison: Comparison, items: Sequence[ItemResult]) -> Iterator[Block]:
    """Scores of the first queries beside those of random queries."""
    if not comparison.measures("null_max_z"):
        return
    yield Heading("Against random queries")
    yield Paragraph(
        "Each sample's score for random queries gives its own mean and spread; z-scores are "
        "deviations from them. Rows named “(z)” in the tables rank by z-score."
    )
    for name in ("null_max_z", "null_share_above"):
        for measure in comparison.measures(name):
            yield comparison.ranked(measure)
    for item in items[:MAX_HISTOGRAMS]:
        charts = [
            [density(found["histogram"], f"{item.id}, {method}")]
            for method, found in _nulls(item).items()
            if found["histogram"]["edges"]
        ]
        if charts:
            yield Columns(charts) if len(charts) > 1 else charts[0][0]


def _nulls(item: ItemResult) -> Mapping[str, Any]:
    found: Any = item.values.get("null", {})
    return found


def density(found: Mapping[str, Any], caption: str) -> Lines:
    """Two histograms over common bins as lines."""
    middles = [(a + b) / 2 for a, b in pairwise(found["edges"])]
    return Lines(
        {
            "this query": list(zip(middles, found["scores"], strict=True)),
            "random queries": list(zip(middles, found["null"], strict=True)),
        },
        "score",
        "share of samples",
        caption,
    )
