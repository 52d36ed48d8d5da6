"""The plugin `byzantine`: descriptions only, importable without any heavy library."""

from __future__ import annotations

from tenfold import PluginInfo, hookimpl


@hookimpl
def tenfold_plugin() -> PluginInfo:
    """Who we are."""
    return PluginInfo(
        name="byzantine",
        summary="Consensus games of language-model agents with faulty players",
        paper="arXiv:2603.01213",
    )
