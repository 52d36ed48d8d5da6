"""Exits on flat states, for decoding: norm, router and head of one exit.

As with layers there are two ways with the same arithmetic: `ModuleExit` calls the exit's own
modules, `PackedExit` copies of their weights laid out for few tokens, with the router's last norm
and head folded into two dot products.

Shapes: `n` tokens, `H` hidden, `V` vocabulary, `R` router width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold_nvium.exits import (
    CONTINUE,
    EXIT,
    NviumAdapter,
    NviumRMSNorm,
    NviumRouter,
    NviumRouterBlock,
    ScaledLinear,
)
from tenfold_nvium.packing import NormedLinear, PackedLinear, PackedNorm, is_single, is_wide

if TYPE_CHECKING:
    from tenfold_nvium.modeling import NviumForCausalLM

_PLAIN = (nn.Linear, ScaledLinear, NviumRMSNorm)


class ExitRunner(Protocol):
    """One exit of a model on residual streams `x_k [n, H]`."""

    def log_odds(self, states: Tensor) -> np.ndarray:
        """Router log-odds `[n]` in fp64; early exits only."""
        ...

    def logits(self, states: Tensor) -> Tensor:
        """The head's logits `[n, V]`."""
        ...


class ModuleExit:
    """Runs exit `k` (0-based) of a model through its modules."""

    def __init__(self, model: NviumForCausalLM, k: int) -> None:
        self._model, self._k = model, k

    def log_odds(self, states: Tensor) -> np.ndarray:
        """See `ExitRunner`."""
        normed = self._model.normed(self._k, states)
        return self._model.gate(self._k, normed).double().cpu().numpy()

    def logits(self, states: Tensor) -> Tensor:
        """See `ExitRunner`."""
        return self._model.head_logits(self._k, self._model.normed(self._k, states))


class PackedExit:
    """Runs an exit from packed weights.

    Args:
        norm, router, adapter: the exit's modules; the last exit has no router.
        head: its output embedding, shared between exits that share the weight.
    """

    def __init__(
        self, norm: nn.Module, router: NviumRouter | None, adapter: nn.Module, head: PackedLinear
    ) -> None:
        self._norm = PackedNorm(norm)
        self._router = None if router is None else PackedRouter(norm, router)
        self._adapter = None
        if isinstance(adapter, NviumAdapter):
            self._adapter = PackedLinear.of(adapter.down), PackedLinear.of(adapter.up)
        self._head = head

    def log_odds(self, states: Tensor) -> np.ndarray:
        """See `ExitRunner`."""
        assert self._router is not None
        return self._router(states)

    def logits(self, states: Tensor) -> Tensor:
        """See `ExitRunner`."""
        normed = self._norm(states)
        if self._adapter is not None:
            down, up = self._adapter
            normed = up.add_to(normed, F.silu(down(normed), inplace=True))
        return self._head(normed)


class PackedRouter:
    """Router log-odds `s [n]` from residual streams `x_k [n, H]`.

    With `f [R]` before the last norm, `s = (u . f) / sqrt(f . f / R + eps) + c`, where `u` is the
    difference of the head's two rows times the norm's weight, over the temperature. Activations
    are `GELU(h) = (h' + h' erf(h')) / sqrt(2)` of `h' = h / sqrt(2)`, with both factors in the
    matrices: two operations instead of one that costs as much as a small matrix product.
    """

    def __init__(self, norm: nn.Module, router: NviumRouter) -> None:
        blocks = [cast(NviumRouterBlock, block) for block in router.blocks]
        norms = [norm, *(block.norm for block in blocks[:-1])]
        self._blocks = [
            (NormedLinear(before, block.fc1, factor=0.5**0.5), _halved(block.fc2))
            for before, block in zip(norms, blocks, strict=True)
        ]
        last = blocks[-1].norm
        weight, bias = (t.detach().double() for t in (router.head.weight, router.head.bias))
        size = weight.shape[1]
        direction = (weight[EXIT] - weight[CONTINUE]) * last.weight.detach().double()
        self._direction = (direction * size**0.5 / router.temperature).to(last.weight)
        self._shift = float((bias[EXIT] - bias[CONTINUE]) / router.temperature)
        self._eps = last.variance_epsilon * size

    def __call__(self, states: Tensor) -> np.ndarray:
        """`[n, H]` to `[n]` in fp64."""
        for fc1, fc2 in self._blocks:
            inner = fc1(states)
            states = fc2(torch.addcmul(inner, inner, inner.erf()))
        if is_single(states):
            vector = states.numpy()[0]
            along = float(vector.dot(self._direction.numpy()))
            square = float(vector.dot(vector))
            return np.array([along / math.sqrt(square + self._eps) + self._shift])
        pair = torch.stack(
            [torch.linalg.vecdot(states, self._direction), torch.linalg.vecdot(states, states)]
        )
        along, square = pair.double().cpu().numpy()
        return along / np.sqrt(square + self._eps) + self._shift


def _halved(layer: nn.Linear) -> PackedLinear:
    """A linear layer whose inputs are multiplied by `sqrt(1/2)`."""
    return PackedLinear(
        layer.weight.detach() * 0.5**0.5, None if layer.bias is None else layer.bias.detach()
    )


def module_exits(model: NviumForCausalLM) -> list[ExitRunner]:
    """Every exit of a model, through its modules."""
    return [ModuleExit(model, k) for k in range(model.num_exits)]


@torch.no_grad()
def packed_exits(model: NviumForCausalLM) -> list[ExitRunner]:
    """Every exit of a model from packed weights; exits in half precision, or with parts that are
    not plain linear layers, run through their modules."""
    heads: dict[int, PackedLinear] = {}
    runners: list[ExitRunner] = []
    for k in range(model.num_exits):
        parts = model.exit_parts(k)
        weight = model.head_weight(k)
        if not is_wide(weight) or not all(_is_plain(part) for part in parts if part is not None):
            runners.append(ModuleExit(model, k))
            continue
        if id(weight) not in heads:
            heads[id(weight)] = PackedLinear(weight.detach())
        runners.append(PackedExit(*parts, heads[id(weight)]))
    return runners


def _is_plain(part: nn.Module) -> bool:
    """Whether a part's linear layers are what they seem: no adapters, no quantised weights."""
    leaves = [m for m in part.modules() if not list(m.children())]
    return all(type(m) in _PLAIN for m in leaves if any(True for _ in m.parameters(False)))
