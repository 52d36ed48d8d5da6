"""Constrained generation: JSON schema, regular expression or choice, through llguidance.

Before each token every row's matcher says which tokens keep the text inside the grammar; the
others are excluded. A row's matcher knows only that row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from tenfold.errors import ConfigError, nearest

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
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except json.JSONDecodeError as error:
            raise ConfigError(f"constraint json_schema is not JSON: {error}") from error
    if not isinstance(schema, Mapping):
        raise ConfigError(f"constraint json_schema must be a table; got {schema!r}")
    return _matcher_class().grammar_from_json_schema(dict(schema), defaults=_JSON_OPTIONS)


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
