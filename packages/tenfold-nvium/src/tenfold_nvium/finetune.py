"""`nvium:finetune`: continues an N-vium, or gives a dense checkpoint exits and trains them.

The way from a dense base to a fast one has two parts. First the backbone is frozen and the
exits learn (`train_parts = "exits"`): the base's own predictions stay bit for bit, and its last
head is what the mixture falls back on. The early heads' cross-entropy is added to the loss
there, since a gate that starts at 1.8 % would let them learn at 1.8 % of the speed. Then
everything may move (`train_parts = "all"`), with the compute penalty held by the base's own
validation loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tenfold.capabilities import Context, Dataset
from tenfold.errors import ConfigError, nearest
from tenfold.lm.plan import TrainingPlan
from tenfold.lm.precision import native_bf16
from tenfold.lm.trainer import Collator, scored_tokens
from tenfold.records import Checkpoint
from tenfold.scale.process import local_device

from tenfold_nvium.checkpoints import read_config, read_tokenizer
from tenfold_nvium.configuration import NviumConfig
from tenfold_nvium.controller import BaselineCurve
from tenfold_nvium.convert import TRAINING_LOG_ODDS, convert, gates_are_closed, set_gates
from tenfold_nvium.lm import load_network
from tenfold_nvium.modeling import NviumForCausalLM
from tenfold_nvium.rows import rows_of, train_and_held_out
from tenfold_nvium.trainers import fit_mixture
from tenfold_nvium.training import LOSSES

PARTS = ("exits", "routers", "all")
_RATES = {"exits": 1e-3, "routers": 1e-3, "all": 1e-5}
_CONTEXT = 512
"""Longest training row unless another is given."""


class Finetuner:
    """Trains the exits, the routers alone, or all of an N-vium on text or on prompts with
    reference answers.

    Args:
        dataset: records with a `text`, packed; or prompts with a reference, of which the
            answer alone is scored.
        checkpoint: folder of an N-vium, or of a dense base that is converted on the fly.
        exits: depths of the early exits of a base that is converted.
        num_exits: number of its heads, instead; default 4.
        gate_init: log-odds that routers start with: for a base -4 by default; an N-vium keeps
            its routers unless this is given.
        train_parts: `exits` (norms, adapters, routers, heads of their own; the backbone is frozen),
            `routers`, or `all`.
        loss: `full` (mixture and compute penalty), `mix_only`, or `final_only` (last head).
        head_loss: weight of the early heads' mean cross-entropy; None: 1 when the exits are
            trained alone, else 0.
        learning_rate: peak rate; None: 1e-3, or 1e-5 when everything is trained.
        context_length: tokens per row; None: the model's context, 512 at most.
        compute_penalty: beta; None: the checkpoint's own.
        router_warmup_ratio: share of the steps with the router warm-up term.
        controller: a baseline curve that beta follows.
        controller_gain: factor of the controller's gains.
        hold_base_loss: beta follows the last head's validation loss before training instead:
            depth is saved as long as the mixture is no worse than that.

    Other parameters: see `Pretrainer` and `TrainingPlan`.

    Raises:
        ConfigError: settings that contradict each other or the checkpoint.
    """

    def __init__(
        self,
        dataset: Dataset,
        checkpoint: str,
        exits: Sequence[int] | None = None,
        num_exits: int | None = None,
        gate_init: float | None = None,
        train_parts: str = "exits",
        loss: str = "full",
        head_loss: float | None = None,
        steps: int = 300,
        batch_size: int = 8,
        context_length: int | None = None,
        learning_rate: float | None = None,
        warmup_ratio: float = 0.05,
        weight_decay: float = 0.01,
        compute_penalty: float | None = None,
        router_warmup_ratio: float = 0.0,
        controller: str | None = None,
        controller_gain: float = 1.0,
        hold_base_loss: bool = False,
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
        for name, value, known in (
            ("train_parts", train_parts, PARTS),
            ("loss", loss, LOSSES),
        ):
            if value not in known:
                raise ConfigError(
                    f"{name} is {value!r}{nearest(value, known)}; one of {', '.join(known)}"
                )
        if loss == "final_only" and train_parts != "all":
            raise ConfigError(
                f'loss "final_only" trains the last head, which train_parts = '
                f'{train_parts!r} freezes; use train_parts = "all"'
            )
        if controller and hold_base_loss:
            raise ConfigError("controller and hold_base_loss both set the target; give one")
        if (controller or hold_base_loss) and loss != "full":
            raise ConfigError(f"loss {loss!r} has no compute penalty to control; use 'full'")
        if hold_base_loss and eval_rows <= 0:
            raise ConfigError("hold_base_loss compares evaluations; eval_rows must be above 0")
        self.dataset, self.checkpoint = dataset, checkpoint
        self.exits, self.num_exits, self.gate_init = exits, num_exits, gate_init
        self.train_parts, self.loss = train_parts, loss
        self.head_loss = float(train_parts == "exits") if head_loss is None else head_loss
        self.controller_gain = controller_gain
        self.steps, self.batch_size, self.context_length = steps, batch_size, context_length
        self.learning_rate = _RATES[train_parts] if learning_rate is None else learning_rate
        self.warmup_ratio, self.weight_decay = warmup_ratio, weight_decay
        self.compute_penalty, self.router_warmup_ratio = compute_penalty, router_warmup_ratio
        self.controller, self.hold_base_loss = controller, hold_base_loss
        self.bf16 = bf16
        self.gradient_accumulation = gradient_accumulation
        self.gradient_checkpointing = gradient_checkpointing
        self.eval_rows, self.eval_steps, self.save_steps = eval_rows, eval_steps, save_steps
        self.seed = seed
        self._baseline = BaselineCurve.load(controller) if controller else None

    def fit(self, ctx: Context, model: Any | None, data: Mapping[str, Dataset]) -> Checkpoint:
        """Trains and saves `ctx.work_dir / "checkpoint"`; resumes an interrupted call.

        Raises:
            ConfigError: a checkpoint that cannot be trained so, too little text, a prompt
                without a reference, or a baseline of other data.
        """
        seed = ctx.seed if self.seed is None else self.seed
        network, tokenizer = self._start(seed)
        length = self._row_length(network)
        with ctx.progress("preparing rows", None, "") as bar:
            make_rows = rows_of(self.dataset.kind, tokenizer, length)
            rows, held_out = train_and_held_out(self.dataset, make_rows, self.eval_rows, seed)
            bar.advance(len(rows))
        self._check_ids(network, tokenizer)
        plan = self._plan(ctx, seed, length, held_out is not None)
        baseline = self._baseline
        if held_out is None and (baseline is not None or self.hold_base_loss):
            raise ConfigError(
                "the compute penalty follows evaluations, but there are no held-out rows; give a "
                "larger dataset, or one with a validation split"
            )
        if self.hold_base_loss:
            baseline = BaselineCurve.constant(last_head_loss(network, held_out, ctx.device, plan))
        freeze(network, self.train_parts, self.loss)
        if self.gradient_checkpointing:
            network.gradient_checkpointing_enable()
        return fit_mixture(
            ctx, network, tokenizer, rows, held_out, plan,
            warmup_steps=int(self.steps * self.router_warmup_ratio), baseline=baseline,
            controller_gain=self.controller_gain, loss=self.loss, head_loss=self.head_loss,
        )  # fmt: skip

    def _start(self, seed: int) -> tuple[NviumForCausalLM, Any]:
        """The network in fp32 and its tokenizer."""
        folder = Path(self.checkpoint).expanduser()
        if not isinstance(read_config(folder), NviumConfig):
            odds = TRAINING_LOG_ODDS if self.gate_init is None else self.gate_init
            network = convert(
                folder, self.exits, self.num_exits, odds, seed=seed, dtype=torch.float32
            )
            tokenizer = read_tokenizer(folder)
        else:
            if self.exits is not None or self.num_exits is not None:
                raise ConfigError(
                    f"{folder} is an N-vium with its own exits; exits and num_exits are for a "
                    "dense base that is converted"
                )
            network, tokenizer, _ = load_network(str(folder), "float32")
            if self.gate_init is not None:
                set_gates(network, self.gate_init)
        self._check_exits(network, folder)
        if self.compute_penalty is not None:
            network.config.compute_penalty = network.compute_penalty = self.compute_penalty
        return network, tokenizer

    def _check_exits(self, network: NviumForCausalLM, folder: Path) -> None:
        if network.num_exits == 1 and self.train_parts != "all":
            raise ConfigError(f'{folder} has one exit and no routers; use train_parts = "all"')
        if self.loss != "final_only" and gates_are_closed(network):
            raise ConfigError(
                f"the gates of {folder} are closed: their gradient is 0 and they cannot learn",
                hint=f"set gate_init = {TRAINING_LOG_ODDS:g} to start them slightly open",
            )

    def _row_length(self, network: NviumForCausalLM) -> int:
        context = network.config.max_position_embeddings
        length = min(context, _CONTEXT) if self.context_length is None else self.context_length
        if length > context:
            raise ConfigError(
                f"context_length {length} is beyond the model's context of {context} tokens"
            )
        return length

    def _check_ids(self, network: NviumForCausalLM, tokenizer: Any) -> None:
        if len(tokenizer) > network.config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {len(tokenizer)} tokens, the model {network.config.vocab_size}"
                " embeddings; resize them first (`model.resize_token_embeddings`)"
            )

    def _plan(self, ctx: Context, seed: int, length: int, evaluates: bool) -> TrainingPlan:
        interval = self.eval_steps
        if interval is None:
            steered = self._baseline is not None or self.hold_base_loss
            interval = max(1, self.steps // 20) if steered else 0
        return TrainingPlan(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup_ratio=self.warmup_ratio,
            weight_decay=self.weight_decay,
            context_length=length,
            bf16=native_bf16(ctx.device) if self.bf16 is None else self.bf16,
            gradient_accumulation=self.gradient_accumulation,
            eval_steps=interval if evaluates else 0,
            save_steps=self.save_steps,
            seed=seed,
        )


def freeze(network: NviumForCausalLM, train_parts: str, loss: str = "full") -> None:
    """Leaves gradients to the trained parameters only.

    Parts without any gradient under a loss are frozen, too: several processes would otherwise
    wait for it.
    """
    for name, parameter in network.named_parameters():
        early = name.startswith("exits.")
        trained = {
            "all": loss != "final_only" or not early,
            "exits": early or name.startswith("final_adapter."),
            "routers": early and ".router." in name,
        }[train_parts]
        parameter.requires_grad_(trained)


@torch.no_grad()
def last_head_loss(network: NviumForCausalLM, rows: Any, device: str, plan: TrainingPlan) -> float:
    """Mean cross-entropy of the last head over rows, nats per scored token: the base's own
    validation loss, as long as the backbone is the base's."""
    place = torch.device(local_device(device))
    network.to(place).eval()
    collate, size = Collator(0), max(1, plan.batch_size // plan.gradient_accumulation)
    total = count = 0.0
    for start in range(0, len(rows), size):
        part = [rows[i] for i in range(start, min(start + size, len(rows)))]
        batch = {name: values.to(place) for name, values in collate(part).items()}
        with torch.autocast(place.type, torch.bfloat16, enabled=plan.bf16):
            losses = network(**batch).exit_losses
        scored = float(scored_tokens(batch))
        total, count = total + float(losses[-1]) * scored, count + scored
    return total / max(1.0, count)
