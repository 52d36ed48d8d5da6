"""What a model of a configuration costs and may save: counted, not run.

Parameters are counted on a model without memory. Work per token counts matrix products with
weights (attention scores, which grow with the text, are left out).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tenfold.lm.quiet import quiet
from torch import nn

from tenfold_nvium.configuration import NviumConfig
from tenfold_nvium.modeling import NviumForCausalLM
from tenfold_nvium.presets import Preset, dense_twin

COMPONENTS = (
    "embeddings", "layers", "final norm", "output head", "exit norms", "routers", "adapters",
    "exit heads",
)  # fmt: skip


def empty_model(config: NviumConfig) -> NviumForCausalLM:
    """The model without memory for its weights."""
    with torch.device("meta"), quiet():
        return NviumForCausalLM(config)


def component_of(name: str) -> str:
    """The component that a parameter belongs to; one of `COMPONENTS`."""
    if name.startswith("exits."):
        kinds = {"norm": "exit norms", "router": "routers", "adapter": "adapters"}
        return kinds.get(name.split(".")[2], "exit heads")
    starts = {
        "model.embed_tokens": "embeddings",
        "model.layers": "layers",
        "model.norm": "final norm",
        "lm_head": "output head",
        "final_adapter": "adapters",
    }
    return next(part for start, part in starts.items() if name.startswith(start))


def parameters_by_component(config: NviumConfig) -> dict[str, int]:
    """Number of parameters of each component, shared weights counted once."""
    counts = dict.fromkeys(COMPONENTS, 0)
    for name, parameter in empty_model(config).named_parameters():
        counts[component_of(name)] += parameter.numel()
    return {name: count for name, count in counts.items() if count}


def weights_per_token(config: NviumConfig) -> int:
    """Weights that one token is multiplied with in a full forward pass: matrices of all layers
    and exits, and the output matrix once per head. Twice this number are its FLOPs."""
    total = 0
    for name, module in empty_model(config).named_modules():
        if isinstance(module, nn.Linear) and component_of(f"{name}.weight") not in (
            "output head", "exit heads",
        ):  # fmt: skip
            total += module.weight.numel()
    return total + len(config.depths) * config.vocab_size * config.hidden_size


def speed_bound(config: NviumConfig, shares: Sequence[float]) -> dict[str, float]:
    """Mean depth for given exit shares, and the largest speedup that it allows: `1 / depth`
    over a dense model of equal layer cost, when time is spent on launches or on reading
    weights."""
    depth = sum(s * d for s, d in zip(shares, config.depths, strict=True))
    depth /= config.num_hidden_layers
    return {"mean_depth": depth, "bound": 1 / depth}


def trained_shares(folder: Path, exits: int) -> list[float] | None:
    """Mean exit shares in the last logged training step of a checkpoint, where it has a
    `training.json`."""
    path = folder / "training.json"
    try:
        log = json.loads(path.read_text(encoding="utf-8"))["log"]
        names = [f"exit-share-{k + 1}" for k in range(exits)]
        rows = [row for row in log if all(name in row for name in names)]
        return [float(rows[-1][name]) for name in names] if rows else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def describe(
    config: NviumConfig, *, preset: Preset | None = None, shares: Sequence[float] | None = None
) -> dict[str, Any]:
    """Everything `tenfold nvium info` shows, as JSON values."""
    components = parameters_by_component(config)
    total, exits = sum(components.values()), len(config.depths)
    facts: dict[str, Any] = {
        "base": config.base_model_type,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "exits": config.depths,
        "heads": config.exit_head_tying if exits > 1 else "one",
        "parameters": total,
        "components": components,
        "weights_per_token": weights_per_token(config),
        "uniform": speed_bound(config, [1 / exits] * exits),
    }
    if shares is not None:
        facts["measured"] = {"shares": list(shares), **speed_bound(config, shares)}
    if exits > 1:
        twin = dense_twin(config)
        size = sum(parameters_by_component(twin).values())
        facts["dense_twin"] = {
            "intermediate_size": twin.intermediate_size,
            "parameters": size,
            "difference": size - total,
            "weights_per_token": weights_per_token(twin),
        }
    if preset is not None:
        tokens = preset.steps * preset.batch_size * preset.context_length
        facts["training"] = {
            "steps": preset.steps,
            "rows_per_step": preset.batch_size,
            "tokens": tokens,
            "tokens_per_parameter": tokens / total,
            "learning_rate": preset.learning_rate,
        }
    return facts


def info_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The description as a table of two columns."""
    rows = [
        ("base", f"{facts['base']}, {facts['layers']} layers of width {facts['hidden_size']}"),
        ("vocabulary", f"{facts['vocabulary']:,} tokens, context {facts['context']:,}"),
        ("exits after layers", ", ".join(map(str, facts["exits"]))),
        ("heads", facts["heads"]),
        ("parameters", f"{facts['parameters']:,}"),
        *((f"  {name}", f"{count:,}") for name, count in facts["components"].items()),
    ]
    if twin := facts.get("dense_twin"):
        rows.append(
            ("dense twin", f"{twin['parameters']:,} parameters with an MLP of "
             f"{twin['intermediate_size']} ({twin['difference']:+,})")
        )  # fmt: skip
        more = facts["weights_per_token"] / twin["weights_per_token"] - 1
        rows.append(
            ("training work", f"{2 * facts['weights_per_token'] / 1e6:,.1f} MFLOP per token "
             f"forward, {more:+.1%} against the twin: data and parameters match, compute does not")
        )  # fmt: skip
    if training := facts.get("training"):
        rows.append(
            ("token budget", f"{training['tokens']:,} ({training['tokens_per_parameter']:.1f} per "
             f"parameter, {training['steps']:,} steps of {training['rows_per_step']} rows)")
        )  # fmt: skip
    for name in ("uniform", "measured"):
        if part := facts.get(name):
            shares = ", ".join(f"{s:.0%}" for s in part.get("shares", ()))
            rows.append(
                (f"bound, {name} exits", f"{part['bound']:.3f}x at mean depth "
                 f"{part['mean_depth']:.3f}" + (f" ({shares})" if shares else ""))
            )  # fmt: skip
    return rows
