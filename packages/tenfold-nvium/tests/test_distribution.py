"""Sampled texts follow the enumerated mixture (chi-square), and a wrong sampler is caught."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from nvium_cases import tiny_model
from tenfold_nvium.decode import PiggybackDecoder
from tenfold_nvium.sampling import Warp

VOCAB, LENGTH, DRAWS, BLOCK = 4, 4, 20000, 2000


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=VOCAB, dtype=torch.float32)


@pytest.fixture(scope="module")
def probabilities(model) -> dict[tuple[int, ...], float]:
    """Probability of each of the 4^4 continuations of the prompt [0], by teacher forcing."""
    texts = list(itertools.product(range(VOCAB), repeat=LENGTH))
    tokens = torch.tensor([[0, *text] for text in texts])
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    total = logits.gather(-1, tokens[:, 1:, None])[..., 0].double().sum(-1).exp()
    assert total.sum().item() == pytest.approx(1.0, abs=1e-6)
    return dict(zip(texts, total.tolist(), strict=True))


def p_value(counts: dict[tuple[int, ...], int], expected: dict[tuple[int, ...], float]) -> float:
    """Chi-square p-value, cells with fewer than 8 expected draws merged (Wilson-Hilferty)."""
    draws = sum(counts.values())
    cells, rest_seen, rest_wanted = [], 0, 0.0
    for text, probability in expected.items():
        wanted, seen = probability * draws, counts.get(text, 0)
        if wanted < 8:
            rest_seen, rest_wanted = rest_seen + seen, rest_wanted + wanted
        else:
            cells.append((seen, wanted))
    if rest_wanted > 0:
        cells.append((rest_seen, rest_wanted))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    freedom = len(cells) - 1
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


def sample(model, policy: str, warp: Warp | None = None, draws: int = DRAWS):
    decoder, counts = PiggybackDecoder(model, policy, warp=warp), {}
    for start in range(0, draws, BLOCK):
        seeds = range(start, start + BLOCK)
        for row in decoder.generate([[0]] * BLOCK, LENGTH, seeds=seeds).rows:
            key = tuple(row.tokens)
            counts[key] = counts.get(key, 0) + 1
    return counts


@pytest.mark.parametrize("policy", ["sample", "full"])
def test_sampled_texts_follow_the_enumerated_mixture(model, probabilities, policy):
    assert p_value(sample(model, policy), probabilities) > 0.001


@pytest.mark.parametrize(
    ("policy", "warp"), [("greedy-router", None), ("sample", Warp(top_k=2)), ("fixed:1", None)]
)
def test_a_sampler_of_another_distribution_is_rejected(model, probabilities, policy, warp):
    """Negative control: the test above can fail."""
    assert p_value(sample(model, policy, warp, 4000), probabilities) < 1e-6
