"""The OpenAI wire format: requests from prompts and settings, completions from answers.

Pure functions; `tenfold.builtin.openai_http` sends and receives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tenfold.capabilities import Prompt
from tenfold.errors import CapabilityError, ConfigError, RunFailed, nearest
from tenfold.records import Completion, GenerationConfig
from tenfold.seeds import derive

_SEEDS = 2**31
"""Endpoints differ in how large a seed they take; 31 bits suit all."""


@dataclass(frozen=True, slots=True)
class Wire:
    """How one endpoint is spoken to.

    Attributes:
        chat: whether `/chat/completions` is used, else `/completions`.
        vllm: whether vLLM's own fields for regex and choice constraints are understood.
        max_tokens_field: what the endpoint calls the limit on new tokens.
        send_seed: whether sampled requests carry a seed.
        extra: more fields, which win over ours.
    """

    chat: bool = True
    vllm: bool = False
    max_tokens_field: str = "max_tokens"
    send_seed: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The path below the base address."""
        return "/chat/completions" if self.chat else "/completions"

    @property
    def constraint_kinds(self) -> frozenset[str]:
        """Constraints that can be sent."""
        return frozenset({"json_schema", "regex", "choice"} if self.vllm else {"json_schema"})

    def request(self, model: str, prompt: Prompt, config: GenerationConfig) -> dict[str, Any]:
        """The body of a request.

        Raises:
            ConfigError: a prompt that this interface cannot take.
            CapabilityError: a constraint that it cannot take.
        """
        body: dict[str, Any] = {"model": model}
        body |= self._chat(prompt, config) if self.chat else self._plain(prompt, config)
        body |= {self.max_tokens_field: config.max_new_tokens, "temperature": config.temperature}
        if config.top_p < 1:
            body["top_p"] = config.top_p
        if config.top_k is not None:
            body["top_k"] = config.top_k
        if config.stop:
            body["stop"] = list(config.stop)
        if config.temperature > 0:
            body |= {"n": config.n} if config.n > 1 else {}
            body |= {"seed": request_seed(prompt, config)} if self.send_seed else {}
        if config.constraint is not None:
            body |= self._constraint(config.constraint)
        return {**body, **self.extra}

    def _chat(self, prompt: Prompt, config: GenerationConfig) -> dict[str, Any]:
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
        elif prompt and not isinstance(prompt[0], int):
            messages = [dict(message) for message in prompt if isinstance(message, Mapping)]
        else:
            raise ConfigError(
                "the chat interface takes text and messages, not token ids",
                hint='set endpoint = "completions"',
            )
        return {"messages": messages} | ({"logprobs": True} if config.logprobs else {})

    def _plain(self, prompt: Prompt, config: GenerationConfig) -> dict[str, Any]:
        if not isinstance(prompt, str) and prompt and not isinstance(prompt[0], int):
            raise ConfigError(
                "the completions interface takes text and token ids, not chat messages",
                hint='set endpoint = "chat"',
            )
        text = prompt if isinstance(prompt, str) else list(prompt)
        return {"prompt": text} | ({"logprobs": config.logprobs} if config.logprobs else {})

    def _constraint(self, constraint: Mapping[str, Any]) -> dict[str, Any]:
        known = self.constraint_kinds
        if len(constraint) != 1 or not set(constraint) <= known:
            wrong = next((kind for kind in constraint if kind not in known), "")
            raise CapabilityError(
                f"core:openai follows one constraint of the kinds {', '.join(sorted(known))}; got "
                f"{', '.join(sorted(constraint)) or 'none'}{nearest(wrong, known)}",
                hint='dialect = "vllm" also sends regex and choice, for endpoints that know them',
            )
        kind, value = next(iter(constraint.items()))
        if kind != "json_schema":
            return {"structured_outputs": {kind: value}}
        named = {"name": "answer", "schema": _schema(value), "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": named}}


