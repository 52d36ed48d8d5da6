"""Log-probabilities of target tokens without keeping logits: memory grows with chunk x V.

Four heads of `[B, T, V]` logits dominate an N-vium's training memory, yet the mixture loss
needs one number per head and token. The forward pass walks over chunks of tokens and keeps
only each token's log-sum-exp; the backward pass recomputes a chunk's logits and writes

    d log p(y) / d logits = onehot(y) - softmax(logits)

straight into that buffer. Shapes: `N` tokens, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""Label of a position that is not scored, as everywhere in transformers."""


def target_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = 1024) -> Tensor:
    """`log softmax(hidden weight^T)[label]` for each token, `[N]`, in fp32 or wider.

    Args:
        hidden: `[N, H]` head inputs.
        weight: `[V, H]` output embedding (no bias).
        labels: `[N]` int64; `IGNORED` positions give 0 and no gradient.
        chunk: tokens whose logits exist at once; 0 takes all of them together.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        # A custom function does not autocast; match what `F.linear` would have computed in.
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    size = chunk if chunk > 0 else max(1, hidden.shape[0])
    return _TargetLogProbs.apply(hidden, weight, labels, size)[0]


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _TargetLogProbs(torch.autograd.Function):
    """See `target_log_probs`; the second output, the log-sum-exps, is kept for backward."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        values = hidden.new_zeros(hidden.shape[0], dtype=dtype)
        norms = torch.zeros_like(values)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden[part], weight)
            norms[part] = logits.logsumexp(-1)
            target = labels[part].clamp(min=0)
            values[part] = logits.gather(-1, target[:, None])[:, 0] - norms[part]
        values.masked_fill_(labels == IGNORED, 0.0)
        return values, norms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        hidden, weight, labels, ctx.chunk = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(hidden, weight, labels, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # ty: ignore
        hidden, weight, labels, norms = ctx.saved_tensors
        grad = grad.masked_fill(labels == IGNORED, 0.0)
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # The weight gradient sums over many chunks: accumulate it wider than half precision.
        wide = torch.promote_types(weight.dtype, torch.float32)
        to_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            slope = _logits(hidden[part], weight).sub_(norms[part, None]).exp_()
            slope.mul_(-grad[part, None])
            slope.scatter_add_(-1, labels[part].clamp(min=0)[:, None], grad[part, None])
            slope = slope.to(hidden.dtype)
            if to_hidden is not None:
                to_hidden[part] = slope @ weight
            if to_weight is not None:
                to_weight.addmm_(slope.t().to(wide), hidden[part].to(wide))
        return to_hidden, to_weight if to_weight is None else to_weight.to(weight.dtype), None, None
