"""Chunked target log-probabilities equal log-softmax, in value, gradient and memory."""

from __future__ import annotations

import pytest
import torch
from tenfold_nvium.loss import IGNORED, target_log_probs


def problem(tokens=13, size=6, vocab=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, size, dtype=dtype, generator=generator).requires_grad_()
    weight = torch.randn(vocab, size, dtype=dtype, generator=generator).requires_grad_()
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[3] = IGNORED
    return hidden, weight, labels


def reference(hidden, weight, labels):
    logits = hidden @ weight.t()
    values = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return values.masked_fill(labels == IGNORED, 0.0)


@pytest.mark.parametrize("chunk", [0, 1, 4, 5, 13, 100])
def test_value_and_gradients_equal_log_softmax_for_every_chunk(chunk):
    hidden, weight, labels = problem()
    scale = torch.linspace(-1, 2, 13, dtype=torch.float64)
    expected = reference(hidden, weight, labels)
    wanted = torch.autograd.grad((expected * scale).sum(), (hidden, weight))
    values = target_log_probs(hidden, weight, labels, chunk)
    got = torch.autograd.grad((values * scale).sum(), (hidden, weight))
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    hidden, weight, labels = problem(tokens=5)
    assert torch.autograd.gradcheck(
        lambda h, w: target_log_probs(h, w, labels, 2), (hidden, weight)
    )


def test_ignored_labels_give_zero_and_no_gradient():
    hidden, weight, labels = problem()
    labels[:] = IGNORED
    values = target_log_probs(hidden, weight, labels, 4)
    values.sum().backward()
    assert values.eq(0).all()
    assert hidden.grad.eq(0).all()
    assert weight.grad.eq(0).all()


def test_half_precision_sums_in_fp32():
    hidden, weight, labels = problem(dtype=torch.float32)
    half = target_log_probs(hidden.bfloat16(), weight.bfloat16(), labels, 4)
    exact = reference(hidden.bfloat16().double(), weight.bfloat16().double(), labels)
    assert half.dtype == torch.float32
    # Logits are rounded to 8 bits, the log-sum-exp is not.
    assert (half - exact).abs().max() < 0.1


def test_autocast_matches_an_autocast_linear_layer():
    hidden, weight, labels = problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = torch.nn.functional.linear(hidden, weight).float()
        values = target_log_probs(hidden, weight, labels, 0)
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(values, picked.masked_fill(labels == IGNORED, 0.0))
    values.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_no_buffer_holds_all_logits():
    """Peak memory grows with chunk x V: no tensor of tokens x V is made in either pass."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else (out,):
                if isinstance(value, torch.Tensor):
                    self.size = max(self.size, value.numel())
            return out

    hidden, weight, labels = problem(tokens=64, size=4, vocab=32)
    for chunk, limit in ((8, 8 * 32), (0, 64 * 32)):
        with Largest() as largest:
            target_log_probs(hidden, weight, labels, chunk).sum().backward()
        assert largest.size == limit
