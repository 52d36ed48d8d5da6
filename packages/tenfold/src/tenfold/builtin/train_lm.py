"""`core:lm`: trains a causal language model through `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tenfold.builtin.hf import load
from tenfold.capabilities import Context, Dataset
from tenfold.errors import ConfigError
from tenfold.lm import architecture
from tenfold.lm.packing import PackedRows, pack_tokens
from tenfold.lm.plan import TrainingPlan
from tenfold.lm.tokenizer import train_bpe
from tenfold.lm.training import fit_causal_lm
from tenfold.records import Checkpoint, Metric, TextRecord


class LanguageModelTrainer:
    """Trains from scratch (a small Llama-type model and a byte-level BPE), from the checkpoint
    `init`, or the run's `model` role. Texts are packed into rows; see `TrainingPlan` for the
    settings that are not explained in the component's description."""

    def __init__(
        self,
        dataset: Dataset,
        init: str | None = None,
        vocab_size: int = 2048,
        hidden_size: int = 128,
        layers: int = 4,
        heads: int = 4,
        context_length: int = 128,
        eval_rows: int = 32,
        gradient_checkpointing: bool = False,
        seed: int | None = None,
        **plan: Any,
    ) -> None:
        """Raises ConfigError when the heads do not divide the width."""
        if hidden_size % heads or (hidden_size // heads) % 2:
            raise ConfigError(
                f"hidden_size {hidden_size} cannot be divided into {heads} heads of even width"
            )
        self.dataset = dataset
        self.init = init
        self.vocab_size = vocab_size
        self.shape = {"hidden_size": hidden_size, "layers": layers, "heads": heads}
        self.context_length = context_length
        self.eval_rows = eval_rows
        self.gradient_checkpointing = gradient_checkpointing
        self.seed = seed
        self.plan = plan

    def fit(self, ctx: Context, model: Any | None, data: Mapping[str, Dataset]) -> Checkpoint:
        """Trains and saves `ctx.work_dir / "checkpoint"`; resumes an interrupted call.

        Raises:
            ConfigError: too little text, or both `init` and a model role.
        """
        seed = ctx.seed if self.seed is None else self.seed
        if self.init and model is not None:
            raise ConfigError("the trainer has both `init` and a model; keep one")
        network, tokenizer = self._start(model, seed)
        self._check_context(network)
        size = float(sum(p.numel() for p in network.parameters()))
        rows = pack_tokens(self._texts(), tokenizer, self.context_length)
        held_out = self._held_out(tokenizer)
        if held_out is None and (count := min(self.eval_rows, len(rows) // 10)):
            rows, held_out = rows.split(count, seed)
        if self.gradient_checkpointing:
            network.gradient_checkpointing_enable()
        plan = TrainingPlan(context_length=self.context_length, seed=seed, **self.plan)
        checkpoint = fit_causal_lm(ctx, network, tokenizer, rows, plan, eval_dataset=held_out)
        return Checkpoint(checkpoint.path, [*checkpoint.metrics, Metric("parameters", size, 1)])

    def _texts(self, split: str = "") -> Iterator[str]:
        for record in self.dataset.load(split):
            if not isinstance(record, TextRecord):
                raise ConfigError(f"core:lm learns from text records, not {record.kind} records")
            yield record.text

    def _held_out(self, tokenizer: Any) -> PackedRows | None:
        """Rows of the dataset's `validation` split, where it has one."""
        if self.eval_rows == 0 or "validation" not in self.dataset.splits():
            return None
        try:
            rows = pack_tokens(self._texts("validation"), tokenizer, self.context_length)
        except ConfigError:  # too few tokens for a row; training rows are held out instead
            return None
        step = max(1, len(rows) // self.eval_rows)
        return PackedRows(rows.tokens[::step][: self.eval_rows])

    def _check_context(self, network: Any) -> None:
        limit = architecture.context_length(network)
        if self.context_length > limit:
            raise ConfigError(
                f"context_length {self.context_length} is beyond the model's own of {limit} tokens"
            )

    def _start(self, model: Any | None, seed: int) -> tuple[Any, Any]:
        """The network to train, with its tokenizer."""
        if model is not None:
            return model.module(), model.tokenizer
        if self.init is not None:
            started = load(self.init)
            return started.module(), started.tokenizer
        tokenizer = train_bpe(self._texts(), self.vocab_size)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.shape["hidden_size"],
            intermediate_size=8 * -(-self.shape["hidden_size"] // 3),
            num_hidden_layers=self.shape["layers"],
            num_attention_heads=self.shape["heads"],
            num_key_value_heads=self.shape["heads"],
            max_position_embeddings=max(2 * self.context_length, 256),
            tie_word_embeddings=True,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(config), tokenizer
