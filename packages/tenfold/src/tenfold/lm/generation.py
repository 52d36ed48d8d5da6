"""The `generate` capability: prompts to rows, rows to batches, batches to completions.

What a decoder writes itself is one method, `_generate_batch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import LogitsProcessor

from tenfold.capabilities import Prompt
from tenfold.errors import ConfigError
from tenfold.lm import constraints
from tenfold.lm.closing import Closer
from tenfold.lm.prompts import prompt_ids
from tenfold.lm.sampling import GeneratedRow, GenerationControls, GenerationRow, completion
from tenfold.records import Completion, GenerationConfig
from tenfold.seeds import content_hash, derive


class GenerateMixin:
    """`generate` for classes with the `tokenize` capability and a `_generate_batch`."""

    batch_tokens: int
    _eos_ids: frozenset[int]

    def generate(
        self, prompts: Sequence[Prompt], config: GenerationConfig
    ) -> list[list[Completion]]:
        """For each prompt its `config.n` completions.

        Greedy output is the arg-max of `step`, token for token. A sampled one is a function of
        (weights, prompt, config, seed): each row has a random generator of its own. Generation
        ends at an end token (kept in `token_ids`), a stop string (cut from the text), after
        `max_new_tokens`, or where the model's context is full. Choices and the JSON schemas of
        `tenfold.lm.json_machine` are always whole by then.

        Raises:
            ConfigError: a prompt that fills the context, a constraint that cannot be used or
                whose shortest text is longer than the limit, or not one seed per prompt.
        """
        samples = config.n if config.temperature > 0 else 1
        self._grammar(config)  # a bad constraint is reported before any work
        seeds = prompt_seeds(config, len(prompts))
        rows = [
            self._row(ids, config, seed, sample)
            for ids, seed in zip([self._prompt(p, config) for p in prompts], seeds, strict=True)
            for sample in range(samples)
        ]
        if (closer := self._closer(config)) is not None:
            constraints.check_limits(closer, [row.limit for row in rows])
        written = self._generate_rows(rows, config)
        model: Any = self
        done = [completion(row, model, self._eos_ids, config.stop) for row in written]
        repeats = config.n // samples
        return [done[i : i + samples] * repeats for i in range(0, len(done), samples)]

    def prompt_ids(self, prompt: Prompt, chat: bool = True) -> list[int]:
        """The token ids that `generate` reads for a prompt, see `tenfold.lm.prompts`."""
        model: Any = self
        return prompt_ids(model, prompt, chat=chat)

    def _prompt(self, prompt: Prompt, config: GenerationConfig) -> list[int]:
        """Prompt ids, with room for at least one token after them."""
        model: Any = self
        ids = self.prompt_ids(prompt, config.chat)
        if len(ids) >= model.context_length:
            raise ConfigError(
                f"a prompt of {len(ids)} tokens leaves no room in the model's context of "
                f"{model.context_length} tokens",
                hint="shorten the prompt or use a model with a longer context",
            )
        return ids

    def _row(
        self, ids: list[int], config: GenerationConfig, seed: int, sample: int
    ) -> GenerationRow:
        model: Any = self
        limit = min(config.max_new_tokens, model.context_length - len(ids))
        return GenerationRow(ids, limit, derive(seed, content_hash(ids), sample))

    def _generate_rows(
        self, rows: Sequence[GenerationRow], config: GenerationConfig
    ) -> list[GeneratedRow]:
        """All rows, in batches of similar length; results in order."""
        model: Any = self
        written: dict[int, GeneratedRow] = {}
        for indices in generation_batches(rows, self.batch_tokens, model.context_length):
            batch = self._generate_batch([rows[i] for i in indices], config)
            written.update(zip(indices, batch, strict=True))
        return [written[i] for i in range(len(rows))]

    def _generate_batch(
        self, rows: Sequence[GenerationRow], config: GenerationConfig
    ) -> list[GeneratedRow]:
        """Writes one batch; `controls` has its sampling, stopping and constraints."""
        raise NotImplementedError

    def controls(
        self, rows: Sequence[GenerationRow], config: GenerationConfig, width: int
    ) -> GenerationControls:
        """Processors and stopping rules of a batch whose padded prompts have `width` tokens."""
        model: Any = self
        constraint: LogitsProcessor | None = None
        closer = self._closer(config)
        if closer is not None:
            limits = [row.limit for row in rows]
            constraint = constraints.ClosingProcessor(closer, limits, width)
        elif (grammar := self._grammar(config)) is not None:
            constraint = constraints.GrammarProcessor(
                self._grammar_tokenizer, grammar, len(rows), width
            )
        return GenerationControls(
            rows,
            config,
            width=width,
            tokenizer=model,
            eos_ids=self._eos_ids,
            constraint=constraint,
            by_position=closer is not None,
        )

    def _closer(self, config: GenerationConfig) -> Closer | None:
        """The configuration's constraint, where it is one that always closes."""
        if config.constraint is None:
            return None
        return constraints.closer(self, config.constraint, sorted(self._eos_ids))

    @cached_property
    def _grammar_tokenizer(self) -> Any:
        model: Any = self
        return constraints.grammar_tokenizer(
            model.tokenizer, model.vocabulary_size, sorted(self._eos_ids)
        )

    def _grammar(self, config: GenerationConfig) -> str | None:
        if config.constraint is None:
            return None
        return constraints.compile_grammar(config.constraint)


def prompt_seeds(config: GenerationConfig, prompts: int) -> list[int]:
    """Per prompt the seed that its samples are drawn from.

    Raises:
        ConfigError: not one of `config.seeds` per prompt.
    """
    if config.seeds is None:
        return [config.seed or 0] * prompts
    if len(config.seeds) != prompts:
        raise ConfigError(f"{len(config.seeds)} seeds for {prompts} prompts; give one per prompt")
    return list(config.seeds)


def generation_batches(
    rows: Sequence[GenerationRow], token_budget: int, context_length: int
) -> list[list[int]]:
    """Indices of rows that are written together, longest prompts first.

    A batch's padded size stays within the budget. Its longest prompt and its largest limit
    together fit the context: rows that have ended still move on with the others, and models
    with learned positions have none beyond their context.
    """
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), rows[i].limit, i))
    batches: list[list[int]] = []
    width = limit = 0
    for i in order:
        longest = max(limit, rows[i].limit)
        size = (width + longest) * (len(batches[-1]) + 1) if batches else 0
        if not batches or size > token_budget or width + longest > context_length:
            batches.append([])
            width, longest = len(rows[i].ids), rows[i].limit
        batches[-1].append(i)
        limit = longest
    return batches
