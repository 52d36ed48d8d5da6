"""The whole plugin surface: hooks take nothing and return data.

A plugin implements the hooks it needs in the module its `tenfold.plugins` entry point names:

    from tenfold import hookimpl

    @hookimpl
    def tenfold_plugin(): ...
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pluggy

from tenfold.spec import CommandSpec, ComponentSpec, PluginInfo

PROJECT = "tenfold"
ENTRY_POINT_GROUP = "tenfold.plugins"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def tenfold_plugin() -> PluginInfo:
    """The plugin's card: name, summary, paper, API range, homepage. Required."""


@hookspec
def tenfold_models() -> Iterable[ComponentSpec]:
    """Models. A decoder is a model with a `component:model` parameter that it `inherits`."""


@hookspec
def tenfold_datasets() -> Iterable[ComponentSpec]:
    """Datasets; `provides` names the record kind."""


@hookspec
def tenfold_evaluators() -> Iterable[ComponentSpec]:
    """Evaluators: split into `plan`, `run`, `aggregate`, see `tenfold.capabilities.Evaluator`."""


@hookspec
def tenfold_trainers() -> Iterable[ComponentSpec]:
    """Trainers: produce a checkpoint and a record."""


@hookspec
def tenfold_commands() -> Iterable[CommandSpec]:
    """Sub-commands `tenfold <plugin> <command>`, imported when invoked."""


@hookspec
def tenfold_run_start(run: Mapping[str, Any]) -> None:
    """Observer: a run begins; `run` is the content of its `run.json`."""


@hookspec
def tenfold_item_end(run: Mapping[str, Any], item: Mapping[str, Any]) -> None:
    """Observer: one item was recorded; `item` is its line in `items.jsonl`."""


@hookspec
def tenfold_run_end(run: Mapping[str, Any], status: str) -> None:
    """Observer: the run ended with `status` (`ok`, `failed`, `interrupted`)."""
