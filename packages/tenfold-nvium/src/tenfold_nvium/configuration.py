"""Configuration of an N-vium model: a decoder-only base plus exits (paper section "Method").

The base's own fields keep their usual names (`hidden_size`, `num_hidden_layers`, ...), so one
object configures the decoder layers of Llama, Mistral, Qwen2 and Qwen3 alike; everything else
describes exits, routers, and the compute penalty. Depths are counts of decoder layers, 1-based:
exit `k` sits after layer `exit_layers[k - 1]`, and the last exit (after the last layer) is
implied.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any, ClassVar

from tenfold.errors import ConfigError, nearest
from transformers import PreTrainedConfig

from tenfold_nvium.policies import AUTO, make_policy

BASE_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Base architectures whose decoder layers are supported."""

HEAD_TYINGS = ("lm_head", "embeddings", "none")
ROTARY_TYPES = ("default", "linear", "yarn", "llama3")
"""Rotary scalings that depend on the position alone. `dynamic` and `longrope` change with the
length of the whole sequence, so a cached key would no longer equal a recomputed one."""

_ROUTER_WIDTHS = {128: 88, 256: 176, 512: 344, 768: 512, 1024: 688, 1536: 1016}


def ceil_to(value: float, multiple: int = 8) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-int(-(-value // 1)) // multiple) * multiple


def router_width(hidden_size: int) -> int:
    """Default inner width of a router, about 0.66 of the hidden size: the paper's own values
    for its six widths, the next multiple of 8 for any other."""
    return _ROUTER_WIDTHS.get(hidden_size, ceil_to(0.66 * hidden_size))


def even_exits(num_layers: int, num_exits: int) -> list[int]:
    """Depths of the early exits when `num_exits` heads are spread evenly: `round(L k / K)`.

    Raises:
        ConfigError: two exits would coincide, or one would have no layer before it.
    """
    if not 1 <= num_exits <= num_layers:
        raise ConfigError(
            f"{num_exits} exits do not fit into {num_layers} layers; "
            f"choose between 1 (a dense model) and {num_layers}"
        )
    return [int(num_layers * k / num_exits + 0.5) for k in range(1, num_exits)]


class NviumConfig(PreTrainedConfig):
    """Configuration of `NviumForCausalLM`.

    Base fields have the meaning they have in `LlamaConfig`. Those of the method:

    Attributes:
        base_model_type: whose decoder layers are used; one of `BASE_MODEL_TYPES`.
        exit_layers: depths of the early exits, strictly increasing, in `1..L-1`. None spreads
            `num_exits` heads evenly; an empty list is a dense model (K = 1).
        num_exits: number of heads K, early ones and the last; read only without `exit_layers`.
        exit_head_tying: early heads share `lm_head`, share the input embeddings, or own a
            weight each (`none`).
        adapter_size: inner width of the residual adapters; None means the hidden size, 0 none.
        final_adapter: whether the last exit has an adapter too.
        router_hidden_size: width r of the router's output block; None means the hidden size.
        router_intermediate_size: inner width; None means about 0.66 of the hidden size.
        router_num_layers: number of stacked router blocks.
        router_temperature: divides the router's log-odds, in training as in decoding.
        router_init_std: standard deviation of each of the two router logits at the start.
        compute_penalty: weight beta of the expected normalised depth in the loss.
        compute_cost: cost of each exit in (0, 1], one number per exit; None means depth / L.
        router_warmup_weight: weight of the warm-up term while it is active.
        loss_chunk_tokens: tokens whose logits exist at once in the loss; 0 turns chunking off.
        decode_policy: exit policy of `generate`; `auto` is exact and as fast as that allows.
        max_deferred: most positions a row may defer before they are completed; None: no limit.
        packed_decoding: whether `generate` keeps copies of the weights laid out for decoding:
            up to twice as fast on CPU, for up to three times the memory.
    """

    model_type: ClassVar[str] = "nvium"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    base_model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 24
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 1024
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None

    exit_layers: list[int] | None = None
    num_exits: int = 4
    exit_head_tying: str = "lm_head"
    adapter_size: int | None = None
    final_adapter: bool = True
    router_hidden_size: int | None = None
    router_intermediate_size: int | None = None
    router_num_layers: int = 1
    router_temperature: float = 1.0
    router_init_std: float = 0.4
    compute_penalty: float = 0.15
    compute_cost: list[float] | None = None
    router_warmup_weight: float = 1.0
    loss_chunk_tokens: int = 1024
    decode_policy: str = "auto"
    max_deferred: int | None = None
    packed_decoding: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        _check_heads(self)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        if self.exit_layers is None:
            self.exit_layers = even_exits(self.num_hidden_layers, self.num_exits)
        self.exit_layers = check_exit_layers(self.exit_layers, self.num_hidden_layers)
        self.num_exits = len(self.exit_layers) + 1
        if self.adapter_size is None:
            self.adapter_size = self.hidden_size
        if self.router_hidden_size is None:
            self.router_hidden_size = self.hidden_size
        if self.router_intermediate_size is None:
            self.router_intermediate_size = router_width(self.hidden_size)
        super().__post_init__(**kwargs)
        _check_method(self)

    @property
    def depths(self) -> list[int]:
        """Depth of every exit in layers, the last one included: `l_1 < ... < l_K = L`."""
        return [*(self.exit_layers or ()), self.num_hidden_layers]

    @property
    def exit_costs(self) -> list[float]:
        """Cost of every exit: `compute_cost`, else its depth over L."""
        if self.compute_cost is not None:
            return list(self.compute_cost)
        return [depth / self.num_hidden_layers for depth in self.depths]

    @property
    def segments(self) -> list[range]:
        """Layer indices of segment m, which lies between exits m and m + 1."""
        bounds = [0, *self.depths]
        return [range(a, b) for a, b in itertools.pairwise(bounds)]

    def segment_of(self, layer: int) -> int:
        """The segment that a 0-based layer index belongs to."""
        return next(m for m, layers in enumerate(self.segments) if layer in layers)


def check_exit_layers(exit_layers: Sequence[int], num_layers: int) -> list[int]:
    """The depths as a list of ints.

    Raises:
        ConfigError: they are not strictly increasing inside `1..num_layers - 1`.
    """
    try:
        depths = [operator.index(depth) for depth in exit_layers]
    except TypeError:
        raise ConfigError(
            f"exit_layers {exit_layers!r} must be a list of whole numbers of layers, such as [2, 4]"
        ) from None
    for depth in depths:
        if not 1 <= depth < num_layers:
            raise ConfigError(
                f"exit_layers {depths}: depth {depth} is outside 1..{num_layers - 1}; an early "
                f"exit sits between two of the {num_layers} layers (the last exit is implied)"
            )
    if any(a >= b for a, b in itertools.pairwise(depths)):
        raise ConfigError(
            f"exit_layers {depths} must be strictly increasing, e.g. {sorted(set(depths))}"
        )
    return depths


def _check_heads(config: NviumConfig) -> None:
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be at least 1")
    heads, groups = config.num_attention_heads, config.num_key_value_heads or 1
    if config.head_dim is None and config.hidden_size % heads:
        raise ConfigError(
            f"hidden_size {config.hidden_size} is not a multiple of "
            f"num_attention_heads {heads}; set head_dim to choose another head size"
        )
    if heads % groups:
        raise ConfigError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
        )


def _check_method(config: NviumConfig) -> None:
    """Raises ConfigError for settings that the method has no meaning for."""
    if config.base_model_type not in BASE_MODEL_TYPES:
        raise ConfigError(
            f"base_model_type {config.base_model_type!r} is not supported"
            f"{nearest(config.base_model_type, BASE_MODEL_TYPES)} "
            f"(supported: {', '.join(BASE_MODEL_TYPES)})"
        )
    if config.exit_head_tying not in HEAD_TYINGS:
        raise ConfigError(
            f"exit_head_tying {config.exit_head_tying!r} must be one of {', '.join(HEAD_TYINGS)}"
        )
    if config.sliding_window is not None or set(config.layer_types or ()) - {"full_attention"}:
        raise ConfigError(
            "sliding-window and other non-full attention layers are not supported: a deferred "
            "token must see every earlier key; use a base with full attention in all layers"
        )
    rotary = (config.rope_parameters or {}).get("rope_type", "default")
    if rotary not in ROTARY_TYPES:
        raise ConfigError(
            f"rotary type {rotary!r} changes with the sequence length, so cached keys would not "
            f"equal recomputed ones; supported: {', '.join(ROTARY_TYPES)}"
        )
    if config.router_temperature <= 0:
        raise ConfigError(
            f"router_temperature is {config.router_temperature}; it must be above 0 "
            "(a greedy router is a decode policy, not a temperature)"
        )
    if config.router_num_layers < 1:
        raise ConfigError(f"router_num_layers is {config.router_num_layers}; at least 1")
    if config.max_deferred is not None and config.max_deferred < 1:
        raise ConfigError(f"max_deferred is {config.max_deferred}; None or at least 1")
    for name in ("adapter_size", "compute_penalty", "router_warmup_weight", "loss_chunk_tokens"):
        if not getattr(config, name) >= 0:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be 0 or more")
    if config.decode_policy != AUTO:
        make_policy(config.decode_policy)
    costs = config.compute_cost
    if costs is not None and not all(0 < cost <= 1 for cost in costs):
        raise ConfigError(f"compute_cost {costs} must be numbers above 0, at most 1")
    if costs is not None and len(costs) != len(config.depths):
        raise ConfigError(
            f"compute_cost has {len(costs)} numbers for {len(config.depths)} exits; one each"
        )
