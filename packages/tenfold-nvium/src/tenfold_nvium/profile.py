"""`nvium:profile`: where tokens leave, how good each head is, and what that looks like.

Per prompt or text: a generated continuation with its exits, and a teacher-forced pass over the
text with every head's log-probability and the mixture weights. The report shows text shaded by
depth, exit shares by token class, each head's loss beside the mixture's, what the routers
answer, how many positions wait while decoding, and what depth gains by position.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from tenfold.capabilities import Context, Dataset
from tenfold.lm.tokenizer import token_pieces
from tenfold.records import (
    GenerationConfig,
    ItemResult,
    Metric,
    Metrics,
    Record,
    TextRecord,
    WorkItem,
    WorkItems,
)
from tenfold.stats import MeanSum, RatioSum

from tenfold_nvium.exactness import prompt_of, require_nvium
from tenfold_nvium.histograms import gain_by_position, gate_counts, shares_by_class
from tenfold_nvium.lm import NviumLM
from tenfold_nvium.mixture import exit_log_probs
from tenfold_nvium.scoring import ScoredPart, gates_and_heads, scored_part
from tenfold_nvium.tokens import ordered_classes, piece_classes

if TYPE_CHECKING:
    from tenfold.report import Block

SHOWN = 8
"""Texts that the report shows in full."""


class Profile:
    """One item per record; see the module.

    Args:
        max_new_tokens: tokens to generate after a prompt (0 generates nothing).
        temperature, top_k, top_p: as everywhere; 0 decodes greedily, with certificates.
        max_text_tokens: longest text that is scored; longer ones are cut.
    """

    def __init__(
        self,
        max_new_tokens: int = 48,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        max_text_tokens: int = 256,
    ) -> None:
        self.max_new_tokens, self.max_text_tokens = max_new_tokens, max_text_tokens
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self._config(0)  # a wrong setting is reported when the run is built

    def _config(self, seed: int) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=max(1, self.max_new_tokens),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=seed,
        )

    def plan(self, ctx: Context, data: Mapping[str, Dataset]) -> WorkItems:
        """Every record of the dataset."""
        return WorkItems(WorkItem(record.id, record) for record in data["dataset"].load())

    def run(
        self, ctx: Context, models: Mapping[str, Any], items: Iterable[WorkItem]
    ) -> Iterator[ItemResult]:
        """Generates and scores, record by record."""
        lm = require_nvium(models)
        for item in items:
            values: dict[str, Any] = {"depths": lm.model.config.depths}
            if self.max_new_tokens:
                values["generated"] = self._generate(lm, prompt_of(item.payload), ctx.seed)
            part = scored_part(lm, item.payload, self.max_text_tokens)
            if part is not None and part.ids:
                values["scored"] = self._score(lm, part, item.payload)
            yield ItemResult(item.id, values)

    def _generate(self, lm: NviumLM, prompt: Any, seed: int) -> dict[str, Any]:
        """A continuation of the prompt with its exits and its text, piece by piece."""
        (done,) = lm.generate([prompt], self._config(seed))[0]
        return {
            "prompt": prompt if isinstance(prompt, str) else lm.render_chat(prompt),
            "pieces": token_pieces(lm, done.token_ids),
            "exits": done.stats["exits"],
            "prompt_tokens": len(lm.prompt_ids(prompt)),
            "max_deferred": lm.max_deferred or lm.model.config.max_deferred,
            "policy": done.stats["policy"],
        }

    def _score(self, lm: NviumLM, part: ScoredPart, record: Record) -> dict[str, Any]:
        """Per token of a given text its expected depth, and sums: each head's loss, exit
        shares, gates by tenths, gain of depth by position."""
        gates, heads = gates_and_heads(lm, part.before, part.ids)
        weights = exit_log_probs(gates)
        depths = torch.tensor(lm.model.config.depths).double() / lm.model.config.num_hidden_layers
        pieces = token_pieces(lm, part.ids)
        # Spans are those of a text, not of a prompt's reference.
        spans = record.metadata.get("token_classes") if isinstance(record, TextRecord) else None
        classes = piece_classes(pieces, spans)
        return {
            "pieces": pieces,
            "classes": classes,
            "depth": (weights.exp() @ depths).tolist(),
            "shares": weights.exp().sum(0).tolist(),
            "head_loss": (-heads).sum(0).tolist(),
            "loss": float(-(weights + heads).logsumexp(-1).sum()),
            "tokens": len(part.ids),
            "class_shares": shares_by_class(classes, weights.exp()),
            "gates": gate_counts(gates.sigmoid()),
            "gain": gain_by_position(heads, len(part.before)),
        }

    def aggregate(self, ctx: Context, results: Iterable[ItemResult]) -> Metrics:
        """Mean depth and exit shares (generated, scored), losses, depth by token class."""
        sums = _Sums()
        for result in results:
            sums.add(result.values)
        return list(sums.metrics())

    def report(
        self, ctx: Context, results: Iterable[ItemResult], metrics: Metrics
    ) -> Iterator[Block]:
        """Shaded texts and charts, from the items alone."""
        from tenfold_nvium.profile_report import profile_blocks

        yield from profile_blocks(results, metrics, SHOWN)


@dataclass(slots=True)
class _Sums:
    """Running sums over items."""

    loss: RatioSum = field(default_factory=RatioSum)
    heads: list[RatioSum] = field(default_factory=list)
    depth: MeanSum = field(default_factory=MeanSum)
    shares: list[float] = field(default_factory=list)
    by_class: dict[str, MeanSum] = field(default_factory=dict)
    exits: list[int] = field(default_factory=list)
    depths: Sequence[int] = ()

    def add(self, values: Mapping[str, Any]) -> None:
        self.depths = values["depths"]
        count = len(self.depths)
        self.exits = self.exits or [0] * count
        for k in values.get("generated", {}).get("exits", ()):
            self.exits[k - 1] += 1
        scored = values.get("scored")
        if not scored or not scored["tokens"]:
            return
        self.heads = self.heads or [RatioSum() for _ in range(count)]
        self.shares = self.shares or [0.0] * count
        self.loss.add(scored["loss"], scored["tokens"])
        for k in range(count):
            self.heads[k].add(scored["head_loss"][k], scored["tokens"])
            self.shares[k] += scored["shares"][k]
        for name, depth in zip(scored["classes"], scored["depth"], strict=True):
            self.depth.add(depth)
            self.by_class.setdefault(name, MeanSum()).add(depth)

    def metrics(self) -> Iterator[Metric]:
        generated = sum(self.exits)
        if generated:
            mean = sum(n * d for n, d in zip(self.exits, self.depths, strict=True))
            yield Metric("generated_depth", mean / generated / self.depths[-1], generated)
            for k, n in enumerate(self.exits):
                yield Metric("generated_share", n / generated, generated, group=f"exit={k + 1}")
        tokens = self.depth.n
        if not tokens:
            return
        yield Metric(
            "loss", self.loss.ratio, tokens, self.loss.interval(), higher_is_better=False,
            unit="nats",
        )  # fmt: skip
        yield Metric("expected_depth", self.depth.mean, tokens, self.depth.interval())
        for k, (head, share) in enumerate(zip(self.heads, self.shares, strict=True)):
            group = f"exit={k + 1}"
            yield Metric(
                "head_loss", head.ratio, tokens, head.interval(), higher_is_better=False,
                unit="nats", group=group,
            )  # fmt: skip
            yield Metric("share", share / tokens, tokens, group=group)
        for name in ordered_classes(self.by_class):
            line = self.by_class[name]
            yield Metric(
                "expected_depth", line.mean, line.n, line.interval(), group=f"class={name}"
            )
