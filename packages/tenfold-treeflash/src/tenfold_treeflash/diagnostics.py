"""`treeflash:diagnostics`: drafted distributions against the model's, by depth.

Blocks begin at random tokens of given texts. For slot `k` the model's distribution is the one
after the true tokens up to slot `k - 1`; the drafter's is its marginal, and the corrected one for
the true token at slot `k - 1`. Nothing is generated.

    tvd        1/2 sum |p - q|
    coverage   the model's probability on the drafter's n best tokens
    kl         KL(p || q), nats
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tenfold.capabilities import Context, Dataset
from tenfold.errors import ConfigError
from tenfold.records import ItemResult, Metric, Metrics, WorkItem, WorkItems
from tenfold.seeds import derive
from tenfold.stats import bootstrap
from torch import Tensor

from tenfold_treeflash.anchors import make_blocks
from tenfold_treeflash.lm import TreeDecoder
from tenfold_treeflash.objective import DraftObjective, ObjectiveSettings

if TYPE_CHECKING:
    from tenfold.report import Block

MARGINAL, CORRECTED = "marginal", "corrected"


class Diagnostics:
    """One item per text; see the module.

    Item values: per kind and measure, a list over depths of means over the text's blocks.

    Args:
        anchors: blocks per text.
        max_text_tokens: longer texts are cut.
        coverage: numbers of best tokens.
        seed: of the blocks; None takes the run's.
    """

    def __init__(
        self,
        anchors: int = 16,
        max_text_tokens: int = 256,
        coverage: Sequence[int] = (1, 5, 16),
        seed: int | None = None,
    ) -> None:
        if not coverage:
            raise ConfigError("coverage is empty; name at least one number of tokens")
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
        model = models["model"]
        if not isinstance(model, TreeDecoder) or model.drafter is None:
            raise ConfigError(
                f"treeflash:diagnostics needs a model with a drafter, such as treeflash:tree; "
                f"this is a {type(model).__name__}"
            )
        seed = ctx.seed if self.seed is None else self.seed
        for item in items:
            ids = self._ids(model, item.payload)
            if len(ids) < 3:
                yield ItemResult(item.id, error="the text has fewer than three tokens")
                continue
            yield ItemResult(item.id, self._measure(model, ids, derive(seed, item.id)))

    def _ids(self, model: Any, record: Any) -> list[int]:
        own = getattr(record, "completion_ids", None)
        if own is not None and record.prompt_ids is not None:
            ids = [*record.prompt_ids, *own]
        else:
            text = getattr(record, "text", None)
            ids = model.encode(text if text is not None else record.completion)
        return ids[: min(self.max_text_tokens, model.context_length)]

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
        """Means over texts by kind, measure and depth."""
        return [
            Metric(
                name, sum(values) / len(values), len(values),
                bootstrap(values, lambda part: sum(part) / len(part)),
                higher_is_better=name.startswith("coverage"), unit="nats" if name == "kl" else "",
                group=f"{kind} depth={depth}",
            )
            for (kind, name, depth), values in by_depth(results).items()
        ]  # fmt: skip

    def report(
        self, ctx: Context, results: Iterable[ItemResult], metrics: Metrics
    ) -> Iterator[Block]:
        """A curve per measure."""
        from tenfold_treeflash.reports import diagnostics_blocks

        yield from diagnostics_blocks(by_depth(results))


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
