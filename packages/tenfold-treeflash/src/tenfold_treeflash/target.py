"""The target model as tree decoding needs it: embeddings, head, features, masks, cache.

Any decoder-only transformers model whose attention takes a mask of its own: the nodes of a tree
run in one pass, each looking at the context and at its ancestors. Layers with a sliding window
look at what lies inside it *by position*. `check_tree_attention` runs a small tree both ways and
refuses a model that computes something else.

Shapes: `C` cached tokens, `n` nodes or tokens of a pass, `H` hidden, `V` vocabulary, `F` layers
that a drafter reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tenfold.errors import ComponentError, ConfigError
from tenfold.lm import architecture
from torch import Tensor

from tenfold_treeflash.configuration import TreeFlashConfig
from tenfold_treeflash.modeling import TreeFlashDraftModel
from tenfold_treeflash.tree import DraftTree
from tenfold_treeflash.tree_cache import TreeCache

FULL, SLIDING = "full_attention", "sliding_attention"
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 0.15
"""Largest difference of probabilities that rounding may explain, in fp32 and in half precision;
a wrong mask makes a larger one on any model that has learned something."""
_ROPES_THAT_TURN = ("longrope",)
_ROPES_THAT_MOVE = ("dynamic",)


class TargetHead:
    """A target's output head with what its model does to the logits afterwards."""

    def __init__(self, module: Any, config: Any) -> None:
        self._module = module
        self._cap = getattr(config, "final_logit_softcapping", None)
        scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", 1)
        self._factor = (1.0 if scale is None else scale) / (divisor or 1)
        self.weight = getattr(module, "weight", None)
        self.bias = getattr(module, "bias", None)

    def finish(self, logits: Tensor) -> Tensor:
        """Factor and soft cap, where the model has them."""
        if self._factor != 1.0:
            logits = logits * self._factor
        return torch.tanh(logits / self._cap) * self._cap if self._cap else logits

    def __call__(self, states: Tensor) -> Tensor:
        """States `[..., H]` to logits `[..., V]`."""
        return self.finish(self._module(states))


