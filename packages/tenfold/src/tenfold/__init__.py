"""Tenfold: light plugins describe components, the host plans, builds and runs them.

This module stays light: names are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "hookimpl": "tenfold.hookspecs",
    "ComponentSpec": "tenfold.spec",
    "CommandSpec": "tenfold.spec",
    "Param": "tenfold.spec",
    "PluginInfo": "tenfold.spec",
    "REQUIRED": "tenfold.spec",
    "TenfoldError": "tenfold.errors",
    "GenerationConfig": "tenfold.records",
}

__all__ = [
    "REQUIRED",
    "CommandSpec",
    "ComponentSpec",
    "GenerationConfig",
    "Param",
    "PluginInfo",
    "TenfoldError",
    "__version__",
    "hookimpl",
]

if TYPE_CHECKING:
    from tenfold.errors import TenfoldError
    from tenfold.hookspecs import hookimpl
    from tenfold.records import GenerationConfig
    from tenfold.spec import REQUIRED, CommandSpec, ComponentSpec, Param, PluginInfo


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'tenfold' has no attribute {name!r}")
