"""Texts as training rows: documents joined by the end-of-sequence token, cut at equal lengths."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tenfold.errors import ConfigError

_TEXTS_PER_CALL = 512

IGNORED = -100
"""Label of a token that is not scored."""


class PackedRows(Dataset):
    """Rows of `context_length` tokens, held as one `[N, context_length]` int32 tensor.

    A row is `{"input_ids": [L], "labels": [L]}` (int64, equal): models shift labels themselves.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.tokens[index].long()
        return {"input_ids": row, "labels": row.clone()}

    def fingerprint(self) -> str:
        """Content hash of the rows."""
        digest = hashlib.sha256(str(tuple(self.tokens.shape)).encode())
        digest.update(self.tokens.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def split(self, held_out: int, seed: int = 0) -> tuple[PackedRows, PackedRows]:
        """Training rows and `held_out` others, chosen by `seed`; both keep their order.

        Raises:
            ConfigError: nothing would be left to train on.
        """
        if not 0 <= held_out < len(self):
            raise ConfigError(f"cannot hold out {held_out} of {len(self)} rows")
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator)
        kept, held = order[held_out:].sort().values, order[:held_out].sort().values
        return PackedRows(self.tokens[kept]), PackedRows(self.tokens[held])


class AnswerRows(Dataset):
    """Rows of different lengths, each a prompt and its answer.

    A row is `{"input_ids": [L], "labels": [L]}` (int64); the prompt's labels are `IGNORED`.
    """

    def __init__(self, rows: Sequence[tuple[list[int], int]]) -> None:
        self._rows = list(rows)
        """Token ids, and how many of them are the prompt."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, prompt = self._rows[index]
        tokens = torch.tensor(ids)
        labels = tokens.clone()
        labels[:prompt] = IGNORED
        return {"input_ids": tokens, "labels": labels}

    def fingerprint(self) -> str:
        """Content hash of the rows."""
        return hashlib.sha256(repr(self._rows).encode()).hexdigest()[:16]

    def subset(self, indices: Iterable[int]) -> AnswerRows:
        """The rows of these indices, in their order."""
        return AnswerRows([self._rows[i] for i in indices])

    def split(self, held_out: int, seed: int = 0) -> tuple[AnswerRows, AnswerRows]:
        """Rows to train on and `held_out` others, chosen by `seed`; both keep their order."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator).tolist()
        return self.subset(sorted(order[held_out:])), self.subset(sorted(order[:held_out]))


def pack_tokens(texts: Iterable[str], tokenizer: Any, context_length: int) -> PackedRows:
    """Rows of exactly `context_length` tokens from texts in their order.

    Each text is followed by the end-of-sequence token; the last, unfilled row is dropped.
    Deterministic: equal texts and tokenizer give equal rows.

    Args:
        texts: documents; read once, in batches.
        tokenizer: a transformers tokenizer with an end-of-sequence token.
        context_length: tokens per row, at least 2.

    Raises:
        ConfigError: no end-of-sequence token, or too little text for one row.
    """
    if context_length < 2:
        raise ConfigError(f"context_length is {context_length}; it must be at least 2")
    if tokenizer.eos_token_id is None:
        raise ConfigError("packing joins documents by the end-of-sequence token; there is none")
    stream = torch.cat([*_encoded(texts, tokenizer), torch.zeros(0, dtype=torch.int32)])
    rows = stream.numel() // context_length
    if rows == 0:
        raise ConfigError(
            f"the texts have {stream.numel()} tokens, less than one row of {context_length}",
            hint="give more text or a smaller context_length",
        )
    return PackedRows(stream[: rows * context_length].view(rows, context_length))


def _encoded(texts: Iterable[str], tokenizer: Any) -> Iterator[Tensor]:
    """Token ids of the documents, each with its end token, in batches."""
    remaining = iter(texts)
    while batch := list(islice(remaining, _TEXTS_PER_CALL)):
        rows = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        flat = [token for row in rows for token in (*row, tokenizer.eos_token_id)]
        yield torch.tensor(flat, dtype=torch.int32)
