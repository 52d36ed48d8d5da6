"""Decoding under a constraint that always closes, with as few forward passes as it takes.

Tokens that the constraint prescribes are written without asking the model (jump-forward): they
enter the cache together with the next tokens that it is asked about. Prompts with a common
beginning are read once. The texts are those of the plain loop, token for token, up to float
noise: noise for sampling belongs to a position, not to a draw.

Shapes: `B` rows, `T` new tokens of the longest row, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tenfold.lm import architecture, constraints
from tenfold.lm.batching import pad_batch
from tenfold.lm.closing import Closer
from tenfold.lm.prefixes import Prefix, shared_prefixes
from tenfold.lm.sampling import GeneratedRow, GenerationRow, RowStopper, warpers, with_noise
from tenfold.records import GenerationConfig

_SLACK = 1.5
"""Cached columns per real one beyond which the cache is compacted."""


def can_jump(model: Any, config: GenerationConfig) -> bool:
    """Whether rows may advance by different numbers of tokens: positions are given, and nothing
    is dropped from the cache by a window. Log-probabilities need every token's own logits, which
    the plain loop records."""
    network = model.model
    return (
        config.logprobs == 0
        and architecture.accepts(network, "position_ids")
        and architecture.sliding_window(network) is None
    )


class _Row:
    """One text being written."""

    def __init__(self, row: GenerationRow, closer: Closer) -> None:
        self.row = row
        self.follower = constraints.Follower(closer, row.limit)
        self.written: list[int] = []
        self.reason = ""
        self.passes = self.forced = self.reused = 0
        self.fed = 0
        """Written tokens that the model has read."""

    @property
    def waiting(self) -> list[int]:
        """Written tokens that the model has not read."""
        return self.written[self.fed :]


class ConstrainedDecoder:
    """One batch of rows.

    Args:
        model: a `CausalLM`.
        rows: what to write.
        config: its `constraint` is `closer`'s.
        closer: the constraint.
        share: read common beginnings of prompts once.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[GenerationRow],
        config: GenerationConfig,
        closer: Closer,
        *,
        share: bool = True,
    ) -> None:
        self._model, self._config, self._share = model, config, share
        self._rows = [_Row(row, closer) for row in rows]
        self._stopper = RowStopper(rows, 0, model, model._eos_ids, config.stop)
        self._warpers = warpers(config) if config.temperature > 0 else None

    @torch.no_grad()
    def run(self) -> list[GeneratedRow]:
        """All rows, in order."""
        for row in self._rows:
            self._jump(row)
        active = [row for row in self._rows if not row.reason]
        if active:
            session, logits = self._read_prompts(active)
            while True:
                active = self._advance(active, logits, session)
                if not active:
                    break
                logits = self._extend(session, [row.waiting for row in active])
                if session.length > _SLACK * max(len(r.row.ids) + len(r.written) for r in active):
                    session.compact()
                for row in active:
                    row.passes += 1
        return [self._done(row) for row in self._rows]

    def _advance(self, active: list[_Row], logits: Tensor, session: Any) -> list[_Row]:
        """Chooses each row's next tokens; the rows that go on, which are then the session's."""
        for row in active:
            row.fed = len(row.written)
        for row, token in zip(active, self._choose(active, logits[:, -1]), strict=True):
            self._write(row, token)
            self._jump(row)
        going = [i for i, row in enumerate(active) if not row.reason]
        if going and len(going) < len(active):
            session.reorder(going)
        return [active[i] for i in going]

    def _choose(self, rows: list[_Row], logits: Tensor) -> list[int]:
        """The next token of each row; logits `[B, V]`."""
        allowed = [row.follower.allowed() for row in rows]
        scores = constraints.masked(logits.float(), allowed)
        if self._warpers is not None:
            no_ids: Any = None
            scores = self._warpers(no_ids, scores)
            seeds = [row.row.seed for row in rows]
            scores = with_noise(scores, seeds, [len(row.written) for row in rows])
        return scores.argmax(-1).tolist()

    def _write(self, row: _Row, token: int) -> None:
        row.written.append(token)
        row.follower.write(token)
        row.reason = self._stopper.reason(row.written, row.row.limit)

    def _jump(self, row: _Row) -> None:
        """Writes all tokens that are prescribed."""
        while not row.reason and isinstance(token := row.follower.allowed(), int):
            self._write(row, token)
            row.forced += 1

    # --- Forward passes -------------------------------------------------------------------------

    def _read_prompts(self, rows: list[_Row]) -> tuple[Any, Tensor]:
        """Prompts and what follows them by prescription; the logits of the last positions."""
        texts = [[*row.row.ids, *row.written] for row in rows]
        prompts = [row.row.ids for row in rows]
        groups = shared_prefixes(prompts) if self._share else []
        for row in rows:
            row.passes += 1
        if not any(group.length for group in groups):
            batch = self._padded(texts)
            session, output = self._model.start(batch.input_ids, batch.attention_mask)
            return session, output.logits
        session = self._read_prefixes(prompts, groups)
        for group in groups:
            for place, member in enumerate(group.rows):
                rows[member].reused = group.length if place else 0
                texts[member] = texts[member][group.length :]
        return session, self._extend(session, texts)

    def _read_prefixes(self, prompts: list[list[int]], groups: list[Prefix]) -> Any:
        """A session of all rows that has read what they share."""
        shared = [prompts[group.rows[0]][: group.length] for group in groups]
        batch = self._padded(shared)
        session, _ = self._model.start(batch.input_ids, batch.attention_mask)
        owner = {row: place for place, group in enumerate(groups) for row in group.rows}
        session.reorder([owner[row] for row in range(len(prompts))])
        return session

    def _extend(self, session: Any, texts: list[list[int]]) -> Tensor:
        """Logits of further tokens, of which rows may have different numbers."""
        batch = self._padded(texts)
        return session.begin(batch.input_ids, batch.attention_mask).logits

    def _padded(self, texts: list[list[int]]) -> Any:
        return pad_batch(texts, self._model.pad_id, side="left", device=self._model.device)

    def _done(self, row: _Row) -> GeneratedRow:
        stats = {"forward_passes": row.passes, "forced_tokens": row.forced}
        if row.reused:
            stats["reused_tokens"] = row.reused
        return GeneratedRow(row.written, row.reason, stats=stats)
