"""`nvium:pretrain`: text in, checkpoint out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tenfold.capabilities import Context, Dataset
from tenfold.errors import ConfigError
from tenfold.lm.packing import PackedRows
from tenfold.lm.plan import TrainingPlan
from tenfold.lm.precision import native_bf16
from tenfold.lm.tokenizer import train_bpe
from tenfold.lm.training import fit_causal_lm
from tenfold.records import Checkpoint, Metric
from transformers import TrainerCallback

from tenfold_nvium.checkpoints import read_tokenizer
from tenfold_nvium.controller import BaselineCurve, ComputePenaltyController
from tenfold_nvium.modeling import NviumForCausalLM
from tenfold_nvium.presets import Preset, dense_twin, preset
from tenfold_nvium.rows import Vocabulary, rows_of, texts_of, train_and_held_out
from tenfold_nvium.training import (
    BASELINE_FILE,
    CollapseCallback,
    CurveCallback,
    NviumLoss,
    PenaltyCallback,
    PhaseCallback,
)

_SHAPE = ("layers", "hidden_size", "heads", "intermediate_size", "vocab_size", "context_length",
          "steps", "batch_size", "learning_rate", "warmup_ratio", "weight_decay",
          "compute_penalty", "adapter_size")  # fmt: skip


class Pretrainer:
    """Trains an N-vium (or its dense twin) from scratch on a text dataset.

    A tokenizer is learned from the training texts, unless one is given. Rows are packed to
    `context_length` tokens; the dataset's `validation` split, or else some rows held out, is
    evaluated. Every parameter left at None is the preset's.

    Args:
        dataset: records with a `text`.
        preset: named shape, see `tenfold_nvium.presets`.
        exits: depths of early exits, 1-based layer counts; an empty list trains a dense model.
        router_warmup_ratio: share of the steps with the warm-up term.
        controller: a baseline curve (`baseline.json` of a dense run): beta is then moved after
            every evaluation.
        controller_gain: factor of the controller's gains. The published ones are for large
            models, whose losses differ by hundredths; small ones collapse to the first exit.
        dense: train the parameter-matched dense twin instead; it writes `baseline.json`.
        tokenizer: folder of a tokenizer to use, such as another run's checkpoint.
        bf16: compute in bfloat16 with fp32 weights; None: where the hardware does it natively.
        eval_rows: most rows that an evaluation reads; 0 evaluates nothing.
        eval_steps: steps between evaluations; None: 20 over the run with a controller or a
            dense twin, else at the end only.

    Other parameters: see `TrainingPlan`.
    """

    def __init__(
        self,
        dataset: Dataset,
        preset: str = "quickstart",
        layers: int | None = None,
        hidden_size: int | None = None,
        heads: int | None = None,
        intermediate_size: int | None = None,
        exits: Sequence[int] | None = None,
        adapter_size: int | None = None,
        vocab_size: int | None = None,
        context_length: int | None = None,
        steps: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        warmup_ratio: float | None = None,
        weight_decay: float | None = None,
        compute_penalty: float | None = None,
        router_warmup_ratio: float = 0.05,
        controller: str | None = None,
        controller_gain: float = 1.0,
        dense: bool = False,
        tokenizer: str | None = None,
        bf16: bool | None = None,
        gradient_accumulation: int = 1,
        gradient_checkpointing: bool = False,
        eval_rows: int = 64,
        eval_steps: int | None = None,
        save_steps: int = 0,
        seed: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in _SHAPE}
        self.dataset = dataset
        self.shape = _shaped(preset, given, exits)
        self.router_warmup_ratio = router_warmup_ratio
        self.controller, self.controller_gain = controller, controller_gain
        self.dense = dense
        self.tokenizer = tokenizer
        self.bf16 = bf16
        self.gradient_accumulation = gradient_accumulation
        self.gradient_checkpointing = gradient_checkpointing
        self.eval_rows, self.eval_steps, self.save_steps = eval_rows, eval_steps, save_steps
        self.seed = seed
        if controller and dense:
            raise ConfigError("a dense twin has no compute penalty to control; drop `controller`")
        if controller:
            BaselineCurve.load(controller)  # a wrong path fails now, not after the packing
        self.shape.config()  # so does an impossible shape

    def fit(self, ctx: Context, model: Any | None, data: Mapping[str, Dataset]) -> Checkpoint:
        """Trains and saves `ctx.work_dir / "checkpoint"` (weights, tokenizer, `training.json`;
        `baseline.json` when evaluations were made); resumes an interrupted call.

        Raises:
            ConfigError: too little text, or a baseline of other data.
        """
        seed = ctx.seed if self.seed is None else self.seed
        with ctx.progress("preparing text", None, "") as bar:
            tokenizer, rows, held_out = self._rows(seed)
            bar.advance(len(rows))
        network = self._model(len(tokenizer), tokenizer, seed)
        plan = self._plan(ctx, seed, held_out is not None)
        warmup = 0 if self.dense else max(1, int(plan.steps * self.router_warmup_ratio))
        return fit_mixture(
            ctx, network, tokenizer, rows, held_out, plan, warmup_steps=warmup,
            baseline=BaselineCurve.load(self.controller) if self.controller else None,
            controller_gain=self.controller_gain,
        )  # fmt: skip

    def _rows(self, seed: int) -> tuple[Any, PackedRows, PackedRows | None]:
        """Tokenizer, training rows, held-out rows."""
        tokenizer = (
            read_tokenizer(Path(self.tokenizer).expanduser())
            if self.tokenizer
            else train_bpe(texts_of(self.dataset.load()), self.shape.vocab_size)
        )
        make_rows = rows_of("text", tokenizer, self.shape.context_length)
        return tokenizer, *train_and_held_out(self.dataset, make_rows, self.eval_rows, seed)

    def _model(self, vocabulary: int, tokenizer: Any, seed: int) -> NviumForCausalLM:
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = self.shape.config(
            vocab_size=vocabulary, pad_token_id=tokenizer.pad_token_id, **ends
        )
        if self.dense:
            config = dense_twin(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = NviumForCausalLM(config)
        if self.gradient_checkpointing:
            network.gradient_checkpointing_enable()
        return network

    def _plan(self, ctx: Context, seed: int, evaluates: bool) -> TrainingPlan:
        shape, interval = self.shape, self.eval_steps
        if interval is None:
            interval = max(1, shape.steps // 20) if self.controller or self.dense else 0
        return TrainingPlan(
            steps=shape.steps,
            batch_size=shape.batch_size,
            learning_rate=shape.learning_rate,
            warmup_ratio=shape.warmup_ratio,
            weight_decay=shape.weight_decay,
            context_length=shape.context_length,
            bf16=native_bf16(ctx.device) if self.bf16 is None else self.bf16,
            gradient_accumulation=self.gradient_accumulation,
            eval_steps=interval if evaluates else 0,
            save_steps=self.save_steps,
            seed=seed,
        )


class DensePretrainer(Pretrainer):
    """`Pretrainer` with `dense = True`: the parameter-matched baseline of a preset."""

    def __init__(self, dataset: Dataset, **settings: Any) -> None:
        super().__init__(dataset, dense=True, **settings)


def fit_mixture(
    ctx: Context,
    network: NviumForCausalLM,
    tokenizer: Any,
    rows: Any,
    held_out: Any,
    plan: TrainingPlan,
    *,
    warmup_steps: int,
    baseline: BaselineCurve | None = None,
    controller_gain: float = 1.0,
    loss: str = "full",
    head_loss: float = 0.0,
) -> Checkpoint:
    """Trains whatever of `network` has gradients and saves it, with its validation losses as
    `baseline.json`; resumes an interrupted call.

    Args:
        rows, held_out: rows for training and evaluation, see `tenfold_nvium.rows`.
        warmup_steps: optimiser steps with the router warm-up term.
        baseline: the curve that beta follows; None keeps `network.compute_penalty`.
        controller_gain: factor of the controller's gains.
        loss, head_loss: see `NviumLoss`.

    Raises:
        ConfigError: a baseline of other data.
    """
    facts = {"data": rows.fingerprint(), "vocabulary": Vocabulary(tokenizer).vocabulary_hash}
    phase = PhaseCallback(network, warmup_steps, plan.log_steps)
    curve = CurveCallback()
    callbacks: list[TrainerCallback] = [phase, curve]
    if baseline is not None:
        baseline.check(facts)
        penalty = ComputePenaltyController(
            baseline, beta=network.compute_penalty, gain_scale=controller_gain
        )
        callbacks.append(PenaltyCallback(network, penalty))
    if network.num_exits > 1:
        callbacks.append(CollapseCallback(network.num_exits, warmup_steps))
    checkpoint = fit_causal_lm(
        ctx, network, tokenizer, rows, plan, compute_loss=NviumLoss(phase, loss, head_loss),
        callbacks=callbacks, eval_dataset=held_out,
    )  # fmt: skip
    measured = curve.curve(**facts)
    if measured is not None and ctx.rank == 0:
        measured.save(checkpoint.path / BASELINE_FILE)
    size = sum(p.numel() for p in network.parameters())
    return Checkpoint(checkpoint.path, [*checkpoint.metrics, Metric("parameters", float(size), 1)])


def _shaped(name: str, given: Mapping[str, Any], exits: Sequence[int] | None) -> Preset:
    """The preset with what was given put in its place."""
    chosen = preset(name)
    changes = {key: value for key, value in given.items() if value is not None}
    if exits is not None:
        changes["exits"] = tuple(exits)
    elif changes.get("layers", chosen.layers) != chosen.layers:
        from tenfold_nvium.configuration import even_exits

        changes["exits"] = tuple(even_exits(changes["layers"], len(chosen.exits) + 1))
    if "hidden_size" in changes:
        from tenfold_nvium.configuration import ceil_to

        # Widths that belong to the preset's own hidden size do not carry over.
        changes.setdefault("intermediate_size", ceil_to(8 * changes["hidden_size"] / 3))
        changes.setdefault("adapter_size", None)
        changes.setdefault("router_intermediate_size", None)
    return replace(chosen, **changes)
