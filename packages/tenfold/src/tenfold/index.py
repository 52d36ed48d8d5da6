"""The component index: what discovery found, kept so that listing imports no plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tenfold.discovery import Sources
    from tenfold.registry import Registry
    from tenfold.workspace import Workspace


def read(workspace: Workspace) -> Registry | None:
    """The indexed registry when everything it was made from is unchanged, else None."""
    return None


def write(workspace: Workspace, registry: Registry, sources: Sources) -> None:
    """Keeps a registry for later commands."""