class Target:
    """A causal language model to decode with.

    Raises:
        ConfigError: the model has no language-model head, or is an encoder-decoder.
        ComponentError: layers whose attention a tree has no mask for.
    """

    def __init__(self, model: Any) -> None:
        name = type(model).__name__
        if getattr(model.config, "is_encoder_decoder", False):
            raise ConfigError(f"{name} is an encoder-decoder; tree decoding needs a decoder")
        self.model = model
        config = architecture.text_config(model)
        _check_layers(name, config)
        self.blocks = architecture.blocks(model)
        self.head = TargetHead(architecture.head(model), config)
        self._limits = _position_limits(config, architecture.context_length(model))
        self.window = architecture.sliding_window(model)
        kinds = set(getattr(config, "layer_types", None) or [])
        self._mixed = self.window is not None and FULL in kinds
        self._positions = architecture.accepts(model, "position_ids")
        self._vocabulary = int(config.vocab_size)
        self._keeps_logits = architecture.accepts(model, "logits_to_keep")

    # --- What a drafter borrows ---------------------------------------------------------------

    @property
    def embedding(self) -> Tensor:
        """The raw input embeddings `[V, H]`."""
        return self.model.get_input_embeddings().weight.detach()

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its states."""
        return self.model.dtype

    @property
    def hidden_size(self) -> int:
        """Width H of its states."""
        return int(architecture.text_config(self.model).hidden_size)

    @property
    def turns(self) -> bool:
        """Whether its rotary embedding changes with the length of a pass."""
        return self._limits[1] < architecture.UNLIMITED

    def deepest(self, start: int) -> int:
        """How many positions a tree may reach beyond `start`: learned position tables end, and
        some rotary embeddings compute every key of a pass by the pass's last position."""
        limit, turn, moves = self._limits
        if start < turn:
            limit = min(limit, turn)
        elif moves:
            return 0
        return max(limit - 1 - start, 0)

    def check_drafter(self, config: TreeFlashConfig) -> None:
        """Whether a drafter was made for a model of this shape.

        Raises:
            ConfigError: another width, vocabulary or number of layers; a mask token that the
                model has no row for.
        """
        rows, width = self.embedding.shape
        if width != self.hidden_size:
            raise ConfigError(
                f"the target's embeddings are {width} wide and its states {self.hidden_size}; "
                "a drafter needs one width"
            )
        for name, theirs, ours in (
            ("hidden_size", self.hidden_size, config.hidden_size),
            ("vocab_size", self._vocabulary, config.vocab_size),
            ("num_target_layers", len(self.blocks), config.num_target_layers),
        ):
            if ours is not None and ours != theirs:
                raise ConfigError(
                    f"the drafter was made for a target with {name} = {ours}; this one has {theirs}"
                )
        if config.target_layer_ids[-1] >= len(self.blocks):
            raise ConfigError(
                f"the drafter reads layer {config.target_layer_ids[-1]}; the target has layers "
                f"0 to {len(self.blocks) - 1}"
            )
        mask = config.mask_token_id
        if mask is not None and not 0 <= mask < rows:
            raise ConfigError(f"mask_token_id is {mask}; the target has {rows} embeddings")

    @contextmanager
    def features(self, layers: Sequence[int]) -> Iterator[Callable[[], Tensor]]:
        """A function that gives the last pass's outputs of these layers, `[R, n, F H]`."""
        with architecture.block_states(self.model, {i + 1 for i in layers}) as seen:
            yield lambda: torch.cat([seen[i + 1].to(self.device) for i in layers], dim=-1)

    # --- Passes -------------------------------------------------------------------------------

    def new_cache(self) -> TreeCache:
        """An empty cache."""
        return TreeCache(len(self.blocks))

    def prefill(self, ids: Tensor, cache: TreeCache) -> Tensor:
        """Runs a prompt `[n]`; logits `[V]` after its last token."""
        extra = {"logits_to_keep": 1} if self._keeps_logits else {}
        output = self.model(input_ids=ids[None], past_key_values=cache, use_cache=True, **extra)
        return output.logits[0, -1]

    def verify(self, tree: DraftTree, cache: TreeCache) -> Tensor:
        """Runs all nodes of a tree behind the cache; logits `[n, V]`."""
        start, device = cache.length, self.device
        positions = torch.tensor(tree.depths, device=device) + start
        arguments: dict[str, Any] = {}
        if self._positions:
            arguments["position_ids"] = positions[None]
        if len(tree) > 1 or self.window is not None:
            allowed = torch.from_numpy(tree.ancestors()).to(device)
            arguments["attention_mask"] = self.mask(allowed, positions, start)
        output = self.model(
            input_ids=torch.tensor([tree.tokens], device=device),
            past_key_values=cache,
            use_cache=True,
            **arguments,
        )
        return output.logits[0]

    def prefill_rows(self, ids: Tensor, counts: Sequence[int], cache: TreeCache) -> Tensor:
        """Runs prompts `[R, n]`, padded on the right behind their first `counts[r]` tokens;
        logits `[R, V]` after the last token of each."""
        last = torch.tensor(counts, device=ids.device) - 1
        extra = {}
        if self._keeps_logits:
            kept, last = last.unique(return_inverse=True)
            extra["logits_to_keep"] = kept
        output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **extra)
        return output.logits[torch.arange(len(counts), device=ids.device), last]

    def verify_rows(
        self, trees: Sequence[DraftTree], lengths: Sequence[int], cache: TreeCache
    ) -> Tensor:
        """Runs a tree per row behind its first `lengths[r]` tokens; logits `[R, n, V]`.

        Smaller trees are filled up with nodes that see themselves only and that no walk reaches.
        """
        n, start, device = max(map(len, trees)), cache.length, self.device
        seen = np.zeros((len(trees), n, start + n), dtype=bool)
        tokens, depths = [], []
        for row, (tree, length) in enumerate(zip(trees, lengths, strict=True)):
            size = len(tree)
            seen[row, :, :length] = True
            seen[row, :, start:] = np.eye(n, dtype=bool)
            seen[row, :size, start : start + size] = tree.ancestors()
            tokens.append(tree.tokens + [tree.tokens[0]] * (n - size))
            depths.append(tree.depths + [0] * (n - size))
        positions = torch.tensor(depths, device=device)
        positions = positions + torch.tensor(lengths, device=device)[:, None]
        arguments: dict[str, Any] = {"position_ids": positions} if self._positions else {}
        output = self.model(
            input_ids=torch.tensor(tokens, device=device),
            attention_mask=self._masks(torch.from_numpy(seen).to(device), positions, start),
            past_key_values=cache,
            use_cache=True,
            **arguments,
        )
        return output.logits

    def mask(self, allowed: Tensor, positions: Tensor, start: int) -> Any:
        """Additive masks `[1, 1, n, start + n]`, or one per kind of layer.

        `allowed [n, n]` bool: which nodes a node looks at, itself included.
        """
        n = allowed.shape[0]
        seen = torch.ones((1, n, start + n), dtype=torch.bool, device=allowed.device)
        seen[0, :, start:] = allowed
        return self._masks(seen, positions[None], start)

    def _masks(self, seen: Tensor, positions: Tensor, start: int) -> Any:
        """Masks from what is seen, `[R, n, start + n]`, and positions `[R, n]`: the slots of the
        context are its positions."""
        if self.window is None:
            return self._additive(seen)
        context = torch.arange(start, device=seen.device).expand(seen.shape[0], -1)
        keys = torch.cat([context, positions], dim=1)
        near = seen & (positions[:, :, None] - keys[:, None] < self.window)
        if not self._mixed:
            return self._additive(near)
        return {FULL: self._additive(seen), SLIDING: self._additive(near)}

    def _additive(self, seen: Tensor) -> Tensor:
        dtype = self.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def _check_layers(name: str, config: Any) -> None:
    """Raises ComponentError for attention that no tree mask stands for, and that a short test
    cannot tell from full attention."""
    kinds = set(getattr(config, "layer_types", None) or []) - {FULL, SLIDING}
    if "local" in (getattr(config, "attention_layers", None) or []):
        kinds.add("local attention")
    if kinds:
        raise ComponentError(
            f"{name} has layers of the kind {', '.join(sorted(kinds))}; trees run through "
            f"{FULL} and {SLIDING} only",
            hint="decode it without a drafter",
        )


