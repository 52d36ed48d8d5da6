"""Prompts of every kind as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tenfold.capabilities import Prompt
from tenfold.errors import ConfigError
from tenfold.lm.tokenizer import TokenizerMixin, plain_chat


class PromptMixin(TokenizerMixin):
    """Encodes text, chat messages and token ids for `generate` and `score`."""

    def prompt_ids(self, prompt: Prompt, chat: bool = True) -> list[int]:
        """Token ids of a prompt, never empty.

        Text gets the special tokens that the tokenizer puts before a text; chat messages are
        written by the chat template, which brings its own (`chat=False`: as plain lines, a
        text); ids stay as they are. An empty prompt becomes the begin or end-of-sequence
        token, after which texts start.

        Raises:
            ConfigError: not a prompt, or an id outside the vocabulary.
        """
        value: Any = prompt if isinstance(prompt, str) else _as_list(prompt)
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            if chat:
                return self.encode(self.render_chat(value)) or [self._start_id()]
            value = plain_chat(value)
        if isinstance(value, str):
            ids = [*self.prompt_prefix, *self.encode(value)]
        else:
            ids = self._checked_ids(value)
        return ids or [self._start_id()]

    def continuation_ids(self, continuation: str | Sequence[int]) -> list[int]:
        """Token ids of a continuation; text is encoded by itself, without special tokens."""
        if isinstance(continuation, str):
            return self.encode(continuation)
        return self._checked_ids(_as_list(continuation))

    def _checked_ids(self, ids: Sequence[Any]) -> list[int]:
        try:
            checked = [int(i) for i in ids]
        except (TypeError, ValueError):
            raise ConfigError(
                f"a prompt is text, chat messages or token ids; got {type(ids[0]).__name__} items"
            ) from None
        if bad := [i for i in checked if not 0 <= i < self.vocabulary_size]:
            raise ConfigError(
                f"token id {bad[0]} is outside the vocabulary of {self.vocabulary_size}"
            )
        return checked

    def _start_id(self) -> int:
        begin = getattr(self.tokenizer, "bos_token_id", None)
        return begin if begin is not None else self.eos_id if self.eos_id is not None else 0


def _as_list(ids: Any) -> list[Any]:
    """Ids of a sequence, array or tensor."""
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if not isinstance(ids, Sequence):
        raise ConfigError(f"a prompt is text, chat messages or token ids; got {type(ids).__name__}")
    return list(ids)
