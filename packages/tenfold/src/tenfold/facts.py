"""Facts of a run that make it comparable and repeatable: host, versions, source state."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from tenfold import __version__
from tenfold.spec import HEAVY_MODULES

_DISTRIBUTIONS = {"torch_geometric": "torch-geometric"}


def host_facts() -> dict[str, Any]:
    """Machine and interpreter; no user name, host name or path."""
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        **_gpu_facts(),
    }


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _gpu_facts() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"gpus": names}


def versions(distributions: Iterable[str] = ()) -> dict[str, str]:
    """Versions of the core, the given distributions, and installed heavy libraries."""
    found = {"tenfold": __version__}
    heavy = [_DISTRIBUTIONS.get(name, name) for name in HEAVY_MODULES]
    for name in (*distributions, *heavy):
        try:
            found.setdefault(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether the tree has changes, or None outside a repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(git("status", "--porcelain"))}


def peak_memory() -> dict[str, int]:
    """Peak resident memory of this process, and of the GPU where torch used one, in bytes."""
    # ru_maxrss is in kilobytes on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["gpu_bytes"] = int(torch.cuda.max_memory_allocated())
    return peak
