"""Texts as training rows: documents joined by the end-of-sequence token, cut at equal lengths."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tenfold.errors import ConfigError

_TEXTS_PER_CALL = 512


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
