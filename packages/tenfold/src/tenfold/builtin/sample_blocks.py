"""Report blocks that show what models wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tenfold.records import Message, SampleRecord
from tenfold.report import Badges, Block, Details, Heading, Histogram, Paragraph, Preformatted

_OPEN = 5
"""Samples that are not folded away."""


def sample_report(samples: Iterable[tuple[str, SampleRecord]], shown: int) -> Iterator[Block]:
    """The first samples (each with its model's role) and histograms over all of them."""
    kept: list[tuple[str, SampleRecord]] = []
    reasons: Counter[str] = Counter()
    exits: Counter[str] = Counter()
    for role, sample in samples:
        if len(kept) < shown:
            kept.append((role, sample))
        reasons[sample.finish_reason or "unknown"] += 1
        exits.update(_exit_counts(sample.stats))
    total = reasons.total()
    roles = {role for role, _ in kept}
    yield Heading("Samples")
    if total > len(kept):
        yield Paragraph(f"The first {len(kept)} of {total} samples.")
    for number, (role, sample) in enumerate(kept):
        title = sample.id if len(roles) == 1 else f"{sample.id} ({role})"
        blocks = list(sample_blocks(sample))
        if number < _OPEN:
            yield Heading(title, 3)
            yield from blocks
        else:
            yield Details(title, blocks)
    yield Heading("How completions ended")
    yield Histogram(dict(reasons.most_common()), "Completions by their ending.")
    if exits:
        yield Heading("Exits")
        ordered = sorted(exits.items(), key=lambda pair: (len(pair[0]), pair[0]))
        yield Histogram(dict(ordered), "Tokens by the exit that wrote them.")


def sample_blocks(sample: SampleRecord) -> Iterator[Block]:
    """One sample: prompt, completion, reference."""
    yield Preformatted(prompt_text(sample.prompt), "prompt")
    yield Preformatted(sample.completion, "completion")
    if sample.reference is not None:
        yield Details("reference", [Preformatted(sample.reference)])
    facts: dict[str, Any] = {"ended": sample.finish_reason or "unknown"}
    if sample.completion_ids is not None:
        facts["tokens"] = len(sample.completion_ids)
    yield Badges(facts)


def prompt_text(prompt: str | Sequence[Message]) -> str:
    """A prompt as one text; of a chat, each message after its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"[{m.get('role', '?')}] {m.get('content', '')}" for m in prompt)


def _exit_counts(stats: Mapping[str, Any]) -> dict[str, int]:
    """The generation's exit histogram, if it reports one."""
    histogram = stats.get("exit_histogram")
    return dict(histogram) if isinstance(histogram, Mapping) else {}
