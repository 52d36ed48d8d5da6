"""Named model shapes with their training settings: small ones for laptops, the paper's grid and
its ablations.

The grid has 30 cells `h<hidden>-l<layers>` (paper "Experimental setup"): Llama-2 shapes, exits
at a quarter, half and three quarters, 20 training tokens per parameter. Every preset has a
dense twin with a wider MLP, the smallest multiple of 8 with at least as many parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tenfold.errors import ConfigError, nearest

from tenfold_nvium.configuration import NviumConfig, ceil_to


@dataclass(frozen=True, slots=True)
class Preset:
    """Shape and training settings of one model.

    `adapter_size` and `router_intermediate_size` of None take the paper's widths. Steps,
    `batch_size` (rows per optimiser step) and `context_length` fix the token budget.
    """

    hidden_size: int
    layers: int
    heads: int
    exits: tuple[int, ...]
    intermediate_size: int
    vocab_size: int = 32000
    context_length: int = 1024
    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_ratio: float = 0.01
    weight_decay: float = 0.1
    compute_penalty: float = 0.15
    adapter_size: int | None = None
    router_intermediate_size: int | None = None
    tie_word_embeddings: bool = False

    def config(self, **changes: Any) -> NviumConfig:
        """The model's configuration; the beginning of text is its end-of-text token 0."""
        values: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.context_length,
            "exit_layers": list(self.exits),
            "adapter_size": self.adapter_size,
            "router_intermediate_size": self.router_intermediate_size,
            "compute_penalty": self.compute_penalty,
            "tie_word_embeddings": self.tie_word_embeddings,
        }
        return NviumConfig(**(values | changes))


GRID_EXITS = {6: (1, 2, 4), 12: (3, 6, 9), 24: (6, 12, 18), 36: (9, 18, 27), 48: (12, 24, 36)}
"""Exit depths by number of layers; the first is the paper's own, no rounding rule gives it."""

_GRID_WIDTHS = {
    # hidden: (heads, MLP, learning rate, rows per step)
    128: (4, 344, 1e-3, 64),
    256: (8, 688, 1e-3, 128),
    512: (8, 1368, 1e-3, 256),
    768: (12, 2048, 4e-4, 256),
    1024: (16, 2736, 3e-4, 512),
    1536: (24, 4096, 3e-4, 512),
}
_GRID_STEPS = {
    128: (2924, 3288, 4012, 4736, 5460),
    256: (3346, 4070, 5518, 6966, 8412),
    512: (4184, 5625, 8509, 11393, 14277),
    768: (7531, 10771, 17251, 23731, 30211),
    1024: (5866, 8750, 14517, 20285, 26052),
    1536: (11308, 17788, 30748, 43708, 56668),
}


def _grid() -> dict[str, Preset]:
    cells = {}
    for hidden, (heads, mlp, rate, rows) in _GRID_WIDTHS.items():
        for (layers, exits), steps in zip(GRID_EXITS.items(), _GRID_STEPS[hidden], strict=True):
            cell = Preset(
                hidden, layers, heads, exits, mlp, steps=steps, batch_size=rows, learning_rate=rate
            )
            if (hidden, layers) == (1536, 48):
                # The flagship cell: fewer, larger heads and a lower rate.
                cell = replace(cell, heads=12, learning_rate=2e-4)
            cells[f"h{hidden}-l{layers}"] = cell
    return cells


GRID: dict[str, Preset] = _grid()
"""The paper's 30 cells, `h128-l6` to `h1536-l48`."""

ABLATIONS: dict[str, Preset] = {
    "ablation-beta": replace(GRID["h768-l24"], learning_rate=6e-4, steps=17254),
    "ablation-heads": replace(
        GRID["h768-l24"], learning_rate=6e-4, steps=17254, compute_penalty=0.1
    ),
    "ablation-position": replace(
        GRID["h768-l24"], learning_rate=5e-4, steps=16937, compute_penalty=0.0, exits=(12,)
    ),
}
"""The paper's ablations of the penalty, the number of heads and the exit's place, all at width
768 and 24 layers; what each varies is in the recipes of the same names."""

