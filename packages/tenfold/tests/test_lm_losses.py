"""Chunked losses equal the full ones, gradients included, and never hold all logits."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from tenfold.capabilities import TokenBatch
from tenfold.lm.losses import shifted_nll, shifted_token_nll, token_nll
from torch.utils._python_dispatch import TorchDispatchMode

B, T, H, V = 3, 11, 8, 50


class Largest(TorchDispatchMode):
    """Remembers the largest floating-point tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.numel = max(self.numel, value.numel())
        return result


def sample(dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    hidden = torch.randn(B, T, H, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, dtype=dtype, requires_grad=True)
    offset = torch.randn(V, dtype=dtype, requires_grad=True) if bias else None
    targets = torch.randint(0, V, (B, T))
    mask = torch.rand(B, T) > 0.3
    return hidden, weight, offset, targets, mask


def gradients(losses, *inputs):
    weights = torch.linspace(0.5, 1.5, losses.numel(), dtype=losses.dtype).view_as(losses)
    return torch.autograd.grad((losses * weights).sum(), inputs)


@pytest.mark.parametrize("chunk", [0, 1, 4, 1000])
@pytest.mark.parametrize("bias", [False, True])
def test_chunked_loss_equals_cross_entropy_with_gradients(chunk, bias):
    hidden, weight, offset, targets, mask = sample(bias=bias)
    inputs = [t for t in (hidden, weight, offset) if t is not None]
    full = (
        F.cross_entropy(
            F.linear(hidden, weight, offset).flatten(0, 1), targets.flatten(), reduction="none"
        ).view(B, T)
        * mask
    )
    ours = token_nll(hidden, weight, targets, mask, chunk, offset)
    torch.testing.assert_close(ours, full, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(ours, *inputs), gradients(full, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_no_tensor_is_larger_than_a_chunk_of_logits():
    hidden, weight, _, targets, mask = sample(bias=False)
    chunk = 4
    with Largest() as largest:
        token_nll(hidden, weight, targets, mask, chunk).sum().backward()
    assert largest.numel == max(chunk * V, weight.numel(), hidden.numel())
    assert largest.numel < int(mask.sum()) * V


def test_masked_entries_are_zero_and_carry_no_gradient():
    hidden, weight, _, targets, mask = sample(bias=False)
    losses = token_nll(hidden, weight, targets, mask, 4)
    assert (losses[~mask] == 0).all()
    [gradient] = torch.autograd.grad(losses.sum(), [hidden])
    assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("chunk", [0, 3])
def test_shifted_losses_speak_of_the_next_token(chunk):
    hidden, weight, _, _, _ = sample(bias=False)
    ids = torch.randint(0, V, (B, T))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # left padding
    mask[1, -3:] = 0  # right padding
    batch = TokenBatch(ids, mask)
    ours = shifted_token_nll(hidden, weight, batch, chunk)
    logs = F.linear(hidden, weight).log_softmax(-1)
    for b in range(B):
        for t in range(T):
            scored = t > 0 and mask[b, t] and mask[b, t - 1]
            expected = -logs[b, t - 1, ids[b, t]].item() if scored else 0.0
            assert ours[b, t].item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(shifted_nll(F.linear(hidden, weight), batch, chunk), ours)


def test_half_precision_logits_are_summed_in_float32():
    hidden, weight, _, targets, _ = sample(torch.bfloat16, bias=False)
    losses = token_nll(hidden, weight, targets, torch.ones(B, T), 4)
    assert losses.dtype == torch.float32
    exact = F.cross_entropy(
        F.linear(hidden, weight).float().flatten(0, 1), targets.flatten(), reduction="none"
    )
    torch.testing.assert_close(losses.flatten(), exact)


def test_nothing_scored_gives_zeros():
    hidden, weight, _, targets, _ = sample(bias=False)
    losses = token_nll(hidden, weight, targets, torch.zeros(B, T), 4)
    assert losses.shape == (B, T)
    assert not losses.any()
