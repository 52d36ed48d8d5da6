"""`nvium:tradeoff`: perplexity against depth and speed, from one checkpoint.

Adding one number delta to every router's log-odds gives another mixture of the same heads: a
higher delta leaves earlier. Neither the gates nor the heads' predictions on given text depend
on delta, so one forward pass per text gives the exact perplexity and expected depth of every
shifted model. Beside that curve stand the trained point (delta = 0), each fixed exit, the
oracle, which knows the next token and takes the head that gives it the highest probability
(no model, but a bound: no way of choosing exits reaches a lower loss), and a dense twin.

Speed is measured by decoding: every point continues the same prompts by equally many tokens,
points taking turns, and only the time after a prompt's first new token counts. The bound is
1 / depth: what the same layers would give if time were layers run one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tenfold.capabilities import Context, Dataset
from tenfold.errors import ConfigError
from tenfold.records import ItemResult, Metrics, Record, WorkItem, WorkItems
from torch import Tensor

from tenfold_nvium.decode import PiggybackDecoder
from tenfold_nvium.exactness import prompt_of, require_nvium
from tenfold_nvium.lm import NviumLM
from tenfold_nvium.mixture import exit_log_probs
from tenfold_nvium.policies import ExitPolicy, FixedExit, SampleExit
from tenfold_nvium.scoring import gates_and_heads, scored_part

if TYPE_CHECKING:
    from tenfold.report import Block

OFFSETS = (-4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
_WARM_TOKENS = 4


def offset_name(offset: float) -> str:
    """Name of the point whose routers are shifted by `offset`; `offset=0` is the trained one."""
    return f"offset={offset:+g}" if offset else "offset=0"


TRAINED = offset_name(0.0)
ORACLE = "oracle"
DENSE = "dense"


class Tradeoff:
    """One item per text (`text/<id>`) and per timed pass over the prompts (`time/<pass>`).

    Args:
        offsets: numbers added to the routers' log-odds; 0 is always among them.
        max_text_tokens: longest text that is scored; longer ones are cut, and counted.
        time_runs: timed passes over the prompts for each point; 0 measures no speed.
        time_prompts: prompts per pass, from the beginning of the dataset.
        time_tokens: new tokens per prompt; texts do not end earlier.
        max_prompt_tokens: longer prompts keep their end.

    Raises:
        ConfigError: an offset that is not finite, or too few tokens to time.
    """

    def __init__(
        self,
        offsets: Sequence[float] = OFFSETS,
        max_text_tokens: int = 256,
        time_runs: int = 3,
        time_prompts: int = 4,
        time_tokens: int = 48,
        max_prompt_tokens: int = 32,
    ) -> None:
        if bad := [x for x in offsets if not math.isfinite(x)]:
            raise ConfigError(f"offsets holds {bad[0]}; every offset must be a finite number")
        if time_runs and time_tokens < 2:
            raise ConfigError(
                f"time_tokens is {time_tokens}; at least 2, as a prompt's first new token is "
                "not timed (time_runs = 0 measures no speed)"
            )
        self.offsets = sorted({*map(float, offsets), 0.0})
        self.max_text_tokens, self.max_prompt_tokens = max_text_tokens, max_prompt_tokens
        self.time_runs, self.time_prompts = time_runs, time_prompts
        self.time_tokens = time_tokens

    def plan(self, ctx: Context, data: Mapping[str, Dataset]) -> WorkItems:
        """Texts first, then passes."""

        def items() -> Iterator[WorkItem]:
            prompts: list[Record] = []
            for record in data["dataset"].load():
                if len(prompts) < self.time_prompts:
                    prompts.append(record)
                yield WorkItem(f"text/{record.id}", record)
            for number in range(self.time_runs if prompts else 0):
                yield WorkItem(f"time/{number}", prompts)

        return WorkItems(items())

    def run(
        self, ctx: Context, models: Mapping[str, Any], items: Iterable[WorkItem]
    ) -> Iterator[ItemResult]:
        """Scores and times, item by item.

        Raises:
            ConfigError: a model of another kind, or a dense twin with another vocabulary.
        """
        lm = require_nvium(models)
        dense = _dense_twin(models.get("dense"), lm)
        for item in items:
            if item.id.startswith("time/"):
                values = self._times(ctx, lm, dense, item.payload)
            else:
                values = self._score(lm, dense, item.payload)
            yield ItemResult(item.id, values)

    # --- Perplexity ---------------------------------------------------------------------------

    def _score(self, lm: NviumLM, dense: NviumLM | None, record: Record) -> dict[str, Any]:
        """A text's nats, depth and exit shares (sums over tokens) at every point."""
        part = scored_part(lm, record, self.max_text_tokens)
        if part is None or not part.ids:
            return {"tokens": 0, "cut": False, "points": {}}
        gates, heads = gates_and_heads(lm, part.before, part.ids)
        depths = torch.tensor(lm.model.config.depths).double() / lm.model.config.num_hidden_layers
        points = {
            offset_name(offset): mixture_point(gates + offset, heads, depths)
            for offset in self.offsets
        }
        for k in range(len(depths)):
            points[f"exit={k + 1}"] = _chosen_point(torch.full((len(heads),), k), heads, depths)
        points[ORACLE] = _chosen_point(heads.argmax(-1), heads, depths)
        if dense is not None:
            _, scores = gates_and_heads(dense, part.before, part.ids)
            points[DENSE] = _chosen_point(
                torch.zeros(len(scores), dtype=torch.long), scores, torch.ones(1).double()
            )
        return {"tokens": len(part.ids), "cut": part.cut, "points": points}

    # --- Speed --------------------------------------------------------------------------------

    def _times(
        self, ctx: Context, lm: NviumLM, dense: NviumLM | None, records: Sequence[Record]
    ) -> dict[str, Any]:
        """One pass: every point decodes the prompts, one prompt at a time in turn."""
        decoder = PiggybackDecoder(lm.model)
        policies = timed_policies(self.offsets, lm.model.num_exits)
        runners = {name: _Runner(decoder, policy) for name, policy in policies.items()}
        if dense is not None:
            runners[DENSE] = _Runner(PiggybackDecoder(dense.model), SampleExit())
        for record in records:
            ids = lm.prompt_ids(prompt_of(record))[-self.max_prompt_tokens :]
            seed = ctx.derive("tradeoff", record.id)
            for runner in runners.values():
                runner.decode(ids, self.time_tokens, seed)
        return {"times": {name: runner.values() for name, runner in runners.items()}}

    # --- Numbers and report -------------------------------------------------------------------

    def aggregate(self, ctx: Context, results: Iterable[ItemResult]) -> Metrics:
        """Perplexity, expected depth, bound and speed: of the trained point without a group,
        and of every point."""
        from tenfold_nvium.tradeoff_curve import Curve

        return Curve.of(results, ctx.derive("bootstrap")).metrics()

    def report(
        self, ctx: Context, results: Iterable[ItemResult], metrics: Metrics
    ) -> Iterator[Block]:
        """Curves and a table, which is also written to `artifacts/tradeoff.csv`."""
        from tenfold_nvium.tradeoff_curve import Curve
        from tenfold_nvium.tradeoff_report import tradeoff_blocks

        yield from tradeoff_blocks(ctx, Curve.of(results, ctx.derive("bootstrap")))


