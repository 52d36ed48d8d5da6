"""Training of the baselines over `transformers.Trainer`: schedules by step, and the loss.

Everything random in layer dropout is a function of (seed, step, row of the data set, layer):
the same rows skip the same layers on one process and on many, with and without gradient
accumulation, and after an interruption.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tenfold.lm.packing import PackedRows
from tenfold.seeds import derive
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tenfold_nvium.baselines.modeling import (
    CalmForCausalLM,
    ExitForCausalLM,
    LayerSkipForCausalLM,
)
from tenfold_nvium.baselines.schedules import (
    active_exits,
    calm_weights,
    dropout_rates,
    layerskip_weights,
    linear_ramp,
)


class NumberedRows(Dataset):
    """Packed rows that know their number in the data set (`row`, int64)."""

    def __init__(self, rows: PackedRows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**self._rows[index], "row": torch.tensor(index)}

    def fingerprint(self) -> str:
        """Content hash of the rows."""
        return self._rows.fingerprint()


class ExitSchedule(TrainerCallback):
    """Sets what the step about to run needs; a function of the step alone, so nothing of it is
    saved.

    Args:
        model: the model being trained (not a wrapper of it).
        log_steps: steps between logged values.
    """

    def __init__(self, model: ExitForCausalLM, log_steps: int) -> None:
        self.model = model
        self.reports = True
        """Whether the current step's values will be logged."""
        self._log_steps = log_steps

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepares a step."""
        self.reports = (state.global_step + 1) % self._log_steps == 0
        self.prepare(state.global_step, state.max_steps)

    def prepare(self, step: int, total: int) -> None:
        """Loss weights, and whatever else changes, for step `step` (0-based) of `total`."""
        raise NotImplementedError

    def layers(self, rows: Tensor) -> Tensor | None:
        """`[L, B]` boolean: which of the data set's `rows [B]` run which layer; None: all."""
        return None


class CalmSchedule(ExitSchedule):
    """Weights of the exits, with the early ones' linear ramp."""

    model: CalmForCausalLM

    def prepare(self, step: int, total: int) -> None:
        """See `ExitSchedule`."""
        config = self.model.config
        ramp = linear_ramp(step, total, config.exit_ramp)
        self.model.loss_weights = calm_weights(config.depths, config.exit_weights, ramp)


class LayerSkipSchedule(ExitSchedule):
    """Active exits and layer dropout.

    Args:
        model, log_steps: see `ExitSchedule`.
        seed: of the dropout.
    """

    model: LayerSkipForCausalLM

    def __init__(self, model: LayerSkipForCausalLM, log_steps: int, seed: int) -> None:
        super().__init__(model, log_steps)
        self._seed, self._step = seed, 0
        self.rates = [0.0] * model.config.num_hidden_layers

    def prepare(self, step: int, total: int) -> None:
        """See `ExitSchedule`."""
        config, early = self.model.config, len(self.model.config.exit_layers)
        layers = config.num_hidden_layers
        active = active_exits(
            config.exit_curriculum, early, step, total, layers, config.exit_period
        )
        self.model.loss_weights = layerskip_weights(config.depths, active, config.exit_scale)
        self.rates = dropout_rates(
            layers, step, total, config.layer_dropout, config.dropout_curriculum
        )
        self._step = step

    def layers(self, rows: Tensor) -> Tensor | None:
        """See `ExitSchedule`."""
        if not any(self.rates):
            return None
        numbers = [self._numbers(row) for row in rows.tolist()]
        return torch.stack(numbers, -1) >= torch.tensor(self.rates)[:, None]

    def _numbers(self, row: int) -> Tensor:
        """A uniform number in [0, 1) per layer."""
        generator = torch.Generator().manual_seed(
            derive(self._seed, "layer-dropout", self._step, row)
        )
        return torch.rand(len(self.rates), generator=generator)


class ExitLoss:
    """`(model, batch) -> loss, values` for `fit_causal_lm`: the weighted heads in training, the
    last head's cross-entropy in evaluation, as for a dense model."""

    def __init__(self, schedule: ExitSchedule) -> None:
        self._schedule = schedule

    def __call__(
        self, model: Any, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]] | Tensor:
        """The batch's mean loss over scored tokens; values to log every few steps."""
        inputs: dict[str, Any] = dict(batch)
        rows = inputs.pop("row", None)
        if not model.training:
            return model(**inputs).exit_losses[-1]
        keep = None if rows is None else self._schedule.layers(rows)
        output = model(**inputs, keep=keep)
        return output.loss, self._values(output) if self._schedule.reports else {}

    def _values(self, output: Any) -> dict[str, float]:
        """The heads' losses; heads without a loss at this step have none."""
        losses = output.exit_losses.float().tolist()
        return {f"exit-loss-{k + 1}": loss for k, loss in enumerate(losses) if loss == loss}
