"""Pretraining of an N-vium, or of its dense twin, over `transformers.Trainer`.

The loss has two phases (paper "Training"): for the first 5 % of the steps the router warm-up
term keeps all exits in use, then the compute penalty beta takes its place; beta is fixed or
moved by the feedback controller. Two callbacks carry that state: phases follow the optimiser
step, and beta is written into every resumable state and read back from it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tenfold.files import write_json
from tenfold.lm.trainer import scored_tokens
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tenfold_nvium.controller import BaselineCurve, ComputePenaltyController
from tenfold_nvium.loss import IGNORED
from tenfold_nvium.mixture import gate_entropy
from tenfold_nvium.modeling import NviumForCausalLM

CONTROLLER_FILE = "nvium-controller.json"
BASELINE_FILE = "baseline.json"
LOSSES = ("full", "mix_only", "final_only")
COLLAPSE_SHARE = 0.01
COLLAPSE_STEPS = 500


class PhaseCallback(TrainerCallback):
    """Switches the model between warm-up and main loss by optimiser step.

    Args:
        model: the model being trained (not a wrapper of it).
        warmup_steps: number of steps of the warm-up phase.
    """

    def __init__(self, model: NviumForCausalLM, warmup_steps: int, log_steps: int) -> None:
        self.model = model
        self.warmup_steps = warmup_steps
        self._log_steps = log_steps
        self.reports = True
        """Whether the current step's values will be logged; others are not read back from the
        device."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Chooses the phase of the step about to run."""
        self.model.loss_phase = "warmup" if state.global_step < self.warmup_steps else "main"
        self.reports = (state.global_step + 1) % self._log_steps == 0


class PenaltyCallback(TrainerCallback):
    """Moves beta after every evaluation, keeps it in every resumable state.

    The evaluation loss is averaged over all processes by the trainer, so each process computes
    the same beta.
    """

    def __init__(self, model: NviumForCausalLM, controller: ComputePenaltyController) -> None:
        self.model = model
        self.controller = controller
        model.compute_penalty = controller.beta

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes up the beta of the state that training resumes from."""
        path = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / CONTROLLER_FILE
        if state.global_step and path.is_file():
            self.controller.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
        self.model.compute_penalty = self.controller.beta

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One controller move; none while the warm-up lasts."""
        metrics: Mapping[str, float] = kwargs.get("metrics") or {}
        if "eval_loss" in metrics and self.model.loss_phase == "main":
            nll = float(metrics["eval_loss"])
            self.model.compute_penalty = self.controller.step(state.global_step, nll)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves the last beta in the configuration, for whoever continues the checkpoint."""
        self.model.config.compute_penalty = self.controller.beta

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes beta beside the trainer's own state."""
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            write_json(folder / CONTROLLER_FILE, self.controller.state_dict())


class CurveCallback(TrainerCallback):
    """Records validation losses by step, the baseline curve of later runs."""

    def __init__(self) -> None:
        self.values: dict[int, float] = {}

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes note of an evaluation; earlier ones come from the trainer's history."""
        for row in [*state.log_history, {"step": state.global_step, **kwargs.get("metrics", {})}]:
            if "eval_loss" in row:
                self.values[int(row["step"])] = float(row["eval_loss"])

    def curve(self, **facts: Any) -> BaselineCurve | None:
        """The curve so far, None before any evaluation."""
        return BaselineCurve(dict(self.values), facts) if self.values else None


class CollapseCallback(TrainerCallback):
    """Warns once when an exit has had less than 1 % of the mixture for 500 steps."""

    def __init__(self, num_exits: int, warmup_steps: int) -> None:
        self._since: dict[int, int] = {}
        self._num_exits = num_exits
        self._warmup_steps = warmup_steps
        self._warned: set[int] = set()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks at the logged exit shares."""
        logs: Mapping[str, float] = kwargs.get("logs") or {}
        for k in range(1, self._num_exits + 1):
            share = logs.get(f"exit-share-{k}")
            if share is None or state.global_step <= self._warmup_steps:
                continue
            if share >= COLLAPSE_SHARE:
                self._since.pop(k, None)
                continue
            since = self._since.setdefault(k, state.global_step)
            if state.global_step - since >= COLLAPSE_STEPS and k not in self._warned:
                self._warned.add(k)
                warnings.warn(
                    f"exit {k} has had less than {COLLAPSE_SHARE:.0%} of the mixture since step "
                    f"{since}; the routers may have collapsed (lower compute_penalty, or train "
                    "a smaller model with fewer exits)",
                    stacklevel=2,
                )


class NviumLoss:
    """`(model, batch) -> loss, values` for `fit_causal_lm`.

    In evaluation it is the plain mixture negative log-likelihood, which is what baselines are
    compared by (`final_only`: the last head's). In training:

    - `full`: the phase's loss, mixture and compute penalty (or router warm-up);
    - `mix_only`: the mixture's negative log-likelihood alone;
    - `final_only`: the last head's cross-entropy alone.

    Args:
        phase: tells which steps are reported.
        loss: one of `LOSSES`.
        head_loss: weight of the early heads' mean cross-entropy, added to the first two. An
            exit that is hardly used learns from it; the mixture alone would teach it in
            proportion to its use.
    """

    def __init__(self, phase: PhaseCallback, loss: str = "full", head_loss: float = 0.0) -> None:
        self._phase, self._loss, self._head_loss = phase, loss, head_loss

    def __call__(
        self, model: Any, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]] | Tensor:
        """The batch's mean loss over scored tokens; values to log every few steps."""
        chosen = {} if self._loss == "full" else {"loss_phase": "main", "compute_penalty": 0.0}
        output = model(**batch, **chosen)
        last_only = self._loss == "final_only"
        # Not the wrapper's own flag: DeepSpeed's engine says it trains while its module does not.
        if not self._phase.model.training:
            return output.exit_losses[-1] if last_only else output.mixture_loss
        heads = -output.target_log_probs.sum((0, 1)) / scored_tokens(batch).clamp(min=1)
        total = heads[-1] if last_only else output.loss
        if self._head_loss and not last_only and len(heads) > 1:
            total = total + self._head_loss * heads[:-1].mean()
        return total, self._values(output, batch) if self._phase.reports else {}

    def _values(self, output: Any, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """Losses and shares of the exits, and per router its mean answer (`gate-mean-k`, the
        probability of leaving once there) and how undecided it is (`gate-entropy-k`, nats).
        One transfer from the device for all numbers."""
        named = {
            "mixture-loss": output.mixture_loss,
            "expected-depth": output.expected_depth,
            "router-warmup": output.router_warmup,
        }
        for k, (loss, share) in enumerate(zip(output.exit_losses, output.exit_shares, strict=True)):
            named[f"exit-loss-{k + 1}"], named[f"exit-share-{k + 1}"] = loss, share
        gates = output.gate_log_odds[:, :-1].detach()
        scored = batch["labels"][:, 1:] != IGNORED
        for name, numbers in (("mean", gates.sigmoid()), ("entropy", gate_entropy(gates))):
            means = (numbers * scored[..., None]).sum((0, 1)) / scored.sum().clamp(min=1)
            named |= {f"gate-{name}-{k + 1}": value for k, value in enumerate(means)}
        numbers = torch.stack([v.detach().float() for v in named.values()]).tolist()
        values = dict(zip(named, numbers, strict=True))
        values["compute-penalty"] = float(self._phase.model.compute_penalty)
        return values
