"""The drafter: a one-shot block drafter and an approximator of autoregression on top of it.

Slot 0 of a block is the newest token (the anchor), the other slots hold a mask; one pass gives a
state `h_k` per slot, which predicts the token *at* the slot's position from everything before
the anchor alone. The approximator corrects `h_k` for a given token at slot `k - 1`:

    z = [RMSNorm(E[v]); norm(h_k)]      [a; g] = W_ug z + b_ug      h_k + W_d (SiLU(g) * a)

The target's features enter as keys and values only. Names of parameters are those of published
checkpoints. Shapes: `B` rows, `S` context tokens, `T` block slots (several blocks side by side
in training), `H` hidden, `F` target features, `D` head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from tenfold.errors import ConfigError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RotaryEmbedding

from tenfold_treeflash.configuration import TreeFlashConfig
from tenfold_treeflash.draft_cache import DraftCache

APPROXIMATOR_EPS = 1e-6


class RMSNorm(nn.RMSNorm):
    """The usual one in one call: a drafter's pass on a CPU is bound by the number of calls."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised in fp32 or wider, as checkpoints of half precision were trained."""
        if x.dtype in (torch.float32, torch.float64):
            return super().forward(x)
        return self.weight * F.rms_norm(x.float(), self.normalized_shape, eps=self.eps).to(x)


