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

from tenfold.capabilities import HiddenStates, Prompt, Session, StepOutput, TokenBatch
from tenfold.errors import ConfigError
from tenfold.lm import architecture, constraints, weights
from tenfold.lm.batching import length_buckets, pad_batch, position_ids
from tenfold.lm.losses import CHUNK_TOKENS, shifted_nll, shifted_token_nll
from tenfold.lm.prompts import PromptMixin
from tenfold.lm.sampling import GeneratedRow, GenerationControls, GenerationRow, completion
from tenfold.lm.session import CacheSession
from tenfold.records import Completion, GenerationConfig, TokenScores
from tenfold.seeds import content_hash, derive


class CausalLM(PromptMixin):
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

    def generate(
        self, prompts: Sequence[Prompt], config: GenerationConfig
    ) -> list[list[Completion]]:
        """For each prompt its `config.n` completions.

        Greedy output equals `transformers.generate` and the arg-max of `step`. A sampled one
        is a function of (weights, prompt, config, seed): each row has a generator of its own.
        Generation ends at an end token (kept in `token_ids`), a stop string (cut from the
        text), after `max_new_tokens`, or where the model's context is full.

        Raises:
            ConfigError: a prompt that fills the context, or a constraint that cannot be used.
        """
        samples = config.n if config.temperature > 0 else 1
        rows = [
            self._generation_row(ids, config, sample)
            for ids in (self._prompt(prompt, config) for prompt in prompts)
            for sample in range(samples)
        ]
        if config.constraint is not None:
            self._grammar(config)
        written = self._generate_rows(rows, config)
        done = [completion(row, self, self._eos_ids, config.stop) for row in written]
        repeats = config.n // samples
        return [done[i : i + samples] * repeats for i in range(0, len(done), samples)]

    def _prompt(self, prompt: Prompt, config: GenerationConfig) -> list[int]:
        """Prompt ids, with room for at least one token after them."""
        ids = self.prompt_ids(prompt, config.chat)
        if len(ids) >= self.context_length:
            raise ConfigError(
                f"a prompt of {len(ids)} tokens leaves no room in the model's context of "
                f"{self.context_length} tokens",
                hint="shorten the prompt or use a model with a longer context",
            )
        return ids

    def _generation_row(
        self, ids: list[int], config: GenerationConfig, sample: int
    ) -> GenerationRow:
        limit = min(config.max_new_tokens, self.context_length - len(ids))
        return GenerationRow(ids, limit, derive(config.seed or 0, content_hash(ids), sample))

    def _generate_rows(
        self, rows: Sequence[GenerationRow], config: GenerationConfig
    ) -> list[GeneratedRow]:
        """All rows, in batches of similar length; results in order."""
        written: dict[int, GeneratedRow] = {}
        sizes = [len(row.ids) + row.limit for row in rows]
        for bucket in length_buckets(sizes, self.batch_tokens):
            batch = self._generate_batch([rows[i] for i in bucket], config)
            written.update(zip(bucket, batch, strict=True))
        return [written[i] for i in range(len(rows))]

    @torch.no_grad()
    def _generate_batch(
        self, rows: Sequence[GenerationRow], config: GenerationConfig
    ) -> list[GeneratedRow]:
        """One left-padded batch through `transformers.generate`.

        Decoders override this and use `controls` for sampling, stopping and constraints.
        """
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
        return controls.collect(sequences)

    def controls(
        self, rows: Sequence[GenerationRow], config: GenerationConfig, width: int
    ) -> GenerationControls:
        """Processors and stopping rules of a batch whose padded prompts have `width` tokens."""
        grammar = self._grammar(config)
        constraint = None
        if grammar is not None:
            constraint = constraints.GrammarProcessor(
                self._grammar_tokenizer, grammar, len(rows), width
            )
        return GenerationControls(
            rows, config, width=width, tokenizer=self, eos_ids=self._eos_ids, constraint=constraint
        )

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

    # --- constrain --------------------------------------------------------------------------

    @cached_property
    def _grammar_tokenizer(self) -> Any:
        return constraints.grammar_tokenizer(
            self.tokenizer, self.vocabulary_size, sorted(self._eos_ids)
        )

    def _grammar(self, config: GenerationConfig) -> str | None:
        if config.constraint is None:
            return None
        return constraints.compile_grammar(config.constraint)

    # --- score and loss ---------------------------------------------------------------------

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[Prompt, str | Sequence[int]]]) -> list[TokenScores]:
        """For each (context, continuation) the continuation's token log-probabilities.

        Equals minus `token_loss` of the joined tokens. Context and continuation are encoded
        separately; pass ids where token boundaries matter.

        Raises:
            ConfigError: context and continuation do not fit the model's context.
        """
        contexts = [self.prompt_ids(context) for context, _ in pairs]
        targets = [self.continuation_ids(continuation) for _, continuation in pairs]
        rows = [c + t for c, t in zip(contexts, targets, strict=True)]
        self._check_length(max(map(len, rows), default=0))
        results: dict[int, TokenScores] = {}
        for bucket in length_buckets([len(r) for r in rows], self.batch_tokens):
            batch = pad_batch(
                [rows[i] for i in bucket],
                self.pad_id,
                loss_from=[len(contexts[i]) for i in bucket],
                device=self.device,
            )
            losses = self.token_loss(batch).cpu()
            for line, i in zip(losses, bucket, strict=True):
                values = (-line[len(contexts[i]) : len(rows[i])]).tolist()
                results[i] = TokenScores(targets[i], values)
        return [results[i] for i in range(len(rows))]

    def _check_length(self, longest: int) -> None:
        if longest > self.context_length:
            raise ConfigError(
                f"a sequence of {longest} tokens does not fit the model's context of "
                f"{self.context_length} tokens",
                hint="shorten the texts or use a model with a longer context",
            )

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
            self._check_length(int(batch.attention_mask.sum(-1).max()))
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
