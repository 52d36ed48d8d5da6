"""`treeflash:diagnostics`: drafted distributions against the model's, by depth.

Blocks begin at random tokens of given texts. For slot `k` the model's distribution is the one
after the true tokens up to slot `k - 1`; the drafter's is its marginal, and the corrected one for
the true token at slot `k - 1`. Nothing is generated.

    tvd        1/2 sum |p - q|
    coverage   the model's probability on the drafter's n best tokens
    kl         KL(p || q), nats

Rounds are simulated, too (see `simulation`): at places that a whole block fits behind, a tree is
drafted, and the text's own tokens walk through it. For texts that the model wrote (`core:generated`
at the temperature in question) that is what decoding would accept; for other texts it is how well
they are foreseen.

    block_efficiency    tokens per round, the model's own last one included, by tree size
    acceptance          share of walks that get past a depth, of those that get there
    ended               why walks end
    calibration_error   mean distance of predicted and observed path probabilities, over bins
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from tenfold.capabilities import Context, Dataset
from tenfold.errors import ConfigError
from tenfold.records import ItemResult, Metric, Metrics, WorkItem, WorkItems
from tenfold.seeds import derive
from tenfold.stats import bootstrap, wilson
from torch import Tensor

from tenfold_treeflash.anchors import make_blocks
from tenfold_treeflash.lm import TreeDecoder, with_drafter
from tenfold_treeflash.objective import DraftObjective, ObjectiveSettings
from tenfold_treeflash.simulation import ENDINGS, SimulatedRound, simulate, whole_blocks

if TYPE_CHECKING:
    from tenfold.report import Block

MARGINAL, CORRECTED = "marginal", "corrected"
BINS = 10
"""Bins of equal width for path probabilities."""


class Diagnostics:
    """One item per text; see the module.

    Item values: `kinds`, per kind and measure a list over depths of means over the text's blocks;
    `rounds`, counts of the simulated ones (see `_counts`).

    Args:
        anchors: blocks per text.
        max_text_tokens: longer texts are cut.
        coverage: numbers of best tokens.
        tree_sizes: nodes per simulated round; the largest one counts for all but efficiency.
        seed: of the blocks; None takes the run's.
    """

    def __init__(
        self,
        anchors: int = 16,
        max_text_tokens: int = 256,
        coverage: Sequence[int] = (1, 5, 16),
        tree_sizes: Sequence[int] = (1, 4, 8, 16, 32, 64),
        seed: int | None = None,
    ) -> None:
        for name, numbers in (("coverage", coverage), ("tree_sizes", tree_sizes)):
            if not numbers or min(numbers) < 1:
                raise ConfigError(f"{name} is {list(numbers)}; name numbers of at least 1")
        self.tree_sizes = sorted(set(tree_sizes))
        self.anchors, self.max_text_tokens = anchors, max_text_tokens
        self.coverage, self.seed = sorted(set(coverage)), seed

    def plan(self, ctx: Context, data: Mapping[str, Dataset]) -> WorkItems:
        """Every record of the dataset."""
        return WorkItems(WorkItem(record.id, record) for record in data["dataset"].load())

    def run(
        self, ctx: Context, models: Mapping[str, Any], items: Iterable[WorkItem]
    ) -> Iterator[ItemResult]:
        """Measures text by text.

        Raises:
            ConfigError: the model has no drafter.
        """
        model = with_drafter(models["model"], "treeflash:diagnostics")
        seed = ctx.seed if self.seed is None else self.seed
        for item in items:
            ids, begin = self._ids(model, item.payload)
            if len(ids) < 3:
                yield ItemResult(item.id, error="the text has fewer than three tokens")
                continue
            own = derive(seed, item.id)
            values = self._measure(model, ids, own)
            yield ItemResult(item.id, {**values, "rounds": self._rounds(model, ids, begin, own)})

    def _ids(self, model: Any, record: Any) -> tuple[list[int], int]:
        """A text's tokens, and where what the model wrote begins."""
        own = getattr(record, "completion_ids", None)
        begin = 0
        if own is not None and record.prompt_ids is not None:
            ids, begin = [*record.prompt_ids, *own], len(record.prompt_ids)
        else:
            text = getattr(record, "text", None)
            ids = model.encode(text if text is not None else record.completion)
        return ids[: min(self.max_text_tokens, model.context_length)], begin

    def _rounds(self, model: TreeDecoder, ids: list[int], begin: int, seed: int) -> dict[str, Any]:
        """Counts of rounds at random places of what the model wrote."""
        assert model.drafter is not None
        network = model.drafter.network
        settings = replace(model.settings, tree_size=max(self.tree_sizes))
        size = settings.block_size or network.config.block_size
        fitting = [place for place in whole_blocks(len(ids), size) if place >= begin]
        count = min(self.anchors, len(fitting))
        places = sorted(random.Random(derive(seed, "places")).sample(fitting, count))
        return _counts(simulate(model.target, network, ids, places, settings), self.tree_sizes)

    @torch.inference_mode()
    def _measure(self, model: TreeDecoder, ids: list[int], seed: int) -> dict[str, Any]:
        assert model.drafter is not None
        drafter, target = model.drafter.network, model.target
        tokens = torch.tensor([ids], device=target.device)
        blocks = make_blocks(tokens, tokens, self.anchors, drafter.config.block_size, [seed])
        phase = "treeflash" if drafter.looks_back else "dflash"
        objective = DraftObjective(target, ObjectiveSettings(phase=phase, anchors=self.anchors))
        states, marginal, corrected = objective.states(drafter, tokens, None, blocks)
        head = target.head
        out: dict[str, Any] = {MARGINAL: {}, CORRECTED: {}}
        for depth in range(1, blocks.tokens.shape[-1]):
            chosen = blocks.scored[0, :, depth]
            if not bool(chosen.any()):
                break
            before = blocks.positions[0, chosen, depth] - 1
            p = head(states[0, before]).float().softmax(-1)
            for kind, drafted in ((MARGINAL, marginal), (CORRECTED, corrected)):
                if drafted is not None:
                    q = head(drafted[0, chosen, depth]).float().softmax(-1)
                    for name, value in self._numbers(p, q).items():
                        out[kind].setdefault(name, []).append(value)
        if corrected is None:
            del out[CORRECTED]
        return {"kinds": out, "blocks": int((blocks.scored[0].any(-1)).sum())}

    def _numbers(self, p: Tensor, q: Tensor) -> dict[str, float]:
        kl = (p * (p.clamp_min(1e-12).log() - q.clamp_min(1e-12).log())).sum(-1)
        best = q.topk(min(max(self.coverage), q.shape[-1])).indices
        seen = p.gather(-1, best).cumsum(-1)
        numbers = {
            "tvd": float((p - q).abs().sum(-1).mean() / 2),
            "kl": float(kl.mean()),
        }
        for n in self.coverage:
            numbers[f"coverage@{n}"] = float(seen[:, min(n, seen.shape[1]) - 1].mean())
        return numbers

    def aggregate(self, ctx: Context, results: Iterable[ItemResult]) -> Metrics:
        """Means over texts by kind, measure and depth; and those of simulated rounds."""
        kept = list(results)
        return [*_distances(kept), *_round_metrics(kept)]

    def report(
        self, ctx: Context, results: Iterable[ItemResult], metrics: Metrics
    ) -> Iterator[Block]:
        """A curve per measure, and what rounds did."""
        from tenfold_treeflash.reports import diagnostics_blocks, rounds_blocks

        kept = list(results)
        yield from diagnostics_blocks(by_depth(kept))
        yield from rounds_blocks(metrics, calibration(kept), histogram(kept))


