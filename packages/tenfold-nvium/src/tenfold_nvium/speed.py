"""`nvium:speed`: how fast models decode the same prompts, taking turns on the same machine.

Per prompt every model generates one token, and then a whole text, several times; models take
turns, so that a machine that slows down slows all of them. The difference is decoding alone,
without the prompt. For models of this plugin a model of the time (`speed_model`) is measured
beside it and says how much of the possible saving was reached. Times are those of this machine: a
repeated run gives others.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tenfold.capabilities import Context, Dataset, Prompt
from tenfold.errors import ConfigError
from tenfold.records import GenerationConfig, ItemResult, Metric, Metrics, WorkItem, WorkItems
from tenfold.seeds import content_hash, derive
from tenfold.stats import bootstrap, median

from tenfold_nvium.exactness import prompt_of
from tenfold_nvium.lm import NviumLM
from tenfold_nvium.runner_cache import packed_runner
from tenfold_nvium.speed_model import WIDTHS, SpeedModel, measure, merged

if TYPE_CHECKING:
    from tenfold.report import Block


class Speed:
    """One item per prompt; see the module.

    Item values: `category`, and per role `tokens`, `first_s` and `total_s` (one number per round),
    and for an N-vium `mean_depth`, `blocks` and `speed_model`.

    Args:
        baseline: the role that speed-ups refer to; without such a model there are none.
        max_new_tokens: tokens per prompt.
        temperature, top_k, top_p: as everywhere; the same for all models.
        max_prompt_tokens: longer prompts keep their end only.
        rounds: timed rounds per prompt; one more comes before them, untimed.
        seed: of sampling; None takes the run's.
    """

    def __init__(
        self,
        baseline: str = "dense",
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        max_prompt_tokens: int = 896,
        rounds: int = 3,
        seed: int | None = None,
    ) -> None:
        if max_new_tokens < 2:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}; decoding needs at least 2")
        self.baseline, self.rounds, self.seed = baseline, rounds, seed
        self.max_prompt_tokens = max_prompt_tokens
        self._config = GenerationConfig(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p
        )

    def plan(self, ctx: Context, data: Mapping[str, Dataset]) -> WorkItems:
        """Every record of the dataset."""
        return WorkItems(WorkItem(record.id, record) for record in data["dataset"].load())

    def run(
        self, ctx: Context, models: Mapping[str, Any], items: Iterable[WorkItem]
    ) -> Iterator[ItemResult]:
        """Times every model on every prompt."""
        seed = ctx.seed if self.seed is None else self.seed
        for number, item in enumerate(items):
            prompt = prompt_of(item.payload)
            config = replace(self._config, seed=seed + number)
            values: dict[str, Any] = {
                "category": str(item.payload.metadata.get("category", "")),
                "roles": self._timed(models, prompt, config),
            }
            yield ItemResult(item.id, values)

    def _timed(
        self, models: Mapping[str, Any], prompt: Prompt, config: GenerationConfig
    ) -> dict[str, dict[str, Any]]:
        """Values of each role for one prompt."""
        prompts = {role: self._cut(model, prompt) for role, model in models.items()}
        single = replace(config, max_new_tokens=1)
        rows: dict[str, dict[str, Any]] = {role: {"first_s": [], "total_s": []} for role in models}
        order = list(models)
        for turn in range(self.rounds + 1):
            for role in order[turn % len(order) :] + order[: turn % len(order)]:
                first, _ = _generate(models[role], prompts[role], single)
                total, tokens = _generate(models[role], prompts[role], config)
                if turn:
                    rows[role]["first_s"].append(first)
                    rows[role]["total_s"].append(total)
                rows[role]["tokens"] = tokens
        for role, model in models.items():
            if isinstance(model, NviumLM):
                rows[role] |= _inside(model, model.prompt_ids(prompts[role]), config)
        return rows

    def _cut(self, model: Any, prompt: Prompt) -> Prompt:
        """The end of a prompt that is too long, as the model's own tokens."""
        if not hasattr(model, "prompt_ids"):
            return prompt
        return model.prompt_ids(prompt)[-self.max_prompt_tokens :]

    def aggregate(self, ctx: Context, results: Iterable[ItemResult]) -> Metrics:
        """Rates and ratios over all prompts, speed-ups by category too."""
        rows = [_Row.of(result) for result in results]
        roles = list(rows[0].times) if rows else []
        metrics = []
        for role in roles:
            metrics += _role_metrics(rows, role)
            if self.baseline in roles and role != self.baseline:
                metrics += _speedups(rows, role, self.baseline)
        return metrics

    def report(
        self, ctx: Context, results: Iterable[ItemResult], metrics: Metrics
    ) -> Iterator[Block]:
        """Rates, speed-ups, and measured against possible speed."""
        from tenfold_nvium.speed_report import blocks

        yield from blocks(list(results), metrics, self.baseline)


