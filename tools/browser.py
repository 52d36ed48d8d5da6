"""A headless Chromium over its DevTools protocol: what a page asks for, says and looks like.

Used by the tests of reports and docs, and to take the pictures in `docs/assets`:

    python tools/browser.py report.html docs/assets/report.png --width 1280 --height 1600
"""

from __future__ import annotations

import argparse
import base64
import functools
import http.server
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--headless",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-port=0",
)
TIMEOUT_S = 60.0


def find_browser() -> str | None:
    """Path of an installed Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Page:
    """A loaded page: its requests, its console, and a way to ask it things."""

    requests: list[str] = field(default_factory=list)
    """Every address that was asked for, data: addresses included."""
    problems: list[str] = field(default_factory=list)
    """Console errors and warnings, uncaught exceptions, policy violations."""
    call: Callable[..., dict[str, Any]] = field(default=lambda *_, **__: {}, repr=False)

    def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression (outside the page's own policy)."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"JavaScript failed: {answer['exceptionDetails']['text']}")
        return answer["result"].get("value")

    def prefer(self, scheme: str) -> None:
        """Switches the preferred color scheme: `light` or `dark`."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def resize(self, width: int, height: int, scale: float = 1.0) -> None:
        """Sets the size of the window's content in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )

    def screenshot(self) -> bytes:
        """The visible part as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


class Browser:
    """A running browser; `open` loads one page after the other."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._page = Page()
        self._loaded = False

    def open(self, address: str, *, width: int = 1280, height: int = 900) -> Page:
        """Loads a page in a fresh tab and waits until its load event.

        Raises:
            TimeoutError: the page did not load in time.
        """
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        session = attached["sessionId"]

        def call(method: str, **params: Any) -> dict[str, Any]:
            return self._call(method, session, **params)

        page = self._page = Page(call=call)
        self._loaded = False
        for domain in ("Page", "Runtime", "Log", "Network"):
            call(f"{domain}.enable")
        call("Network.setCacheDisabled", cacheDisabled=True)
        page.resize(width, height)
        call("Page.navigate", url=address)
        deadline = time.monotonic() + TIMEOUT_S
        while not self._loaded:
            self._receive(deadline - time.monotonic())
        return page

    def _call(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        self._socket.send(json.dumps(message))
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            answer = self._receive(deadline - time.monotonic())
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _receive(self, timeout: float) -> dict[str, Any]:
        message = json.loads(self._socket.recv(timeout=max(timeout, 0.0)))
        if "method" in message:
            self._note(message["method"], message["params"])
        return message

    def _note(self, event: str, params: dict[str, Any]) -> None:
        page = self._page
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Network.requestWillBeSent":
            page.requests.append(params["request"]["url"])
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            page.problems.append(params["entry"]["text"])
        elif event == "Runtime.exceptionThrown":
            page.problems.append(params["exceptionDetails"]["text"])
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            page.problems.append(str([a.get("value") for a in params["args"]]))
        elif event == "Page.javascriptDialogOpening":
            page.problems.append(f"dialog: {params['message']}")


@contextmanager
def running(executable: str) -> Iterator[Browser]:
    """A headless browser with a profile of its own, ended and removed afterwards.

    Raises:
        TimeoutError: it did not start in time.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = [*QUIET, f"--user-data-dir={profile}"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            flags.append("--no-sandbox")  # Chromium's sandbox refuses to run as root
        process = subprocess.Popen(
            [executable, *flags, "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with connect(_address(process, Path(profile)), max_size=None) as socket:
                yield Browser(socket)
        finally:
            process.terminate()
            process.wait(timeout=TIMEOUT_S)


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serves a folder on this machine; its address. A real origin shows requests that pages
    opened as files do not make."""
    handler = functools.partial(_QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def _address(process: subprocess.Popen[bytes], profile: Path) -> str:
    """The DevTools address, which Chromium writes into its profile once it listens."""
    port_file = profile / "DevToolsActivePort"
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        lines = port_file.read_text().split() if port_file.is_file() else []
        if len(lines) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        if process.poll() is not None:
            raise RuntimeError(f"the browser ended at once with code {process.returncode}")
        time.sleep(0.05)
    raise TimeoutError("the browser did not start in time")


def main() -> int:
    """Takes a picture of a page."""
    parser = argparse.ArgumentParser(description="Takes a picture of a local page.")
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=1600)
    parser.add_argument("--top", type=int, default=0, help="pixels to scroll down first")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    args = parser.parse_args()
    executable = find_browser()
    if executable is None:
        parser.error(f"no browser found (looked for {', '.join(NAMES)})")
    with running(executable) as browser:
        page = browser.open(args.page.resolve().as_uri(), width=args.width, height=args.height)
        page.prefer(args.scheme)
        page.evaluate(f"scrollTo({{top: {args.top}, behavior: 'instant'}})")
        args.picture.write_bytes(page.screenshot())
    for problem in page.problems:
        print(problem, file=sys.stderr)
    return 1 if page.problems else 0


if __name__ == "__main__":
    sys.exit(main())
