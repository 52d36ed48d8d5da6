"""`core:throughput`: tokens per second of generation, by batch size.

Passes of different batch sizes and models take turns, so that a machine that slows down slows
all of them. The values are times of this machine: a repeated run gives others.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from tenfold.builtin.prompting import (
    PromptCut,
    batches,
    generating_models,
    generation_config,
)
from tenfold.capabilities import Context, Dataset, Prompt
from tenfold.errors import ConfigError
from tenfold.records import (
    Completion,
    GenerationConfig,
    ItemResult,
    Metric,
    Metrics,
    WorkItem,
    WorkItems,
)
from tenfold.stats import median, median_interval, quantile

if TYPE_CHECKING:
    from tenfold.report import Block


class Throughput:
    """One item per timed pass over the prompts: `<role>/batch=<size>/pass=<number>`.

    Item values: `seconds`, `tokens` (generated), `tokens_per_second`, `counted` (how tokens
    were counted: `ids`, `usage`, `encoded` or `words`), `role`, `batch_size`.

    Args:
        batch_sizes: batch sizes to compare.
        repeats: timed passes per batch size; 6 or more give an interval.
        warmup: untimed passes before the first timed one of each batch size.
        prompts: prompts per pass, from the beginning of the dataset.
        roles: model roles that take part.
        prompt_chars: text records: so many characters are the prompt.
        prompt_lines: text records: so many lines are the prompt.
        seed: of sampling; None takes the run's.
        settings: the other fields of `GenerationConfig`.

    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(
        self,
        batch_sizes: Sequence[int] = (1, 8),
        repeats: int = 7,
        warmup: int = 1,
        prompts: int = 16,
        roles: Sequence[str] = ("model",),
        prompt_chars: int | None = None,
        prompt_lines: int | None = None,
        seed: int | None = None,
        **settings: Any,
    ) -> None:
        if not batch_sizes:
            raise ConfigError("batch_sizes is empty; name at least one, such as [1, 8]")
        self.batch_sizes = tuple(dict.fromkeys(batch_sizes))
        self.repeats, self.warmup, self.prompts = repeats, warmup, prompts
        self.roles = tuple(dict.fromkeys(roles))
        self.cut = PromptCut(prompt_chars, prompt_lines)
        self.seed, self.settings = seed, settings
        self._config(0)

    def plan(self, ctx: Context, data: Mapping[str, Dataset]) -> WorkItems:
        """Passes, batch sizes and roles taking turns.

        Raises:
            ConfigError: the dataset is empty.
        """
        records = islice(data["dataset"].load(limit=self.prompts), self.prompts)
        prompts = [self.cut.apply(record)[0] for record in records]
        if not prompts:
            raise ConfigError("the dataset of core:throughput has no records")
        items = [
            WorkItem(f"{role}/batch={size}/pass={number}", (role, size, prompts))
            for number in range(self.repeats)
            for size in self.batch_sizes
            for role in self.roles
        ]
        return WorkItems(items, len(items))

    def run(
        self, ctx: Context, models: Mapping[str, Any], items: Iterable[WorkItem]
    ) -> Iterator[ItemResult]:
        """Timed passes, one after the other.

        Raises:
            ConfigError: a role without a model.
            CapabilityError: a constraint that a model cannot follow.
        """
        config = self._config(ctx.seed if self.seed is None else self.seed)
        chosen = generating_models(models, self.roles, config)
        warm: set[tuple[str, int]] = set()
        for item in items:
            role, size, prompts = item.payload
            if (role, size) not in warm:
                warm.add((role, size))
                for _ in range(self.warmup):
                    _pass(chosen[role], prompts, size, config)
            seconds, written = _pass(chosen[role], prompts, size, config)
            tokens, counted = count_tokens(chosen[role], written)
            values = {
                "role": role,
                "batch_size": size,
                "seconds": seconds,
                "tokens": tokens,
                "tokens_per_second": tokens / seconds,
                "counted": counted,
            }
            yield ItemResult(item.id, values)

    def _config(self, seed: int) -> GenerationConfig:
        return generation_config(seed=seed, **self.settings)

    def aggregate(self, ctx: Context, results: Iterable[ItemResult]) -> Metrics:
        """Median tokens per second, and the spread: the middle half's width over the median."""
        rates: dict[str, list[float]] = {}
        unit = "tokens/s"
        for result in results:
            values = result.values
            rates.setdefault(self._group(values), []).append(values["tokens_per_second"])
            if values["counted"] == "words":
                unit = "words/s"
        return [
            metric
            for group, values in rates.items()
            for metric in _metrics(sorted(values), unit, group)
        ]

    def _group(self, values: Mapping[str, Any]) -> str:
        batch = f"batch={values['batch_size']}"
        return f"{values['role']} {batch}" if len(self.roles) > 1 else batch

    def report(
        self, ctx: Context, results: Iterable[ItemResult], metrics: Metrics
    ) -> Iterator[Block]:
        """Median rates as bars, and every pass in a table."""
        from tenfold.report import Bars, Details, Heading, Table

        rates = [metric for metric in metrics if metric.name == "tokens_per_second"]
        if rates:
            yield Heading("Throughput")
            yield Bars(
                [metric.group for metric in rates],
                [metric.value for metric in rates],
                [metric.interval for metric in rates],
                rates[0].unit,
                "Medians over the timed passes; intervals where there are 6 passes or more.",
            )
        columns = ["role", "batch_size", "seconds", "tokens", "tokens_per_second"]
        rows = [[result.values[name] for name in columns] for result in results]
        yield Details("Every pass", [Table([c.replace("_", " ") for c in columns], rows)])


def _pass(
    model: Any, prompts: Sequence[Prompt], size: int, config: GenerationConfig
) -> tuple[float, list[Completion]]:
    """Seconds of one pass over the prompts, and what was written."""
    written: list[Completion] = []
    started = time.perf_counter()
    for batch in batches(prompts, size):
        for completions in model.generate(batch, config):
            written += completions
    return max(time.perf_counter() - started, 1e-9), written


def count_tokens(model: Any, completions: Sequence[Completion]) -> tuple[int, str]:
    """Generated tokens and how they were counted: from ids, from what an endpoint charged,
    by encoding the text again, or as words."""
    if any(completion.token_ids for completion in completions):
        return sum(len(completion.token_ids) for completion in completions), "ids"
    usages = [completion.stats.get("completion_tokens") for completion in completions]
    if usages and all(isinstance(usage, int) for usage in usages):
        return sum(usage for usage in usages if isinstance(usage, int)), "usage"
    if hasattr(model, "encode"):
        return sum(len(model.encode(completion.text)) for completion in completions), "encoded"
    return sum(len(completion.text.split()) for completion in completions), "words"


def _metrics(rates: Sequence[float], unit: str, group: str) -> Iterator[Metric]:
    n, middle = len(rates), median(rates)
    yield Metric("tokens_per_second", middle, n, median_interval(rates), True, unit, group)
    width = quantile(rates, 0.75) - quantile(rates, 0.25)
    yield Metric("spread", width / middle if middle else 0.0, n, None, False, "", group)
