"""Constrained generation: JSON schema, regular expression or choice.

Before each token every row's matcher says which tokens keep the text inside the grammar; the
others are excluded. A row's matcher knows only that row. Choices and the JSON schemas of
`tenfold.lm.json_machine` always close within `max_new_tokens` (`tenfold.lm.closing`); all other
grammars are llguidance's and end where the limit cuts them.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from tenfold.errors import ConfigError, nearest
from tenfold.lm.byte_machine import Machine, NotInSubset, State
from tenfold.lm.closing import NEVER, Closer, Vocabulary
from tenfold.lm.json_machine import GUIDANCE, choice_machine, schema_machine
from tenfold.seeds import content_hash

T = TypeVar("T")

KINDS = frozenset({"json_schema", "regex", "choice"})

_JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": " ?"}
"""At most one space between tokens: models write it, and unlimited space need never end."""


def compile_grammar(constraint: Mapping[str, Any]) -> str:
    """The llguidance grammar of a `GenerationConfig.constraint`.

    Raises:
        ConfigError: not exactly one of the known kinds, or its value is not what it takes.
    """
    if len(constraint) != 1 or not set(constraint) <= KINDS:
        known = ", ".join(sorted(KINDS))
        wrong = next((k for k in constraint if k not in KINDS), "")
        raise ConfigError(
            f"a constraint has exactly one of {known}; got {sorted(constraint) or 'nothing'}"
            f"{nearest(wrong, KINDS)}"
        )
    kind, value = next(iter(constraint.items()))
    grammar = _GRAMMARS[kind](value)
    if problem := _matcher_class().validate_grammar(grammar):
        raise ConfigError(f"constraint {kind} cannot be used: {problem}")
    return grammar


def _json_grammar(schema: Any) -> str:
    schema = _schema_table(schema)
    own = isinstance(schema.get(GUIDANCE), Mapping)  # a layout of its own
    return _matcher_class().grammar_from_json_schema(
        schema, defaults=None if own else _JSON_OPTIONS
    )


def _schema_table(schema: Any) -> dict[str, Any]:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except json.JSONDecodeError as error:
            raise ConfigError(f"constraint json_schema is not JSON: {error}") from error
    if not isinstance(schema, Mapping):
        raise ConfigError(f"constraint json_schema must be a table; got {schema!r}")
    return dict(schema)


def _regex_grammar(pattern: Any) -> str:
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"constraint regex must be a non-empty string; got {pattern!r}")
    return _matcher_class().grammar_from_regex(pattern)


def _choice_grammar(choices: Any) -> str:
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
        raise ConfigError(f"constraint choice must be a non-empty list; got {choices!r}")
    if bad := [c for c in choices if not isinstance(c, str) or not c]:
        raise ConfigError(f"constraint choice lists non-empty strings; got {bad[0]!r}")
    alternatives = " | ".join(json.dumps(c, ensure_ascii=False) for c in choices)
    return _matcher_class().grammar_from_lark(f"start: {alternatives}")


_GRAMMARS = {"json_schema": _json_grammar, "regex": _regex_grammar, "choice": _choice_grammar}


def _matcher_class() -> Any:
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise ConfigError(
            "constrained generation needs llguidance", hint="install tenfold[hf]"
        ) from error
    return LLMatcher


def grammar_tokenizer(tokenizer: Any, vocabulary_size: int, eos_ids: Sequence[int]) -> Any:
    """llguidance's view of a tokenizer; takes about a second, so keep it.

    Raises:
        ConfigError: the tokenizer is not a fast one, or there is no end-of-sequence token.
    """
    _matcher_class()
    from llguidance.hf import from_tokenizer

    if not eos_ids:
        raise ConfigError("constrained generation needs a model with an end-of-sequence token")
    try:
        return from_tokenizer(tokenizer, n_vocab=vocabulary_size, eos_token=list(eos_ids))
    except ValueError as error:
        raise ConfigError(f"this tokenizer cannot be constrained: {error}") from error


# --- Constraints that always close ------------------------------------------------------------

_VOCABULARIES: OrderedDict[str, Vocabulary] = OrderedDict()
_CLOSERS: OrderedDict[str, Closer | None] = OrderedDict()


def closer(model: Any, constraint: Mapping[str, Any], end_ids: Sequence[int]) -> Closer | None:
    """The constraint over a model's vocabulary, where it is one that always closes.

    Vocabularies and compiled constraints are kept by content, so that equal tokenizers share
    them; `constraint` has passed `compile_grammar`.

    Args:
        model: anything with `tokenizer`, `vocabulary_hash`, `vocabulary_size` and `eos_id`.
        constraint: as in a `GenerationConfig`.
        end_ids: tokens that end a text.
    """
    first = [model.eos_id] if model.eos_id in end_ids else []
    ends = [*first, *sorted(i for i in end_ids if i not in first)]
    name = content_hash([model.vocabulary_hash, model.vocabulary_size, ends])

    def compiled() -> Closer | None:
        machine = _machine(constraint)
        if machine is None:
            return None
        vocabulary = _kept(_VOCABULARIES, name, 4, lambda: _vocabulary(model, ends))
        return Closer(machine, vocabulary)

    return _kept(_CLOSERS, content_hash([name, *_canonical(constraint)]), 32, compiled)


def _kept(store: OrderedDict[str, T], key: str, most: int, make: Callable[[], T]) -> T:
    if key not in store:
        store[key] = make()
    store.move_to_end(key)
    while len(store) > most:
        store.popitem(last=False)
    return store[key]


def _canonical(constraint: Mapping[str, Any]) -> list[str]:
    """The constraint as text; the order of a schema's keys is that of the answer."""
    [(kind, value)] = constraint.items()
    value = _schema_table(value) if kind == "json_schema" else value
    return [kind, json.dumps(value)]


