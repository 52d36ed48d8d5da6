"""State propagation: keys and values of layers that a token skipped, from its exit state alone.

CALM's answer to the holes in the cache: a token that left at an exit is given, in every layer
above, the key and value that this layer would compute if the state had stayed as it was:

    k = rotary(norm_k(W_k norm_l(x))),   v = W_v norm_l(x)

No attention and no MLP runs, so the cache is an *approximation* of the full-depth one. All
layers of a segment are filled by one batched matrix product for any number of tokens.

Shapes: `n` tokens, `H` hidden, `G` key-value heads, `D` head size, `S` layers of the segment.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold_nvium.block import Block
from tenfold_nvium.cache import NviumCache


class Propagator:
    """Fills one segment's cache. It keeps a copy of the projections; make a new one when
    weights change.

    Args:
        model: a model with a backbone and a configuration.
        segment: the segment's index.
    """

    @torch.no_grad()
    def __init__(self, model: Any, segment: int) -> None:
        self._rotary = model.model.rotary
        self._indices = list(model.config.segments[segment])
        layers = [model.model.layers[i] for i in self._indices]
        attention = [layer.self_attn for layer in layers]
        self._size = attention[0].head_dim
        self._groups = attention[0].k_proj.out_features // self._size
        self._eps = layers[0].input_layernorm.variance_epsilon
        self._norms = torch.stack([layer.input_layernorm.weight for layer in layers])[:, None]
        self._weights = torch.stack([_joined(a, "weight").t() for a in attention]).contiguous()
        has_bias = attention[0].k_proj.bias is not None
        self._biases = (
            torch.stack([_joined(a, "bias") for a in attention])[:, None] if has_bias else None
        )
        self._key_norms: list[nn.Module] | None = (
            [a.k_norm for a in attention] if hasattr(attention[0], "k_norm") else None
        )

    @torch.inference_mode()
    def fill(self, x: Tensor, block: Block, cache: NviumCache) -> None:
        """Writes keys and values of the block's states `x [n, H]` into the segment's layers."""
        states = self.keys_and_values(x, block)
        for layer, index in enumerate(self._indices):
            store = cache.stores[index]
            block.store(store.room_for(block, self._groups, states), states[layer])

    def keys_and_values(self, x: Tensor, block: Block) -> Tensor:
        """`[S, n, 2, G, D]`, keys rotated to their positions."""
        normed = _unscaled_norm(x, self._eps) * self._norms
        states = torch.bmm(normed, self._weights)
        if self._biases is not None:
            states = states + self._biases
        states = states.view(len(self._indices), x.shape[0], 2, self._groups, self._size)
        keys = states[:, :, 0]
        if self._key_norms is not None:
            keys = torch.stack([norm(k) for norm, k in zip(self._key_norms, keys, strict=True)])
        cos, sin = (block.pick(t)[:, None] for t in self._rotary.signed(block.length, x))
        # The first half of `sin` is negated, so rolling does what `rotate_half` does.
        states[:, :, 0] = keys * cos + keys.roll(self._size // 2, -1) * sin
        return states


def _joined(attention: Any, name: str) -> Tensor:
    return torch.cat([getattr(attention.k_proj, name), getattr(attention.v_proj, name)])


def _unscaled_norm(x: Tensor, eps: float) -> Tensor:
    """The root-mean-square norm before its weight, rounded as `NviumRMSNorm` rounds it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, wide.shape[-1:], None, eps).to(x.dtype)
