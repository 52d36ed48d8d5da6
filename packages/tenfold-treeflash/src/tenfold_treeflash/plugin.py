"""The plugin `treeflash`: descriptions only, importable without any heavy library."""

from __future__ import annotations

from tenfold import PluginInfo, hookimpl


@hookimpl
def tenfold_plugin() -> PluginInfo:
    """Who we are."""
    return PluginInfo(
        name="treeflash",
        summary="Tree speculative decoding with a parallel drafter",
        paper="arXiv:2606.03819",
    )
