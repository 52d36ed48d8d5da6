"""Configuration of a drafter: the fields of a Qwen3 decoder, and what connects it to a target.

The layout is that of published checkpoints: `dflash_config` holds the mask token and the target
layers, `treeflash_config` the approximator; both are also understood at the top level.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tenfold.errors import ConfigError, nearest
from transformers import Qwen3Config

APPROXIMATIONS = ("swiglu", "linear", "swiglu2")
"""The paper's approximator, and its ablations; None drafts marginals."""

_DFLASH_KEYS = ("mask_token_id", "target_layer_ids")
_TREEFLASH_KEYS = ("ar_approximation", "candidate_tokens")


def spread_layers(num_layers: int, count: int) -> list[int]:
    """Ids of the target layers whose outputs a drafter reads: `round(1 + i (L - 4) / (n - 1))`.

    Targets of fewer than 8 layers get distinct, evenly spaced ids below the last layer, and
    fewer of them where there are not enough.
    """
    if num_layers < 8:
        count = min(count, max(num_layers - 1, 1))
        if count == 1:
            return [max(num_layers // 2 - 1, 0)]
        return [round(i * (num_layers - 2) / (count - 1)) for i in range(count)]
    if count == 1:
        return [num_layers // 2]
    return [round(1 + i * (num_layers - 4) / (count - 1)) for i in range(count)]


class TreeFlashConfig(Qwen3Config):
    """Configuration of `TreeFlashDraftModel`.

    Fields of the layers have the meaning they have in `Qwen3Config`. Those of the method:

    Attributes:
        block_size: slots of one drafter pass; slot 0 is the newest token, so one less is drafted.
        num_target_layers: layers of the target that the drafter was made for.
        dflash_config: `mask_token_id` (None: a learned vector instead of a token) and
            `target_layer_ids` (0 is the first layer's output).
        treeflash_config: `ar_approximation` (None: marginals) and `candidate_tokens` M.
        ar_intermediate_size: inner width of the approximator; None means `intermediate_size`.
        input_embedding_scale: factor of the target's raw input embeddings.
    """

    model_type: ClassVar[str] = "treeflash"

    block_size: int = 16
    num_target_layers: int | None = None
    dflash_config: dict | None = None
    treeflash_config: dict | None = None
    ar_intermediate_size: int | None = None
    input_embedding_scale: float = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        dflash, treeflash = dict(self.dflash_config or {}), dict(self.treeflash_config or {})
        for keys, nested in ((_DFLASH_KEYS, dflash), (_TREEFLASH_KEYS, treeflash)):
            for key in keys:
                if key in kwargs:
                    nested.setdefault(key, kwargs.pop(key))
        if "block_size" in dflash:
            self.block_size = int(dflash.pop("block_size"))
        dflash.setdefault("mask_token_id", None)
        if dflash.get("target_layer_ids") is None and self.num_target_layers:
            count = self.num_hidden_layers
            dflash["target_layer_ids"] = spread_layers(self.num_target_layers, count)
        treeflash.setdefault("ar_approximation", None)
        treeflash.setdefault("candidate_tokens", 16)
        self.dflash_config, self.treeflash_config = dflash, treeflash
        super().__post_init__(**kwargs)
        _check(self)

    @property
    def target_layer_ids(self) -> list[int]:
        """Target layers whose outputs are read."""
        return list((self.dflash_config or {}).get("target_layer_ids") or [])

    @property
    def mask_token_id(self) -> int | None:
        """Token in the slots to be drafted; None where a learned vector stands there."""
        return (self.dflash_config or {}).get("mask_token_id")

    @property
    def ar_approximation(self) -> str | None:
        """Kind of the approximator."""
        return (self.treeflash_config or {}).get("ar_approximation")

    @property
    def candidate_tokens(self) -> int:
        """Default number M of candidate previous tokens."""
        return int((self.treeflash_config or {}).get("candidate_tokens", 16))

    @property
    def approximator_width(self) -> int:
        """Inner width I of the approximator."""
        return self.ar_intermediate_size or self.intermediate_size


def _check(config: TreeFlashConfig) -> None:
    """Raises ConfigError for values that make no drafter."""
    if config.block_size < 2:
        raise ConfigError(f"block_size is {config.block_size}; it must be at least 2")
    kind = config.ar_approximation
    if kind is not None and kind not in APPROXIMATIONS:
        raise ConfigError(
            f"ar_approximation is {kind!r}{nearest(str(kind), APPROXIMATIONS)} "
            f"(known: {', '.join(APPROXIMATIONS)}, or none)"
        )
    layers, ids = config.num_target_layers, config.target_layer_ids
    if not ids:
        raise ConfigError("target_layer_ids is empty, and num_target_layers says nothing either")
    if sorted(set(ids)) != ids or ids[0] < 0 or (layers is not None and ids[-1] >= layers):
        raise ConfigError(
            f"target_layer_ids {ids} must increase and lie in 0..{(layers or 0) - 1}"
            if layers
            else f"target_layer_ids {ids} must increase, from 0 up"
        )


def for_target(
    target: Any,
    *,
    num_hidden_layers: int = 2,
    block_size: int = 8,
    num_features: int = 5,
    mask_token_id: int | None = None,
    ar_approximation: str | None = "swiglu",
    **changes: Any,
) -> TreeFlashConfig:
    """A drafter's configuration for a target's (`PreTrainedConfig`): same widths, few layers.

    Args:
        num_features: how many target layers are read.
        changes: further fields of `TreeFlashConfig`.

    Raises:
        ConfigError: settings that make no drafter.
    """
    config = target.get_text_config(decoder=True)
    depth, width, heads = (
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads,
    )  # fmt: skip
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": width,
        "intermediate_size": _inner_width(config),
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": _head_size(config),
        "max_position_embeddings": _positions(config),
        "num_target_layers": depth,
        "block_size": block_size,
        "dflash_config": {
            "mask_token_id": mask_token_id,
            "target_layer_ids": spread_layers(depth, num_features),
        },
        "treeflash_config": {"ar_approximation": ar_approximation, "candidate_tokens": 16},
    }
    return TreeFlashConfig(**(fields | changes))


def _inner_width(config: Any) -> int:
    for name in ("intermediate_size", "n_inner", "ffn_dim"):
        value = getattr(config, name, None)
        if value:
            return int(value)
    return 4 * int(config.hidden_size)


def _head_size(config: Any) -> int:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(size) + int(size) % 2  # rotary angles come in pairs


def _positions(config: Any) -> int:
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 32768


def from_published(values: Mapping[str, Any]) -> TreeFlashConfig:
    """A configuration from the `config.json` of a TreeFlash or DFlash checkpoint.

    Raises:
        ConfigError: no `num_target_layers` and no layer ids, or other values that make no drafter.
    """
    dropped = ("architectures", "auto_map", "model_type", "transformers_version", "torch_dtype")
    kept = {name: value for name, value in values.items() if name not in dropped}
    return TreeFlashConfig(**kept)
