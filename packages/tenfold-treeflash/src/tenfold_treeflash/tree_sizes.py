"""`treeflash:tree-sizes`: one decoder with every tree size, on the same prompts.

Sizes take turns on every prompt, so that a machine that slows down slows all of them; the first
turn is not timed. Size 1 is plain decoding in the same loop. Rates are of decoding after the first
token; seconds by stage are those of the decoder's own clocks, which wait for no device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from tenfold.capabilities import Context, Dataset
from tenfold.errors import ConfigError
from tenfold.records import ItemResult, Metric, Metrics, WorkItem, WorkItems
from tenfold.seeds import derive
from tenfold.stats import bootstrap, median

from tenfold_treeflash.decoding import DecodingStats
from tenfold_treeflash.generation import generate
from tenfold_treeflash.lm import TreeDecoder, with_drafter

if TYPE_CHECKING:
    from tenfold.report import Block

STAGES = ("draft", "tables", "tree", "verify", "walk", "commit")
"""Of a round, in their order."""


class TreeSizes:
    """One item per prompt; see the module.

    Item values: per size `tokens` and `accepted`, and per timed turn `decode_s` and `stages`
    (seconds by stage).

    Args:
        tree_sizes: nodes per round.
        max_new_tokens: tokens per prompt.
        temperature: 0 decodes greedily.
        rounds: timed turns per prompt.
        max_prompt_tokens: longer prompts keep their end only.
        seed: of sampling; None takes the run's.
    """

    def __init__(
        self,
        tree_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        rounds: int = 2,
        max_prompt_tokens: int = 512,
        seed: int | None = None,
    ) -> None:
        if not tree_sizes or min(tree_sizes) < 1:
            raise ConfigError(f"tree_sizes is {list(tree_sizes)}; name numbers of at least 1")
        if max_new_tokens < 2:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}; decoding needs at least 2")
        if not temperature >= 0:
            raise ConfigError(f"temperature is {temperature}; it must be 0 or more")
        self.tree_sizes, self.max_new_tokens = sorted(set(tree_sizes)), max_new_tokens
        self.temperature, self.rounds, self.seed = temperature, rounds, seed
        self.max_prompt_tokens = max_prompt_tokens

    def plan(self, ctx: Context, data: Mapping[str, Dataset]) -> WorkItems:
        """Every record of the dataset."""
        return WorkItems(WorkItem(record.id, record) for record in data["dataset"].load())

    def run(
        self, ctx: Context, models: Mapping[str, Any], items: Iterable[WorkItem]
    ) -> Iterator[ItemResult]:
        """Decodes prompt by prompt.

        Raises:
            ConfigError: the model has no drafter.
        """
        model = with_drafter(models["model"], "treeflash:tree-sizes")
        seed = ctx.seed if self.seed is None else self.seed
        for item in items:
            record = item.payload
            text = getattr(record, "prompt", None) or getattr(record, "text", "")
            prompt = model.base.prompt_ids(text)[-self.max_prompt_tokens :]
            if model.context_length - len(prompt) < 2:
                yield ItemResult(item.id, error="the prompt leaves no room for two tokens")
                continue
            yield ItemResult(item.id, {"sizes": self._timed(model, prompt, derive(seed, item.id))})

    def _timed(self, model: TreeDecoder, prompt: list[int], seed: int) -> dict[str, dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = {
            str(size): {"decode_s": [], "stages": []} for size in self.tree_sizes
        }
        for turn in range(self.rounds + 1):
            start = turn % len(self.tree_sizes)
            for size in self.tree_sizes[start:] + self.tree_sizes[:start]:
                stats = self._decode(model, prompt, size, seed)
                row = rows[str(size)]
                row |= {"tokens": stats.new_tokens, "accepted": list(stats.accepted)}
                if turn:
                    row["decode_s"].append(stats.total_s - stats.first_token_s)
                    row["stages"].append({s: stats.seconds.get(s, 0.0) for s in STAGES})
        return rows

    def _decode(self, model: TreeDecoder, prompt: list[int], size: int, seed: int) -> DecodingStats:
        assert model.drafter is not None
        base: Any = model.base
        ids = torch.tensor([prompt], device=model.target.device)
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {"do_sample": True, "temperature": float(self.temperature), "top_k": 0}
            sampling["seeds"] = [seed % 2**62]
        done = generate(
            model.target.model, ids, drafter=model.drafter.network, checked=True,
            settings=replace(model.settings, tree_size=size), attention_mask=torch.ones_like(ids),
            max_new_tokens=min(self.max_new_tokens, model.context_length - len(prompt)),
            pad_token_id=base.pad_id, return_dict_in_generate=True, **sampling,
        )  # fmt: skip
        return done.spec_stats[0]

    def aggregate(self, ctx: Context, results: Iterable[ItemResult]) -> Metrics:
        """Per size: rate, tokens per round, milliseconds per round by stage."""
        rows = [r.values["sizes"] for r in results if "sizes" in r.values]
        metrics: list[Metric] = []
        for size in rows[0] if rows else ():
            metrics += _metrics([row[size] for row in rows], f"tree_size={size}")
        return metrics

    def report(
        self, ctx: Context, results: Iterable[ItemResult], metrics: Metrics
    ) -> Iterator[Block]:
        """Rates, tokens per round and stages over sizes."""
        from tenfold_treeflash.reports import sizes_blocks

        yield from sizes_blocks(metrics)


def _metrics(rows: Sequence[Mapping[str, Any]], group: str) -> Iterator[Metric]:
    def rate(part: Sequence[Mapping[str, Any]]) -> float:
        seconds = sum(median(row["decode_s"]) for row in part)
        return sum(max(row["tokens"] - 1, 0) for row in part) / max(seconds, 1e-9)

    def efficiency(part: Sequence[Mapping[str, Any]]) -> float:
        counts = sum(len(row["accepted"]) for row in part)
        return sum(sum(row["accepted"]) for row in part) / max(counts, 1)

    yield Metric("decode_tokens_per_second", rate(rows), len(rows), bootstrap(rows, rate), True,
                 "tokens/s", group)  # fmt: skip
    rounds = sum(len(row["accepted"]) for row in rows)
    if not rounds:
        return
    yield Metric("block_efficiency", efficiency(rows), rounds, bootstrap(rows, efficiency), True,
                 "tokens", group)  # fmt: skip
    for stage in STAGES:
        # The middle turn of every prompt, per round.
        seconds = sum(median([turn[stage] for turn in row["stages"]]) for row in rows)
        yield Metric(f"{stage}_ms", 1000 * seconds / rounds, rounds, None, False, "ms", group)
