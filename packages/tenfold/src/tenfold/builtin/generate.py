"""`core:generate`: writes completions and records them; `core:run-samples` reads them back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tenfold.builtin.prompting import (
    PromptCut,
    batches,
    generating_models,
    generation_config,
    prompt_token_ids,
)
from tenfold.builtin.samples import sample_records, sample_values
from tenfold.capabilities import Context, Dataset
from tenfold.records import (
    GenerationConfig,
    ItemResult,
    Metric,
    Metrics,
    Record,
    SampleRecord,
    WorkItem,
    WorkItems,
)
from tenfold.stats import MeanSum, wilson

if TYPE_CHECKING:
    from tenfold.report import Block

SHOWN = 20
"""Samples that the report shows."""


class Generate:
    """One item per prompt (and role) with its completions; see `tenfold.builtin.samples`.

    Item ids are the records' ids; with several roles `<id>@<role>`.

    Args:
        n: samples per prompt.
        roles: model roles that write.
        batch_size: prompts per call of a model; changes nothing but speed.
        prompt_chars: text records: so many characters are the prompt.
        prompt_lines: text records: so many lines are the prompt.
        seed: of sampling; None takes the run's.
        settings: the other fields of `GenerationConfig`.

    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(
        self,
        n: int = 1,
        roles: Sequence[str] = ("model",),
        batch_size: int = 8,
        prompt_chars: int | None = None,
        prompt_lines: int | None = None,
        seed: int | None = None,
        **settings: Any,
    ) -> None:
        self.roles = tuple(dict.fromkeys(roles))
        self.batch_size = batch_size
        self.cut = PromptCut(prompt_chars, prompt_lines)
        self.seed = seed
        self.settings: dict[str, Any] = {"n": n, **settings}
        self._config(0)  # a wrong setting is reported when the run is built

    def plan(self, ctx: Context, data: Mapping[str, Dataset]) -> WorkItems:
        """Every record for every role, role by role."""
        dataset = data["dataset"]
        several = len(self.roles) > 1
        return WorkItems(
            WorkItem(f"{record.id}@{role}" if several else record.id, (role, record))
            for role in self.roles
            for record in dataset.load()
        )

    def run(
        self, ctx: Context, models: Mapping[str, Any], items: Iterable[WorkItem]
    ) -> Iterator[ItemResult]:
        """Completions, batch by batch.

        Raises:
            ConfigError: a role without a model.
            CapabilityError: a constraint that a model cannot follow.
        """
        config = self._config(ctx.seed if self.seed is None else self.seed)
        chosen = generating_models(models, self.roles, config)
        for batch in batches(items, self.batch_size):
            for role, members in groupby(batch, key=lambda item: item.payload[0]):
                yield from self._generate(chosen[role], role, list(members), config)

    def _generate(
        self, model: Any, role: str, items: Sequence[WorkItem], config: GenerationConfig
    ) -> Iterator[ItemResult]:
        records: list[Record] = [item.payload[1] for item in items]
        pairs = [self.cut.apply(record) for record in records]
        answers = model.generate([prompt for prompt, _ in pairs], config)
        for item, record, (prompt, reference), completions in zip(
            items, records, pairs, answers, strict=True
        ):
            failed = [c for c in completions if c.finish_reason == "error"]
            if failed:
                error = str(failed[0].stats.get("error", "the model reported an error"))
                yield ItemResult(item.id, error=error)
                continue
            values = sample_values(
                prompt,
                completions,
                prompt_ids=prompt_token_ids(model, prompt, config.chat),
                reference=reference,
                metadata=record.metadata,
                role=role,
            )
            yield ItemResult(item.id, values)

    def _config(self, seed: int) -> GenerationConfig:
        return generation_config(seed=seed, **self.settings)

    def aggregate(self, ctx: Context, results: Iterable[ItemResult]) -> Metrics:
        """Length and ending of the completions, per role when there are several."""
        sums: dict[str, _Sums] = {role: _Sums() for role in self.roles}
        for result in results:
            role = str(result.values.get("role", "model"))
            for sample in sample_records(result.id, result.values):
                sums.setdefault(role, _Sums()).add(sample)
        several = len(self.roles) > 1
        groups = ((f"role={r}" if several else "", s) for r, s in sums.items())
        return [metric for group, s in groups for metric in s.metrics(group)]

    def report(
        self, ctx: Context, results: Iterable[ItemResult], metrics: Metrics
    ) -> Iterator[Block]:
        """The first samples in full, and how completions ended."""
        from tenfold.builtin.sample_blocks import sample_report

        pairs = (
            (str(result.values.get("role", "model")), sample)
            for result in results
            for sample in sample_records(result.id, result.values)
        )
        yield from sample_report(pairs, SHOWN)


@dataclass(slots=True)
class _Sums:
    """Running sums over the samples of one role."""

    chars: MeanSum = field(default_factory=MeanSum)
    tokens: MeanSum = field(default_factory=MeanSum)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, sample: SampleRecord) -> None:
        self.chars.add(len(sample.completion))
        if sample.completion_ids is not None:
            self.tokens.add(len(sample.completion_ids))
        self.reasons[sample.finish_reason] += 1

    def metrics(self, group: str) -> Iterator[Metric]:
        n = self.chars.n
        if not n:
            return
        yield Metric(
            "completion_length", self.chars.mean, n, self.chars.interval(), None, "chars", group
        )
        if self.tokens.n:
            tokens = self.tokens
            yield Metric(
                "completion_tokens", tokens.mean, tokens.n, tokens.interval(), None, "", group
            )
        ended = n - self.reasons["length"]
        yield Metric("finished", ended / n, n, wilson(ended, n), None, "", group)
