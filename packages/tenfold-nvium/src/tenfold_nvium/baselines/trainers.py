"""`nvium:pretrain-calm` and `nvium:pretrain-layerskip`: text in, checkpoint out.

Presets, data and plan are `nvium:pretrain`'s. The MLP has the width of the N-vium's dense twin,
so an N-vium, its dense twin, a CALM and a LayerSkip of one preset have the same number of
parameters (to a few norms) and read the same rows in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tenfold.capabilities import Context, Dataset
from tenfold.lm.training import fit_causal_lm
from tenfold.records import Checkpoint, Metric

from tenfold_nvium.baselines.configuration import every_second_layer
from tenfold_nvium.baselines.modeling import (
    CalmForCausalLM,
    ExitForCausalLM,
    LayerSkipForCausalLM,
)
from tenfold_nvium.baselines.training import (
    CalmSchedule,
    ExitLoss,
    ExitSchedule,
    LayerSkipSchedule,
    NumberedRows,
)
from tenfold_nvium.configuration import NviumConfig
from tenfold_nvium.presets import dense_twin
from tenfold_nvium.trainers import Pretrainer

_OF_EXITS = ("model_type", "exit_layers", "num_exits", "adapter_size", "final_adapter",
             "compute_penalty", "compute_cost")  # fmt: skip


class ExitPretrainer(Pretrainer):
    """What both trainers share.

    Args:
        dataset: records with a `text`.
        early_exits: depths of the exits with a loss.
        method: fields of the model's configuration.
        settings: see `Pretrainer`; `exits` and `intermediate_size` are those of the N-vium
            that parameters are matched with.
    """

    model_class: type[ExitForCausalLM]

    def __init__(
        self,
        dataset: Dataset,
        early_exits: Sequence[int] | None,
        method: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> None:
        super().__init__(dataset, **settings)
        self.method = dict(method)
        self.early_exits = list(early_exits) if early_exits is not None else self.default_exits()
        self.config()  # wrong settings fail now, not after the packing

    def default_exits(self) -> list[int]:
        """Depths of the exits when none are given."""
        raise NotImplementedError

    def schedule(self, network: Any, log_steps: int, seed: int) -> ExitSchedule:
        """What changes from step to step."""
        raise NotImplementedError

    def config(self, **changes: Any) -> NviumConfig:
        """The model's configuration."""
        twin = dense_twin(self.shape.config(**changes)).to_dict()
        values = {name: value for name, value in twin.items() if name not in _OF_EXITS}
        kind: Any = self.model_class.config_class
        return kind(**values, exit_layers=self.early_exits, **self.method)

    def fit(self, ctx: Context, model: Any | None, data: Mapping[str, Dataset]) -> Checkpoint:
        """Trains and saves `ctx.work_dir / "checkpoint"` (weights, tokenizer,
        `training.json`); resumes an interrupted call.

        Raises:
            ConfigError: too little text.
        """
        seed = ctx.seed if self.seed is None else self.seed
        with ctx.progress("preparing text", None, "") as bar:
            tokenizer, rows, held_out = self._rows(seed)
            bar.advance(len(rows))
        network: Any = self._network(tokenizer, seed)
        plan = self._plan(ctx, seed, held_out is not None)
        schedule = self.schedule(network, plan.log_steps, seed)
        checkpoint = fit_causal_lm(
            ctx, network, tokenizer, NumberedRows(rows), plan, compute_loss=ExitLoss(schedule),
            callbacks=[schedule], eval_dataset=held_out,
        )  # fmt: skip
        size = sum(p.numel() for p in network.parameters())
        metrics = [*checkpoint.metrics, Metric("parameters", float(size), 1)]
        return Checkpoint(checkpoint.path, metrics)

    def _network(self, tokenizer: Any, seed: int) -> ExitForCausalLM:
        config = self.config(
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self.model_class(config)
        if self.gradient_checkpointing:
            network.gradient_checkpointing_enable()
        return network


class CalmPretrainer(ExitPretrainer):
    """Trains a CALM model from scratch: every exit learns to predict.

    Args:
        dataset: records with a `text`.
        exit_norms, exit_weights, exit_ramp: see `CalmConfig`.
        settings: see `Pretrainer`; the exits are the N-vium's.
    """

    model_class = CalmForCausalLM

    def __init__(
        self,
        dataset: Dataset,
        exit_norms: str = "own",
        exit_weights: str = "depth",
        exit_ramp: float = 0.0,
        **settings: Any,
    ) -> None:
        method = {
            "exit_norms": exit_norms, "exit_weights": exit_weights, "exit_ramp": exit_ramp,
        }  # fmt: skip
        super().__init__(dataset, None, method, settings)

    def default_exits(self) -> list[int]:
        """Those of the N-vium."""
        return list(self.shape.exits)

    def schedule(self, network: Any, log_steps: int, seed: int) -> ExitSchedule:
        """Weights with their ramp."""
        return CalmSchedule(network, log_steps)


class LayerSkipPretrainer(ExitPretrainer):
    """Trains a LayerSkip model from scratch: layer dropout and early losses.

    Args:
        dataset: records with a `text`.
        early_exits: depths of the exits with a loss; None takes every second layer.
        exit_curriculum, exit_period, exit_scale, layer_dropout, dropout_curriculum: see
            `LayerSkipConfig`.
        settings: see `Pretrainer`; `exits` are those of the N-vium that the width is matched
            with.
    """

    model_class = LayerSkipForCausalLM

    def __init__(
        self,
        dataset: Dataset,
        early_exits: Sequence[int] | None = None,
        exit_curriculum: str = "rotational",
        exit_period: int = 8,
        exit_scale: float = 1.0,
        layer_dropout: float = 0.1,
        dropout_curriculum: str = "rising",
        **settings: Any,
    ) -> None:
        method = {
            "exit_curriculum": exit_curriculum, "exit_period": exit_period,
            "exit_scale": exit_scale, "layer_dropout": layer_dropout,
            "dropout_curriculum": dropout_curriculum,
        }  # fmt: skip
        super().__init__(dataset, early_exits, method, settings)

    def default_exits(self) -> list[int]:
        """Every second layer."""
        return every_second_layer(self.shape.layers)

    def schedule(self, network: Any, log_steps: int, seed: int) -> ExitSchedule:
        """Active exits and layer dropout."""
        return LayerSkipSchedule(network, log_steps, seed)