def _position_limits(config: Any, length: int) -> tuple[int, int, bool]:
    """First position that does not exist, position where the rotary embedding changes, and
    whether it goes on changing from there."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    rotary = bool(rope) or hasattr(config, "rope_theta")
    kinds = {rope.get("rope_type")} | {
        part.get("rope_type") for part in rope.values() if isinstance(part, dict)
    }
    turn, moves = architecture.UNLIMITED, bool(kinds.intersection(_ROPES_THAT_MOVE))
    if moves:
        turn = length
    elif kinds.intersection(_ROPES_THAT_TURN):
        parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
        own = [part["original_max_position_embeddings"] for part in parts
               if part.get("original_max_position_embeddings")]  # fmt: skip
        own = own or [getattr(config, "original_max_position_embeddings", None) or length]
        turn = int(min(own))
    return architecture.UNLIMITED if rotary else length, turn, moves


@contextmanager
def own_masks(model: Any) -> Iterator[None]:
    """Attention that takes masks of one's own while the block runs (flash attention does not)."""
    before = model.config._attn_implementation
    if before in (None, "eager", "sdpa"):
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def check_tree_attention(target: Target) -> None:
    """Runs a tree of seven nodes at once and each of its paths alone.

    Raises:
        ComponentError: the answers differ, or the model cannot run a tree; decoding would not be
            lossless.
    """
    vocabulary = target.embedding.shape[0]
    context = [(7 * i + 3) % vocabulary for i in range(12)]
    tree = DraftTree(
        [(5 * i + 1) % vocabulary for i in range(7)],
        [-1, 0, 0, 1, 1, 2, 3], [0, 1, 1, 2, 2, 2, 3], [0.0] * 7,
    )  # fmt: skip
    name = type(target.model).__name__
    try:
        with own_masks(target.model):
            cache = target.new_cache()
            target.prefill(torch.tensor(context, device=target.device), cache)
            found = target.verify(tree, cache).float().softmax(-1)
            wanted = [
                _last_logits(target, context + [tree.tokens[i] for i in tree.path(node)])
                for node in range(len(tree))
            ]
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ComponentError(
            f"{name} cannot run a tree of tokens in one pass: {error}",
            hint="decode it without a drafter; its attention or cache is of another kind",
        ) from error
    worst = float((found - torch.stack(wanted).float().softmax(-1)).abs().max())
    half = target.dtype in (torch.float16, torch.bfloat16)
    if not worst <= (_HALF_TOLERANCE if half else _TOLERANCE) or not np.isfinite(worst):
        raise ComponentError(
            f"{name} answers a tree of tokens differently than its paths one by one (probabilities "
            f"differ by {worst:.2g}): tree decoding would change what it writes",
            hint="models whose positions are counted by key (ALiBi) or that keep a state cannot "
            "be decoded in trees",
        )


def _last_logits(target: Target, ids: list[int]) -> Tensor:
    tokens = torch.tensor([ids], device=target.device)
    return target.model(input_ids=tokens, use_cache=False).logits[0, -1]


def check_pair(target: Target, drafter: TreeFlashDraftModel | None) -> None:
    """Raises ConfigError or ComponentError for a pair that cannot decode together."""
    if drafter is not None:
        target.check_drafter(drafter.config)
    check_tree_attention(target)
