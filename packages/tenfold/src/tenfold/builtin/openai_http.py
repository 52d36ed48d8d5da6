"""Requests to an OpenAI-compatible endpoint: concurrent, retried, with errors that explain.

Needs httpx2 (`tenfold[openai]`). Two kinds of failure are told apart: a `ComponentError` says
that the endpoint is of no use to anybody (down, key refused, model unknown), a `RunFailed`
that one request failed (too long, rate limit that does not pass, no answer in time).
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import ipaddress
import json
import os
import random
import threading
import time
import weakref
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2

from tenfold.errors import ComponentError, ConfigError, RunFailed, TenfoldError

T = TypeVar("T")

_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses after which the same request may succeed."""
_USELESS = frozenset({401, 402, 403, 404, 405, 410})
"""Statuses that every further request would get too."""
_CONNECT_S = 10.0
_THREAD = "tenfold-http"
_SHOWN = 300


class Endpoint:
    """One address that answers JSON with JSON.

    Requests run on an event loop in a thread of their own, so that an interruption of the
    caller cancels them at once, and connections stay open from call to call.

    Args:
        base_url: address up to `/v1`.
        key_env: environment variable with the key; empty for none.
        concurrency: requests at the same time, over all callers.
        retries: further attempts after a passing failure.
        backoff_s: pause before the second attempt; doubles each time, with some jitter.
        max_wait_s: longest pause, also where the endpoint asks for a longer one.
        timeout_s: longest time from request to whole answer.

    Raises:
        ConfigError: `base_url` is no http(s) address, or holds a password.
    """

    def __init__(
        self,
        base_url: str,
        key_env: str = "",
        *,
        concurrency: int = 8,
        retries: int = 5,
        backoff_s: float = 0.5,
        max_wait_s: float = 60.0,
        timeout_s: float = 300.0,
    ) -> None:
        self.base_url = checked_url(base_url)
        self.key_env = key_env
        self.retries, self.backoff_s, self.max_wait_s = retries, backoff_s, max_wait_s
        self.timeout_s, self.concurrency = timeout_s, concurrency
        self._loop: asyncio.AbstractEventLoop | None = None
        self._clients: list[httpx2.AsyncClient] = []  # at most one; shared with the finalizer
        self._slots: asyncio.Semaphore | None = None
        self._starting = threading.Lock()
        self._down = False

    # --- for callers ---

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine on the endpoint's loop; cancelled with the caller."""
        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                arguments = (self._loop,)
                threading.Thread(target=_serve, args=arguments, name=_THREAD, daemon=True).start()
                weakref.finalize(self, _end, self._loop, self._clients)
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        return self.run(self.send("GET", path))

    async def send(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON answer to a request, after as many attempts as it takes.

        Raises:
            ComponentError: the endpoint is down, or refuses everything.
            RunFailed: this request failed for good.
        """
        if self._slots is None:
            self._slots = asyncio.Semaphore(self.concurrency)
        attempt = 0
        while True:
            async with self._slots:
                try:
                    return await self._attempt(method, path, body)
                except _PassingError as error:
                    failure = error
            attempt += 1
            # An endpoint that was down a moment ago is asked once only, not with patience.
            if attempt > self.retries or (self._down and failure.unreachable):
                self._down = failure.unreachable
                raise self._given_up(failure, path, attempt) from failure.__cause__
            await asyncio.sleep(self._pause(failure, attempt))

    # --- one attempt ---

    async def _attempt(self, method: str, path: str, body: Any) -> Any:
        url = self.base_url + path
        try:
            async with asyncio.timeout(self.timeout_s):
                response = await self._open_client().request(
                    method, url, json=body, headers=self._headers()
                )
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise _PassingError(str(error) or type(error).__name__, unreachable=True) from error
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise _PassingError(f"no answer within {self.timeout_s:g} s") from error
        except httpx2.RequestError as error:
            raise _PassingError(f"the connection broke: {error}") from error
        self._down = False
        if response.is_success:
            return self._content(response)
        raise self._refused(response, path)

    def _open_client(self) -> httpx2.AsyncClient:
        if not self._clients:
            limits = httpx2.Limits(max_connections=self.concurrency)
            timeout = httpx2.Timeout(self.timeout_s, connect=min(_CONNECT_S, self.timeout_s))
            # Proxies of the environment are for the world outside.
            outside = not is_local(self.base_url)
            # Reading the certificates of the world costs 0.1 s.
            verify = self.base_url.startswith("https:")
            client = httpx2.AsyncClient(
                limits=limits, timeout=timeout, trust_env=outside, verify=verify
            )
            self._clients.append(client)
        return self._clients[0]

    def _key(self) -> str:
        return os.environ.get(self.key_env, "").strip() if self.key_env else ""

    def _headers(self) -> dict[str, str]:
        key = self._key()
        if not key.isascii() or not key.isprintable():
            raise ComponentError(f"the key in {self.key_env} holds characters no key has")
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _content(self, response: httpx2.Response) -> Any:
        try:
            return response.json()
        except ValueError as error:
            shown = self._masked(response.text[:_SHOWN])
            raise _PassingError(f"the answer is no whole JSON: {shown!r}") from error

    # --- failures ---

    def _refused(self, response: httpx2.Response, path: str) -> Exception:
        """What a status other than success means."""
        status, said = response.status_code, self._masked(error_message(response.text))
        where = f"{self.base_url}{path}"
        if status in (401, 403):
            return ComponentError(
                f"{where} refused the key ({status}): {said}", hint=self._key_hint()
            )
        spent = "insufficient_quota" in response.text or status == 402
        if spent or status in _USELESS or response.is_redirect:
            hint = "check base_url and model" if not spent else "the account has nothing left"
            target = response.headers.get("location")
            said = f"it redirects to {target}" if target else said
            return ComponentError(f"{where} answered {status}: {said}", hint=hint)
        if status in _PASSING or status >= 500:
            return _PassingError(f"status {status}: {said}", asked_s=retry_after(response.headers))
        return RunFailed(f"{where} refused the request ({status}): {said}")

    def _key_hint(self) -> str:
        if not self.key_env:
            return "set api_key_env to the environment variable that holds the key"
        state = "is set, but was not accepted" if self._key() else "is not set"
        return f"the environment variable {self.key_env} {state}"

    def _given_up(self, failure: _PassingError, path: str, attempts: int) -> TenfoldError:
        times = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        if failure.unreachable:
            return ComponentError(
                f"cannot reach {self.base_url} ({times}): {failure}",
                hint="start the server, or correct base_url",
            )
        return RunFailed(f"{self.base_url}{path} failed ({times}): {failure}")

    def _pause(self, failure: _PassingError, attempt: int) -> float:
        """Seconds to wait: what the endpoint asks for, else exponentially more."""
        if failure.asked_s is not None:
            return min(failure.asked_s, self.max_wait_s)
        grown = self.backoff_s * 2 ** min(attempt - 1, 30)
        return min(grown * random.uniform(0.75, 1.25), self.max_wait_s)

    def _masked(self, text: str) -> str:
        """The text without the key, which some endpoints repeat in their messages."""
        key = self._key()
        return text.replace(key, "***") if key else text


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """What an endpoint's thread does until `_end`."""
    loop.run_forever()
    loop.close()


def _end(loop: asyncio.AbstractEventLoop, clients: Sequence[httpx2.AsyncClient]) -> None:
    """Closes connections and ends the thread of an endpoint that nobody uses any more."""

    async def close() -> None:
        for client in clients:
            await client.aclose()
        loop.stop()

    with contextlib.suppress(RuntimeError):  # the interpreter may have ended the loop first
        asyncio.run_coroutine_threadsafe(close(), loop)


class _PassingError(Exception):
    """A failure that may pass: try again. `asked_s` is the pause that the endpoint asked for."""

    def __init__(
        self, message: str, *, unreachable: bool = False, asked_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.unreachable = unreachable
        self.asked_s = asked_s


def error_message(text: str) -> str:
    """The message in an error answer, in any of the shapes that endpoints use."""
    try:
        content = json.loads(text)
    except ValueError:
        return " ".join(text.split())[:_SHOWN] or "no message"
    while isinstance(content, dict):
        inner = content.get("error") or content.get("message") or content.get("detail")
        if not inner:
            break
        content = inner
    return (content if isinstance(content, str) else json.dumps(content))[:_SHOWN]


def retry_after(headers: httpx2.Headers) -> float | None:
    """Seconds that an answer asks to wait: `Retry-After` (seconds or a date) or
    `retry-after-ms`."""
    try:
        if value := headers.get("retry-after-ms"):
            return max(0.0, float(value) / 1000)
        value = headers.get("retry-after", "")
        return max(0.0, float(value))
    except ValueError:
        date = email.utils.parsedate_tz(headers.get("retry-after", ""))
        return None if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())


def checked_url(url: str) -> str:
    """An address without its trailing slash.

    Raises:
        ConfigError: no http(s) address, or one with a user name or a query in it.
    """
    try:
        parts = urlsplit(url.strip())
        host = parts.hostname
        parts.port  # noqa: B018 - raises for a port that is no number
    except ValueError as error:
        raise ConfigError(f"base_url is {url!r}: {error}") from None
    if parts.username or parts.password:
        raise ConfigError("base_url holds a user name or password; secrets stay out of run files")
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise ConfigError(
            f"base_url is {url!r}; it must look like http://127.0.0.1:8000/v1",
            hint="write the address up to /v1, with http:// or https://",
        )
    trimmed = url.strip().rstrip("/")
    for ending in ("/chat/completions", "/completions"):
        trimmed = trimmed.removesuffix(ending)
    return trimmed


def is_local(url: str) -> bool:
    """Whether an address is on this machine or its private network: a private IP address,
    `localhost`, or a name without dots."""
    host = urlsplit(url).hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith((".localhost", ".local", ".internal"))
    return address.is_private or address.is_loopback or address.is_link_local


async def gather(work: Sequence[Coroutine[Any, Any, T]]) -> list[T | BaseException]:
    """Results or exceptions of all, in order; nothing is left running."""
    return list(await asyncio.gather(*work, return_exceptions=True))
