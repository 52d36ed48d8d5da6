"""`core:perplexity`: how well a model predicts texts.

Nats per token are weighted by tokens: the sum over all texts divided by their number of scored
tokens. Intervals take texts as the independent observations (delta method).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tenfold.builtin.prompting import batches, require_column
from tenfold.capabilities import Context, Dataset
from tenfold.errors import ConfigError
from tenfold.records import ItemResult, Metric, Metrics, WorkItem, WorkItems
from tenfold.stats import Interval, RatioSum

if TYPE_CHECKING:
    from tenfold.report import Block

Window = tuple[list[int], list[int]]
"""Token ids of a context, and of the continuation that is scored."""

_REPLACEMENT = "\ufffd"
_SHOWN = 20


class Perplexity:
    """One item per text: its `nats`, scored `tokens`, their `bytes`, and `windows`.

    A text longer than the window is scored in overlapping windows, each token once: `stride`
    new tokens per window, predicted from all that fits before them.

    Args:
        start: what a text's first token is predicted from. `none`: nothing, so that it is not
            scored; `special`: the tokens that the tokenizer puts before a text, or the
            end-of-text token.
        window: longest window in tokens; None takes the model's context length.
        stride: new tokens per window; None takes half a window.
        group_by: also report each value of this metadata column.
        batch_size: windows per call of the model; changes nothing but speed.

    Raises:
        ConfigError: a stride that leaves no context.
    """

    def __init__(
        self,
        start: str = "none",
        window: int | None = None,
        stride: int | None = None,
        group_by: str = "",
        batch_size: int = 8,
    ) -> None:
        if window is not None and stride is not None and stride >= window:
            raise ConfigError(
                f"stride is {stride} with a window of {window}; it must be smaller, so that "
                "every token has a token before it"
            )
        self.start, self.window, self.stride = start, window, stride
        self.group_by, self.batch_size = group_by, batch_size

    def plan(self, ctx: Context, data: Mapping[str, Dataset]) -> WorkItems:
        """One item per text.

        Raises:
            ConfigError: the records have no metadata column `group_by`.
        """
        records = require_column(data["dataset"].load(), self.group_by)
        return WorkItems(WorkItem(record.id, record) for record in records)

    def run(
        self, ctx: Context, models: Mapping[str, Any], items: Iterable[WorkItem]
    ) -> Iterator[ItemResult]:
        """Scores, several texts at a time.

        Raises:
            ConfigError: the window exceeds the model's context, or there is no start token.
        """
        scorer = _Scorer(models["model"], self.start, self.window, self.stride)
        for batch in batches(items, self.batch_size):
            texts = [item.payload.text for item in batch]
            for item, values in zip(batch, scorer.values(texts, self.batch_size), strict=True):
                if self.group_by:
                    group = item.payload.metadata.get(self.group_by)
                    values["group"] = f"{self.group_by}={group}"
                yield ItemResult(item.id, values)

    def aggregate(self, ctx: Context, results: Iterable[ItemResult]) -> Metrics:
        """`nats_per_token`, `perplexity`, `bits_per_byte` and `tokens`, and each group's."""
        sums: dict[str, tuple[RatioSum, RatioSum]] = {"": (RatioSum(), RatioSum())}
        for result in results:
            values = result.values
            if not values["tokens"]:
                continue
            for group in {"", values.get("group", "")}:
                by_token, by_byte = sums.setdefault(group, (RatioSum(), RatioSum()))
                by_token.add(values["nats"], values["tokens"])
                by_byte.add(values["nats"] / math.log(2), values["bytes"])
        return [
            metric
            for group, (by_token, by_byte) in sorted(sums.items())
            if by_token.n
            for metric in _metrics(by_token, by_byte, group)
        ]

    def report(
        self, ctx: Context, results: Iterable[ItemResult], metrics: Metrics
    ) -> Iterator[Block]:
        """Groups as bars, and the texts that surprised the model most."""
        from tenfold.report import Bars, Heading, Table

        groups = [m for m in metrics if m.group and m.name == "nats_per_token"]
        if groups:
            yield Heading("Groups")
            yield Bars(
                [m.group for m in groups],
                [m.value for m in groups],
                [m.interval for m in groups],
                "nats/token",
                "Nats per token by group, with 95 % intervals.",
            )
        rows = (
            (r.values["nats"] / r.values["tokens"], r.values["tokens"], r.id)
            for r in results
            if r.values["tokens"]
        )
        worst = heapq.nsmallest(_SHOWN, rows, key=lambda row: (-row[0], row[2]))
        yield Heading("Texts that surprised the model most")
        table = [[name, nats, tokens] for nats, tokens, name in worst]
        yield Table(["text", "nats per token", "tokens"], table)


