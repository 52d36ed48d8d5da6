"""Tokenizers: training one, and the `tokenize` capability over any transformers tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tenfold.capabilities import Message, Tokenizes
from tenfold.errors import ConfigError
from tenfold.seeds import content_hash

END_OF_TEXT = "<|endoftext|>"
MIN_VOCABULARY = 257
"""256 bytes and the end-of-text token: with these every text has an encoding."""

_INCOMPLETE = "\ufffd"
"""What decoders write for the first bytes of an unfinished character."""


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from `texts`.

    Every text can be encoded and decoded back exactly. `<|endoftext|>` is both the
    end-of-sequence and the padding token. The result is a function of the texts in any order;
    a small corpus may give fewer than `vocab_size` tokens.

    Raises:
        ConfigError: `vocab_size` is too small to hold every byte.
    """
    if vocab_size < MIN_VOCABULARY:
        raise ConfigError(
            f"vocab_size is {vocab_size}; it must be at least {MIN_VOCABULARY} "
            f"(256 bytes and {END_OF_TEXT})"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


class TokenizerMixin:
    """The `tokenize` capability over `self.tokenizer`.

    `vocabulary_size` and `context_length` are the tokenizer's own here; models, which may have
    padded output rows and a shorter context, override them.
    """

    tokenizer: Any

    @property
    def eos_id(self) -> int | None:
        """End-of-sequence id."""
        return self.tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        """Padding id; the end-of-sequence id, or 0, for tokenizers that have none."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return pad if pad is not None else eos if eos is not None else 0

    @property
    def start_id(self) -> int:
        """The token that texts start after: begin-of-sequence, else end-of-sequence."""
        begin = getattr(self.tokenizer, "bos_token_id", None)
        return begin if begin is not None else self.pad_id if self.eos_id is None else self.eos_id

    @property
    def vocabulary_size(self) -> int:
        """Number of ids, added tokens included."""
        return len(self.tokenizer)

    @property
    def context_length(self) -> int:
        """Longest sequence in tokens, as far as the tokenizer knows."""
        return int(self.tokenizer.model_max_length)

    @cached_property
    def vocabulary_hash(self) -> str:
        """Content hash of ids and splitting rules; padding and truncation do not count."""
        return _vocabulary_hash(self.tokenizer)

    @cached_property
    def prompt_prefix(self) -> list[int]:
        """Special tokens that the tokenizer puts before a text (`<s>`, for one), often none."""
        plain = self.encode("a")
        full = list(self.tokenizer("a", verbose=False)["input_ids"])
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start]
        return []

    def encode(self, text: str) -> list[int]:
        """Token ids, without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def render_chat(self, messages: Sequence[Message]) -> str:
        """Messages by the chat template, ready for an answer; `role: content` lines without one.

        Raises:
            ConfigError: a message has no role or content, or the template refuses it.
        """
        plain = plain_chat(messages)
        if getattr(self.tokenizer, "chat_template", None):
            try:
                return self.tokenizer.apply_chat_template(
                    [dict(m) for m in messages], tokenize=False, add_generation_prompt=True
                )
            except Exception as error:
                raise ConfigError(f"the chat template refuses these messages: {error}") from error
        return plain


def plain_chat(messages: Sequence[Message]) -> str:
    """Messages as `role: content` lines, ending where the assistant's answer begins.

    Raises:
        ConfigError: a message has no role or content.
    """
    for message in messages:
        if not {"role", "content"} <= set(message):
            raise ConfigError(f"a chat message needs 'role' and 'content'; got {message!r}")
    lines = [f"{m['role']}: {m['content']}" for m in messages]
    return "\n".join([*lines, "assistant:"])


def _vocabulary_hash(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return content_hash(["vocabulary", tokenizer.get_vocab()])
    rules = json.loads(backend.to_str())
    return content_hash({k: v for k, v in rules.items() if k not in ("padding", "truncation")})


def token_pieces(tokenizer: Tokenizes, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; joined, they are `tokenizer.decode(ids)` exactly.

    A token that ends inside a character adds nothing; the one that completes it adds it.
    Special tokens add nothing.
    """
    ids = list(ids)
    whole = tokenizer.decode(ids)
    pieces = _windowed_pieces(tokenizer, ids)
    return pieces if "".join(pieces) == whole else _prefix_pieces(tokenizer, ids, whole)


def _windowed_pieces(tokenizer: Tokenizes, ids: list[int]) -> list[str]:
    """Linear time: each token is decoded behind a few tokens of context."""
    pieces: list[str] = []
    start = done = shown = 0  # ids[start:done] are context; what follows gave `shown` characters
    for end in range(1, len(ids) + 1):
        known = len(tokenizer.decode(ids[start:done]))
        text = tokenizer.decode(ids[start:end])
        complete = text if end == len(ids) else text.rstrip(_INCOMPLETE)
        piece = complete[known + shown :]
        pieces.append(piece)
        shown += len(piece)
        if len(complete) == len(text) > known:
            start, done, shown = done, end, 0
    return pieces


def _prefix_pieces(tokenizer: Tokenizes, ids: list[int], whole: str) -> list[str]:
    """Quadratic time, always right: the longest prefix of the whole text decoded so far."""
    pieces, emitted = [], 0
    for end in range(1, len(ids) + 1):
        text = whole if end == len(ids) else tokenizer.decode(ids[:end]).rstrip(_INCOMPLETE)
        common = _common_prefix(text, whole)
        pieces.append(whole[emitted:common] if common > emitted else "")
        emitted = max(emitted, common)
    return pieces


def _common_prefix(a: str, b: str) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
