"""Prompts of every kind as token ids, over anything that has the `tokenize` capability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tenfold.capabilities import Prompt, Tokenizes
from tenfold.errors import ConfigError
from tenfold.lm.tokenizer import plain_chat


def prompt_ids(tokenizer: Tokenizes, prompt: Prompt, *, chat: bool = True) -> list[int]:
    """Token ids of a prompt, never empty.

    Text gets the special tokens that the tokenizer puts before a text (`prompt_prefix`, where
    it has one); chat messages are written by the chat template, which brings its own
    (`chat=False`: as plain lines, a text); ids stay as they are. An empty prompt becomes the
    token that texts start after.

    Raises:
        ConfigError: not a prompt, or an id outside the vocabulary.
    """
    value: Any = prompt if isinstance(prompt, str) else _as_list(prompt)
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        if chat:
            return tokenizer.encode(tokenizer.render_chat(value)) or [_start_id(tokenizer)]
        value = plain_chat(value)
    if isinstance(value, str):
        ids = [*getattr(tokenizer, "prompt_prefix", ()), *tokenizer.encode(value)]
    else:
        ids = _checked_ids(tokenizer, value)
    return ids or [_start_id(tokenizer)]


def continuation_ids(tokenizer: Tokenizes, continuation: str | Sequence[int]) -> list[int]:
    """Token ids of a continuation; text is encoded by itself, without special tokens.

    Raises:
        ConfigError: an id outside the vocabulary.
    """
    if isinstance(continuation, str):
        return tokenizer.encode(continuation)
    return _checked_ids(tokenizer, _as_list(continuation))


def _as_list(ids: Any) -> list[Any]:
    """Items of a sequence, array or tensor."""
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if not isinstance(ids, Sequence):
        raise ConfigError(f"a prompt is text, chat messages or token ids; got {ids!r}")
    return list(ids)


def _checked_ids(tokenizer: Tokenizes, ids: Sequence[Any]) -> list[int]:
    if bad := [i for i in ids if isinstance(i, bool) or not hasattr(i, "__index__")]:
        raise ConfigError(
            f"a prompt is text, chat messages or token ids; got a list with {bad[0]!r}"
        )
    checked = [int(i) for i in ids]
    if wrong := [i for i in checked if not 0 <= i < tokenizer.vocabulary_size]:
        raise ConfigError(
            f"token id {wrong[0]} is outside the vocabulary of {tokenizer.vocabulary_size}"
        )
    return checked


def _start_id(tokenizer: Tokenizes) -> int:
    start = getattr(tokenizer, "start_id", None)
    return start if start is not None else tokenizer.pad_id
