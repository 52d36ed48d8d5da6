"""`core:openai`: any OpenAI-compatible HTTP endpoint as a model.

The key comes from an environment variable and is never part of a run file or a record.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from functools import cached_property
from typing import Any

from tenfold.builtin.openai_http import Endpoint, gather, is_local
from tenfold.builtin.openai_wire import Wire, completions, join_choices, per_prompt
from tenfold.capabilities import Prompt
from tenfold.errors import ComponentError
from tenfold.records import Completion, GenerationConfig
from tenfold.seeds import content_hash

VERSION = 1


class OpenAI:
    """Completions over HTTP, `concurrency` prompts at a time.

    Plain prompts become one user message (`endpoint = "chat"`) or are continued
    (`"completions"`). Token ids of completions are not known; `Completion.stats` holds what
    the endpoint tells (`tenfold.builtin.openai_wire.completions`).

    When one request of a batch fails for good, the others are finished and kept, so that
    asking for them again does not pay for them twice.

    Args:
        model: the model's name there; None: the only one that is served.
        base_url: address up to `/v1`.
        endpoint: `chat` or `completions`.
        api_key_env: environment variable that holds the key; unset means no key.
        dialect: `vllm` also sends regex and choice constraints.
        max_tokens_field: what the endpoint calls the limit on new tokens.
        send_seed: send a seed with sampled requests.
        extra: more fields of the request; they win over ours.
        concurrency: requests at the same time.
        retries: further attempts after a passing failure (no connection, 429, 5xx, half an
            answer, no answer in time).
        backoff_s: first pause between attempts; doubles each time.
        max_wait_s: longest pause, also where the endpoint asks for more.
        timeout_s: longest wait for one answer.
        offline: refuse addresses outside this machine and its private network.

    Raises:
        ConfigError: `base_url` is no address.
        ComponentError: the address is outside and `offline` is set.
    """

    def __init__(
        self,
        model: str | None = None,
        base_url: str = "http://127.0.0.1:8000/v1",
        endpoint: str = "chat",
        api_key_env: str = "OPENAI_API_KEY",
        dialect: str = "openai",
        max_tokens_field: str = "max_tokens",
        send_seed: bool = True,
        extra: Mapping[str, Any] | None = None,
        concurrency: int = 8,
        retries: int = 5,
        backoff_s: float = 0.5,
        max_wait_s: float = 60.0,
        timeout_s: float = 300.0,
        offline: bool | None = None,
    ) -> None:
        self._endpoint = Endpoint(
            base_url,
            api_key_env,
            concurrency=concurrency,
            retries=retries,
            backoff_s=backoff_s,
            max_wait_s=max_wait_s,
            timeout_s=timeout_s,
        )
        if offline and not is_local(self._endpoint.base_url):
            raise ComponentError(
                f"{self._endpoint.base_url} is outside this machine and its private network, and "
                "this workspace is offline",
                hint="to send prompts there, set offline = false in the model's table",
            )
        self._wire = Wire(
            endpoint == "chat", dialect == "vllm", max_tokens_field, send_seed, dict(extra or {})
        )
        self._given_name = model
        self._held: dict[str, list[list[Completion]]] = {}

    @property
    def constraint_kinds(self) -> frozenset[str]:
        """Constraints that can be sent: JSON schema; with `dialect = "vllm"` all kinds."""
        return self._wire.constraint_kinds

    @cached_property
    def model(self) -> str:
        """The model's name; asks the endpoint when none was given.

        Raises:
            ComponentError: the endpoint serves none, or several.
        """
        if self._given_name:
            return self._given_name
        answer = self._endpoint.get("/models")
        rows = answer.get("data") if isinstance(answer, dict) else None
        rows = rows if isinstance(rows, list) else []
        names = [str(r["id"]) for r in rows if isinstance(r, dict) and "id" in r]
        if len(names) == 1:
            return names[0]
        served = ", ".join(names[:10]) or "none"
        raise ComponentError(
            f"{self._endpoint.base_url} serves {len(names)} models ({served}); name one",
            hint='set model = "..." in the model\'s table',
        )

    def generate(
        self, prompts: Sequence[Prompt], config: GenerationConfig
    ) -> list[list[Completion]]:
        """`config.n` completions per prompt.

        Endpoints that give fewer choices than asked for are asked again for the rest.

        Raises:
            ComponentError: the endpoint is down, refuses the key, or has no such model.
            RunFailed: a request failed for good, or its answer breaks the constraint.
            ConfigError: a prompt that this interface cannot take, or not one seed per prompt.
            CapabilityError: a constraint that cannot be sent.
        """
        if not prompts:
            return []
        configs = per_prompt(config, len(prompts))
        bodies = [
            self._wire.request(self.model, prompt, own)
            for prompt, own in zip(prompts, configs, strict=True)
        ]
        answers = self._endpoint.run(gather([self._answer(body, config) for body in bodies]))
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        if not failures:
            return [answer for answer in answers if not isinstance(answer, BaseException)]
        for body, answer in zip(bodies, answers, strict=True):
            if not isinstance(answer, BaseException):
                self._held.setdefault(_key(body, config), []).append(answer)
        # What concerns everybody is told first.
        raise next((f for f in failures if isinstance(f, ComponentError)), failures[0])

    def fingerprint(self) -> str:
        """Hash of address, model name and request fields; the weights behind it are not ours
        to see."""
        w = self._wire
        fields = [w.chat, w.vllm, w.max_tokens_field, w.send_seed, dict(w.extra)]
        return content_hash(["openai", VERSION, self._endpoint.base_url, self.model, fields])

    async def _answer(self, body: dict[str, Any], config: GenerationConfig) -> list[Completion]:
        """The completions of one prompt."""
        if held := self._held.get(key := _key(body, config)):
            answer = held.pop()
            if not held:
                del self._held[key]
            return answer
        first = await self._ask(body, config)
        if config.temperature == 0:
            return first[:1] * config.n
        missing = range(len(first), config.n)
        more = await gather([self._ask(_single(body, i), config) for i in missing])
        failed = [part for part in more if isinstance(part, BaseException)]
        if failed:
            raise failed[0]
        parts = [first, *(part[:1] for part in more if not isinstance(part, BaseException))]
        return join_choices(parts, config.n)

    def _ask(
        self, body: dict[str, Any], config: GenerationConfig
    ) -> Coroutine[Any, Any, list[Completion]]:
        async def ask() -> list[Completion]:
            answer = await self._endpoint.send("POST", self._wire.path, body)
            return completions(answer, config, self._endpoint.base_url + self._wire.path)

        return ask()


def _single(body: Mapping[str, Any], sample: int) -> dict[str, Any]:
    """The request for one further sample, with a seed of its own."""
    single = {name: value for name, value in body.items() if name != "n"}
    if "seed" in single:
        single["seed"] = (single["seed"] + sample) % 2**31
    return single


def _key(body: Mapping[str, Any], config: GenerationConfig) -> str:
    return content_hash([body, config.n])
