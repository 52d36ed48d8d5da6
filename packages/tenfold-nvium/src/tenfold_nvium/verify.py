"""Is decoding exact on this checkpoint? The checks of `nvium:exactness` on random prompts, and
for small vocabularies the distribution itself.

With a small vocabulary every text of a few tokens can be listed with its exact probability; a
chi-square test then compares thousands of sampled texts with the list.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tenfold.seeds import derive

from tenfold_nvium.decode import PiggybackDecoder
from tenfold_nvium.exactness import Exactness, exactness_decoder
from tenfold_nvium.modeling import NviumForCausalLM

MOST_TEXTS = 4096
MOST_TOKENS = 4
SIGNIFICANCE = 1e-3
_MIN_EXPECTED = 8
_BLOCK = 1000

Check = dict[str, Any]
"""`{"check", "ok" (None: not done), "value", "limit", "note"}`."""


def verify(
    network: NviumForCausalLM,
    *,
    prompts: Sequence[Sequence[int]] = (),
    num_prompts: int = 4,
    max_new_tokens: int = 32,
    policy: str = "sample",
    max_deferred: int | None = None,
    float64: bool = True,
    tolerance: float | None = None,
    draws: int = 4000,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> list[Check]:
    """All checks of a network, as rows of a report.

    Args:
        prompts: token ids to start from, before `num_prompts` random ones; those beyond half of
            the context keep their end.
        policy: exit policy of the decoder under test.
        float64: check a copy in fp64, where differences are rounding errors of 1e-12.
        tolerance: largest difference of keys, values and log-probabilities; None: 1e-8 in
            fp64, 1e-3 else.
        draws: texts sampled for the chi-square test; 0 leaves it out.
        advance: called after every prompt, and after the chi-square test.

    Raises:
        ConfigError: an unknown policy.
    """
    if float64:
        network = copy.deepcopy(network).to(torch.float64).eval()
    limit = (1e-8 if float64 else 1e-3) if tolerance is None else tolerance
    checker = Exactness(max_new_tokens=max_new_tokens, policy=policy)
    decoder = exactness_decoder(network, policy, max_deferred)
    most = max(1, network.config.max_position_embeddings // 2)
    rows = []
    for i, ids in enumerate([*prompts, *random_prompts(network, num_prompts, seed)]):
        rows.append(checker.check(decoder, list(ids)[-most:], derive(seed, "verify", i)))
        advance()
    checks = [_coupling(rows)]
    for name, key in (("keys and values", "cache_difference"),
                      ("log-probabilities", "logprob_difference")):  # fmt: skip
        values = [row[key] for row in rows]
        # Value by value, so that a NaN is no small difference.
        ok, worst = all(value <= limit for value in values), max(values, default=0.0)
        checks.append(_check(name, ok, worst, limit, "largest difference"))
    checks.append(_distribution(network, decoder, draws, seed))
    advance()
    return checks


def random_prompts(network: NviumForCausalLM, count: int, seed: int) -> list[list[int]]:
    """Prompts of random tokens, 1, 3, 9, ... of them, cut to half of the context."""
    config = network.config
    generator = torch.Generator().manual_seed(seed)
    most = max(1, config.max_position_embeddings // 2)
    lengths = [min(3**i, most, 64) for i in range(count)]
    return [torch.randint(config.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def _coupling(rows: Sequence[Mapping[str, Any]]) -> Check:
    equal, tokens = sum(bool(row["equal"]) for row in rows), sum(row["tokens"] for row in rows)
    depth = sum(row["mean_depth"] for row in rows) / max(1, len(rows))
    note = f"equal texts with equal random numbers; {tokens} tokens, mean depth {depth:.2f}"
    return _check("sequence coupling", equal == len(rows), f"{equal}/{len(rows)}", "all", note)


def _distribution(
    network: NviumForCausalLM, decoder: PiggybackDecoder, draws: int, seed: int
) -> Check:
    """The chi-square check, or why there is none."""
    name, length = "sampled texts", enumerable_length(network)
    reason = ""
    if draws <= 0:
        reason = "not asked for"
    elif decoder.policy.name not in ("sample", "full") or decoder.policy != type(decoder.policy)():
        reason = f"policy {decoder.policy.name!r} does not sample the mixture"
    elif length < 2:
        reason = f"a vocabulary of {network.config.vocab_size} is too large to list all texts"
    if reason:
        return {"check": name, "ok": None, "value": None, "limit": None, "note": reason}
    expected = text_probabilities(network, length)
    p = chi_square(sampled_texts(decoder, length, draws, seed), expected)
    note = f"chi-square p-value, {draws} texts of {length} tokens, {len(expected)} possible"
    return _check(name, p > SIGNIFICANCE, p, SIGNIFICANCE, note)


def _check(name: str, ok: bool, value: Any, limit: Any, note: str) -> Check:
    return {"check": name, "ok": bool(ok), "value": value, "limit": limit, "note": note}


def enumerable_length(network: NviumForCausalLM) -> int:
    """Longest texts, in tokens, of which there are at most `MOST_TEXTS` (and at most
    `MOST_TOKENS` tokens in each)."""
    size, length = network.config.vocab_size, 0
    room = network.config.max_position_embeddings - 1
    while length < min(MOST_TOKENS, room) and size ** (length + 1) <= MOST_TEXTS:
        length += 1
    return length


@torch.no_grad()
def text_probabilities(network: NviumForCausalLM, length: int) -> dict[tuple[int, ...], float]:
    """Probability of every text of `length` tokens after the prompt [0], by teacher forcing."""
    texts = list(itertools.product(range(network.config.vocab_size), repeat=length))
    expected: dict[tuple[int, ...], float] = {}
    for start in range(0, len(texts), _BLOCK):
        part = texts[start : start + _BLOCK]
        tokens = torch.tensor([[0, *text] for text in part], device=network.device)
        logits = network(tokens).logits[:, :-1]
        total = logits.gather(-1, tokens[:, 1:, None])[..., 0].double().sum(-1).exp()
        expected |= dict(zip(part, total.tolist(), strict=True))
    return expected


def sampled_texts(
    decoder: PiggybackDecoder, length: int, draws: int, seed: int
) -> Counter[tuple[int, ...]]:
    """How often each text was drawn after the prompt [0]."""
    counts: Counter[tuple[int, ...]] = Counter()
    for start in range(0, draws, _BLOCK):
        size = min(_BLOCK, draws - start)
        seeds = [derive(seed, "draw", start + i) for i in range(size)]
        done = decoder.generate([[0]] * size, length, seeds=seeds)
        counts.update(tuple(row.tokens) for row in done.rows)
    return counts


def chi_square(
    counts: Mapping[tuple[int, ...], int], expected: Mapping[tuple[int, ...], float]
) -> float:
    """p-value of drawing `counts` from `expected` (Wilson and Hilferty's approximation); rare
    texts are one cell together, so that each cell has eight expected draws."""
    draws = sum(counts.values())
    cells, seen, wanted = [], 0, 0.0
    for text in sorted(expected, key=lambda t: expected[t], reverse=True):
        seen, wanted = seen + counts.get(text, 0), wanted + expected[text] * draws
        if wanted >= _MIN_EXPECTED:
            cells.append((seen, wanted))
            seen, wanted = 0, 0.0
    if cells and wanted > 0:
        cells[-1] = (cells[-1][0] + seen, cells[-1][1] + wanted)
    freedom = len(cells) - 1
    if freedom < 1:
        return 1.0
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    spread = 2 / (9 * freedom)
    z = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(z / math.sqrt(2))