def _distances(results: Iterable[ItemResult]) -> list[Metric]:
    return [
            Metric(
                name, sum(values) / len(values), len(values),
                bootstrap(values, lambda part: sum(part) / len(part)),
                higher_is_better=name.startswith("coverage"), unit="nats" if name == "kl" else "",
                group=f"{kind} depth={depth}",
            )
            for (kind, name, depth), values in by_depth(results).items()
        ]  # fmt: skip


def by_depth(results: Iterable[ItemResult]) -> dict[tuple[str, str, int], list[float]]:
    """`(kind, measure, depth)` to one value per text."""
    table: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for result in results:
        kinds: Mapping[str, Mapping[str, Sequence[float]]] = result.values.get("kinds", {})
        for kind, measures in kinds.items():
            for name, values in measures.items():
                for depth, value in enumerate(values, start=1):
                    table[kind, name, depth].append(value)
    return dict(table)


# --- Simulated rounds -----------------------------------------------------------------------------


def _counts(rounds: Sequence[SimulatedRound], sizes: Sequence[int]) -> dict[str, Any]:
    """What happened in the rounds of one text.

    `count`; per size `tokens` and `endings`; of the largest size `lengths` (rounds by tokens),
    `reached` and `passed` (by depth, from 1) and `bins` (nodes, and the sums of their predicted
    path probabilities and of how often the text went through them).
    """
    largest = max(sizes)
    lengths = Counter(len(r.path()) for r in rounds)
    depth = max((r.tables.depth for r in rounds), default=0)
    bins = [[0, 0.0, 0] for _ in range(BINS)]
    for simulated in rounds:
        taken = set(simulated.path())
        for node in range(1, len(simulated.tree)):
            chance = math.exp(simulated.tree.log_probs[node])
            row = bins[min(int(chance * BINS), BINS - 1)]
            row[0] += 1
            row[1] += chance
            row[2] += node in taken
    return {
        "count": len(rounds),
        "tokens": {str(size): sum(len(r.path(size)) for r in rounds) for size in sizes},
        "endings": dict(Counter(r.ending(largest) for r in rounds)),
        "lengths": {str(tokens): number for tokens, number in sorted(lengths.items())},
        "reached": [sum(n for t, n in lengths.items() if t >= d) for d in range(1, depth + 1)],
        "passed": [sum(n for t, n in lengths.items() if t > d) for d in range(1, depth + 1)],
        "bins": bins,
    }


