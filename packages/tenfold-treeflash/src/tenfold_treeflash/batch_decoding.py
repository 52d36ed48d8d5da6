"""The draft-and-verify loop for several texts at once.

Rows accept different numbers of tokens. Every row's tokens stand at the left of the caches, so a
token's slot is its position; what a row has not filled is masked until it is. A round's nodes are
appended behind the longest row, and each row's accepted ones then move to its own end. Prompts are
padded on the right, where causal attention never looks. Rows that have ended are dropped.

Shapes: `R` rows, `n` tokens or nodes of a pass, `C` slots of a cache, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tenfold_treeflash.draft_cache import DraftCache

if TYPE_CHECKING:
    from tenfold_treeflash.decoding import Chooser, DecodingStats, SpeculativeDecoder


class BatchDecoding:
    """State of one `decode_batch` call; lists by active row."""

    def __init__(
        self,
        decoder: SpeculativeDecoder,
        prompts: Sequence[Sequence[int]],
        choosers: Sequence[Chooser],
        features: Callable[[], Tensor],
    ) -> None:
        from tenfold_treeflash.decoding import Clock, DecodingStats

        self._decoder, self._target, self._features = decoder, decoder.target, features
        self._texts = [list(prompt) for prompt in prompts]
        self._stats = [DecodingStats(prompt_tokens=len(text)) for text in self._texts]
        self._cache, self._context = decoder.target.new_cache(), DraftCache()
        self._clock = Clock()
        self.ids, self._choosers = list(self._texts), list(choosers)
        self._records = list(self._stats)
        self._rates = [decoder.new_rates() for _ in self._texts]
        self.lengths = [0] * len(self._texts)

    def run(self) -> tuple[list[list[int]], list[DecodingStats]]:
        """All texts, and a record of each; times are those of the whole batch."""
        self.begin()
        while self.ids:
            self.round()
        for text, stats in zip(self._texts, self._stats, strict=True):
            stats.new_tokens = len(text) - stats.prompt_tokens
            stats.seconds = dict(self._clock.seconds)
        return self._texts, self._stats

    def begin(self) -> None:
        """Reads the prompts and chooses the first tokens."""
        counts = [len(text) for text in self.ids]
        width, device = max(counts), self._target.device
        padded = torch.tensor([t + [t[-1]] * (width - len(t)) for t in self.ids], device=device)
        logits = self._target.prefill_rows(padded, counts, self._cache)
        over = []
        for text, chooser, row in zip(self.ids, self._choosers, logits, strict=True):
            text.append(chooser.choose(text, row))
            over.append(chooser.ends(text))
        self._clock.lap("prefill")
        self._commit([list(range(count)) for count in counts], over, behind=0)
        for stats in self._stats:
            stats.first_token_s = self._clock.elapsed
        self._clock.lap("draft")

    def round(self) -> None:
        """Drafts, verifies and commits one round of every active row."""
        behind, clock = self._cache.length, self._clock
        planner, began = self._decoder.planner(self._choosers), self._clock.elapsed
        anchors = [text[-1] for text in self.ids]
        trees = self._decoder.trees(
            self._context, anchors, self.lengths, self._choosers, self._rates, clock
        )
        logits = self._target.verify_rows(trees, self.lengths, self._cache)
        clock.lap("verify")
        best = None
        if all(chooser.greedy for chooser in self._choosers):
            best = logits.argmax(-1).tolist()
        paths, over = [], []
        for row, tree in enumerate(trees):
            path, ended = self._decoder.walk(
                tree, logits[row], self.ids[row], self._choosers[row], self._rates[row],
                None if best is None else best[row],
            )  # fmt: skip
            self._decoder.record(self._records[row], tree, path, self.ids[row][-1])
            paths.append(path)
            over.append(ended)
        clock.lap("walk")
        self._commit(paths, over, behind)
        clock.lap("commit")
        if planner is not None:
            planner.book(trees, [len(path) for path in paths], clock.elapsed - began)

    def _commit(self, paths: list[list[int]], over: list[bool], behind: int) -> None:
        """Keeps the accepted nodes of the rows that go on, and drops the others."""
        for record, ended in zip(self._records, over, strict=True):
            if ended:
                record.total_s = self._clock.elapsed
        alive = [row for row, ended in enumerate(over) if not ended]
        dropped = len(alive) < len(over)
        if dropped:
            for name in ("ids", "_choosers", "_records", "_rates", "lengths"):
                setattr(self, name, [getattr(self, name)[row] for row in alive])
            paths = [paths[row] for row in alive]
        if not alive:
            return
        rows = torch.tensor(alive, device=self._target.device) if dropped else None
        if rows is not None:
            self._cache.select(rows)
        self._cache.keep_rows(behind, self.lengths, paths)
        if self._decoder.drafts:
            self._read(rows, paths)
        self.lengths = [a + len(path) for a, path in zip(self.lengths, paths, strict=True)]

    def _read(self, rows: Tensor | None, paths: list[list[int]]) -> None:
        """Hands the features of newly accepted tokens to the drafter."""
        drafter, features = self._decoder.drafter, self._features()
        assert drafter is not None
        if rows is not None:
            features = features[rows]
            self._context.select(rows)
        counts = [len(path) for path in paths]
        width, device = max(counts), features.device
        nodes = torch.tensor([p + [p[-1]] * (width - len(p)) for p in paths], device=device)
        chosen = features.gather(1, nodes[..., None].expand(-1, -1, features.shape[-1]))
        starts = torch.tensor(self.lengths, device=device)[:, None]
        positions = starts + torch.arange(width, device=device)
        pairs = drafter.model.context(chosen, positions)
        ends = [a + b for a, b in zip(self.lengths, counts, strict=True)]
        self._context.append_rows(pairs, positions, max(ends))
