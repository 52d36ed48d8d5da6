"""Laws of the mixture: weights, likelihood, depth, router terms."""

from __future__ import annotations

import pytest
import torch
from tenfold_nvium.mixture import (
    exit_log_probs,
    expected_depth,
    gate_entropy,
    mixture_nll,
    reach_log_probs,
    responsibilities,
    router_warmup_loss,
)

torch.manual_seed(0)


def brute_force_weights(s: torch.Tensor) -> torch.Tensor:
    g, weights, stay = torch.sigmoid(s), [], torch.ones(s.shape[:-1], dtype=s.dtype)
    for k in range(s.shape[-1]):
        weights.append(g[..., k] * stay)
        stay = stay * (1 - g[..., k])
    return torch.stack([*weights, stay], -1)


@pytest.mark.parametrize("exits", range(1, 13))
def test_weights_and_nll_equal_brute_force(exits):
    s = torch.randn(5, 7, exits - 1, dtype=torch.float64) * 2
    heads = torch.randn(5, 7, exits, dtype=torch.float64) - 3
    weights = brute_force_weights(s)
    torch.testing.assert_close(exit_log_probs(s).exp(), weights, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, 7, dtype=torch.float64))
    nll = -(weights * heads.exp()).sum(-1).log()
    torch.testing.assert_close(mixture_nll(s, heads), nll, rtol=1e-12, atol=1e-12)


def test_reach_is_the_product_of_staying():
    s = torch.randn(9, 3, dtype=torch.float64)
    weights = brute_force_weights(s)
    reach = weights.flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(reach_log_probs(s).exp(), reach, rtol=1e-12, atol=1e-15)


def test_extreme_log_odds_stay_finite_in_value_and_gradient():
    s = torch.tensor([[200.0, -200.0, 60.0], [-60.0, 200.0, -200.0]], requires_grad=True)
    heads = torch.tensor([[-5.0, -90.0, -300.0, -1.0]] * 2)
    weights = exit_log_probs(s)
    assert weights[1, 0].item() == pytest.approx(-60.0)
    assert weights[0, 3].item() == pytest.approx(-260.0)
    mixture_nll(s, heads).sum().backward()
    assert torch.isfinite(weights).all()
    assert torch.isfinite(s.grad).all()


def test_gradients_equal_their_closed_forms():
    s = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    heads = (torch.randn(6, 4, dtype=torch.float64) - 2).requires_grad_()
    mixture_nll(s, heads).sum().backward()
    r = responsibilities(exit_log_probs(s), heads).detach()
    later = r.flip(-1).cumsum(-1).flip(-1)[:, :3]
    torch.testing.assert_close(heads.grad, -r, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(s.grad, s.sigmoid().detach() * later - r[:, :3])


def test_depth_gradient_equals_its_closed_form():
    s = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    costs = torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    expected_depth(exit_log_probs(s), costs).sum().backward()
    g, reach = s.sigmoid().detach(), reach_log_probs(s).exp().detach()
    weights = exit_log_probs(s).exp().detach()
    for k in range(3):
        after = (weights[:, k + 1 :] * costs[k + 1 :]).sum(-1) / reach[:, k + 1]
        slope = reach[:, k] * g[:, k] * (1 - g[:, k]) * (costs[k] - after)
        torch.testing.assert_close(s.grad[:, k], slope, rtol=1e-9, atol=1e-12)


def test_gradcheck_of_all_terms():
    s = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    heads = (torch.randn(3, 4, dtype=torch.float64) - 2).requires_grad_()
    costs = torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(mixture_nll, (s, heads))
    assert torch.autograd.gradcheck(lambda x: expected_depth(exit_log_probs(x), costs), (s,))
    assert torch.autograd.gradcheck(router_warmup_loss, (s,))


@pytest.mark.parametrize("exits", [2, 4, 7])
def test_warmup_is_zero_exactly_at_uniform_weights(exits):
    g = torch.tensor([1 / (exits - k) for k in range(exits - 1)], dtype=torch.float64)
    s = torch.logit(g)
    assert router_warmup_loss(s).item() == pytest.approx(0.0, abs=1e-15)
    uniform = torch.full((exits,), 1 / exits, dtype=torch.float64)
    torch.testing.assert_close(exit_log_probs(s).exp(), uniform)
    assert router_warmup_loss(s + 0.1).item() > 1e-4


def test_expected_depth_of_known_gates():
    # The queue statistics of three gates at 0.35 with evenly spread exits.
    s = torch.logit(torch.full((3,), 0.35, dtype=torch.float64))
    costs = torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    depth = expected_depth(exit_log_probs(s), costs).item()
    assert depth == pytest.approx(0.58678, abs=1e-5)
    assert 1 / depth == pytest.approx(1.7042, abs=1e-4)


def test_half_precision_log_odds_are_mixed_in_fp32():
    s = torch.randn(4, 3).bfloat16()
    assert exit_log_probs(s).dtype == torch.float32
    assert exit_log_probs(s).exp().sum(-1).sub(1).abs().max() < 1e-6


def test_entropy_peaks_at_even_odds():
    entropy = gate_entropy(torch.tensor([0.0, 3.0, -3.0]))
    assert entropy[0].item() == pytest.approx(0.693147, abs=1e-5)
    assert entropy[1].item() == pytest.approx(entropy[2].item())
    assert entropy[1] < entropy[0]