def _round_metrics(results: Sequence[ItemResult]) -> Iterator[Metric]:
    rows = [r.values["rounds"] for r in results if r.values.get("rounds", {}).get("count")]
    if not rows:
        return
    total = sum(row["count"] for row in rows)
    for size in rows[0]["tokens"]:

        def efficiency(part: Sequence[Mapping[str, Any]], size: str = size) -> float:
            return sum(row["tokens"][size] for row in part) / sum(row["count"] for row in part)

        yield Metric(
            "block_efficiency", efficiency(rows), total, bootstrap(rows, efficiency), True,
            "tokens", f"tree_size={size}",
        )  # fmt: skip
    for depth in range(max(len(row["reached"]) for row in rows)):
        reached, passed = (
            sum(row[name][depth] for row in rows if depth < len(row[name]))
            for name in ("reached", "passed")
        )
        if reached:
            yield Metric("acceptance", passed / reached, reached, wilson(passed, reached), True, "",
                         f"depth={depth + 1}")  # fmt: skip
    for ending in ENDINGS:
        number = sum(row["endings"].get(ending, 0) for row in rows)
        yield Metric("ended", number / total, total, wilson(number, total), None, "", ending)
    bins = calibration(results)
    nodes = sum(n for n, _, _ in bins)
    if nodes:
        gap = sum(n * abs(predicted - seen) for n, predicted, seen in bins)
        yield Metric("calibration_error", gap / nodes, nodes, None, False)


def calibration(results: Iterable[ItemResult]) -> list[tuple[int, float, float]]:
    """Per bin of path probabilities: nodes, mean prediction, share that the texts went through;
    empty bins are left out."""
    totals = [[0, 0.0, 0] for _ in range(BINS)]
    for result in results:
        for row, values in zip(totals, result.values.get("rounds", {}).get("bins", ()),
                               strict=False):  # fmt: skip
            for i, value in enumerate(values):
                row[i] += value
    return [(int(n), predicted / n, seen / n) for n, predicted, seen in totals if n]


def histogram(results: Iterable[ItemResult]) -> dict[int, int]:
    """Rounds by their number of tokens, at the largest tree size."""
    totals: Counter[int] = Counter()
    for result in results:
        for tokens, number in result.values.get("rounds", {}).get("lengths", {}).items():
            totals[int(tokens)] += number
    return dict(sorted(totals.items()))