def rotated(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Heads `x [B, heads, T, D]` turned by `angles`, cosines and sines `[B, T, D]`."""
    half = x.shape[-1] // 2
    cos, sin = (part[:, None, :, :half] for part in angles)  # both halves of the angles are equal
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class BlockAttention(nn.Module):
    """Attention of block slots over context features and the block itself; no causal mask."""

    def __init__(self, config: TreeFlashConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        assert groups is not None
        width, bias = config.hidden_size, config.attention_bias
        self.grouped = heads != groups
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, groups * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, groups * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim)

    def keys_values(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, G, n, D]` of `x [B, n, H]` at the positions of `angles`."""
        keys = self.k_norm(self._split(self.k_proj(x))).transpose(1, 2)
        return rotated(keys, angles), self._split(self.v_proj(x)).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        context: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        """`x [B, T, H]` to `[B, T, H]`; keys are `context` and the block's own."""
        queries = self.q_norm(self._split(self.q_proj(x))).transpose(1, 2)
        queries = rotated(queries, angles)
        own = self.keys_values(x, angles)
        keys, values = (torch.cat(pair, dim=2) for pair in zip(context, own, strict=True))
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, mask, scale=self.head_dim**-0.5, enable_gqa=self.grouped
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class BlockLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: TreeFlashConfig) -> None:
        super().__init__()
        self.self_attn = BlockAttention(config)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        context: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        """`[B, T, H]` to `[B, T, H]`."""
        x = x + self.self_attn(self.input_layernorm(x), angles, context, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class DraftBackbone(nn.Module):
    """Fusion of target features, block layers, final norm."""

    def __init__(self, config: TreeFlashConfig) -> None:
        super().__init__()
        width, features = config.hidden_size, len(config.target_layer_ids)
        self.layers = nn.ModuleList(BlockLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(width, eps=config.rms_norm_eps)
        self.fc = nn.Linear(features * width, width, bias=False)
        self.hidden_norm = RMSNorm(width, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves and casts, but leaves the rotary frequencies in fp32: in bf16 distant positions
        would coincide."""
        frequencies = self.rotary_emb.inv_freq
        super()._apply(fn, recurse)
        moved = self.rotary_emb.inv_freq
        if moved.dtype != frequencies.dtype:
            self.rotary_emb.register_buffer(
                "inv_freq", frequencies.to(moved.device), persistent=False
            )
        return self

    def blocks(self) -> list[BlockLayer]:
        """The layers, typed."""
        return cast(list[BlockLayer], list(self.layers))

    def context(self, features: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per layer the keys and values `[B, G, n, D]` of target features `[B, n, F H]`."""
        fused = self.hidden_norm(self.fc(features))
        angles = self.rotary_emb(fused, positions)
        return [layer.self_attn.keys_values(fused, angles) for layer in self.blocks()]

    def forward(
        self,
        block: Tensor,
        positions: Tensor,
        context: list[tuple[Tensor, Tensor]],
        mask: Tensor | None = None,
    ) -> Tensor:
        """Residual streams `h [B, T, H]` of block inputs `[B, T, H]` at `positions [B, T]`.

        `mask [B, 1, T, S + T]` says where slots look (True or 0); None: everywhere.
        """
        angles = self.rotary_emb(block, positions)
        for layer, pair in zip(self.blocks(), context, strict=True):
            block = layer(block, angles, pair, mask)
        return block


class ZeroLinear(nn.Linear):
    """A linear layer that a new model starts with zeros: transformers initialises weights by the
    module that owns them, so a parent's word would not count."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)


class SwigluApproximator(nn.Module):
    """The paper's approximator; with `previous = 2` it looks two tokens back (an ablation)."""

    def __init__(self, config: TreeFlashConfig, previous: int = 1) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.approximator_width
        self.previous = previous
        self.norm = RMSNorm(width, eps=APPROXIMATOR_EPS)
        self.ug = nn.Linear((previous + 1) * width, 2 * inner)
        self.d = ZeroLinear(inner, width)

    def forward(self, embedded: Tensor, normed: Tensor) -> Tensor:
        """The correction `[..., H]` from previous tokens' embeddings `[..., previous, H]` and
        `normed [..., H]`."""
        z = torch.cat([self.norm(embedded).flatten(-2), normed], dim=-1)
        up, gate = self.ug(z).chunk(2, dim=-1)
        return self.d(F.silu(gate) * up)


class LinearApproximator(nn.Module):
    """One linear layer in place of the MLP (an ablation)."""

    previous = 1

    def __init__(self, config: TreeFlashConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, eps=APPROXIMATOR_EPS)
        self.d = ZeroLinear(2 * config.hidden_size, config.hidden_size)

    def forward(self, embedded: Tensor, normed: Tensor) -> Tensor:
        """See `SwigluApproximator`."""
        return self.d(torch.cat([self.norm(embedded).flatten(-2), normed], dim=-1))


def make_approximator(config: TreeFlashConfig) -> nn.Module | None:
    """The configured approximator."""
    kind = config.ar_approximation
    if kind is None:
        return None
    if kind == "linear":
        return LinearApproximator(config)
    return SwigluApproximator(config, previous=2 if kind == "swiglu2" else 1)


class TreeFlashDraftModel(PreTrainedModel):
    """A drafter. It owns neither embeddings nor a head: those are the target's."""

    config: TreeFlashConfig
    config_class = TreeFlashConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _no_split_modules = ["BlockLayer"]  # noqa: RUF012

    def __init__(self, config: TreeFlashConfig) -> None:
        super().__init__(config)
        self.model = DraftBackbone(config)
        self.ar_approximation = make_approximator(config)
        self.mask_embedding = (
            nn.Parameter(torch.zeros(config.hidden_size)) if config.mask_token_id is None else None
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Random weights; the approximator's last layer starts at zero, so that a new TreeFlash
        drafts exactly as its backbone does."""
        super()._init_weights(module)
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
        elif isinstance(module, TreeFlashDraftModel) and module.mask_embedding is not None:
            init.normal_(module.mask_embedding, std=self.config.initializer_range)

    # --- One block ----------------------------------------------------------------------------

    def mask_row(self, embedding: Tensor) -> Tensor:
        """The input `[H]` of a slot to be drafted, from the target's table `[V, H]`."""
        if self.mask_embedding is not None:
            return self.mask_embedding
        return embedding[self.config.mask_token_id] * self.config.input_embedding_scale

    def block_input(self, anchors: Tensor, embedding: Tensor, size: int) -> Tensor:
        """Inputs `[..., size, H]` of blocks that begin with `anchors [...]`."""
        first = embedding[anchors] * self.config.input_embedding_scale
        rest = self.mask_row(embedding).to(first).expand(*anchors.shape, size - 1, -1)
        return torch.cat([first[..., None, :], rest], dim=-2)

    def extend(self, cache: DraftCache, features: Tensor, positions: Tensor) -> None:
        """Adds context: target features `[B, n, F H]` at `positions [B, n]`."""
        cache.append(self.model.context(features, positions))

    def draft(self, cache: DraftCache, anchor: int, embedding: Tensor, size: int) -> Tensor:
        """Residual streams `h [size, H]` of the block that begins with `anchor`, behind all of
        the cache (one row)."""
        device = embedding.device
        block = self.block_input(torch.tensor([anchor], device=device), embedding, size)
        positions = torch.arange(cache.length, cache.length + size, device=device)[None]
        return self.model(block, positions, cache.pairs())[0]

    def draft_rows(
        self,
        cache: DraftCache,
        anchors: Sequence[int],
        embedding: Tensor,
        size: int,
        lengths: Sequence[int],
    ) -> Tensor:
        """Residual streams `[B, size, H]` of a block per row, behind the first `lengths[r]` tokens
        of row r of the cache."""
        device = embedding.device
        block = self.block_input(torch.tensor(anchors, device=device), embedding, size)
        ends = torch.tensor(lengths, device=device)[:, None]
        positions = ends + torch.arange(size, device=device)
        mask = None
        if min(lengths) < cache.length:
            filled = torch.arange(cache.length, device=device) < ends
            own = torch.ones((len(lengths), size), dtype=torch.bool, device=device)
            mask = torch.cat([filled, own], dim=1)[:, None, None].expand(-1, -1, size, -1)
        return self.model(block, positions, cache.pairs(), mask)

    def correct(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """`h + delta [..., H]` for previous tokens' raw embeddings `[..., previous, H]`."""
        if self.ar_approximation is None:
            return hidden
        return hidden + self.ar_approximation(embedded, self.model.norm(hidden))

    @property
    def looks_back(self) -> int:
        """How many drafted tokens a correction reads: 0 for marginals."""
        approximator: Any = self.ar_approximation
        return 0 if approximator is None else approximator.previous

    def forward(
        self,
        noise_embedding: Tensor,
        target_hidden: Tensor,
        position_ids: Tensor,
        prev_token_embds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        with_marginal: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normed states `[B, T, H]`, ready for the target's head.

        Args:
            noise_embedding: block inputs `[B, T, H]`.
            target_hidden: features `[B, S, F H]`.
            position_ids: `[B, S + T]`, of the context and of the block.
            prev_token_embds: `[B, T, previous, H]` corrects every slot for these tokens.
            attention_mask: `[B, 1, T, S + T]`; None: every slot sees everything.
            with_marginal: return uncorrected and corrected states, for training on both.

        Raises:
            ConfigError: features of another number of layers.
        """
        length = target_hidden.shape[1]
        wanted = self.model.fc.in_features
        if target_hidden.shape[-1] != wanted:
            raise ConfigError(
                f"target features have {target_hidden.shape[-1]} columns; this drafter reads "
                f"{len(self.config.target_layer_ids)} layers of {self.config.hidden_size}: {wanted}"
            )
        context = self.model.context(target_hidden, position_ids[:, :length])
        hidden = self.model(noise_embedding, position_ids[:, length:], context, attention_mask)
        if prev_token_embds is None:
            return self.model.norm(hidden)
        corrected = self.model.norm(self.correct(hidden, prev_token_embds))
        return (self.model.norm(hidden), corrected) if with_marginal else corrected


def parameter_count(config: TreeFlashConfig) -> dict[str, int]:
    """Parameters of backbone and approximator, without building either."""
    with torch.device("meta"):
        model: Any = TreeFlashDraftModel(config)
    extra = model.ar_approximation
    return {
        "backbone": sum(p.numel() for p in model.model.parameters()),
        "approximator": 0 if extra is None else sum(p.numel() for p in extra.parameters()),
    }
