"""One text, token by token: what was written, at which exit, and how it ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tenfold.errors import ConfigError
from tenfold.records import GenerationConfig

from tenfold_nvium.decode import PiggybackDecoder
from tenfold_nvium.lm import NviumLM
from tenfold_nvium.trace import DecodeTrace

_INCOMPLETE = "\ufffd"
"""What decoders write for the first bytes of an unfinished character."""


@dataclass(slots=True)
class TokenStream:
    """Continues one prompt, a token at a time; iterate over it for `(piece, exit)`.

    The text is that of one `PiggybackDecoder.generate` call with the same seed. Pieces joined
    are the whole text; a token inside a character adds nothing until the character is complete.

    Attributes:
        lm: the model.
        ids: the prompt.
        config: length, temperature, truncation; `seed` is the text's own.
        tokens, exits: what was drawn so far, exits 1-based.
        finish_reason: `eos` or `length` (also at the end of the model's context).
        trace: as of one call.
    """

    lm: NviumLM
    ids: Sequence[int]
    config: GenerationConfig
    tokens: list[int] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    trace: DecodeTrace = field(init=False)
    _decoder: PiggybackDecoder = field(init=False)

    def __post_init__(self) -> None:
        """Raises ConfigError when the prompt leaves no room for a token."""
        policy, warp = self.lm.decoding(self.config)
        self._decoder = PiggybackDecoder(
            self.lm.model, policy, warp=warp, max_deferred=self.lm.max_deferred
        )
        self.trace = DecodeTrace(self.lm.model.config.depths)
        if len(self.ids) > self.lm.context_length:
            raise ConfigError(
                f"the prompt has {len(self.ids)} tokens, the model's context is "
                f"{self.lm.context_length}; give a shorter prompt"
            )

    @property
    def policy(self) -> str:
        """Name of the exit policy."""
        return self._decoder.policy.name

    def __iter__(self) -> Iterator[tuple[str, int]]:
        room = self.lm.context_length - len(self.ids) + 1
        feed, cache, shown = list(self.ids), None, ""
        for _ in range(min(self.config.max_new_tokens, room)):
            done = self._decoder.generate([feed], 1, seeds=[self.config.seed or 0], cache=cache)
            cache = done.cache
            feed = list(done.rows[0].tokens)
            self.trace.append(done.trace)
            self.tokens += feed
            self.exits.append(done.rows[0].exits[0] + 1)
            text = self.lm.decode(self.tokens).rstrip(_INCOMPLETE)
            yield text[len(shown) :], self.exits[-1]
            shown = text
            if feed[0] in self.lm._eos_ids:
                self.finish_reason = "eos"
                break
        whole = self.lm.decode(self.tokens)
        if len(whole) > len(shown):
            yield whole[len(shown) :], self.exits[-1]

    def result(self) -> dict[str, Any]:
        """Text, tokens, exits and totals, as JSON values."""
        return {
            "text": self.lm.decode(self.tokens),
            "token_ids": self.tokens,
            "exits": self.exits,
            "finish_reason": self.finish_reason,
            "policy": self.policy,
            "seed": self.config.seed or 0,
            "exit_shares": self.trace.exit_shares,
            "mean_depth": self.trace.mean_depth,
            "mean_width": self.trace.mean_width,
        }
