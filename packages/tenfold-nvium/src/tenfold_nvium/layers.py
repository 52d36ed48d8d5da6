"""Decoder layers on flat blocks, for decoding with an `NviumCache`.

Two ways to run a layer with the same arithmetic:

- `ModuleLayer` calls the layer's own projections, so adapters, hooks and quantised weights work;
- `PackedLayer` holds query, key and value projections as one matrix, gate and up likewise, adds
  residuals inside the matrix products, and lays matrices out for few tokens (`packing`). It keeps
  *copies* of the weights; make a new one when they change.

Shapes: `n` tokens of a block, `H` hidden, `A` query heads, `G` key-value heads, `D` head size.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold_nvium.block import Block
from tenfold_nvium.cache import FrontierLayer, NviumCache
from tenfold_nvium.exit_runners import ExitRunner, module_exits, packed_exits
from tenfold_nvium.packing import NormedLinear, PackedLinear

if TYPE_CHECKING:
    from tenfold_nvium.modeling import NviumForCausalLM


@dataclass(frozen=True, slots=True)
class Heads:
    """Head counts, head size and score scale of an attention module."""

    queries: int
    groups: int
    size: int
    scale: float

    def attend(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, store: FrontierLayer, block: Block
    ) -> Tensor:
        """Rotates, caches and attends: `qkv [n, A + 2 G, D]` (edited in place) to `[n, A D]`.

        `cos, sin [n, 1, D]` with the first half of `sin` negated, so that
        `x cos + rotate_half(x) sin` becomes `x cos + roll(x) sin`.
        """
        turned = qkv[:, : self.queries + self.groups]
        swapped = turned.roll(self.size // 2, -1)
        turned.mul_(cos).addcmul_(swapped, sin)
        pair = store.room_for(block, self.groups, qkv)
        states = qkv[:, self.queries :].view(block.size, 2, self.groups, self.size)
        keys, values = block.store(pair, states)
        mask = block.mask(qkv.dtype)
        mixed = F.scaled_dot_product_attention(
            block.to_grid(qkv[:, : self.queries]),
            keys,
            values,
            mask,
            is_causal=mask is None and block.width > 1,
            scale=self.scale,
            enable_gqa=self.queries != self.groups,
        )
        return block.from_grid(mixed)


class LayerRunner(Protocol):
    """One decoder layer on a block."""

    def run(
        self, x: Tensor, cos: Tensor, sin: Tensor, store: FrontierLayer, block: Block
    ) -> Tensor:
        """`x [n, H]` to `[n, H]`; keys and values go to `store`."""
        ...


@dataclass(slots=True)
class ModuleLayer:
    """Runs a layer through its own modules."""

    layer: Any
    heads: Heads

    def run(
        self, x: Tensor, cos: Tensor, sin: Tensor, store: FrontierLayer, block: Block
    ) -> Tensor:
        """See `LayerRunner`."""
        layer, attention, size = self.layer, self.layer.self_attn, self.heads.size
        normed = layer.input_layernorm(x)
        q, k, v = (
            project(normed).view(x.shape[0], -1, size)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        mixed = self.heads.attend(torch.cat([q, k, v], 1), cos, sin, store, block)
        x = x + attention.o_proj(mixed)
        return x + layer.mlp(layer.post_attention_layernorm(x))


class PackedLayer:
    """Runs a layer from packed weights."""

    def __init__(self, layer: Any, heads: Heads) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._heads = heads
        self._qkv = NormedLinear(
            layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj
        )
        self._out = PackedLinear.of(attention.o_proj)
        self._gate_up = NormedLinear(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        self._down = PackedLinear.of(mlp.down_proj)
        self._activation = mlp.act_fn
        self._head_norms = (
            (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
        )

    def run(
        self, x: Tensor, cos: Tensor, sin: Tensor, store: FrontierLayer, block: Block
    ) -> Tensor:
        """See `LayerRunner`."""
        heads = self._heads
        qkv = self._qkv(x).view(x.shape[0], -1, heads.size)
        if self._head_norms is not None:
            q_norm, k_norm = self._head_norms
            split = heads.queries + heads.groups
            qkv[:, : heads.queries] = q_norm(qkv[:, : heads.queries])
            qkv[:, heads.queries : split] = k_norm(qkv[:, heads.queries : split])
        x = self._out.add_to(x, heads.attend(qkv, cos, sin, store, block))
        gate, up = self._gate_up(x).chunk(2, -1)
        return self._down.add_to(x, self._activation(gate).mul_(up))


class SegmentRunner:
    """Runs the segments of a model on blocks, and its exits on states.

    Args:
        model: the model.
        packed: copy weights into packed matrices (parts whose projections are not plain linear
            layers run through their modules all the same).
    """

    def __init__(self, model: NviumForCausalLM, *, packed: bool = False) -> None:
        self._model = model
        make = pack_layer if packed else module_layer
        self._layers: list[LayerRunner] = [make(layer) for layer in model.model.layers]
        self._packed = packed
        self._segments = model.config.segments

    @cached_property
    def exits(self) -> list[ExitRunner]:
        """Every exit of the model."""
        return packed_exits(self._model) if self._packed else module_exits(self._model)

    def split_at(self, depths: Sequence[int]) -> SegmentRunner:
        """The same layers in other segments, which end at these depths (the last one is L)."""
        twin = copy.copy(self)
        twin._segments = [range(a, b) for a, b in itertools.pairwise([0, *depths])]
        return twin

    def run(self, segment: int, x: Tensor, block: Block, cache: NviumCache) -> Tensor:
        """Runs a segment on the block's residual streams `x [n, H]`."""
        if block.rotation is None:
            cos, sin = self._model.model.rotary.signed(block.length, x)
            block.rotation = block.pick(cos)[:, None], block.pick(sin)[:, None]
        cos, sin = block.rotation
        for index in self._segments[segment]:
            x = self._layers[index].run(x, cos, sin, cache.stores[index], block)
        return x


def module_layer(layer: Any) -> ModuleLayer:
    """A layer to be run through its modules."""
    attention = layer.self_attn
    size = attention.head_dim
    heads = Heads(
        attention.q_proj.out_features // size,
        attention.k_proj.out_features // size,
        size,
        attention.scaling,
    )
    return ModuleLayer(layer, heads)


def pack_layer(layer: Any) -> LayerRunner:
    """A layer with packed projections, or a `ModuleLayer` when they are not plain."""
    plain = module_layer(layer)
    attention, mlp = layer.self_attn, layer.mlp
    projections = (
        attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
        mlp.gate_proj, mlp.up_proj, mlp.down_proj,
    )  # fmt: skip
    if any(type(m) is not nn.Linear for m in projections):
        return plain
    return PackedLayer(layer, plain.heads)