@dataclass(frozen=True, slots=True)
class Times:
    """One model on one prompt: seconds to the first token, seconds of decoding after it, and
    decoded tokens."""

    first: float
    decoding: float
    tokens: int


@dataclass(frozen=True, slots=True)
class _Row:
    """One prompt: category, times per role, and what N-viums tell of themselves."""

    category: str
    times: dict[str, Times]
    inside: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, result: ItemResult) -> _Row:
        roles: Mapping[str, Mapping[str, Any]] = result.values["roles"]
        times = {role: times_of(values) for role, values in roles.items()}
        inside = {role: dict(v) for role, v in roles.items() if "speed_model" in v}
        return cls(result.values["category"], times, inside)


def times_of(values: Mapping[str, Any]) -> Times:
    """Times of a role's item values: medians over the rounds, the first token taken off."""
    first, total = median(values["first_s"]), median(values["total_s"])
    return Times(first, max(total - first, 1e-9), max(int(values["tokens"]) - 1, 0))


def limit_of(values: Mapping[str, Any]) -> float:
    """Seconds per decoded token that a decoder without overhead would take for the segments that
    ran, on the machine as it was measured beside."""
    counts = [Counter({int(w): n for w, n in blocks.items()}) for blocks in values["blocks"]]
    model = SpeedModel.from_dict(values["speed_model"])
    return model.of_widths(counts, max(1, int(values["decoded"])))


def _generate(model: Any, prompt: Prompt, config: GenerationConfig) -> tuple[float, int]:
    """Seconds and tokens of one generated text."""
    started = time.perf_counter()
    [[completion]] = model.generate([prompt], config)
    return time.perf_counter() - started, len(completion.token_ids)


def _inside(model: NviumLM, ids: Sequence[int], config: GenerationConfig) -> dict[str, Any]:
    """Depth and blocks of the same text, and the cost of segments measured now."""
    own = derive(config.seed or 0, content_hash(list(ids)), 0)  # the seed `generate` gives it
    trace = model.trace(ids, replace(config, seed=own)).trace
    network = model.model
    room = network.config.max_position_embeddings
    widths = [w for w in WIDTHS if w <= max(1, room // 4)]
    context = max(1, min(len(ids) + config.max_new_tokens // 2, room - max(widths)))
    runner = packed_runner(network)
    measured = merged(
        [measure(network, runner, context=context, widths=widths, repeats=3) for _ in range(2)]
    )
    return {
        "mean_depth": trace.mean_depth,
        "decoded": max(0, len(trace.tokens) - 1),
        "blocks": [{str(w): n for w, n in sorted(c.items())} for c in trace.blocks],
        "speed_model": measured.to_dict(),
    }


def _rate(rows: Sequence[_Row], role: str) -> float:
    """Decoded tokens per second over prompts; texts that ended at once decode nothing."""
    timed = [row.times[role] for row in rows if row.times[role].tokens]
    seconds = sum(times.decoding for times in timed)
    return sum(times.tokens for times in timed) / seconds if timed else 0.0


def _role_metrics(rows: Sequence[_Row], role: str) -> Iterator[Metric]:
    n = len(rows)
    whole = [(t.tokens + 1) / (t.first + t.decoding) for t in (row.times[role] for row in rows)]
    yield Metric(
        "decode_tokens_per_second", _rate(rows, role), n,
        bootstrap(rows, lambda part: _rate(part, role)), True, "tokens/s", role,
    )  # fmt: skip
    yield Metric("tokens_per_second", sum(whole) / n, n, None, True, "tokens/s", role)
    first = median(row.times[role].first for row in rows)
    yield Metric("first_token", first, n, None, False, "s", role)
    inside = [(row.times[role], row.inside[role]) for row in rows if role in row.inside]
    tokens = sum(values["decoded"] for _, values in inside)
    if not tokens:
        return
    depth = sum(values["mean_depth"] * values["decoded"] for _, values in inside) / tokens
    yield Metric("mean_depth", depth, n, None, None, "", role)
    yield Metric("depth_bound", 1 / depth, n, None, None, "x", role)
    possible = sum(limit_of(values) * times.tokens for times, values in inside)
    yield Metric(
        "speed_of_limit", possible / sum(times.decoding for times, _ in inside), n, None, True, "",
        role,
    )  # fmt: skip


def _speedups(rows: Sequence[_Row], role: str, baseline: str) -> Iterator[Metric]:
    """Ratios of rates, over prompts that both models decoded something for."""
    rows = [row for row in rows if row.times[role].tokens and row.times[baseline].tokens]
    if not rows:
        return

    def ratio(part: Sequence[_Row]) -> float:
        return _rate(part, role) / _rate(part, baseline)

    yield Metric("speedup", ratio(rows), len(rows), bootstrap(rows, ratio), True, "x", role)
    for category in sorted({row.category for row in rows} - {""}):
        part = [row for row in rows if row.category == category]
        yield Metric(
            "speedup", ratio(part), len(part), bootstrap(part, ratio), True, "x",
            f"{role} {category}",
        )  # fmt: skip
