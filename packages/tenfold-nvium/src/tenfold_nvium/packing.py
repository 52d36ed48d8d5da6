"""Weights laid out for decoding: matrices that multiply one token, or a few, at a time.

A decoding step is bound by reading weights, so the layout decides (`benchmarks/layouts.md`, CPU,
fp32): a vector times a matrix with more columns than rows runs faster from the transposed matrix,
and blocks of a few tokens from oneDNN's blocked layout, where matrices are large. Copies are made
once; they do not follow later changes of the weights.

Shapes: `n` tokens, `I` inputs, `O` outputs.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tenfold_nvium.exits import NviumRMSNorm

_BLOCKED_WIDTHS = range(2, 17)
"""Numbers of tokens that the blocked layout is used for; wider products are not bound by memory."""
_BLOCKED_SIZE: int = 1 << 19
"""Weights that a matrix must have for it; below, calling oneDNN costs more than it saves."""
_BLOCKED_HINT = 4
"""Width that the blocked layout is made for."""


class PackedLinear:
    """`y = x W^T + b`.

    Args:
        weight: `[O, I]`.
        bias: `[O]`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        outputs, inputs = weight.shape
        self.columns = weight.t().contiguous() if outputs > inputs else weight.t()
        """`[I, O]`"""
        self.bias = bias
        self._weight = weight
        self._start = weight.new_zeros(outputs)

    @classmethod
    def of(
        cls, *layers: nn.Linear, scale: Tensor | None = None, factor: float = 1.0
    ) -> PackedLinear:
        """The concatenated outputs of one or more linear layers over the same input, all with
        or all without a bias; inputs are multiplied by `scale [I]`, outputs by `factor`."""
        weights = [m.weight.detach() for m in layers]
        biases = [m.bias.detach() for m in layers if m.bias is not None]
        weight = weights[0] if len(layers) == 1 else torch.cat(weights)
        if scale is not None:
            weight = weight * scale
        bias = torch.cat(biases) if biases else None
        if factor != 1:
            weight, bias = weight * factor, None if bias is None else bias * factor
        return cls(weight, bias)

    @cached_property
    def _blocked(self) -> Any:
        """The blocked copy, made when several tokens first meet."""
        return _blocked(self._weight)

    def __call__(self, x: Tensor) -> Tensor:
        """`x [n, I]` to `[n, O]`."""
        if x.shape[0] in _BLOCKED_WIDTHS and self._blocked is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self._blocked, self.bias, "none", [], "")
        if self.bias is None:
            return torch.mm(x, self.columns)
        return torch.addmm(self.bias, x, self.columns)

    def of_one(self, x: Tensor, factor: float) -> Tensor:
        """`self(factor x)` of one token `x [1, I]`, the factor inside the product."""
        if self.bias is None:
            return torch.addmm(self._start, x, self.columns, beta=0, alpha=factor)
        return torch.addmm(self.bias, x, self.columns, alpha=factor)

    def add_to(self, x: Tensor, y: Tensor) -> Tensor:
        """`x + self(y)`, the addition inside the product: `x [n, O]`, `y [n, I]`."""
        if x.shape[0] in _BLOCKED_WIDTHS and self._blocked is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(y, x, self._blocked, self.bias, "add")
        x = torch.addmm(x, y, self.columns)
        return x if self.bias is None else x.add_(self.bias)


def _blocked(weight: Tensor) -> Any:
    """A copy in oneDNN's blocked layout, or None where there is none (other devices, number
    types, and builds of torch)."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    if weight.numel() < _BLOCKED_SIZE:
        return None
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _BLOCKED_HINT)
    except (AttributeError, RuntimeError):
        return None


class PackedNorm:
    """A root-mean-square norm in few operations (`F.rms_norm` launches ten on CPU).

    Computes in the hidden state's own type, so half precision is left to the module.
    """

    def __init__(self, norm: nn.Module) -> None:
        self._module = norm
        self.scale: Tensor | None = None
        """`[H]` what states over their length are multiplied by; None: left to the module."""
        if isinstance(norm, NviumRMSNorm) and is_wide(norm.weight):
            size = norm.weight.shape[0]
            self.scale = norm.weight.detach() * size**0.5
            self._eps = norm.variance_epsilon * size

    def __call__(self, x: Tensor) -> Tensor:
        """`x [n, H]` normalised."""
        if self.scale is None:
            return self._module(x)
        return (x * self.scale).mul_(self.inverse_length(x))

    def inverse_length(self, x: Tensor) -> Tensor | float:
        """`1 / sqrt(sum x^2 + H eps)`, `[n, 1]`, or a number for one token on the CPU."""
        if is_single(x):
            vector = x.numpy()[0]
            return (float(vector.dot(vector)) + self._eps) ** -0.5
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        return square.add_(self._eps).rsqrt_()


class NormedLinear:
    """Linear layers over one input, behind a norm whose weight the matrix contains. For one token
    the length is a factor of the product, so that normalising costs one dot product."""

    def __init__(self, norm: nn.Module, *layers: nn.Linear, factor: float = 1.0) -> None:
        self._norm = PackedNorm(norm)
        scale = self._norm.scale
        self._linear = PackedLinear.of(*layers, scale=scale, factor=factor)

    def __call__(self, x: Tensor) -> Tensor:
        """`x [n, H]` to `[n, O]`."""
        if self._norm.scale is None:
            return self._linear(self._norm(x))
        inverse = self._norm.inverse_length(x)
        if isinstance(inverse, float):
            return self._linear.of_one(x, inverse)
        return self._linear(x * inverse)


def is_single(x: Tensor) -> bool:
    """Whether `x [n, H]` is one token on the CPU, where plain numbers are quicker than tensors."""
    return x.shape[0] == 1 and x.device.type == "cpu"


def is_wide(weight: Tensor) -> bool:
    """Whether sums may be taken in the weight's own number type: fp32 or fp64."""
    return weight.dtype in (torch.float32, torch.float64)