class _Scorer:
    """Scores texts with one model, by windows where it has a tokenizer."""

    def __init__(self, model: Any, start: str, window: int | None, stride: int | None) -> None:
        self.model = model
        self.tokenizes = hasattr(model, "encode")
        if not self.tokenizes:
            return
        context = model.context_length
        if window is not None and window > context:
            raise ConfigError(f"window is {window} tokens, but the model reads at most {context}")
        self.window = window or context
        self.stride = min(stride or max(1, self.window // 2), self.window - 1)
        self.prefix = _start_ids(model) if start == "special" else []

    def values(self, texts: Sequence[str], batch_size: int) -> list[dict[str, Any]]:
        """Item values of each text."""
        if not self.tokenizes:
            scores = self.model.score([("", text) for text in texts])
            return [
                _values(text, [score.logprobs], len(text.encode(errors="surrogatepass")))
                for text, score in zip(texts, scores, strict=True)
            ]
        encoded = [self.model.encode(text) for text in texts]
        plans = [windows(ids, self.prefix, self.window, self.stride) for ids in encoded]
        flat = [window for plan in plans for window in plan]
        scored = iter(
            [s.logprobs for part in batches(flat, batch_size) for s in self.model.score(part)]
        )
        return [
            _values(text, [next(scored) for _ in plan], self._scored_bytes(text, ids))
            for text, ids, plan in zip(texts, encoded, plans, strict=True)
        ]

    def _scored_bytes(self, text: str, ids: Sequence[int]) -> int:
        """Bytes of the scored tokens: all, or all but the first token's."""
        total = len(text.encode(errors="surrogatepass"))
        if self.prefix or not ids:
            return total
        first = self.model.decode(ids[:1])
        # A token that is part of a character has no text of its own; it is one byte.
        return total - (1 if _REPLACEMENT in first else len(first.encode()))


def _start_ids(model: Any) -> list[int]:
    if prefix := getattr(model, "prompt_prefix", None):
        return list(prefix)
    if model.eos_id is None:
        raise ConfigError(
            'start = "special", but the model\'s tokenizer has no start or end-of-text token',
            hint='use start = "none"',
        )
    return [model.eos_id]


def windows(ids: Sequence[int], prefix: Sequence[int], size: int, stride: int) -> list[Window]:
    """Contexts and continuations that score each token once.

    Without a prefix the first token is context only. The first window scores all that fits;
    each later one up to `stride` tokens, after as many earlier ones as `size` allows.
    """
    tokens = [*prefix, *ids]
    begin = max(1, len(prefix))
    end = min(size, len(tokens))
    found: list[Window] = []
    while begin < end:
        found.append((tokens[max(0, end - size) : begin], tokens[begin:end]))
        begin, end = end, min(end + stride, len(tokens))
    return found


def _values(text: str, logprobs: Sequence[Sequence[float]], size: int) -> dict[str, Any]:
    flat = [value for part in logprobs for value in part]
    return {
        "nats": -math.fsum(flat) if flat else 0.0,
        "tokens": len(flat),
        "bytes": size if flat else 0,
        "windows": len(logprobs),
    }


def _metrics(by_token: RatioSum, by_byte: RatioSum, group: str) -> Iterator[Metric]:
    n, mean, interval = by_token.n, by_token.ratio, by_token.interval()
    yield Metric("nats_per_token", mean, n, interval, False, "nats", group)
    spread: Interval | None = None
    if interval is not None:
        spread = _exp(interval[0]), _exp(interval[1])
    yield Metric("perplexity", _exp(mean), n, spread, False, "", group)
    if by_byte.y:
        yield Metric("bits_per_byte", by_byte.ratio, n, by_byte.interval(), False, "bits", group)
    yield Metric("tokens", by_token.y, n, None, None, "", group)


def _exp(nats: float) -> float:
    """`exp` that ends in infinity instead of an error."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
