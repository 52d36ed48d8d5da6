"""Questions to a model: as few calls as there are kinds of answers, whoever asks.

Requests of one call may come from many games. Each has a seed of its own, named by its view's
key, phase and attempt, so that no answer depends on who else was asked.
"""

from __future__ import annotations

import json
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tenfold.capabilities import Prompt, supports
from tenfold.errors import ConfigError, RunFailed, TenfoldWarning
from tenfold.records import Completion, GenerationConfig
from tenfold.seeds import derive

_SCHEMA_WORDS = re.compile(r"schema|response_format|structured|guided|grammar", re.IGNORECASE)
"""What endpoints say when they do not know JSON schemas."""


@dataclass(frozen=True, slots=True)
class Request:
    """One question.

    Attributes:
        system, user: the prompts.
        schema: of the answer.
        temperature, max_new_tokens: how it is drawn.
        key: names the question and attempt; equal keys draw equal random numbers.
    """

    system: str
    user: str
    schema: Mapping[str, Any]
    temperature: float
    max_new_tokens: int
    key: str

    @property
    def seed(self) -> int:
        """31 bits, as endpoints take them."""
        return derive(0, "byzantine", self.key) % 2**31

    @property
    def messages(self) -> list[dict[str, str]]:
        """As chat."""
        return [
            {"role": "system", "content": self.system},
            {"role": "user", "content": self.user},
        ]


@dataclass(frozen=True, slots=True)
class Response:
    """What came back.

    Attributes:
        text: as written.
        tokens: written.
        prompt_tokens: read; 0 where unknown.
        seconds: the request's share of its call.
    """

    text: str
    tokens: int
    prompt_tokens: int
    seconds: float


class Asker:
    """A model with what has to be known to ask it.

    Args:
        model: anything with `generate`; with `constrain` answers follow their schemas, with
            `tokenize` prompts are rendered here, by the chat template and without thinking.
        clock: seconds, for the share of a call's wall time.
    """

    def __init__(self, model: Any, clock: Any = time.perf_counter) -> None:
        self.model, self._clock = model, clock
        self.constrains = supports(model, "constrain") and ("json_schema" in model.constraint_kinds)
        self._merged = False

    @property
    def local(self) -> bool:
        """Whether the model's tokenizer is at hand, and so its own decoding."""
        return supports(self.model, "tokenize")

    def ask(self, requests: Sequence[Request]) -> list[Response]:
        """Responses in order, by one call per schema, temperature and limit.

        Raises:
            ConfigError: a prompt leaves too little room in the model's context.
        """
        groups: dict[tuple[str, float, int], list[int]] = {}
        for i, request in enumerate(requests):
            # Keys are not sorted: their order is the answer's.
            kind = (json.dumps(request.schema), request.temperature, request.max_new_tokens)
            groups.setdefault(kind, []).append(i)
        found: dict[int, Response] = {}
        for members in groups.values():
            replies = self._call([requests[i] for i in members])
            found.update(zip(members, replies, strict=True))
        return [found[i] for i in range(len(requests))]

    def _call(self, requests: list[Request]) -> list[Response]:
        first = requests[0]
        prompts = [self.prompt(request) for request in requests]
        self._check_room(prompts, first.max_new_tokens)
        config = GenerationConfig(
            max_new_tokens=first.max_new_tokens,
            temperature=first.temperature,
            seeds=tuple(request.seed for request in requests),
            constraint={"json_schema": dict(first.schema)} if self.constrains else None,
        )
        start = self._clock()
        rows = self._generate(prompts, config)
        share = (self._clock() - start) / len(requests)
        return [_response(row[0], prompt, share) for row, prompt in zip(rows, prompts, strict=True)]

    def _generate(self, prompts: list[Prompt], config: GenerationConfig) -> Any:
        """Completions; without a constraint from an endpoint that turns out to know none."""
        try:
            return self.model.generate(prompts, config)
        except RunFailed as error:
            if config.constraint is None or self.local or not _SCHEMA_WORDS.search(str(error)):
                raise
            warnings.warn(
                "the endpoint does not follow JSON schemas; answers are read from free text "
                f"from now on ({str(error).splitlines()[0][:200]})",
                TenfoldWarning,
                stacklevel=2,
            )
            self.constrains = False
            return self.model.generate(prompts, _free(config))

    def prompt(self, request: Request) -> Prompt:
        """The prompt as the model takes it: token ids for local models, else chat messages."""
        if not self.local:
            return request.messages
        return self.model.encode(self.render(request)) or [self.model.pad_id]

    def render(self, request: Request) -> str:
        """The text by the model's chat template, thinking switched off where it can be. Templates
        without a system role get one user message."""
        if not self._merged:
            try:
                return self._template(request.messages)
            except ConfigError:
                self._merged = True
        both = f"{request.system}\n\n{request.user}"
        return self._template([{"role": "user", "content": both}])

    def _template(self, messages: list[dict[str, str]]) -> str:
        tokenizer = getattr(self.model, "tokenizer", None)
        template = getattr(tokenizer, "chat_template", None)
        if not isinstance(template, str) or "enable_thinking" not in template:
            return self.model.render_chat(messages)
        assert tokenizer is not None
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

    def count(self, request: Request) -> int | None:
        """Tokens of a prompt; None where the tokenizer is not at hand."""
        return len(self.prompt(request)) if self.local else None

    def _check_room(self, prompts: Sequence[Prompt], limit: int) -> None:
        if not self.local:
            return
        longest, context = max(map(len, prompts)), self.model.context_length
        if longest + limit > context:
            raise ConfigError(
                f"a prompt of {longest} tokens and an answer of up to {limit} do not fit the "
                f"model's context of {context} tokens",
                hint="show fewer history_rounds or shorter texts ([honest.context]), lower "
                "max_new_tokens, or use a model with a longer context",
            )


def _free(config: GenerationConfig) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, seeds=config.seeds
    )


def _response(completion: Completion, prompt: Prompt, seconds: float) -> Response:
    stats = completion.stats
    tokens = stats.get("completion_tokens", len(completion.token_ids))
    is_ids = bool(prompt) and isinstance(prompt[0], int)
    read = len(prompt) if is_ids else int(stats.get("prompt_tokens", 0))
    text = completion.text.encode("utf-8", "replace").decode()
    return Response(text, int(tokens), read, seconds)
