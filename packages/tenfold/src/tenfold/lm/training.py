"""Training a causal language model: `transformers.Trainer` on one process or many.

The plan's result does not depend on the number of processes, on accumulation, or on how often
the run was interrupted. Under Accelerate and DeepSpeed (ZeRO 1-3) the same call joins the
process group that the launcher prepared.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainingArguments

from tenfold.capabilities import Context
from tenfold.errors import ConfigError, RunFailed
from tenfold.files import disk_full_is_an_error, write_json
from tenfold.lm.interruption import HostCallback, Interruption, claim_folder, latest_state
from tenfold.lm.plan import TrainingPlan
from tenfold.lm.quiet import quiet
from tenfold.lm.trainer import Collator, ComputeLoss, PlanTrainer, RowStream
from tenfold.records import Checkpoint, Metric
from tenfold.scale import deepspeed, process
from tenfold.seeds import content_hash

__all__ = ["ComputeLoss", "TrainingPlan", "fit_causal_lm"]

RECORD = "training.json"
"""File in the checkpoint that tells how it was trained."""

_CLOCK = ("runtime", "per_second")


def fit_causal_lm(
    ctx: Context,
    model: Any,
    tokenizer: Any,
    packed_dataset: Any,
    plan: TrainingPlan,
    *,
    compute_loss: ComputeLoss | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    eval_dataset: Any = None,
) -> Checkpoint:
    """Trains `model` and saves it with its tokenizer as `ctx.work_dir / "checkpoint"`.

    Interrupted (Ctrl-C, SIGTERM), it saves after the current step and raises
    KeyboardInterrupt; called again with the same `work_dir`, it goes on from the newest
    complete state and ends with the weights of an uninterrupted run.

    Args:
        ctx: the host's context; `device` and `world_size` decide where training runs.
        model: a `PreTrainedModel`, trained in place.
        tokenizer: saved beside the weights.
        packed_dataset: rows with `input_ids` and optional `labels`, see `packing`.
        plan: how to train.
        compute_loss: see `ComputeLoss`; default: the model's own loss.
        callbacks: further transformers callbacks.
        eval_dataset: held-out rows; their loss becomes the metric `eval-loss`.

    Raises:
        ConfigError: a batch that cannot be divided, or a `work_dir` of another training.
        RunFailed: the loss is no number any more, the disk is full, memory ran out, or another
            number of processes works together than was asked for.
        KeyboardInterrupt: interrupted; the state is saved.
    """
    rows = plan.rows_per_call(ctx.world_size)
    if len(packed_dataset) == 0:
        raise ConfigError("there are no rows to train on")
    states = Path(ctx.work_dir) / "trainer"
    target = Path(ctx.work_dir) / "checkpoint"
    identity = _identity(ctx, model, packed_dataset, plan)
    with quiet():
        _join(ctx)
    _agree(identity)
    if (done := _finished(target, identity)) is not None:
        return done
    claim_folder(states, identity)
    interruption = Interruption()
    with (
        ctx.progress("training", plan.steps, "steps") as bar,
        interruption.listening(),
        quiet(),
        _clear_failures(states),
    ):
        with _training_mode(model):
            trainer = PlanTrainer(
                model=model,
                args=_arguments(ctx, plan, states, rows, eval_dataset is not None),
                train_dataset=RowStream(packed_dataset, plan.steps * plan.batch_size, plan.seed),
                eval_dataset=eval_dataset,
                data_collator=Collator(_pad_id(tokenizer)),
                loss_function=compute_loss,
                callbacks=[*callbacks, HostCallback(ctx, bar, interruption)],
            )
            # What it prints goes to the host instead.
            trainer.remove_callback(transformers.PrinterCallback)
            _check_world_size(ctx, trainer.accelerator.num_processes)
            state = latest_state(states)
            trainer.train(resume_from_checkpoint=None if state is None else str(state))
            if interruption.requested and trainer.state.global_step < plan.steps:
                raise KeyboardInterrupt
            if eval_dataset is not None and not _evaluated_at_end(trainer):
                trainer.evaluate()
        record = {**_record(ctx, plan, trainer), "identity": identity}
        _save(ctx, trainer, tokenizer, record, target)
    if interruption.requested:
        raise KeyboardInterrupt
    return Checkpoint(target, _metrics(record))


def _join(ctx: Context) -> None:
    """Makes the process group, so that every later step can agree among processes."""
    if ctx.device == "cpu":
        # Accelerate imports DeepSpeed wherever it is installed, and that looks for a GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if ctx.world_size > 1 and process.uses_deepspeed():
        deepspeed.prepare_environment(ctx.device)
    if ctx.world_size > 1:
        process.init_process_group(ctx.device)
        _check_world_size(ctx, process.obtained_world_size())
        if process.uses_deepspeed():
            deepspeed.configure_accelerate(ctx.device)


def _agree(identity: dict[str, Any]) -> None:
    """Raises RunFailed when the processes have prepared different models or data."""
    others = process.gather_objects(identity)
    if changed := sorted({k for other in others for k in identity if other[k] != identity[k]}):
        raise RunFailed(
            f"the processes disagree about {', '.join(changed)}",
            hint="data and models must be the same on every process; check seeds and files",
        )


def _identity(ctx: Context, model: Any, rows: Any, plan: TrainingPlan) -> dict[str, Any]:
    """What must be equal for an interrupted training to go on."""
    fingerprint = getattr(rows, "fingerprint", None)
    return {
        "plan": plan.key(),
        "data": fingerprint() if callable(fingerprint) else len(rows),
        "model": content_hash(model.config.to_dict()),
        "processes": ctx.world_size,
        "launcher": process.launcher() if process.uses_deepspeed() else "",
    }


def _arguments(
    ctx: Context, plan: TrainingPlan, folder: Path, rows: int, evaluates: bool
) -> TrainingArguments:
    sharded = ctx.world_size > 1 and process.uses_deepspeed()
    on_cpu = ctx.device == "cpu" and not sharded
    every = evaluates and plan.eval_steps > 0
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.steps,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=plan.gradient_accumulation,
        learning_rate=plan.learning_rate,
        lr_scheduler_type=plan.schedule,
        warmup_steps=round(plan.steps * plan.warmup_ratio),
        weight_decay=plan.weight_decay,
        adam_beta1=plan.adam_beta1,
        adam_beta2=plan.adam_beta2,
        max_grad_norm=plan.grad_clip,
        optim="adamw_torch",
        bf16=plan.bf16,
        use_cpu=on_cpu,
        ddp_backend="gloo" if ctx.device == "cpu" and ctx.world_size > 1 else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=ctx.device == "cuda",
        deepspeed=deepspeed.active_config() if sharded else None,
        accelerator_config={"use_configured_state": sharded},
        seed=plan.seed % 2**32,
        logging_steps=min(plan.log_steps, plan.steps),
        logging_nan_inf_filter=False,
        eval_strategy="steps" if every else "no",
        eval_steps=plan.eval_steps if every else None,
        save_steps=plan.save_interval,
        save_total_limit=2,
        prediction_loss_only=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        log_level="error",
        log_level_replica="error",
    )
    # One process uses one device: several visible GPUs would mean torch's DataParallel.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _check_world_size(ctx: Context, obtained: int) -> None:
    if obtained != ctx.world_size:
        raise RunFailed(
            f"asked for {ctx.world_size} processes, but {obtained} train together",
            hint='check the launcher and its configuration; on CPU use launcher = "torchrun"',
        )


def _evaluated_at_end(trainer: PlanTrainer) -> bool:
    last = [row for row in trainer.state.log_history if "eval_loss" in row]
    return bool(last) and last[-1]["step"] == trainer.state.global_step


def _finished(target: Path, identity: dict[str, Any]) -> Checkpoint | None:
    """What an earlier call of this very training finished, if one did."""
    path = target / RECORD
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    same = record.get("identity") == json.loads(json.dumps(identity))
    if not all(process.gather_objects(same)):
        return None
    return Checkpoint(target, _metrics(record))


def _save(
    ctx: Context, trainer: PlanTrainer, tokenizer: Any, record: dict[str, Any], target: Path
) -> None:
    """Writes the finished checkpoint under a temporary name, then renames it into place."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if ctx.rank == 0:
        partial = target.with_name(".checkpoint.partial")
        shutil.rmtree(partial, ignore_errors=True)
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        model.save_pretrained(partial, state_dict=weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        write_json(partial / RECORD, record)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        shutil.rmtree(str(trainer.args.output_dir), ignore_errors=True)
    process.barrier()


def _record(ctx: Context, plan: TrainingPlan, trainer: PlanTrainer) -> dict[str, Any]:
    return {
        "plan": asdict(plan),
        "processes": ctx.world_size,
        "launcher": process.launcher(),
        "engine": type(trainer.model_wrapped).__name__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "log": _log(trainer.state.log_history),
    }


def _log(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Losses by step, without wall-clock values: equal trainings leave equal records."""
    return [
        {k: v for k, v in row.items() if k != "epoch" and not k.endswith(_CLOCK)}
        for row in history
        if "loss" in row or "eval_loss" in row
    ]


def _metrics(record: dict[str, Any]) -> list[Metric]:
    """Last logged losses (nats per token) and the number of steps."""
    steps = int(record["plan"]["steps"])
    metrics = []
    for key, name in (("loss", "train-loss"), ("eval_loss", "eval-loss")):
        values = [row[key] for row in record["log"] if key in row]
        if values:
            metrics.append(
                Metric(name, float(values[-1]), steps, higher_is_better=False, unit="nats")
            )
    return [*metrics, Metric("steps", float(steps), steps)]


def _pad_id(tokenizer: Any) -> int:
    return (getattr(tokenizer, "pad_token_id", None) or 0) if tokenizer is not None else 0


@contextmanager
def _training_mode(model: Any) -> Iterator[None]:
    """No key-value cache while training; evaluation mode again afterwards."""
    cache = getattr(model.config, "use_cache", None)
    if cache is not None:
        model.config.use_cache = False
    try:
        yield
    finally:
        if cache is not None:
            model.config.use_cache = cache
        model.eval()


@contextmanager
def _clear_failures(folder: Path) -> Iterator[None]:
    """Turns a full disk and exhausted memory into one clear error each."""
    try:
        with disk_full_is_an_error(folder):
            yield
    except torch.OutOfMemoryError as error:
        raise RunFailed(
            "the device ran out of memory in training",
            hint="raise gradient_accumulation, or lower batch_size or context_length",
        ) from error
    except Exception as error:
        # Serializers report a full disk as an error of their own kind.
        if "No space left" in str(error) and not isinstance(error, RunFailed):
            raise RunFailed(
                f"no space left while writing {folder}",
                hint="free some space, then continue with `tenfold run --resume`",
            ) from error
        raise