def _schema(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ConfigError(f"constraint json_schema is not JSON: {error}") from None


def request_seed(prompt: Prompt, config: GenerationConfig) -> int:
    """The seed sent with a sampled request: the configured one, else one of the prompt."""
    if config.seed is not None:
        return config.seed % _SEEDS
    text = prompt if isinstance(prompt, str) else json.dumps(list(prompt), sort_keys=True)
    return derive(0, text) % _SEEDS


def per_prompt(config: GenerationConfig, prompts: int) -> list[GenerationConfig]:
    """The configuration of each prompt, with its own seed where `config.seeds` has them.

    Raises:
        ConfigError: not one seed per prompt.
    """
    if config.seeds is None:
        return [config] * prompts
    if len(config.seeds) != prompts:
        raise ConfigError(f"{len(config.seeds)} seeds for {prompts} prompts; give one per prompt")
    return [replace(config, seed=seed, seeds=None) for seed in config.seeds]


def completions(answer: Any, config: GenerationConfig, url: str) -> list[Completion]:
    """The completions of an answer, in the order of their index.

    `stats` holds what the endpoint told beside the text: `reasoning` (from `reasoning` or
    `reasoning_content`; both where they differ), `refusal`, `prompt_tokens`,
    `completion_tokens` (for a single choice; the endpoint counts all together) and
    `reasoning_tokens`.

    Raises:
        RunFailed: the answer holds no choices, or text that breaks the constraint.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not all(map(_is_choice, choices)):
        shown = json.dumps(answer)[:200]
        raise RunFailed(f"{url} answered without choices, as no OpenAI interface does: {shown}")
    ordered = sorted(choices, key=lambda choice: choice.get("index") or 0)
    usage = _usage(answer.get("usage"), single=len(ordered) == 1)
    found = [_completion(choice, usage, bool(config.stop)) for choice in ordered]
    for completion in found:
        _check_constraint(completion, config.constraint, url)
    return found


def _is_choice(choice: Any) -> bool:
    return isinstance(choice, dict) and (
        "text" in choice or isinstance(choice.get("message"), dict)
    )


def _completion(choice: Mapping[str, Any], usage: Mapping[str, Any], stops: bool) -> Completion:
    message = choice.get("message") or {}
    text = choice["text"] if "text" in choice else _text(message.get("content"))
    reason = str(choice.get("finish_reason") or "stop")
    stats = {**usage, **_beside(message or choice)}
    if reason not in ("stop", "length"):
        stats["finish_reason"] = reason  # content_filter, tool_calls, ...
    if reason == "length":
        ended = "length"
    else:
        # Only vLLM says which stop text it met; elsewhere an end token and a stop look alike.
        met = choice.get("stop_reason", stops)
        ended = "stop" if met not in (None, False) else "eos"
    return Completion(text or "", [], _logprobs(choice.get("logprobs")), ended, stats)


def _text(content: Any) -> str:
    """A message's text; null while a model only reasoned, a list of parts from some servers."""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _beside(message: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    reasoning, content = message.get("reasoning"), message.get("reasoning_content")
    if reasoning or content:
        found["reasoning"] = reasoning or content
    if reasoning and content and reasoning != content:
        found["reasoning_content"] = content
    if message.get("refusal"):
        found["refusal"] = message["refusal"]
    return found


def _usage(usage: Any, *, single: bool) -> dict[str, Any]:
    if not isinstance(usage, dict):
        return {}
    names = ["prompt_tokens", *(["completion_tokens"] if single else [])]
    found = {name: usage[name] for name in names if isinstance(usage.get(name), int)}
    details = usage.get("completion_tokens_details")
    if single and isinstance(details, dict) and isinstance(details.get("reasoning_tokens"), int):
        found["reasoning_tokens"] = details["reasoning_tokens"]
    return found


def _logprobs(value: Any) -> list[float] | None:
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("content"), list):
        return [float(token["logprob"]) for token in value["content"]]
    if isinstance(value.get("token_logprobs"), list):
        return [float(logprob) for logprob in value["token_logprobs"] if logprob is not None]
    return None


def _check_constraint(
    completion: Completion, constraint: Mapping[str, Any] | None, url: str
) -> None:
    """A finished text must follow the constraint; endpoints that know none ignore it."""
    if constraint is None or completion.finish_reason == "length":
        return
    if "refusal" in completion.stats:
        return
    kind, value = next(iter(constraint.items()))
    if not _follows(completion.text, kind, value):
        raise RunFailed(
            f"{url} did not follow the {kind} constraint: it wrote {completion.text[:120]!r}",
            hint="the endpoint or its model may not support this kind of constraint",
        )


def _follows(text: str, kind: str, value: Any) -> bool:
    if kind == "choice":
        return text in value
    if kind == "regex":
        try:
            return re.fullmatch(value, text) is not None
        except re.error:  # another dialect of regular expressions, which only the endpoint reads
            return True
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def join_choices(parts: Sequence[Sequence[Completion]], n: int) -> list[Completion]:
    """The first `n` completions of several answers to one prompt."""
    return [completion for part in parts for completion in part][:n]
