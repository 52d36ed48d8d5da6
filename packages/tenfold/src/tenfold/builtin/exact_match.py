"""`core:exact-match`: the share of completions that agree with their reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tenfold.builtin.matching import Extraction, Normalization, agrees
from tenfold.builtin.prompting import (
    PromptCut,
    batches,
    generation_config,
    prompt_token_ids,
    require_column,
    require_constraint,
)
from tenfold.builtin.samples import sample_values
from tenfold.capabilities import Context, Dataset
from tenfold.errors import ConfigError
from tenfold.records import (
    Completion,
    GenerationConfig,
    ItemResult,
    Metric,
    Metrics,
    Record,
    SampleRecord,
    WorkItem,
    WorkItems,
)
from tenfold.stats import wilson

if TYPE_CHECKING:
    from tenfold.report import Block

_SHOWN = 20


class ExactMatch:
    """Prompts with references are completed by the model; samples are compared as they are.

    Item values are those of `core:generate`, so that `core:run-samples` reads them, and
    `answer` (what was compared, None where `extract` found nothing) and `correct`.

    Args:
        compare: `equal`, `starts-with`, `contains` or `number`.
        extract: regular expression; its last match is compared. Applied to the reference too,
            where it matches there.
        ignore_case: compare in lower case.
        ignore_whitespace: trim, and count runs of blanks as one.
        ignore_punctuation: compare without punctuation.
        ignore_articles: compare without a, an, the.
        group_by: also report each value of this metadata column.
        batch_size: prompts per call of the model; changes nothing but speed.
        seed: of sampling; None takes the run's.
        settings: the other fields of `GenerationConfig`.

    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(
        self,
        compare: str = "equal",
        extract: str = "",
        ignore_case: bool = False,
        ignore_whitespace: bool = True,
        ignore_punctuation: bool = False,
        ignore_articles: bool = False,
        group_by: str = "",
        batch_size: int = 8,
        seed: int | None = None,
        **settings: Any,
    ) -> None:
        self.compare = compare
        self.extract = Extraction(extract)
        self.normalize = Normalization(
            ignore_case, ignore_whitespace, ignore_punctuation, ignore_articles
        )
        self.group_by, self.batch_size, self.seed = group_by, batch_size, seed
        self.settings = settings
        self._config(0)
        self._needs_model = False

    def plan(self, ctx: Context, data: Mapping[str, Dataset]) -> WorkItems:
        """One item per record.

        Raises:
            ConfigError: the records have no metadata column `group_by`.
        """
        dataset = data["dataset"]
        self._needs_model = dataset.kind == "prompt"
        records = require_column(dataset.load(), self.group_by)
        return WorkItems(WorkItem(record.id, record) for record in records)

    def run(
        self, ctx: Context, models: Mapping[str, Any], items: Iterable[WorkItem]
    ) -> Iterator[ItemResult]:
        """Compared completions, batch by batch. A record without a reference fails.

        Raises:
            ConfigError: the dataset holds prompts and the run has no model.
            CapabilityError: a constraint that the model cannot follow.
        """
        config = self._config(ctx.seed if self.seed is None else self.seed)
        model = models.get("model")
        if self._needs_model:
            if model is None:
                raise ConfigError(
                    "core:exact-match over prompts needs a model that completes them; add [model]",
                    hint='or give it samples: [dataset] use = "core:run-samples"',
                )
            require_constraint(model, config, "model")
        for batch in batches(items, self.batch_size):
            usable = [item for item in batch if item.payload.reference is not None]
            for item in batch:
                if item.payload.reference is None:
                    yield ItemResult(item.id, error="the record has no reference to compare with")
            if usable:
                yield from self._compare(model, usable, config)

    def _compare(
        self, model: Any, items: Sequence[WorkItem], config: GenerationConfig
    ) -> Iterator[ItemResult]:
        records: list[Record] = [item.payload for item in items]
        prompts = [r for r in records if not isinstance(r, SampleRecord)]
        written: Iterator[list[Completion]] = iter(())
        if prompts:
            written = iter(model.generate([PromptCut().apply(r)[0] for r in prompts], config))
        for item, record in zip(items, records, strict=True):
            if isinstance(record, SampleRecord):
                yield self._result(item.id, record, _recorded(record), record.prompt_ids)
                continue
            completion = next(written)[0]
            if completion.finish_reason == "error":
                error = str(completion.stats.get("error", "the model reported an error"))
                yield ItemResult(item.id, error=error)
                continue
            prompt = PromptCut().apply(record)[0]
            ids = prompt_token_ids(model, prompt, config.chat)
            yield self._result(item.id, record, completion, ids)

    def _result(
        self, name: str, record: Any, completion: Completion, prompt_ids: list[int] | None
    ) -> ItemResult:
        answer = self.extract(completion.text)
        reference = self.extract(record.reference)
        reference = record.reference if reference is None else reference
        correct = answer is not None and agrees(
            self.normalize(answer), self.normalize(reference), self.compare
        )
        values = sample_values(
            record.prompt,
            [completion],
            prompt_ids=prompt_ids,
            reference=record.reference,
            metadata=record.metadata,
        )
        return ItemResult(name, {**values, "answer": answer, "correct": correct})

    def _config(self, seed: int) -> GenerationConfig:
        return generation_config(seed=seed, **self.settings)

    def aggregate(self, ctx: Context, results: Iterable[ItemResult]) -> Metrics:
        """`exact_match` with Wilson's interval, and each group's."""
        counts: dict[str, list[int]] = {"": [0, 0]}
        for result in results:
            names = [""]
            if self.group_by:
                names.append(f"{self.group_by}={result.values['metadata'].get(self.group_by)}")
            for name in names:
                count = counts.setdefault(name, [0, 0])
                count[0] += bool(result.values["correct"])
                count[1] += 1
        ordered = sorted(counts.items())
        return [
            Metric("exact_match", right / n, n, wilson(right, n), True, "", group)
            for group, (right, n) in ordered
            if n
        ]

    def report(
        self, ctx: Context, results: Iterable[ItemResult], metrics: Metrics
    ) -> Iterator[Block]:
        """Groups as bars, and the first completions that missed."""
        from tenfold.builtin.match_blocks import match_report

        yield from match_report(results, metrics, _SHOWN)


def _recorded(record: SampleRecord) -> Completion:
    ids = list(record.completion_ids or ())
    return Completion(record.completion, ids, None, record.finish_reason, record.stats)