def _machine(constraint: Mapping[str, Any]) -> Machine | None:
    [(kind, value)] = constraint.items()
    try:
        if kind == "choice":
            return choice_machine(list(value))
        return schema_machine(_schema_table(value)) if kind == "json_schema" else None
    except NotInSubset:
        return None


def _vocabulary(model: Any, ends: Sequence[int]) -> Vocabulary:
    known = grammar_tokenizer(model.tokenizer, model.vocabulary_size, ends)
    tokens = [
        b"" if known.is_special_token(i) else known.decode_bytes([i])
        for i in range(model.vocabulary_size)
    ]
    return Vocabulary(tokens, ends, known.tokenize_bytes)


def check_limits(closer: Closer, limits: Sequence[int]) -> None:
    """Raises ConfigError where a limit is too small for any text of the constraint."""
    least, smallest = closer.least_tokens, min(limits, default=closer.least_tokens)
    if least >= NEVER:
        raise ConfigError("this tokenizer cannot write any text of the constraint")
    if smallest < least:
        raise ConfigError(
            f"the shortest text of the constraint takes {least} tokens; at most {smallest} may "
            "be written",
            hint="raise max_new_tokens, or shorten the prompt where the context is full",
        )


class Follower:
    """One row's way through a constraint that always closes."""

    def __init__(self, closer: Closer, limit: int) -> None:
        self._closer, self._left = closer, limit
        self._state: State | None = closer.start

    @property
    def left(self) -> int:
        """Tokens that may still be written."""
        return self._left

    def allowed(self) -> np.ndarray | int | None:
        """A mask `[V]`, the one token that is prescribed, or None when the text has ended."""
        if self._state is None or self._left < 1:
            return None
        return self._closer.allowed(self._state, self._left)

    def write(self, token: int) -> None:
        """Takes note of the next token."""
        if self._state is not None:
            # An end token leads nowhere, and so does padding after it.
            self._state, self._left = self._closer.advance(self._state, token), self._left - 1


class ClosingProcessor(LogitsProcessor):
    """Excludes tokens that would leave the constraint, or leave too few tokens to close it.

    Args:
        closer: the constraint.
        limits: per row the most tokens that may be written.
        width: length of the padded prompts; tokens after them are matched.
    """

    def __init__(self, closer: Closer, limits: Sequence[int], width: int) -> None:
        self._rows = [Follower(closer, limit) for limit in limits]
        self._seen = width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`[B, V]` scores with forbidden tokens at minus infinity."""
        fresh = input_ids[:, self._seen :].tolist()
        self._seen = input_ids.shape[1]
        for row, ids in zip(self._rows, fresh, strict=True):
            for token in ids:
                row.write(token)
        return masked(scores, [row.allowed() for row in self._rows])


def masked(scores: Tensor, allowed: Sequence[np.ndarray | int | None]) -> Tensor:
    """`[B, V]` scores with all but the allowed tokens of each row at minus infinity; rows with
    None stay as they are."""
    mask = np.zeros(scores.shape, dtype=bool)
    for row, own in zip(mask, allowed, strict=True):
        if own is None:
            row[:] = True
        elif isinstance(own, int):
            row[own] = True
        else:
            row[: len(own)] = own
    return scores.masked_fill(~torch.from_numpy(mask).to(scores.device), float("-inf"))


class GrammarProcessor(LogitsProcessor):
    """Excludes tokens that would leave the grammar, row by row.

    Args:
        tokenizer: from `grammar_tokenizer`.
        grammar: from `compile_grammar`.
        rows: number of rows, each with a matcher of its own.
        width: length of the padded prompts; tokens after them are matched.
    """

    def __init__(self, tokenizer: Any, grammar: str, rows: int, width: int) -> None:
        first = _matcher_class()(tokenizer, grammar)
        _check(first)
        self._matchers = [first, *(first.deep_copy() for _ in range(rows - 1))]
        self._seen = width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`[B, V]` scores with forbidden tokens at minus infinity."""
        fresh = input_ids[:, self._seen :].tolist()
        self._seen = input_ids.shape[1]
        allowed = np.zeros(scores.shape, dtype=bool)
        for row, (matcher, ids) in enumerate(zip(self._matchers, fresh, strict=True)):
            for token in ids:
                # Rows that have ended receive padding, which is none of the grammar's business.
                if not matcher.is_stopped():
                    matcher.consume_token(token)
                    _check(matcher)
            allowed[row] = _allowed(matcher, scores.shape[1])
        mask = torch.from_numpy(allowed).to(scores.device)
        return scores.masked_fill(~mask, float("-inf"))


def _allowed(matcher: Any, size: int) -> np.ndarray:
    """`[V]` bool of the tokens that may come next."""
    bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    flags = np.unpackbits(bits, bitorder="little").astype(bool)
    return np.pad(flags[:size], (0, max(0, size - len(flags))))


def _check(matcher: Any) -> None:
    if matcher.is_error():
        raise ConfigError(f"the constraint cannot be followed: {matcher.get_error()}")
