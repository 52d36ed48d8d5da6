"""LayerSkip's sampled texts follow the dense model (chi-square), and wrong samplers are caught."""

from __future__ import annotations

import itertools

import pytest
import torch
from baseline_cases import tiny_layerskip
from tenfold_nvium.baselines.layerskip import LayerSkipDecoder
from tenfold_nvium.baselines.speculation import kept_prefix, verify_greedy, verify_sampled
from tenfold_nvium.sampling import Warp, inverse_draw
from test_distribution import p_value

VOCAB, LENGTH, DRAWS = 3, 4, 1500


@pytest.fixture(scope="module")
def small():
    return tiny_layerskip(
        2, vocab_size=VOCAB, num_hidden_layers=2, exit_layers=[1], dtype=torch.float32, scale=0.2
    )


def enumerated(model, warp: Warp) -> dict[tuple[int, ...], float]:
    """Probability of each continuation of [0] under the warped dense model."""
    texts = list(itertools.product(range(VOCAB), repeat=LENGTH))
    tokens = torch.tensor([[0, *text] for text in texts])
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    log_probs = warp.log_probs(logits.flatten(0, 1)).view(logits.shape)
    total = log_probs.gather(-1, tokens[:, 1:, None])[..., 0].double().sum(-1).exp()
    assert total.sum().item() == pytest.approx(1.0, abs=1e-6)
    return dict(zip(texts, total.tolist(), strict=True))


def counted(decoder) -> tuple[dict[tuple[int, ...], int], float]:
    counts: dict[tuple[int, ...], int] = {}
    done = decoder.generate([[0]] * DRAWS, LENGTH)
    for row in done.rows:
        counts[tuple(row.tokens)] = counts.get(tuple(row.tokens), 0) + 1
    return counts, done.trace.acceptance


@pytest.mark.parametrize("warp", [Warp(), Warp(0.6, top_k=2)])
def test_sampled_texts_follow_the_enumerated_dense_model(small, warp):
    counts, acceptance = counted(LayerSkipDecoder(small, 1, 2, warp=warp))
    assert 0.1 < acceptance < 0.95
    wanted = {text: p for text, p in enumerated(small, warp).items() if p > 0}
    assert set(counts) <= set(wanted)
    assert p_value(counts, wanted) > 0.001


def test_a_draft_that_is_never_checked_is_rejected(small, monkeypatch):
    """Negative controls: keeping every draft, and drawing the replacement from p."""
    import tenfold_nvium.baselines.layerskip as module

    wanted = enumerated(small, Warp())

    def keeps_all(target, draft, drafted, keep_uniforms, draw_uniforms):
        return torch.ones_like(drafted, dtype=torch.bool), inverse_draw(target, draw_uniforms)

    monkeypatch.setattr(module, "verify_sampled", keeps_all)
    counts, _ = counted(LayerSkipDecoder(small, 1, 2))
    assert p_value(counts, wanted) < 1e-6

    def no_residual(target, draft, drafted, keep_uniforms, draw_uniforms):
        kept, _ = verify_sampled(target, draft, drafted, keep_uniforms, draw_uniforms)
        return kept, inverse_draw(target, draw_uniforms)

    monkeypatch.setattr(module, "verify_sampled", no_residual)
    counts, _ = counted(LayerSkipDecoder(small, 1, 2))
    assert p_value(counts, wanted) < 1e-6


def test_rejection_sampling_draws_from_the_target():
    """The rule alone, many draws at once: one drafted token, then its replacement."""
    p = torch.tensor([0.1, 0.5, 0.05, 0.35], dtype=torch.float64)
    q = torch.tensor([0.6, 0.1, 0.0, 0.3], dtype=torch.float64)
    numbers = torch.rand(3, 40000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drafted = inverse_draw(q.log().expand(40000, 4), numbers[0])
    kept, after = verify_sampled(
        p.log().expand(40001, 4), q.log().expand(40000, 4), drafted, numbers[1],
        torch.cat([numbers[2], numbers[2, :1]]),
    )  # fmt: skip
    tokens = torch.where(kept, drafted, after[:-1])
    shares = {(i,): int((tokens == i).sum()) for i in range(4)}
    assert p_value(shares, {(i,): float(p[i]) for i in range(4)}) > 0.001
    assert kept.double().mean().item() == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.01)
    wrong = {(i,): int((drafted == i).sum()) for i in range(4)}
    assert p_value(wrong, {(i,): float(p[i]) for i in range(4)}) < 1e-6


def test_equal_distributions_are_always_kept():
    p = torch.tensor([[0.2, 0.8], [0.5, 0.5]], dtype=torch.float64).log()
    kept, _ = verify_sampled(
        torch.cat([p, p[:1]]), p, torch.tensor([0, 1]), torch.tensor([1 - 2**-53] * 2),
        torch.tensor([0.5] * 3),
    )  # fmt: skip
    assert kept.all()


def test_greedy_verification():
    target = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]).log()
    kept, after = verify_greedy(target, torch.tensor([1, 1]))
    assert kept.tolist() == [True, False]
    assert after.tolist() == [1, 0, 1]
    assert int(kept_prefix(kept)) == 1
    assert int(kept_prefix(torch.tensor([False, True, True]))) == 0
    assert int(kept_prefix(torch.zeros(0, dtype=torch.bool))) == 0
