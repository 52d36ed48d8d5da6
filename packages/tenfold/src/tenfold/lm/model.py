"""`CausalLM`: every language-model capability over any transformers causal model.

Shapes: `B` batch, `T` time, `H` hidden, `V` vocabulary. Log-probabilities and losses in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig as EngineConfig

from tenfold.capabilities import HiddenStates, Session, StepOutput, TokenBatch
from tenfold.errors import ConfigError
from tenfold.lm import architecture, constraints, weights
from tenfold.lm.batching import pad_batch, position_ids
from tenfold.lm.generation import GenerateMixin
from tenfold.lm.jumping import ConstrainedDecoder, can_jump
from tenfold.lm.losses import CHUNK_TOKENS, shifted_nll, shifted_token_nll
from tenfold.lm.sampling import GeneratedRow, GenerationRow
from tenfold.lm.scoring import ScoreMixin, check_length
from tenfold.lm.session import CacheSession
from tenfold.lm.tokenizer import TokenizerMixin
from tenfold.records import GenerationConfig
from tenfold.seeds import content_hash


class CausalLM(TokenizerMixin, GenerateMixin, ScoreMixin):
    """A transformers causal language model with its tokenizer.

    Provides `generate score loss grad hidden tokenize step constrain`. Subclasses for models
    with another loss or decoding loop override `token_loss` and `_generate_batch`.

    Args:
        model: a `PreTrainedModel` with a language-model head; moved to `device`, set to eval.
        tokenizer: its tokenizer.
        device: a torch device.
        batch_tokens: most tokens in a batch, padding and tokens to be generated included.
        source: the checkpoint folder, whose weight files then stand for the fingerprint.
    """

    constraint_kinds = constraints.KINDS
    jump_forward = True
    """Write tokens that a constraint prescribes without a pass for each, and read common
    beginnings of prompts once; texts are the same without."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        device: str = "cpu",
        batch_tokens: int = 8192,
        source: Path | None = None,
    ) -> None:
        architecture.head(model)
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.batch_tokens = batch_tokens
        self.source = source
        self._eos_ids = _eos_ids(model, tokenizer)

    # --- tokenize ---------------------------------------------------------------------------

    @property
    def vocabulary_size(self) -> int:
        """Number of rows of the model's output, V."""
        return int(architecture.text_config(self.model).vocab_size)

    @cached_property
    def context_length(self) -> int:
        """Longest sequence that the model accepts, in tokens."""
        return architecture.context_length(self.model)

    # --- generate ---------------------------------------------------------------------------

    @torch.no_grad()
    def _generate_batch(
        self, rows: Sequence[GenerationRow], config: GenerationConfig
    ) -> list[GeneratedRow]:
        """One left-padded batch through `transformers.generate`; under a constraint that always
        closes through `tenfold.lm.jumping`, which writes the same in fewer passes.

        Decoders override this and use `controls` for sampling, stopping and constraints.
        """
        closer = self._closer(config)
        if closer is not None and self.jump_forward and can_jump(self, config):
            return ConstrainedDecoder(self, rows, config, closer).run()
        batch = pad_batch([row.ids for row in rows], self.pad_id, side="left", device=self.device)
        controls = self.controls(rows, config, batch.input_ids.shape[1])
        with self._plain_generation():
            sequences = self.model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=max(row.limit for row in rows),
                logits_processor=controls.processors,
                stopping_criteria=controls.stopping,
            )
        written = controls.collect(sequences)
        if closer is not None:
            for row in written:
                row.stats = {"forward_passes": len(row.token_ids), "forced_tokens": 0}
        return written

    @contextmanager
    def _plain_generation(self) -> Any:
        """Sets the checkpoint's own sampling defaults (repetition penalties and the like)
        aside: what is generated depends on our configuration alone."""
        before = self.model.generation_config
        self.model.generation_config = EngineConfig(do_sample=False, pad_token_id=self.pad_id)
        try:
            yield
        finally:
            self.model.generation_config = before

    # --- loss ------------------------------------------------------------------------------

    def token_loss(self, batch: TokenBatch) -> Tensor:
        """`[B, T]` nats; entry t is `-log p(x_t | x_<t)`, 0 where not scored; differentiable.

        Where logits are one matrix product, they are made for 1024 scored tokens at a time and
        never kept (`tenfold.lm.losses`).

        Raises:
            ConfigError: the batch is longer than the model's context.
        """
        if batch.input_ids.numel() == 0:
            return torch.zeros(batch.input_ids.shape, device=self.device)
        batch = self._placed(batch)
        arguments = self._inputs(batch)
        if not self._head_is_linear:
            return shifted_nll(self.model(**arguments).logits, batch)
        hidden = architecture.decoder(self.model)(**arguments)[0]
        head: Any = architecture.head(self.model)
        return shifted_token_nll(hidden, head.weight, batch, CHUNK_TOKENS, head.bias)

    @cached_property
    def _head_is_linear(self) -> bool:
        return architecture.head_is_linear(self.model)

    def _placed(self, batch: TokenBatch) -> TokenBatch:
        """The batch on the model's device."""
        mask = batch.loss_mask
        return TokenBatch(
            batch.input_ids.to(self.device),
            batch.attention_mask.to(self.device),
            None if mask is None else mask.to(self.device),
        )

    def _inputs(self, batch: TokenBatch) -> dict[str, Any]:
        """Forward arguments of a batch padded on either side."""
        if batch.input_ids.shape[1] > self.context_length:  # padding may be what is too long
            check_length(int(batch.attention_mask.sum(-1).max()), self.context_length)
        arguments = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "use_cache": False,
        }
        if architecture.accepts(self.model, "position_ids"):
            arguments["position_ids"] = position_ids(batch.attention_mask)
        return arguments

    # --- grad -------------------------------------------------------------------------------

    def module(self) -> nn.Module:
        """The transformers model that `token_loss` differentiates through."""
        return self.model

    def snapshot(self) -> weights.WeightSnapshot:
        """A copy of all weights and buffers."""
        return weights.snapshot(self.model)

    def restore(self, token: weights.WeightSnapshot) -> None:
        """Puts the weights of a snapshot back, bit for bit, in place."""
        weights.restore(self.model, token)

    # --- hidden -----------------------------------------------------------------------------

    def hidden_states(self, batch: TokenBatch, layers: Sequence[int]) -> HiddenStates:
        """Residual-stream states `[B, T, H]`: 0 enters the first block, i leaves block i.

        Negative numbers count from the last block. No norm is applied, also not to the last.

        Raises:
            ConfigError: a layer that the model does not have.
        """
        depth = len(architecture.blocks(self.model))
        if bad := [i for i in layers if not -depth - 1 <= i <= depth]:
            raise ConfigError(f"layer {bad[0]} is not in -{depth + 1}..{depth}")
        chosen = [i % (depth + 1) for i in layers]
        batch = self._placed(batch)
        with architecture.block_states(self.model, set(chosen)) as seen:
            architecture.decoder(self.model)(**self._inputs(batch))
        return HiddenStates(tuple(chosen), tuple(seen[i] for i in chosen))

    # --- step -------------------------------------------------------------------------------

    def start(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Session, StepOutput]:
        """Runs a (left-padded) prompt `[B, T]`; the session and the prompt's output."""
        session = CacheSession(self.model, self.context_length)
        placed = None if mask is None else mask.to(self.device)
        return session, session.begin(tokens.to(self.device), placed)

    # --- record -----------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Content hash of weights and tokenizer; the same wherever the checkpoint lies."""
        if self.source is not None and (files := sorted(self.source.glob("*.safetensors"))):
            print_ = weights.hash_files(files)
        else:
            print_ = weights.hash_tensors(self.model)
        return content_hash([print_, self.vocabulary_hash, str(self.model.dtype)])


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """All end tokens: the tokenizer's, and those that the checkpoint generates until."""
    found: set[int] = set()
    engine = getattr(model, "generation_config", None)
    for holder in (tokenizer.eos_token_id, getattr(engine, "eos_token_id", None)):
        found.update([holder] if isinstance(holder, int) else holder or [])
    return frozenset(found)
