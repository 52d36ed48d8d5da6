"""Training rows of any length, five bytes per token in memory.

A row is token ids and which of them are supervised. Rows that no block can begin in are left out
and counted: a block needs a token before its anchor, and two supervised ones in a row.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

import torch
from tenfold.lm.packing import IGNORED
from torch import Tensor
from torch.utils.data import Dataset


class TokenRows(Dataset):
    """Rows `{"input_ids": [L], "labels": [L]}` (int64); unsupervised labels are `IGNORED`.

    Attributes:
        skipped: rows that were offered and left out.
    """

    def __init__(self) -> None:
        self._tokens, self._ends = array("i"), array("q", [0])
        self._supervised = bytearray()
        self._order: array[int] | None = None
        self.skipped = 0

    def add(self, ids: Sequence[int], supervised: Sequence[bool]) -> bool:
        """Takes a row, unless it cannot be drafted in; whether it did."""
        usable = len(ids) == len(supervised) and any(
            supervised[i] and supervised[i + 1] for i in range(1, len(ids) - 1)
        )
        if not usable:
            self.skipped += 1
            return False
        self._tokens.extend(ids)
        self._supervised.extend(map(bool, supervised))
        self._ends.append(len(self._tokens))
        return True

    def __len__(self) -> int:
        return len(self._ends) - 1 if self._order is None else len(self._order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        begin, end = self._span(index)
        tokens = torch.tensor(self._tokens[begin:end], dtype=torch.int64)
        mask = torch.tensor(list(self._supervised[begin:end]), dtype=torch.bool)
        return {"input_ids": tokens, "labels": tokens.masked_fill(~mask, IGNORED)}

    def _span(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = index if self._order is None else self._order[index]
        return self._ends[row], self._ends[row + 1]

    def fingerprint(self) -> str:
        """Content hash of the rows, in their order."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            begin, end = self._span(index)
            digest.update((end - begin).to_bytes(8, "little"))
            digest.update(self._tokens[begin:end].tobytes())
            digest.update(self._supervised[begin:end])
        return digest.hexdigest()[:16]

    def subset(self, indices: Iterable[int]) -> TokenRows:
        """The rows of these indices, in their order; the tokens are shared."""
        part = TokenRows()
        part.skipped = self.skipped
        part._tokens, part._ends, part._supervised = self._tokens, self._ends, self._supervised
        order = self._order
        part._order = array("q", (i if order is None else order[i] for i in indices))
        return part

    def split(self, held_out: int, seed: int = 0) -> tuple[TokenRows, TokenRows]:
        """Rows to train on and `held_out` others, chosen by `seed`; both keep their order."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator).tolist()
        return self.subset(sorted(order[held_out:])), self.subset(sorted(order[:held_out]))
