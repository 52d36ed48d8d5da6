"""The mixture of exits: weights, likelihood, depth and router terms (paper "Mixture objective").

Pure functions on tensors, in log space and in fp32 or wider. Shapes: `...` any leading
dimensions (usually `B T`), `K` exits, `K-1` early ones. `s_k` is a router's log-odds of "exit
here", `g_k = sigmoid(s_k)`, `pi_k` the probability of exit k:

    pi_k = g_k prod_{j<k} (1 - g_j),   pi_K = prod_{j<K} (1 - g_j)      (stick-breaking)
    p_mix(y) = sum_k pi_k p_k(y)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def in_full_precision(values: Tensor) -> Tensor:
    """`values` in fp32, or unchanged when they are wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def reach_log_probs(gate_log_odds: Tensor) -> Tensor:
    """`[..., K-1]` log-odds to `[..., K]` log probabilities of *reaching* each exit:
    `log rho_k = sum_{j<k} log(1 - g_j)`, with `rho_1 = 1`."""
    s = in_full_precision(gate_log_odds)
    passed = F.logsigmoid(-s).cumsum(-1)
    return torch.cat([torch.zeros_like(passed[..., :1]), passed], -1) if s.shape[-1] else passed


def exit_log_probs(gate_log_odds: Tensor) -> Tensor:
    """`[..., K-1]` router log-odds to `[..., K]` log mixture weights `log pi_k`.

    `log pi_k = log sigma(s_k) + sum_{j<k} log sigma(-s_j)`; no clamp, so `s = -60` gives -60
    and `s = +200` leaves finite values and gradients behind it. With `K = 1` the result is
    zeros of shape `[..., 1]`.
    """
    s = in_full_precision(gate_log_odds)
    taken = torch.cat([F.logsigmoid(s), s.new_zeros((*s.shape[:-1], 1))], -1)
    return taken + reach_log_probs(s) if s.shape[-1] else taken


def mixture_log_prob(log_weights: Tensor, head_log_probs: Tensor) -> Tensor:
    """`log p_mix(y) [...]` from `log pi_k [..., K]` and `log p_k(y) [..., K]`."""
    return torch.logsumexp(log_weights + in_full_precision(head_log_probs), -1)


def mixture_nll(gate_log_odds: Tensor, head_log_probs: Tensor) -> Tensor:
    """Per-token negative log-likelihood of the mixture, nats, `[...]`.

    `gate_log_odds [..., K-1]`, `head_log_probs [..., K]` (each head's log-probability of the
    target token).
    """
    return -mixture_log_prob(exit_log_probs(gate_log_odds), head_log_probs)


def responsibilities(log_weights: Tensor, head_log_probs: Tensor) -> Tensor:
    """`r_k = pi_k p_k(y) / p_mix(y) [..., K]`: which exit explains the target token.

    They are the weights of each head's cross-entropy gradient:
    `d NLL / d log p_k(y) = -r_k` and `d NLL / d s_k = g_k sum_{j>=k} r_j - r_k`.
    """
    return torch.softmax(log_weights + in_full_precision(head_log_probs), -1)


def expected_depth(log_weights: Tensor, costs: Tensor) -> Tensor:
    """Expected normalised depth `sum_k pi_k c_k`, per token `[...]`; `costs [K]` in (0, 1]."""
    return (log_weights.exp() * costs.to(log_weights)).sum(-1)


def router_warmup_loss(gate_log_odds: Tensor) -> Tensor:
    """Warm-up term `sum_{k<K} (g_k - 1 / (K - k + 1))^2` per token, `[...]`.

    The targets 1/K, ..., 1/3, 1/2 of the *conditional* exit probabilities make the mixture
    weights uniform.
    """
    s = in_full_precision(gate_log_odds)
    early = s.shape[-1]
    targets = 1.0 / torch.arange(early + 1, 1, -1, dtype=s.dtype, device=s.device)
    return (s.sigmoid() - targets).square().sum(-1)


def gate_entropy(gate_log_odds: Tensor) -> Tensor:
    """Entropy of each router's exit decision, nats, `[..., K-1]`."""
    s = in_full_precision(gate_log_odds)
    return -(s.sigmoid() * F.logsigmoid(s) + (-s).sigmoid() * F.logsigmoid(-s))
