"""`treeflash:race`: models write the same texts, taking turns on the same machine.

Per prompt every contender generates one token, and then a whole text, several times; contenders
take turns, so that a machine that slows down slows all of them. The difference is decoding alone.
Contenders are the run's models, and what transformers itself can do with the baseline's model:
its prompt lookup, and its own DFlash loop with a role's drafter. At temperature 0 texts are
compared with the baseline's, token for token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from tenfold.capabilities import Context, Dataset
from tenfold.errors import ConfigError
from tenfold.records import GenerationConfig, ItemResult, Metric, Metrics, WorkItem, WorkItems
from tenfold.seeds import derive
from tenfold.stats import bootstrap, median

from tenfold_treeflash.lm import TreeDecoder

if TYPE_CHECKING:
    from tenfold.report import Block

PEERS = ("prompt-lookup", "dflash")
LOOKUP_TOKENS = 10

Decode = Callable[[list[int], GenerationConfig], tuple[list[int], list[int]]]
"""`(prompt ids, config) -> new tokens, tokens per round (empty when unknown)`."""


class Race:
    """One item per prompt and temperature; see the module.

    Item values: `temperature`, and per contender `tokens`, `first_s` and `total_s` (one number per
    round), `accepted` and, at temperature 0, `equal`.

    Args:
        baseline: the role that speed-ups and texts refer to.
        max_new_tokens: tokens per prompt.
        temperatures: one race each.
        rounds: timed rounds per prompt; one more comes before them, untimed.
        max_prompt_tokens: longer prompts keep their end only.
        peers: see the module.
        seed: of sampling; None takes the run's.
    """

    def __init__(
        self,
        baseline: str = "plain",
        max_new_tokens: int = 64,
        temperatures: Sequence[float] = (0.0, 1.0),
        rounds: int = 3,
        max_prompt_tokens: int = 512,
        peers: Sequence[str] = (),
        seed: int | None = None,
    ) -> None:
        if max_new_tokens < 2:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}; decoding needs at least 2")
        if not temperatures or min(temperatures) < 0:
            raise ConfigError(f"temperatures {list(temperatures)} must be numbers of at least 0")
        if unknown := sorted(set(peers) - set(PEERS)):
            raise ConfigError(f"peers holds {unknown[0]!r}; known: {', '.join(PEERS)}")
        self.baseline, self.rounds, self.seed = baseline, rounds, seed
        self.temperatures, self.peers = list(temperatures), list(peers)
        self.max_prompt_tokens, self.max_new_tokens = max_prompt_tokens, max_new_tokens

    def plan(self, ctx: Context, data: Mapping[str, Dataset]) -> WorkItems:
        """Every record of the dataset, at every temperature."""
        records = list(data["dataset"].load())
        items = [
            WorkItem(f"{record.id}@{temperature:g}", (record, temperature))
            for record in records
            for temperature in self.temperatures
        ]
        return WorkItems(items, len(items))

    def run(
        self, ctx: Context, models: Mapping[str, Any], items: Iterable[WorkItem]
    ) -> Iterator[ItemResult]:
        """Times every contender on every prompt.

        Raises:
            ConfigError: the baseline is no role of the run.
        """
        if self.baseline not in models:
            raise ConfigError(
                f"baseline is {self.baseline!r}, but the run's models are {', '.join(models)}"
            )
        first = models[self.baseline]
        if not all(hasattr(first, name) for name in ("prompt_ids", "context_length")):
            raise ConfigError(
                f"the baseline {self.baseline!r} is a {type(first).__name__}, which reads no token "
                "ids; it must be a local language model such as core:hf"
            )
        seed = ctx.seed if self.seed is None else self.seed
        contenders = self._contenders(models)
        for item in items:
            record, temperature = item.payload
            base: Any = models[self.baseline]
            text = getattr(record, "prompt", None) or getattr(record, "text", "")
            prompt = base.prompt_ids(text)[-self.max_prompt_tokens :]
            room = base.context_length - len(prompt)
            if room < 2:
                yield ItemResult(item.id, error="the prompt leaves no room for two tokens")
                continue
            config = GenerationConfig(
                max_new_tokens=min(self.max_new_tokens, room), temperature=temperature,
                seed=derive(seed, item.id),
            )  # fmt: skip
            yield ItemResult(
                item.id,
                {"temperature": temperature, "contenders": self._timed(contenders, prompt, config)},
            )

    def _contenders(self, models: Mapping[str, Any]) -> dict[str, Decode]:
        found: dict[str, Decode] = {role: _by_generate(model) for role, model in models.items()}
        base = models[self.baseline]
        module = base.module() if hasattr(base, "module") else None
        if self.peers and module is None:
            raise ConfigError("peers need a baseline with weights of its own (core:hf)")
        for peer in self.peers:
            if peer == "prompt-lookup":
                settings = {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
                found["transformers, prompt lookup"] = _by_transformers(base, settings)
                continue
            drafters = [m.drafter for m in models.values() if getattr(m, "drafter", None)]
            if not drafters:
                raise ConfigError("the peer dflash needs a role with a drafter")
            from tenfold_treeflash.assistant import as_hf_dflash_assistant

            assistant = as_hf_dflash_assistant(drafters[0].network)
            settings = {"assistant_model": assistant, "speculation_type": "dflash"}
            found["transformers, DFlash"] = _by_transformers(base, settings)
        return found

    def _timed(
        self, contenders: Mapping[str, Decode], prompt: list[int], config: GenerationConfig
    ) -> dict[str, dict[str, Any]]:
        single = replace(config, max_new_tokens=1)
        rows: dict[str, dict[str, Any]] = {n: {"first_s": [], "total_s": []} for n in contenders}
        texts: dict[str, list[int]] = {}
        order = list(contenders)
        for turn in range(self.rounds + 1):
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                decode = contenders[name]
                started = time.perf_counter()
                decode(prompt, single)
                middle = time.perf_counter()
                texts[name], accepted = decode(prompt, config)
                ended = time.perf_counter()
                if turn:
                    rows[name]["first_s"].append(middle - started)
                    rows[name]["total_s"].append(ended - middle)
                rows[name] |= {"tokens": len(texts[name]), "accepted": accepted}
        if config.temperature == 0:
            for name, ids in texts.items():
                rows[name]["equal"] = ids == texts[self.baseline]
        return rows

    def aggregate(self, ctx: Context, results: Iterable[ItemResult]) -> Metrics:
        """Rates, ratios and tokens per round by temperature, with intervals over prompts."""
        done = [r for r in results if "contenders" in r.values]
        metrics: list[Metric] = []
        for temperature in dict.fromkeys(float(r.values["temperature"]) for r in done):
            rows = [r.values["contenders"] for r in done if r.values["temperature"] == temperature]
            for name in rows[0]:
                metrics += _metrics(rows, name, self.baseline, f"{name} T={temperature:g}")
        return metrics

    def report(
        self, ctx: Context, results: Iterable[ItemResult], metrics: Metrics
    ) -> Iterator[Block]:
        """Rates, speed-ups, tokens per round."""
        from tenfold_treeflash.reports import race_blocks

        yield from race_blocks(metrics, self.baseline)


def _metrics(
    rows: Sequence[Mapping[str, Any]], name: str, baseline: str, group: str
) -> Iterator[Metric]:
    n = len(rows)

    def rate(part: Sequence[Mapping[str, Any]], who: str) -> float:
        seconds = sum(_decoding(row[who]) for row in part)
        return sum(max(row[who]["tokens"] - 1, 0) for row in part) / max(seconds, 1e-9)

    yield Metric(
        "decode_tokens_per_second", rate(rows, name), n, bootstrap(rows, lambda p: rate(p, name)),
        True, "tokens/s", group,
    )  # fmt: skip
    first = median([median(row[name]["first_s"]) for row in rows])
    yield Metric("first_token", first, n, None, False, "s", group)
    if name != baseline:

        def ratio(part: Sequence[Mapping[str, Any]]) -> float:
            return rate(part, name) / max(rate(part, baseline), 1e-9)

        yield Metric("speedup", ratio(rows), n, bootstrap(rows, ratio), True, "x", group)
    drafted = [row[name]["accepted"] for row in rows if row[name]["accepted"]]
    if drafted:

        def efficiency(part: Sequence[Sequence[int]]) -> float:
            return sum(map(sum, part)) / max(sum(map(len, part)), 1)

        yield Metric(
            "block_efficiency", efficiency(drafted), len(drafted), bootstrap(drafted, efficiency),
            True, "tokens", group,
        )  # fmt: skip
    equal = [row[name]["equal"] for row in rows if "equal" in row[name]]
    if equal and name != baseline:
        yield Metric("equal_texts", sum(equal) / len(equal), len(equal), None, True, "", group)


def _decoding(values: Mapping[str, Any]) -> float:
    """Seconds of decoding: medians over the rounds, the first token taken off."""
    return max(median(values["total_s"]) - median(values["first_s"]), 1e-9)


def _by_generate(model: Any) -> Decode:
    """A model through the `generate` capability."""

    def decode(prompt: list[int], config: GenerationConfig) -> tuple[list[int], list[int]]:
        [[done]] = model.generate([prompt], config)
        accepted: Any = done.stats.get("accepted", []) if isinstance(model, TreeDecoder) else []
        return list(done.token_ids), list(accepted)

    return decode


def _by_transformers(base: Any, settings: Mapping[str, Any]) -> Decode:
    """What transformers' own `generate` does with the baseline's model."""
    module = base.module()

    def decode(prompt: list[int], config: GenerationConfig) -> tuple[list[int], list[int]]:
        ids = torch.tensor([prompt], device=module.device)
        torch.manual_seed(config.seed or 0)
        sampling: dict[str, Any] = {"do_sample": False}
        if config.temperature > 0:
            sampling = {"do_sample": True, "temperature": float(config.temperature), "top_k": 0}
        with torch.no_grad():
            done = module.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=config.max_new_tokens,
                pad_token_id=base.pad_id, **sampling, **settings,
            )  # fmt: skip
        return done[0, len(prompt) :].tolist(), []

    return decode
