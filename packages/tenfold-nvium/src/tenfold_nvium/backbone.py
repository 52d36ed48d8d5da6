"""The decoder stack: embeddings, the base architecture's own layers, final norm, rotary table.

Layers come from transformers, so parameter names equal those of the base model and a converted
checkpoint needs no renaming. Two things differ: norms keep fp64 in fp64, and rotary angles are
read from a table, so that a position has the same angles whatever batch it is computed in.

Shapes: `B` batch, `T` time, `H` hidden, `D` head size, `K` exits.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn

from tenfold_nvium.configuration import NviumConfig
from tenfold_nvium.exits import NviumRMSNorm

_CLASS_PREFIX = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_TABLE_BLOCK = 256


def base_class(base_model_type: str, suffix: str) -> Callable[..., Any]:
    """A class of the base architecture's modeling file, e.g. `LlamaDecoderLayer`."""
    module = import_module(f"transformers.models.{base_model_type}.modeling_{base_model_type}")
    return getattr(module, _CLASS_PREFIX[base_model_type] + suffix)


class RotaryTable:
    """Rotary angles by position.

    Cosines are evaluated in blocks of fixed shape: vectorised and scalar code paths may differ
    in the last bit, and a cached key must equal its recomputation bit for bit.
    """

    def __init__(self, rotary: nn.Module) -> None:
        self._rotary = rotary
        self._cos: Tensor | None = None
        self._sin: Tensor | None = None
        self._signed: Tensor | None = None

    def up_to(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """`cos, sin [P, D]` with `P >= length`, of the device and dtype of `like`."""
        cos, sin = self._cos, self._sin
        fits = cos is not None and cos.device == like.device and cos.dtype == like.dtype
        if cos is None or sin is None or not fits or cos.shape[0] < length:
            have = cos.shape[0] if fits and cos is not None else 0
            cos, sin = self._build(max(length, 2 * have), like)
            half = sin.shape[-1] // 2
            self._cos, self._sin = cos, sin
            self._signed = torch.cat([-sin[:, :half], sin[:, half:]], -1)
        return cos, sin

    def signed(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Like `up_to`, with the first half of `sin` negated: `rotate_half(x) sin` is then
        `roll(x) sin`."""
        cos, _ = self.up_to(length, like)
        assert self._signed is not None
        return cos, self._signed

    def at(self, positions: Tensor, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """`cos, sin [B, T, D]` of `positions [B, T]`, all below `length`."""
        cos, sin = self.up_to(length, like)
        return cos[positions], sin[positions]

    @torch.no_grad()
    def _build(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for start in range(0, length, _TABLE_BLOCK):
            block = torch.arange(start, start + _TABLE_BLOCK, device=like.device)
            parts.append(self._rotary(like.new_empty(0), position_ids=block[None]))
        cos, sin = (torch.cat([part[i][0] for part in parts]) for i in (0, 1))
        return cos, sin


class NviumBackbone(nn.Module):
    """Embeddings, decoder layers and final norm, under the names the base model uses."""

    def __init__(self, config: NviumConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layer = base_class(config.base_model_type, "DecoderLayer")
        self.layers = nn.ModuleList(layer(config, i) for i in range(config.num_hidden_layers))
        _replace_norms(self.layers)
        self.norm = NviumRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = base_class(config.base_model_type, "RotaryEmbedding")(config=config)
        self.rotary = RotaryTable(self.rotary_emb)

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Runs every layer on `hidden [B, T, H]`; all layers' outputs, in order.

        `positions [B, T]` (or `[1, T]`) int64; `mask` as the attention implementation takes
        it, None for plain causal attention without padding.
        """
        length = int(positions.max()) + 1 if positions.numel() else 0
        angles = self.rotary.at(positions, length, hidden)
        outputs = []
        for layer in self.layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=past_key_values,
                use_cache=past_key_values is not None,
                position_embeddings=angles,
                **kwargs,
            )
            outputs.append(hidden)
        return outputs


def _replace_norms(module: nn.Module) -> None:
    """Puts `NviumRMSNorm` in the place of the base's norms; names and weights stay."""
    for name, child in module.named_children():
        if type(child).__name__.endswith("RMSNorm"):
            weight, eps = cast(Tensor, child.weight), cast(float, child.variance_epsilon)
            setattr(module, name, NviumRMSNorm(weight.shape[0], eps))
        else:
            _replace_norms(child)


def attention_mask_for(
    config: NviumConfig, allowed: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """A boolean `allowed [B, 1, T, S]` (True = may look) in the form the attention
    implementation takes: boolean for sdpa, additive for eager."""
    if allowed is None or config._attn_implementation != "eager":
        return allowed
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    return torch.where(allowed, zero, torch.finfo(dtype).min)


def causal_pattern(attention_mask: Tensor | None, queries: int, keys: int) -> Tensor | None:
    """Which of `keys` columns the last `queries` columns may look at, `[B, 1, T, S]` boolean.

    `attention_mask [B, S]` marks real columns. A padded query looks at itself alone, so that
    no softmax is empty. None when nothing but the plain causal triangle is needed.
    """
    padded = attention_mask is not None and not bool(attention_mask.all())
    if not padded and (queries == keys or queries == 1):
        return None
    device = attention_mask.device if attention_mask is not None else None
    key = torch.arange(keys, device=device)
    query = key[keys - queries :, None]
    allowed = (key <= query)[None]
    if padded:
        assert attention_mask is not None
        allowed = (allowed & attention_mask.bool()[:, None, :]) | (key == query)
    return allowed[:, None]


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """Position of each column counted over real tokens, `[B, S]`; padding gets 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
