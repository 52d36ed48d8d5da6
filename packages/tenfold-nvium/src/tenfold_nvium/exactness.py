"""`nvium:exactness`: is the accelerated decoder really exact, on this checkpoint and this text?

Per prompt three independent checks:

- *coupling*: piggybacked decoding and full recomputation, fed the same random numbers, must
  choose the same exits and write the same tokens;
- *cache*: after completing deferred work, keys and values must equal those of one full pass;
- *likelihood*: log-probabilities completed from deferred states must equal teacher forcing.

In fp64 (the default) the differences are rounding errors of 1e-12; in the model's own type
they are larger and a token may flip where two are almost equally likely.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from tenfold.capabilities import Context, Dataset
from tenfold.errors import ConfigError
from tenfold.records import (
    ItemResult,
    Metric,
    Metrics,
    PromptRecord,
    Record,
    TextRecord,
    WorkItem,
    WorkItems,
)
from tenfold.stats import wilson

from tenfold_nvium.cache import NviumCache
from tenfold_nvium.decode import PiggybackDecoder, recompute
from tenfold_nvium.lm import NviumLM
from tenfold_nvium.modeling import NviumForCausalLM
from tenfold_nvium.noise import PositionNoise
from tenfold_nvium.policies import make_policy
from tenfold_nvium.sampling import Warp

if TYPE_CHECKING:
    from tenfold.report import Block


def require_nvium(models: Mapping[str, Any]) -> NviumLM:
    """The run's model, which must be one of this plugin's.

    Raises:
        ConfigError: it is another kind of model.
    """
    model = models["model"]
    if not isinstance(model, NviumLM):
        raise ConfigError(
            f"this evaluator looks inside an N-vium; the model is a {type(model).__name__}",
            hint="use nvium:causal-lm or nvium:dense",
        )
    return model


def prompt_of(record: Record) -> Any:
    """The prompt of a prompt record, or a text record's whole text.

    Raises:
        ConfigError: a record of another kind.
    """
    if isinstance(record, PromptRecord):
        return record.prompt
    if isinstance(record, TextRecord):
        return record.text
    raise ConfigError(f"record {record.id!r} is a {record.kind} record, not a prompt")


class Exactness:
    """One item per prompt; see the module.

    Args:
        max_new_tokens: tokens per prompt.
        max_prompt_tokens: longer prompts keep their end only.
        policy: exit policy to check.
        float64: check a copy of the model in fp64, the rigorous way.
        max_deferred: as in the decoder.
    """

    def __init__(
        self,
        max_new_tokens: int = 32,
        max_prompt_tokens: int = 32,
        policy: str = "sample",
        float64: bool = True,
        max_deferred: int | None = None,
    ) -> None:
        self.max_new_tokens, self.max_prompt_tokens = max_new_tokens, max_prompt_tokens
        self.policy, self.float64, self.max_deferred = policy, float64, max_deferred

    def plan(self, ctx: Context, data: Mapping[str, Dataset]) -> WorkItems:
        """Every record of the dataset."""
        return WorkItems(WorkItem(record.id, record) for record in data["dataset"].load())

    def run(
        self, ctx: Context, models: Mapping[str, Any], items: Iterable[WorkItem]
    ) -> Iterator[ItemResult]:
        """The three checks, prompt by prompt."""
        lm = require_nvium(models)
        network = lm.model
        if self.float64:
            network = copy.deepcopy(network).to(torch.float64).eval()
        decoder = exactness_decoder(network, self.policy, self.max_deferred)
        longest = min(self.max_prompt_tokens, max(1, lm.context_length // 2))
        for item in items:
            ids = lm.prompt_ids(prompt_of(item.payload))[-longest:]
            yield ItemResult(item.id, self.check(decoder, ids, ctx.derive("exact", item.id)))

    def check(self, decoder: PiggybackDecoder, ids: list[int], seed: int) -> dict[str, Any]:
        """Values of one prompt: whether texts agree, and the largest differences."""
        network = decoder.model
        limit = min(self.max_new_tokens, network.config.max_position_embeddings - len(ids))
        done = decoder.generate([ids], limit, seeds=[seed], log_probs=True)
        row = done.rows[0]
        noise = PositionNoise(seed, network.num_exits)
        reference = recompute(network, ids, limit, noise, policy=decoder.policy, warp=decoder.warp)
        equal = row.tokens == reference.tokens
        if not decoder.policy.certifies:  # the reference does not stop at certificates
            equal = equal and row.exits == reference.exits
        text = [*ids, *row.tokens]
        log_probs = row.log_probs or []
        return {
            "tokens": len(row.tokens),
            "equal": equal,
            "first_difference": _first_difference(row.tokens, reference.tokens),
            "cache_difference": cache_difference(network, done.cache, text[:-1]),
            "logprob_difference": logprob_difference(network, text, len(ids), log_probs),
            "mean_depth": done.trace.mean_depth,
            "mean_width": done.trace.mean_width,
        }

    def aggregate(self, ctx: Context, results: Iterable[ItemResult]) -> Metrics:
        """Share of equal texts and the worst differences."""
        rows = [result.values for result in results]
        n, equal = len(rows), sum(bool(row["equal"]) for row in rows)
        if not n:
            return []
        return [
            Metric("equal_texts", equal / n, n, wilson(equal, n), higher_is_better=True),
            Metric("cache_difference", max(r["cache_difference"] for r in rows), n,
                   higher_is_better=False),
            Metric("logprob_difference", max(r["logprob_difference"] for r in rows), n,
                   higher_is_better=False, unit="nats"),
            Metric("mean_depth", sum(r["mean_depth"] for r in rows) / n, n),
            Metric("mean_width", sum(r["mean_width"] for r in rows) / n, n),
        ]  # fmt: skip

    def report(
        self, ctx: Context, results: Iterable[ItemResult], metrics: Metrics
    ) -> Iterator[Block]:
        """One row per prompt, with what each column means."""
        from tenfold.report import Paragraph, Table

        yield Paragraph(
            "Piggybacked decoding and full recomputation get the same random numbers: their "
            "texts must agree. Differences of the completed cache and of the log-probabilities "
            "are rounding errors when the decoder is exact."
        )
        columns = ("tokens", "equal", "cache_difference", "logprob_difference", "mean_depth")
        rows = [(r.id, *(r.values[c] for c in columns)) for r in results]
        yield Table(("prompt", *(c.replace("_", " ") for c in columns)), rows)


def exactness_decoder(
    network: NviumForCausalLM, policy: str, max_deferred: int | None
) -> PiggybackDecoder:
    """The decoder under test: sampling, or greedy where the policy proves an arg-max."""
    warp = Warp(0.0) if make_policy(policy).certifies else Warp()
    return PiggybackDecoder(network, policy, warp=warp, max_deferred=max_deferred)


def _first_difference(a: list[int], b: list[int]) -> int | None:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)


@torch.no_grad()
def cache_difference(model: NviumForCausalLM, cache: NviumCache, text: list[int]) -> float:
    """Largest difference of completed keys and values from one full pass over `text`."""
    cache.flush(model)
    reference = NviumCache(model.config)
    model(torch.tensor([text], device=model.device), past_key_values=reference)
    worst = 0.0
    for mine, theirs in zip(cache.stores, reference.stores, strict=True):
        assert mine.pair is not None
        assert theirs.pair is not None
        length = len(text)
        gap = mine.pair[:, :, :, :length] - theirs.pair[:, :, :, :length]
        worst = max(worst, float(gap.abs().max()))
    return worst


@torch.no_grad()
def logprob_difference(
    model: NviumForCausalLM, text: list[int], prompt: int, log_probs: list[float]
) -> float:
    """Largest difference of completed log-probabilities from teacher forcing, nats."""
    tokens = torch.tensor([text], device=model.device)
    logits = model(tokens).logits[0, prompt - 1 : -1]
    wanted = logits.gather(-1, tokens[0, prompt:, None])[:, 0]
    got = torch.tensor(log_probs, dtype=wanted.dtype, device=wanted.device)
    return float((wanted - got).abs().max()) if log_probs else 0.0