PRESETS: dict[str, Preset] = {
    # Seconds, for tests.
    "tiny": Preset(
        32, 3, 2, (1, 2), 64, vocab_size=400, context_length=48, steps=40, batch_size=8,
        learning_rate=3e-3, warmup_ratio=0.1, compute_penalty=0.02, tie_word_embeddings=True,
    ),
    # Two minutes on two slow CPU cores: text that looks like code.
    "quickstart": Preset(
        160, 6, 4, (2, 4), 432, vocab_size=2048, context_length=128, steps=360, batch_size=10,
        learning_rate=3e-3, warmup_ratio=0.05, compute_penalty=0.02, adapter_size=80,
        router_intermediate_size=80, tie_word_embeddings=True,
    ),
    # Ten to twenty minutes on two CPU cores.
    "small": Preset(
        256, 8, 4, (2, 4, 6), 688, vocab_size=4096, context_length=256, steps=1000,
        batch_size=8, learning_rate=2e-3, warmup_ratio=0.05, compute_penalty=0.02,
        tie_word_embeddings=True,
    ),
    # As deep as the paper's ablations, so that their lists of exits fit, and narrow enough for
    # a few minutes on two CPU cores.
    "narrow": Preset(
        64, 24, 4, (6, 12, 18), 176, vocab_size=2048, context_length=128, steps=400,
        batch_size=10, learning_rate=3e-3, warmup_ratio=0.05, compute_penalty=0.02,
        tie_word_embeddings=True,
    ),
    **GRID,
    **ABLATIONS,
}  # fmt: skip


def preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"unknown preset {name!r}{nearest(name, PRESETS)} "
            f"(known: tiny, quickstart, small, narrow, h<128..1536>-l<6..48>, "
            f"{', '.join(ABLATIONS)})"
        )
    return PRESETS[name]


# --- Parameter counts ---------------------------------------------------------------------------


def dense_parameters(config: NviumConfig, intermediate_size: int | None = None) -> int:
    """Parameters of the dense model of this shape (Llama layers, no biases), with another MLP
    width if given. `2 V h + L (2 h d_q + 2 h d_kv + 3 h i + 2 h) + h`; one `V h` less when
    embeddings are tied."""
    h = config.hidden_size
    inner = intermediate_size or config.intermediate_size
    size = config.head_dim or h // config.num_attention_heads
    attention = 2 * h * size * (config.num_attention_heads + (config.num_key_value_heads or 1))
    layer = attention + 3 * h * inner + 2 * h
    vocabularies = 1 if config.tie_word_embeddings else 2
    return vocabularies * config.vocab_size * h + config.num_hidden_layers * layer + h


def router_parameters(config: NviumConfig) -> int:
    """Parameters of one router: `h r_i + r_i + r_i r + r + r` per block, `2 r + 2` its head."""
    inner, out = config.router_intermediate_size or 0, config.router_hidden_size or 0
    total, size = 0, config.hidden_size
    for _ in range(config.router_num_layers):
        total += size * inner + inner + inner * out + out + out
        size = out
    return total + 2 * out + 2


def nvium_parameters(config: NviumConfig) -> int:
    """Parameters of the N-vium: dense ones, and per early exit a router, an adapter, a norm
    (and a head when untied); one more adapter at the last exit."""
    h, early = config.hidden_size, len(config.depths) - 1
    adapter = 2 * h * (config.adapter_size or 0)
    head = config.vocab_size * h if config.exit_head_tying == "none" else 0
    total = dense_parameters(config) + early * (router_parameters(config) + adapter + h + head)
    return total + (adapter if config.final_adapter else 0)


def matched_intermediate_size(config: NviumConfig) -> int:
    """MLP width of the parameter-matched dense twin: the smallest multiple of 8 with at least
    as many parameters as the N-vium."""
    per_unit = 3 * config.hidden_size * config.num_hidden_layers
    missing = nvium_parameters(config) - dense_parameters(config, 8)
    return 8 + ceil_to(missing / per_unit)


def dense_twin(config: NviumConfig) -> NviumConfig:
    """Configuration of the parameter-matched dense model: one exit, no adapter, wider MLP."""
    values = config.to_dict()
    for name in ("exit_layers", "num_exits", "compute_cost", "final_adapter", "adapter_size"):
        values.pop(name, None)
    values["intermediate_size"] = matched_intermediate_size(config)
    return NviumConfig(**values, exit_layers=[], final_adapter=False, adapter_size=0)
