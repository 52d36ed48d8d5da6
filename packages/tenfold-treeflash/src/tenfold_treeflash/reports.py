"""Report pages of the evaluators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from tenfold.records import Metric

if TYPE_CHECKING:
    from tenfold.report import Block

_RACE = (
    ("decode_tokens_per_second", "Decoding after the first token, one text at a time."),
    ("speedup", "Decoding speed over {baseline}, with bootstrap intervals over prompts."),
    ("block_efficiency", "Tokens per round, the model's own last one included."),
)


def race_blocks(metrics: Sequence[Metric], baseline: str) -> Iterator[Block]:
    """Bars per measure, and whether greedy texts were equal."""
    from tenfold.report import Bars, Heading, Paragraph

    yield Heading("Race")
    yield Paragraph(
        "Models took turns on every prompt. At temperature above 0 contenders with other random "
        "numbers write other texts; rates are per token."
    )
    for name, caption in _RACE:
        chosen = [m for m in metrics if m.name == name]
        if chosen:
            yield Bars(
                [m.group for m in chosen], [m.value for m in chosen],
                [m.interval for m in chosen], chosen[0].unit, caption.format(baseline=baseline),
            )  # fmt: skip
    equal = [m for m in metrics if m.name == "equal_texts"]
    if equal:
        whole = [m.group for m in equal if m.value == 1]
        other = [f"{m.group}: {m.value:.0%}" for m in equal if m.value < 1]
        text = f"Greedy texts equal to {baseline}'s, token for token: {', '.join(whole) or 'none'}."
        yield Paragraph(text + (f" Not always: {', '.join(other)}." if other else ""))


def diagnostics_blocks(table: Mapping[tuple[str, str, int], Sequence[float]]) -> Iterator[Block]:
    """One chart per measure, a line per kind over depths."""
    from tenfold.report import Heading, Lines

    yield Heading("Drafted distributions by depth")
    for name in dict.fromkeys(key[1] for key in table):
        series: dict[str, list[tuple[float, float]]] = {}
        for (kind, measure, depth), values in table.items():
            if measure == name:
                series.setdefault(kind, []).append((float(depth), sum(values) / len(values)))
        yield Lines(series, "depth", name, f"{name}, means over texts.")


def rounds_blocks(
    metrics: Sequence[Metric],
    calibration: Sequence[tuple[int, float, float]],
    histogram: Mapping[int, int],
) -> Iterator[Block]:
    """Simulated rounds: efficiency by size, acceptance by depth, why they ended, calibration."""
    from tenfold.report import Bars, Heading, Histogram, Lines, Paragraph

    if not histogram:
        return
    yield Heading("Simulated rounds")
    yield Paragraph(
        "Trees were drafted at places of the given texts, and the texts' own tokens walked through "
        "them. That is what decoding accepts where the model itself wrote the texts."
    )
    by_size = [(float(m.group.partition("=")[2]), m.value) for m in metrics
               if m.name == "block_efficiency"]  # fmt: skip
    yield Lines({"tokens per round": by_size}, "nodes", "tokens", "Tokens per round by tree size.")
    accepted = [(float(m.group.partition("=")[2]), m.value) for m in metrics
                if m.name == "acceptance"]  # fmt: skip
    yield Lines({"accepted": accepted}, "depth", "share",
                "Share of walks that get past a depth, of those that get there.")  # fmt: skip
    yield Histogram({str(tokens): float(n) for tokens, n in histogram.items()},
                    caption="Rounds by their number of tokens.")  # fmt: skip
    ended = [m for m in metrics if m.name == "ended"]
    yield Bars([m.group for m in ended], [m.value for m in ended], [m.interval for m in ended],
               caption="Why walks ended: nothing was drafted any deeper; the token stood at that "
               "depth below another node; it was listed, but the tree had no room; it was in no "
               "list.")  # fmt: skip
    seen = [(predicted, observed) for _, predicted, observed in calibration]
    yield Lines({"observed": seen, "as predicted": [(p, p) for p, _ in seen]},
                "predicted path probability", "share of texts",
                "How often the text went through a node, by the drafter's probability of its path.",
                )  # fmt: skip


def sizes_blocks(metrics: Sequence[Metric]) -> Iterator[Block]:
    """Speed, tokens per round, and the time of a round by stage, over tree sizes."""
    from tenfold.report import Heading, Lines

    def points(name: str) -> list[tuple[float, float]]:
        return [(float(m.group.partition("=")[2]), m.value) for m in metrics if m.name == name]

    yield Heading("Tree sizes")
    for name, label, caption in (
        ("decode_tokens_per_second", "tokens/s", "Decoding after the first token, by tree size."),
        ("block_efficiency", "tokens", "Tokens per round by tree size."),
    ):
        yield Lines({name: points(name)}, "nodes", label, caption, log_x=True)
    stages = [m.name for m in metrics if m.name.endswith("_ms")]
    total: dict[float, float] = {}
    stacked: dict[str, list[tuple[float, float]]] = {}
    for name in dict.fromkeys(stages):
        for size, value in points(name):
            total[size] = total.get(size, 0.0) + value
        stacked[name.removesuffix("_ms")] = sorted(total.items())
    yield Lines(stacked, "nodes", "ms per round",
                "Time of a round, stage upon stage: each line adds its stage to the one below it.",
                log_x=True)  # fmt: skip
