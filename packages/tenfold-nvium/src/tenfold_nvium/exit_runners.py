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
from tenfold_nvium.packing import PackedLinear, PackedNorm, is_wide

if TYPE_CHECKING:
    from tenfold_nvium.modeling import NviumForCausalLM

_PLAIN = (nn.Linear, ScaledLinear, NviumRMSNorm)


class ExitRunner(Protocol):
    """One exit of a model on states."""

    def normed(self, states: Tensor) -> Tensor:
        """`n_k [n, H]` of the residual streams `x_k [n, H]`."""
        ...

    def log_odds(self, normed: Tensor) -> np.ndarray:
        """Router log-odds `[n]` in fp64 from `n_k`; early exits only."""
        ...

    def logits(self, normed: Tensor) -> Tensor:
        """The head's logits `[n, V]` from `n_k`."""
        ...


class ModuleExit:
    """Runs exit `k` (0-based) of a model through its modules."""

    def __init__(self, model: NviumForCausalLM, k: int) -> None:
        self._model, self._k = model, k

    def normed(self, states: Tensor) -> Tensor:
        """See `ExitRunner`."""
        return self._model.normed(self._k, states)

    def log_odds(self, normed: Tensor) -> np.ndarray:
        """See `ExitRunner`."""
        return self._model.gate(self._k, normed).double().cpu().numpy()

    def logits(self, normed: Tensor) -> Tensor:
        """See `ExitRunner`."""
        return self._model.head_logits(self._k, normed)


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
        self._router = None if router is None else PackedRouter(router)
        self._adapter = None
        if isinstance(adapter, NviumAdapter):
            self._adapter = PackedLinear.of(adapter.down), PackedLinear.of(adapter.up)
        self._head = head

    def normed(self, states: Tensor) -> Tensor:
        """See `ExitRunner`."""
        return self._norm(states)

    def log_odds(self, normed: Tensor) -> np.ndarray:
        """See `ExitRunner`."""
        assert self._router is not None
        return self._router(normed)

    def logits(self, normed: Tensor) -> Tensor:
        """See `ExitRunner`."""
        if self._adapter is not None:
            down, up = self._adapter
            normed = up.add_to(normed, F.silu(down(normed), inplace=True))
        return self._head(normed)


class PackedRouter:
    """Router log-odds `s [n]` from `n_k [n, H]`.

    With `f [R]` before the last norm, `s = (u . f) / sqrt(f . f / R + eps) + c`, where `u` is the
    difference of the head's two rows times the norm's weight, over the temperature.
    """

    def __init__(self, router: NviumRouter) -> None:
        blocks = [cast(NviumRouterBlock, block) for block in router.blocks]
        self._blocks = [
            (PackedLinear.of(block.fc1), PackedLinear.of(block.fc2), PackedNorm(block.norm))
            for block in blocks
        ]  # fmt: skip
        last = blocks[-1].norm
        weight, bias = (t.detach().double() for t in (router.head.weight, router.head.bias))
        size = weight.shape[1]
        direction = (weight[EXIT] - weight[CONTINUE]) * last.weight.detach().double()
        self._direction = (direction * size**0.5 / router.temperature).to(last.weight)
        self._shift = float((bias[EXIT] - bias[CONTINUE]) / router.temperature)
        self._eps = last.variance_epsilon * size

    def __call__(self, normed: Tensor) -> np.ndarray:
        """`[n, H]` to `[n]` in fp64."""
        for i, (fc1, fc2, norm) in enumerate(self._blocks):
            normed = fc2(F.gelu(fc1(normed)))
            if i + 1 < len(self._blocks):
                normed = norm(normed)
        if normed.shape[0] == 1 and normed.device.type == "cpu":
            vector = normed[0]
            along = torch.dot(vector, self._direction).item()
            square = torch.dot(vector, vector).item()
            return np.array([along / math.sqrt(square + self._eps) + self._shift])
        pair = torch.stack(
            [torch.linalg.vecdot(normed, self._direction), torch.linalg.vecdot(normed, normed)]
        )
        along, square = pair.double().cpu().numpy()
        return along / np.sqrt(square + self._eps) + self._shift


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
