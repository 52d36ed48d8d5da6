"""`core:generated`: a dataset that a model writes when it is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from tenfold.builtin.prompting import (
    PromptCut,
    batches,
    generation_config,
    prompt_token_ids,
    require_constraint,
)
from tenfold.builtin.samples import sample_records, sample_values
from tenfold.builtin.selection import Selection, shuffle
from tenfold.capabilities import Dataset
from tenfold.errors import RunFailed
from tenfold.records import Record, SampleRecord
from tenfold.seeds import content_hash

VERSION = 1


class Generated:
    """Sample records of a model's completions, in the order of the prompts.

    Ids are the prompts' ids; with `n` above 1, `<id>#0`, `<id>#1`, ... What was written once
    is kept, so that reading again generates nothing.

    Args:
        model: the model that writes (`generate`).
        prompts: a dataset of prompts, or of texts to begin with.
        n: samples per prompt.
        prompt_chars: text records: so many characters are the prompt, the rest the reference.
        prompt_lines: text records: so many lines are the prompt, the rest the reference.
        batch_size: prompts per call of the model; changes nothing but speed.
        limit: at most this many records.
        shuffle_seed: shuffle by this seed, before `limit`.
        seed: of sampling.
        settings: the other fields of `GenerationConfig`.

    Raises:
        ConfigError: a setting out of range.
        CapabilityError: a constraint that the model cannot follow.
    """

    kind = "sample"

    def __init__(
        self,
        model: Any,
        prompts: Dataset,
        n: int = 1,
        prompt_chars: int | None = None,
        prompt_lines: int | None = None,
        batch_size: int = 8,
        limit: int | None = None,
        shuffle_seed: int | None = None,
        seed: int | None = None,
        **settings: Any,
    ) -> None:
        self.model, self.prompts = model, prompts
        self.cut = PromptCut(prompt_chars, prompt_lines)
        self.config = generation_config(n=n, seed=seed or 0, **settings)
        self.batch_size = batch_size
        self._selection = Selection(limit, shuffle_seed)
        self._written: dict[str, list[SampleRecord]] = {}
        require_constraint(model, self.config, "model")

    def splits(self) -> Sequence[str]:
        """Those of the prompts."""
        return self.prompts.splits()

    def load(
        self, split: str = "", limit: int | None = None, shuffle_seed: int | None = None
    ) -> Iterator[SampleRecord]:
        """Samples, generated batch by batch as they are asked for.

        A shuffle orders the prompts, which it holds in memory; samples of one prompt stay
        together. The texts do not depend on it.

        Raises:
            RunFailed: the model reported an error for a prompt.
        """
        count = self._selection.count(limit)
        wanted = None if count is None else -(-count // self.config.n)
        seed = self._selection.seed(shuffle_seed)
        records = iter(self.prompts.load(split))
        if seed is not None:
            shuffled = list(records)
            shuffle(shuffled, seed)
            records = iter(shuffled)
        return islice(self._samples(islice(records, wanted)), count)

    def fingerprint(self, split: str = "") -> str:
        """Hash of what decides the texts: model, prompts and settings; generates nothing."""
        own = getattr(self.model, "fingerprint", None)
        model = own() if callable(own) else type(self.model).__qualname__
        settings = [dataclasses.asdict(self.config), dataclasses.asdict(self.cut)]
        selection = [self._selection.limit, self._selection.shuffle_seed]
        prompts = self.prompts.fingerprint(split)
        return content_hash(["generated", VERSION, model, prompts, settings, selection])

    def _samples(self, records: Iterator[Record]) -> Iterator[SampleRecord]:
        for batch in batches(records, self.batch_size):
            self._write([record for record in batch if record.id not in self._written])
            for record in batch:
                yield from self._written[record.id]

    def _write(self, records: Sequence[Record]) -> None:
        if not records:
            return
        pairs = [self.cut.apply(record) for record in records]
        answers = self.model.generate([prompt for prompt, _ in pairs], self.config)
        for record, (prompt, reference), completions in zip(records, pairs, answers, strict=True):
            failed = [c for c in completions if c.finish_reason == "error"]
            if failed:
                why = failed[0].stats.get("error", "the model reported an error")
                raise RunFailed(f"core:generated: prompt {record.id!r}: {why}")
            values = sample_values(
                prompt,
                completions,
                prompt_ids=prompt_token_ids(self.model, prompt, self.config.chat),
                reference=reference,
                metadata=record.metadata,
            )
            self._written[record.id] = list(sample_records(record.id, values))
