"""Plugins that watch runs: each hook call is isolated; one that fails is silenced."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any


class Observers:
    """Calls the observer hooks of plugin modules, one plugin at a time."""

    def __init__(self, modules: Iterable[tuple[str, Any]]) -> None:
        self._modules = dict(modules)

    def run_start(self, run: Mapping[str, Any]) -> None:
        """A run begins."""
        self._call("tenfold_run_start", run=run)

    def item_end(self, run: Mapping[str, Any], item: Mapping[str, Any]) -> None:
        """One item was recorded."""
        if self._modules:
            self._call("tenfold_item_end", run=run, item=item)

    def run_end(self, run: Mapping[str, Any], status: str) -> None:
        """The run ended."""
        self._call("tenfold_run_end", run=run, status=status)

    def _call(self, hook: str, **arguments: Any) -> None:
        for name, module in list(self._modules.items()):
            function = getattr(module, hook, None)
            if function is None:
                continue
            try:
                # A hook may take fewer arguments than the specification offers, as in pluggy;
                # it may also be a method, whose `self` is no argument.
                wanted = function.__code__.co_varnames[: function.__code__.co_argcount]
                wanted = wanted[hasattr(function, "__self__") :]
                function(**{key: arguments[key] for key in wanted})
            except (Exception, SystemExit) as error:
                del self._modules[name]
                print(
                    f"warning: plugin {name!r} failed in {hook} and no longer watches this run: "
                    f"{type(error).__name__}: {error}",
                    file=sys.stderr,
                )
