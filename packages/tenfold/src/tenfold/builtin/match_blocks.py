"""Report blocks of `core:exact-match`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tenfold.builtin.sample_blocks import prompt_text
from tenfold.records import ItemResult, Metrics
from tenfold.report import Bars, Block, Details, Heading, Paragraph, Preformatted


def match_report(results: Iterable[ItemResult], metrics: Metrics, shown: int) -> Iterator[Block]:
    """Accuracy by group, and the first `shown` completions that missed their reference."""
    groups = [metric for metric in metrics if metric.group]
    if groups:
        yield Heading("Groups")
        yield Bars(
            [metric.group for metric in groups],
            [metric.value for metric in groups],
            [metric.interval for metric in groups],
            caption="Exact match by group, with 95 % intervals.",
        )
    missed, total = [], 0
    for result in results:
        if not result.values["correct"]:
            total += 1
            if len(missed) < shown:
                missed.append(result)
    yield Heading("Misses")
    if not missed:
        yield Paragraph("Every completion agreed with its reference.")
        return
    yield Paragraph(f"The first {len(missed)} of {total}.")
    for result in missed:
        values = result.values
        answer = values["answer"]
        blocks: list[Block] = [
            Preformatted(prompt_text(values["prompt"]), "prompt"),
            Preformatted(values["completion"], "completion"),
            Preformatted(values["reference"], "reference"),
        ]
        if answer != values["completion"]:
            text = "Nothing could be extracted." if answer is None else f"Compared: {answer}"
            blocks.append(Paragraph(text))
        yield Details(result.id, blocks)
