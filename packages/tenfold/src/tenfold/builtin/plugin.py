"""The built-in plugin `core`: what the host can do with no other plugin installed."""

from __future__ import annotations

from tenfold import PluginInfo, __version__
from tenfold.builtin import describe_io, describe_lm
from tenfold.hookspecs import hookimpl
from tenfold.spec import ComponentSpec


@hookimpl
def tenfold_plugin() -> PluginInfo:
    return PluginInfo("core", f"Built-in models, datasets, evaluators (tenfold {__version__})")


@hookimpl
def tenfold_models() -> list[ComponentSpec]:
    return [*describe_lm.MODELS, *describe_io.MODELS]


@hookimpl
def tenfold_datasets() -> list[ComponentSpec]:
    return describe_io.DATASETS


@hookimpl
def tenfold_evaluators() -> list[ComponentSpec]:
    return describe_io.EVALUATORS


@hookimpl
def tenfold_trainers() -> list[ComponentSpec]:
    return describe_lm.TRAINERS
