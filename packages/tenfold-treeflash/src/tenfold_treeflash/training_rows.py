"""`treeflash:rows` and `treeflash:row-prompts`: training data in the formats that are in use.

One JSON object per line, in one of these forms, which may be mixed:

    {"messages": [{"role": ..., "content": ...}, ...]}   one sample per answer of the assistant
    {"prompt": TEXT or MESSAGES, "response": TEXT}       (or `completion`), also with the exact
                                                         `prompt_ids` and `completion_ids`
    {"input_ids": [...], "loss_mask": [...]}             tokens, 1 where the loss counts

Samples are what a drafter learns from; prompts are what a model writes new samples for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tenfold.builtin.paths import find_files
from tenfold.builtin.row_sources import JsonLines
from tenfold.builtin.selection import Selection, Splits, shuffle
from tenfold.errors import ConfigError
from tenfold.records import Message, PromptRecord, Record, SampleRecord
from tenfold.seeds import content_hash

VERSION = 1
LOSS_MASK = "loss_mask"
_FORMS = '{"messages"}, {"prompt", "response"} or {"input_ids", "loss_mask"}'


class TrainingRows:
    """Sample records, or with `prompts` the prompts alone; streamed.

    Ids are the row's `id`, or `<file>:<line>`; later answers of a conversation add `#2`, `#3`.

    Args:
        path: a JSON Lines file, a folder (its `*.jsonl` files), or a glob.
        prompts: give prompts to be answered anew, one per answer.
        suffix: put behind the newest message of every prompt, such as ` /no_think`.
        validation: share of records in the split `validation`.
        limit: at most this many records.
        shuffle_seed: shuffle by this seed (rows are held in memory), before `limit`.

    Raises:
        ConfigError: nothing at `path`.
    """

    def __init__(
        self,
        path: str | Path,
        prompts: bool = False,
        suffix: str = "",
        validation: float = 0.0,
        limit: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        self.kind = "prompt" if prompts else "sample"
        self.files = find_files(path, "**/*.jsonl")
        self.source, self.suffix = JsonLines(self.files), suffix
        self._splits = Splits("train", validation)
        self._selection = Selection(limit, shuffle_seed)

    def splits(self) -> Sequence[str]:
        """`train`, and `validation` where its share is above 0."""
        return self._splits.names()

    def load(
        self, split: str = "", limit: int | None = None, shuffle_seed: int | None = None
    ) -> Iterator[Record]:
        """Records in the files' order, or shuffled.

        Raises:
            ConfigError: a row of no known form; names file and line.
        """
        name = self._splits.check(split)
        records = (record for record in self._records() if self._splits.holds(name, record.id))
        seed = self._selection.seed(shuffle_seed)
        if seed is not None:
            shuffled = list(records)
            shuffle(shuffled, seed)
            records = iter(shuffled)
        return islice(records, self._selection.count(limit))

    def fingerprint(self, split: str = "") -> str:
        """Hash of the files and of what selects from them."""
        selection = [self._selection.limit, self._selection.shuffle_seed]
        shares = [self._splits.check(split), self._splits.validation]
        content = [self.kind, self.suffix, self.files.digests()]
        return content_hash(["treeflash-rows", VERSION, content, shares, selection])

    def _records(self) -> Iterator[Record]:
        for place, row in self.source.rows():
            where = self.source.where(place)
            file = self.files.paths[place.file]
            name = str(row["id"]) if row.get("id") is not None else (
                f"{self.files.name(file)}:{place.number}"
            )  # fmt: skip
            samples = list(row_samples(row, name, where))
            yield from map(self._prompt, samples) if self.kind == "prompt" else samples

    def _prompt(self, sample: SampleRecord) -> PromptRecord:
        prompt: Any = sample.prompt
        if sample.prompt_ids is not None and not prompt:
            raise ConfigError(
                f"row {sample.id!r} holds token ids alone; prompts to be answered need text"
            )
        if self.suffix and isinstance(prompt, str):
            prompt += self.suffix
        elif self.suffix:
            prompt = [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + self.suffix}]
        return PromptRecord(id=sample.id, prompt=prompt, reference=sample.completion)


def row_prompts(path: str | Path, **settings: Any) -> TrainingRows:
    """The prompts of training rows; settings are those of `TrainingRows`."""
    return TrainingRows(path, prompts=True, **settings)


def row_samples(row: Mapping[str, Any], name: str, where: str) -> Iterator[SampleRecord]:
    """The samples of one row; `where` names file and line in messages.

    Raises:
        ConfigError: a row of no known form.
    """
    if (ids := row.get("input_ids")) is not None:
        yield _tokens(ids, row.get(LOSS_MASK), name, where)
    elif (messages := row.get("messages")) is not None:
        yield from _answers(messages, name, where)
    else:
        yield _pair(row, name, where)


def _tokens(ids: Any, mask: Any, name: str, where: str) -> SampleRecord:
    whole = isinstance(ids, list) and all(type(i) is int for i in ids)
    if not whole:
        raise ConfigError(f"{where}: input_ids must be a list of whole numbers")
    fits = isinstance(mask, list) and len(mask) == len(ids) and all(m in (0, 1) for m in mask)
    if not fits:
        raise ConfigError(f"{where}: loss_mask must hold a 0 or 1 for each of the {len(ids)} ids")
    return SampleRecord(
        id=name, prompt="", completion="", prompt_ids=[], completion_ids=ids,
        metadata={LOSS_MASK: [int(m) for m in mask]},
    )  # fmt: skip


def _answers(messages: Any, name: str, where: str) -> Iterator[SampleRecord]:
    known = isinstance(messages, list) and all(
        isinstance(m, Mapping)
        and isinstance(m.get("role"), str)
        and isinstance(m.get("content"), str)
        for m in messages
    )
    if not known:
        raise ConfigError(
            f'{where}: messages must be a list of {{"role": "user", "content": "..."}} and the like'
        )
    places = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i > 0]
    if not places:
        raise ConfigError(f"{where}: no message of the assistant follows another one")
    for number, place in enumerate(places, start=1):
        before: list[Message] = [dict(m) for m in messages[:place]]
        yield SampleRecord(
            id=name if number == 1 else f"{name}#{number}",
            prompt=before, completion=messages[place]["content"],
        )  # fmt: skip


def _pair(row: Mapping[str, Any], name: str, where: str) -> SampleRecord:
    prompt = row.get("prompt")
    answer = row.get("response", row.get("completion"))
    if not isinstance(prompt, str | list) or not isinstance(answer, str):
        raise ConfigError(
            f"{where}: is no training row; it has {', '.join(map(repr, row)) or 'nothing'}, "
            f"and needs {_FORMS}"
        )
    return SampleRecord(
        id=name, prompt=prompt, completion=answer, prompt_ids=row.get("prompt_ids"),
        completion_ids=row.get("completion_ids"), finish_reason=row.get("finish_reason") or "",
    )  # fmt: skip
