"""`core:echo`: a model that answers with its prompt; for trying compositions out."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tenfold.capabilities import Prompt
from tenfold.errors import CapabilityError, ConfigError
from tenfold.records import Completion, GenerationConfig
from tenfold.seeds import content_hash


class Echo:
    """Repeats the prompt (of a chat: its last message) or a fixed text.

    A token is a word with the blanks before it; `max_new_tokens` and `stop` count as for any
    model. Temperature and seed change nothing.

    Args:
        text: answer with this instead of the prompt.
        prefix: text before each answer.
        reverse: write the answer's words in reverse order.
        upper: write the answer in capitals.
    """

    def __init__(
        self,
        text: str | None = None,
        prefix: str = "",
        reverse: bool = False,
        upper: bool = False,
    ) -> None:
        self.text, self.prefix, self.reverse, self.upper = text, prefix, reverse, upper

    def generate(
        self, prompts: Sequence[Prompt], config: GenerationConfig
    ) -> list[list[Completion]]:
        """`config.n` equal completions per prompt.

        Raises:
            CapabilityError: a constraint is asked for.
            ConfigError: a prompt of token ids, which only a tokenizer could read.
        """
        if config.constraint is not None:
            raise CapabilityError("core:echo cannot follow a constraint; it only repeats")
        return [[self._answer(prompt, config)] * config.n for prompt in prompts]

    def fingerprint(self) -> str:
        """Hash of the settings."""
        return content_hash(["echo", self.text, self.prefix, self.reverse, self.upper])

    def _answer(self, prompt: Prompt, config: GenerationConfig) -> Completion:
        text = _said(prompt) if self.text is None else self.text
        if self.reverse:
            text = " ".join(reversed(text.split()))
        if self.upper:
            text = text.upper()
        words = re.findall(r"\s*\S+|\s+$", self.prefix + text)
        written = "".join(words[: config.max_new_tokens])
        stops = [place for stop in config.stop if (place := written.find(stop)) >= 0]
        if stops:
            return Completion(written[: min(stops)], finish_reason="stop")
        whole = len(words) <= config.max_new_tokens
        return Completion(written, finish_reason="eos" if whole else "length")


def _said(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    last = prompt[-1] if prompt else None
    if last is None or isinstance(last, int):
        raise ConfigError("core:echo reads text and chat messages; it has no tokenizer for ids")
    return last["content"]
