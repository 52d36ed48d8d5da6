"""Where a transformers causal language model keeps its parts, across architectures.

A causal model is `head(decoder(ids))`, sometimes with a factor or a soft cap after the head.
`decoder` ends with the final norm; `blocks` are its transformer layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import ConfigError

_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length")
UNLIMITED = 10**9
"""Context length of models without one (relative positions, recurrence)."""


def text_config(model: Any) -> Any:
    """The language model's own configuration (multi-modal models nest it)."""
    return model.config.get_text_config(decoder=True)


def context_length(model: Any) -> int:
    """Longest sequence that the model's positions reach, in tokens."""
    config = text_config(model)
    for name in _CONTEXT_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return UNLIMITED


def sliding_window(model: Any) -> int | None:
    """How far back the model's nearest-sighted layers look, in tokens; None without a limit."""
    config = text_config(model)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    return window if window and (kinds is None or "sliding_attention" in kinds) else None


def head(model: Any) -> nn.Module:
    """The output projection.

    Raises:
        ConfigError: the model has none, so it is no language model.
    """
    module = model.get_output_embeddings()
    if module is None:
        raise ConfigError(
            f"{type(model).__name__} has no language-model head; load a causal language model"
        )
    return module


def decoder(model: Any) -> nn.Module:
    """The module whose output feeds the head."""
    return model.get_decoder()


def blocks(model: Any) -> nn.ModuleList:
    """The transformer layers, first to last.

    Raises:
        ConfigError: the architecture keeps them in no list of the configured length.
    """
    depth = text_config(model).num_hidden_layers
    for module in decoder(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ConfigError(f"{type(model).__name__} keeps its {depth} layers in no module list")


def accepts(model: Any, argument: str) -> bool:
    """Whether the model's forward pass takes an argument of this name."""
    return argument in _forward_arguments(type(model))


@cache
def _forward_arguments(kind: type) -> frozenset[str]:
    """Kept by class: decoding asks once per token."""
    model_class: Any = kind
    return frozenset(inspect.signature(model_class.forward).parameters)


@contextmanager
def head_inputs(model: Any) -> Iterator[list[Tensor]]:
    """Collects what flows into the head, `[B, T, H]` per call, while the block runs."""
    seen: list[Tensor] = []
    hook = head(model).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def block_states(model: Any, wanted: set[int]) -> Iterator[dict[int, Tensor]]:
    """Collects residual-stream states by layer: 0 enters the first block, i leaves block i."""
    seen: dict[int, Tensor] = {}
    layers = blocks(model)

    def enters(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[0] = args[0] if args else kwargs["hidden_states"]

    def leaves(index: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[index] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [layers[i - 1].register_forward_hook(leaves(i)) for i in wanted if i > 0]
    if 0 in wanted:
        hooks.append(layers[0].register_forward_pre_hook(enters, with_kwargs=True))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def head_is_linear(model: Any) -> bool:
    """Whether logits are exactly `head(decoder(ids))`: no factor, cap or other step after it.

    Tried on two tokens rather than guessed from the architecture's name.
    """
    module = head(model)
    if not isinstance(module, nn.Linear):
        return False
    ids = torch.zeros((1, 2), dtype=torch.int64, device=module.weight.device)
    ids[0, 1] = 1
    with head_inputs(model) as seen:
        logits = model(input_ids=ids, use_cache=False).logits
    states = decoder(model)(input_ids=ids, use_cache=False)[0]
    if len(seen) != 1 or states.shape != seen[0].shape:
        return False
    expected = module(states)
    return expected.shape == logits.shape and torch.allclose(
        expected.float(), logits.float(), rtol=1e-3, atol=1e-4
    )