def timed_policies(offsets: Sequence[float], exits: int) -> dict[str, ExitPolicy]:
    """What decodes at each point: shifted routers, and every fixed exit."""
    policies: dict[str, ExitPolicy] = {offset_name(x): SampleExit(offset=x) for x in offsets}
    return policies | {f"exit={k + 1}": FixedExit(k) for k in range(exits)}


def mixture_point(gates: Tensor, heads: Tensor, depths: Tensor) -> dict[str, Any]:
    """Sums over tokens of a mixture: from `gates [n, K-1]`, `heads [n, K]`, `depths [K]`."""
    weights = exit_log_probs(gates)
    shares = weights.exp().sum(0)
    return {
        "nats": float(-(weights + heads).logsumexp(-1).sum()),
        "depth": float(shares @ depths),
        "shares": shares.tolist(),
    }


def _chosen_point(exits: Tensor, heads: Tensor, depths: Tensor) -> dict[str, Any]:
    """Sums over tokens when token t is predicted by head `exits[t]`."""
    shares = torch.bincount(exits, minlength=len(depths)).double()
    return {
        "nats": float(-heads.gather(-1, exits[:, None]).sum()),
        "depth": float(shares @ depths),
        "shares": shares.tolist(),
    }


def _dense_twin(model: Any, lm: NviumLM) -> NviumLM | None:
    """The dense model, when one was given.

    Raises:
        ConfigError: it has several exits or another vocabulary, or is no N-vium at all.
    """
    if model is None:
        return None
    if not isinstance(model, NviumLM) or model.model.num_exits > 1:
        raise ConfigError(
            "models.dense must be a dense twin with one exit under the same decoder",
            hint="use nvium:dense, trained by nvium:pretrain-dense",
        )
    if model.vocabulary_hash != lm.vocabulary_hash:
        raise ConfigError(
            "models.dense has another vocabulary than the model, so their perplexities per "
            "token cannot be compared",
            hint="train both on the same dataset, or give the second the first's `tokenizer`",
        )
    return model


@dataclass(slots=True)
class _Runner:
    """Decodes prompts with one point's policy and sums what that took. Points share a decoder,
    which holds a copy of the weights."""

    decoder: PiggybackDecoder
    policy: ExitPolicy
    tokens: int = 0
    seconds: float = 0.0
    prefill_s: float = 0.0
    layers: int = 0
    """Layers run one after the other while decoding."""

    def decode(self, ids: list[int], new: int, seed: int) -> None:
        """Continues one prompt; the pass's first prompt is preceded by a few untimed tokens."""
        limit = min(new, self.decoder.model.config.max_position_embeddings - len(ids) + 1)
        self.decoder.policy = self.policy
        if not self.tokens:
            self.decoder.generate([ids], min(limit, _WARM_TOKENS), seeds=[seed])
        trace = self.decoder.generate([ids], limit, seeds=[seed]).trace
        sizes = [len(layers) for layers in self.decoder.model.config.segments]
        self.tokens += limit - 1
        self.seconds += trace.decode_s
        self.prefill_s += trace.prefill_s
        self.layers += sum(n * size for n, size in zip(trace.launches, sizes, strict=True))

    def values(self) -> dict[str, Any]:
        """The sums as JSON values; `depth` is the measured share of layers per token."""
        total = self.tokens * self.decoder.model.config.num_hidden_layers
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "prefill_s": self.prefill_s,
            "depth": self.layers / max(1, total),
        }
