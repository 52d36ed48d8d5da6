"""Descriptions of the baselines' components; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tenfold import ComponentSpec, Param

_CAPABILITIES = ("generate", "score", "loss", "grad", "hidden", "tokenize", "step", "constrain")

_CALM = (
    Param(
        "threshold", "float", 0.9,
        "confidence above which a token leaves; 1 or more: never, the dense model", minimum=0.0,
    ),
    Param(
        "measure", "str", "margin",
        "confidence of an exit: likeliest probability, its lead over the second, or the cosine "
        "with the state one exit earlier",
        choices=("max_prob", "margin", "saturation"),
    ),
)  # fmt: skip

_LAYERSKIP = (
    Param(
        "exit_layer", "int", None,
        "layers that draft; default: the first depth that was trained for it", minimum=1,
    ),
    Param("draft_length", "int", 4, "most tokens drafted per check", minimum=1),
)  # fmt: skip

_TRAIN_CALM = (
    Param(
        "exit_norms", "str", "own", "a norm for every early exit, or the final one for all",
        choices=("own", "shared"),
    ),
    Param(
        "exit_weights", "str", "depth", "weights of the exits' losses",
        choices=("depth", "equal"),
    ),
    Param(
        "exit_ramp", "float", 0.0,
        "share of the steps over which the early exits' weights rise from 0",
        minimum=0.0, maximum=1.0,
    ),
)  # fmt: skip

_TRAIN_LAYERSKIP = (
    Param(
        "early_exits", "list[int]", None,
        "depths whose predictions are trained; default: every second layer", minimum=1,
    ),
    Param(
        "exit_curriculum", "str", "rotational",
        "which early exits have a loss at a step: all, one more by and by, or in turn",
        choices=("all", "gradual", "rotational"),
    ),
    Param("exit_period", "int", 8, "steps of a rotation", minimum=1),
    Param("exit_scale", "float", 1.0, "weight of the early losses together", minimum=0.0),
    Param(
        "layer_dropout", "float", 0.1, "largest probability of skipping a layer in training",
        minimum=0.0, maximum=0.99,
    ),
    Param(
        "dropout_curriculum", "str", "rising",
        "layer dropout that grows over the steps, or not",
        choices=("rising", "constant"),
    ),
)  # fmt: skip


def _without(params: Iterable[Param], *names: str) -> tuple[Param, ...]:
    return tuple(param for param in params if param.name not in names)


def models(loading: Iterable[Param], **common: Any) -> list[ComponentSpec]:
    """`nvium:calm` and `nvium:layerskip`, from the parameters that all models share."""
    shared = _without(loading, "policy", "max_deferred", "warp_scope")
    return [
        ComponentSpec(
            "calm",
            "tenfold_nvium.baselines.lm:load_calm",
            "CALM: tokens leave at the first confident exit; approximate below a threshold of 1",
            params=(shared[0], *_CALM, *shared[1:]),
            provides=_CAPABILITIES,
            trainer="nvium:pretrain-calm",
            tags=("language model", "early exit", "baseline"),
            **common,
        ),
        ComponentSpec(
            "layerskip",
            "tenfold_nvium.baselines.lm:load_layerskip",
            "LayerSkip: the first layers draft, all layers check; exact",
            params=(shared[0], *_LAYERSKIP, *_without(shared[1:], "decode_rows")),
            provides=_CAPABILITIES,
            trainer="nvium:pretrain-layerskip",
            tags=("language model", "self-speculation", "baseline"),
            **common,
        ),
    ]


def trainers(
    dataset: Param, shape: Iterable[Param], run: Iterable[Param], **common: Any
) -> list[ComponentSpec]:
    """`nvium:pretrain-calm` and `nvium:pretrain-layerskip`."""
    # Adapters belong to the N-vium that the width is matched with, as `exits` do.
    shape, run = tuple(shape), tuple(run)
    return [
        ComponentSpec(
            "pretrain-calm",
            "tenfold_nvium.baselines.trainers:CalmPretrainer",
            "Train a CALM model from scratch, with the exits and the parameters of an N-vium",
            params=(dataset, *shape, *_TRAIN_CALM, *run),
            **common,
        ),
        ComponentSpec(
            "pretrain-layerskip",
            "tenfold_nvium.baselines.trainers:LayerSkipPretrainer",
            "Train a LayerSkip model from scratch, with as many parameters as an N-vium",
            params=(dataset, *shape, *_TRAIN_LAYERSKIP, *run),
            **common,
        ),
    ]
