"""Training rows from records: packed texts, or prompts whose answers alone are scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from tenfold.capabilities import Dataset as RecordDataset
from tenfold.capabilities import Tokenizes
from tenfold.errors import ConfigError
from tenfold.lm.packing import AnswerRows, PackedRows, pack_tokens
from tenfold.lm.prompts import continuation_ids, prompt_ids
from tenfold.lm.tokenizer import TokenizerMixin


class Vocabulary(TokenizerMixin):
    """A tokenizer with the `tokenize` capability, and its content hash."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer


Rows = PackedRows | AnswerRows


def texts_of(records: Iterable[Any]) -> Iterator[str]:
    """The texts of text records."""
    return (record.text for record in records)


def answer_row(
    vocabulary: Tokenizes, prompt: Any, answer: str, context_length: int
) -> tuple[list[int], int]:
    """Token ids of prompt, answer and end-of-text token, and the prompt's share of them.

    A row that is too long loses the beginning of its prompt, down to one token, then the end
    of its answer.
    """
    before = prompt_ids(vocabulary, prompt)
    end = [] if vocabulary.eos_id is None else [vocabulary.eos_id]
    after = [*continuation_ids(vocabulary, answer), *end][: context_length - 1]
    before = before[-(context_length - len(after)) :]
    return [*before, *after], len(before)


def rows_of(dataset_kind: str, tokenizer: Any, context_length: int) -> Callable[[Any], Rows]:
    """What turns records of a kind into rows: texts are packed to `context_length`, prompts
    become one row each.

    The function raises ConfigError for a prompt without a reference, or too little text.
    """
    if dataset_kind != "prompt":
        return lambda records: pack_tokens(texts_of(records), tokenizer, context_length)
    vocabulary = Vocabulary(tokenizer)

    def answers(records: Iterable[Any]) -> AnswerRows:
        rows = []
        for record in records:
            if record.reference is None:
                raise ConfigError(
                    f"record {record.id!r} has a prompt without a reference; training on prompts "
                    "needs the answer, training on plain text takes a dataset of texts"
                )
            rows.append(answer_row(vocabulary, record.prompt, record.reference, context_length))
        return AnswerRows(rows)

    return answers


def train_and_held_out(
    dataset: RecordDataset, make_rows: Callable[[Any], Rows], eval_rows: int, seed: int
) -> tuple[Any, Any]:
    """Rows to train on, and at most `eval_rows` held-out ones: from the `validation` split, or
    else a tenth of the rows at most; None where there are none."""
    rows = make_rows(dataset.load())
    if eval_rows <= 0:
        return rows, None
    if "validation" in dataset.splits():
        return rows, spread(make_rows(dataset.load("validation")), eval_rows)
    count = min(eval_rows, len(rows) // 10)
    return rows.split(count, seed) if count else (rows, None)


def spread(rows: Rows, count: int) -> Rows:
    """`count` rows at equal distances, or all of them."""
    if len(rows) <= count:
        return rows
    chosen = torch.linspace(0, len(rows) - 1, count).long()
    return PackedRows(rows.tokens[chosen]) if isinstance(rows, PackedRows) else rows.subset(
        chosen.tolist()
    )  # fmt: skip
