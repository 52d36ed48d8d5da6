"""Blocks of `nvium:profile`'s report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tenfold.records import ItemResult, Metric, Metrics
from tenfold.report import (
    Bars,
    Block,
    Columns,
    Details,
    Heading,
    Histogram,
    Paragraph,
    Preformatted,
    TokenHeat,
)

from tenfold_nvium.histograms import Histograms

EXPLANATION = (
    "An N-vium predicts with several heads at different depths and mixes them. A token shaded "
    "towards 'shallow' left the model early; its upper layers ran later, together with a token "
    "that went deep. Nothing is approximated: the text follows the mixture exactly when exits "
    "are sampled at temperature 1."
)


def profile_blocks(results: Iterable[ItemResult], metrics: Metrics, shown: int) -> Iterator[Block]:
    """Charts over everything, then the first texts."""
    yield Paragraph(EXPLANATION)
    yield from _charts(metrics)
    histograms, texts = Histograms(), []
    for result in results:
        if result.error is not None:
            continue
        histograms.add(result.values)
        if len(texts) < shown:
            texts.append((result.id, list(_text_blocks(result.values))))
    yield from histograms.blocks()
    for name, blocks in texts:
        if blocks:
            yield Heading(name, level=3)
            yield from blocks


def _charts(metrics: Metrics) -> Iterator[Block]:
    shares = _grouped(metrics, "generated_share", "exit=")
    scored = _grouped(metrics, "share", "exit=")
    charts: list[list[Block]] = []
    if shares:
        counts = {f"exit {name}": m.value * m.n for name, m in shares.items()}
        charts.append([Histogram(counts, caption="Generated tokens by exit.")])
    if scored:
        counts = {f"exit {name}": m.value for name, m in scored.items()}
        charts.append([Histogram(counts, caption="Mean mixture weight on given text.")])
    if charts:
        yield Columns(charts)
    heads = _grouped(metrics, "head_loss", "exit=")
    mixture = next((m for m in metrics if m.name == "loss" and not m.group), None)
    if heads and mixture is not None:
        rows = [*((f"head {name}", m) for name, m in heads.items()), ("mixture", mixture)]
        yield _bars(rows, "nats per token", "Loss of each head alone, and of the mixture.")
    classes = _grouped(metrics, "expected_depth", "class=")
    if classes:
        yield _bars(
            list(classes.items()), "share of the layers", "Expected depth by class of token."
        )


def _bars(rows: list[tuple[str, Metric]], unit: str, caption: str) -> Bars:
    return Bars(
        [name for name, _ in rows],
        [m.value for _, m in rows],
        [m.interval for _, m in rows],
        unit=unit,
        caption=caption,
    )


def _grouped(metrics: Metrics, name: str, prefix: str) -> dict[str, Metric]:
    return {
        m.group.removeprefix(prefix): m
        for m in metrics
        if m.name == name and m.group.startswith(prefix)
    }


def _text_blocks(values: Mapping[str, Any]) -> Iterator[Block]:
    """A generated text and a given one, shaded from shallow (negative) to deep (positive)."""
    depths = values["depths"]
    generated = values.get("generated")
    if generated and generated["pieces"]:
        yield Preformatted(generated["prompt"], caption="Prompt")
        shade = [2 * depths[k - 1] / depths[-1] - 1 for k in generated["exits"]]
        yield TokenHeat(
            generated["pieces"], shade, scale=1.0, positive="deep", negative="shallow",
            caption=f"Generated ({generated['policy']}), by the exit each token left at.",
        )  # fmt: skip
    scored = values.get("scored")
    if scored and scored["pieces"]:
        heat = TokenHeat(
            scored["pieces"], [2 * d - 1 for d in scored["depth"]], scale=1.0,
            positive="deep", negative="shallow", caption="Given text, by expected depth.",
        )  # fmt: skip
        yield Details("The given text by expected depth", [heat])
