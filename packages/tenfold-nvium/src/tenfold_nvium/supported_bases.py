"""Which checkpoints can become an N-vium, and the configuration they get (paper "Conversion").

Everything that the exits would compute wrongly is refused here, from the configuration alone
and before a weight is read: other architectures, attention windows, rotary angles that change
with the text's length, logits that are scaled or capped after the head, quantised weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tenfold.errors import ConfigError, nearest

from tenfold_nvium.configuration import (
    BASE_MODEL_TYPES,
    ROTARY_TYPES,
    NviumConfig,
    check_exit_layers,
    even_exits,
)

DEFAULT_HEADS = 4
"""Heads of a conversion that names neither exits nor their number, as in the paper."""

_COPIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings",
    "initializer_range", "rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
    "tie_word_embeddings", "attention_bias", "attention_dropout", "mlp_bias",
)  # fmt: skip
_LOGIT_CHANGES = (
    "final_logit_softcapping", "attn_logit_softcapping", "logits_scaling", "logit_scale",
    "embedding_multiplier", "residual_multiplier", "attention_multiplier",
)  # fmt: skip


def check_base(config: Any, where: str) -> None:
    """Raises ConfigError when a base of this configuration cannot be converted; `where` names
    the checkpoint in messages."""
    kind = config.model_type
    if isinstance(config, NviumConfig):
        raise ConfigError(
            f"{where} already is an N-vium with exits after layers {config.exit_layers}",
            hint="train it further with nvium:finetune; only a dense base is converted",
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"{where} has quantised weights; convert the checkpoint that they were made from"
        )
    changed = [name for name in _LOGIT_CHANGES if getattr(config, name, None) not in (None, 1, 1.0)]
    if changed:
        raise ConfigError(
            f"{where} ({kind}) scales or caps its activations or logits ({', '.join(changed)}), "
            "which every exit would have to repeat; supported are plain heads: "
            f"{', '.join(BASE_MODEL_TYPES)}"
        )
    if kind not in BASE_MODEL_TYPES:
        raise ConfigError(
            f"{where} is a {kind!r} model, which cannot be converted"
            f"{nearest(kind, BASE_MODEL_TYPES)} (supported: {', '.join(BASE_MODEL_TYPES)})"
        )
    _check_attention(config, where)


def _check_attention(config: Any, where: str) -> None:
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is not None:
        partial = sorted(set(kinds) - {"full_attention"})
    else:
        # A window as long as the context never hides a key.
        short = window is not None and window < config.max_position_embeddings
        partial = ["sliding_attention"] if short else []
    if partial:
        raise ConfigError(
            f"{where} has layers with {', '.join(partial)} (window {window}); a deferred token "
            "must see every earlier key, so only full attention in all layers is supported"
        )
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotary not in ROTARY_TYPES:
        raise ConfigError(
            f"{where} has rotary type {rotary!r}, whose angles change with the text's length; "
            f"cached keys would be wrong (supported: {', '.join(ROTARY_TYPES)})"
        )


def chosen_exits(
    num_layers: int, exit_layers: Sequence[int] | None, num_exits: int | None
) -> list[int]:
    """Depths of the early exits: the given ones, or `num_exits` heads spread evenly.

    Raises:
        ConfigError: both or impossible ones were given.
    """
    if exit_layers is not None and num_exits is not None:
        raise ConfigError(
            f"exit_layers {list(exit_layers)} and num_exits {num_exits} were both given; "
            "give the depths or the number of heads"
        )
    if exit_layers is not None:
        return check_exit_layers(exit_layers, num_layers)
    return even_exits(num_layers, DEFAULT_HEADS if num_exits is None else num_exits)


def nvium_config(base: Any, exits: Sequence[int], **method: Any) -> NviumConfig:
    """The configuration of the converted model: the base's fields, and the method's."""
    values = {name: getattr(base, name) for name in _COPIED if hasattr(base, name)}
    rope = getattr(base, "rope_parameters", None)
    return NviumConfig(
        **values,
        base_model_type=base.model_type,
        rope_parameters=None if rope is None else dict(rope),
        exit_layers=list(exits),
        **method,
    )
