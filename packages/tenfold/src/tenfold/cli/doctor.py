"""`tenfold doctor`: what this machine and installation can do, and what stands in the way."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from tenfold import __version__
from tenfold.cli.output import print_json
from tenfold.cli.workspace import Check, check_folders, print_checks
from tenfold.errors import EXIT_COMPONENT, EXIT_OK, EXIT_USAGE
from tenfold.registry import Registry, load_registry
from tenfold.workspace import Workspace, find_workspace

SUMMARY = "report on this machine and installation"

LIBRARIES = {
    "torch": "tenfold[hf]",
    "transformers": "tenfold[hf]",
    "accelerate": "tenfold[hf]",
    "tokenizers": "tenfold[hf]",
    "safetensors": "tenfold[hf]",
    "deepspeed": "tenfold[deepspeed]",
    "pyarrow": "tenfold[parquet]",
    "torch-geometric": "",
    "speechbrain": "",
    "trl": "",
    "peft": "",
}
"""Libraries that plugins use → the extra that installs them."""

LOW_DISK_BYTES = 2 * 1024**3
GPU_TIMEOUT_S = 180
# A subprocess, because importing torch takes seconds and a broken driver can kill it.
_GPU_PROBE = """
import torch
if torch.cuda.is_available():
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    print("; ".join(f"{p.name}, {p.total_memory / 2**30:.0f} GiB" for p in names))
elif getattr(torch.backends, "mps", None) and torch.backends.mps.is_available():
    print("Apple MPS")
else:
    print("none (runs use the CPU)")
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the switch for the slow part."""
    parser.add_argument(
        "--no-gpu", action="store_true", help="do not look for a GPU (that imports torch)"
    )


def run(args: argparse.Namespace) -> int:
    """Prints every fact and check. Exit code 3 with broken plugins, 2 with other failures."""
    workspace = find_workspace()
    registry = load_registry(cached=False, lenient=True)
    checks = [
        *host_facts(),
        *([] if args.no_gpu else [gpu_fact()]),
        *library_facts(),
        *check_folders(workspace),
        disk_check(workspace),
        *plugin_checks(registry),
    ]
    if args.json:
        print_json([check.to_json() for check in checks])
    else:
        print_checks(checks)
    if registry.broken:
        return EXIT_COMPONENT
    return EXIT_USAGE if any(check.status == "fail" for check in checks) else EXIT_OK


def host_facts() -> list[Check]:
    """Versions, cores and memory."""
    facts = {
        "tenfold": f"{__version__} in {Path(__file__).parents[1]}",
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "cores": str(usable_cores()),
        "memory": _gibibytes(total_memory()),
    }
    return [Check("ok", what, found) for what, found in facts.items()]


def usable_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def total_memory() -> int | None:
    """Bytes of physical memory, or None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _gibibytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1024**3:.1f} GiB"


def gpu_fact() -> Check:
    """The GPUs torch sees, asked in a process of its own."""
    if _version("torch") is None:
        return Check("ok", "gpu", "unknown: torch is not installed")
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _GPU_PROBE],
            capture_output=True,
            text=True,
            timeout=GPU_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Check("warn", "gpu", f"torch gave no answer within {GPU_TIMEOUT_S} s")
    if answer.returncode != 0:
        last = (answer.stderr.strip() or f"exit code {answer.returncode}").splitlines()[-1]
        return Check("fail", "gpu", f"importing torch failed: {last}")
    return Check("ok", "gpu", answer.stdout.strip())


def library_facts() -> list[Check]:
    """Installed versions of heavy libraries, read without importing them."""
    checks = []
    for name, extra in LIBRARIES.items():
        version = _version(name)
        hint = f" (install {extra})" if extra else ""
        checks.append(Check("ok", name, version or f"not installed{hint}"))
    return checks


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def disk_check(workspace: Workspace) -> Check:
    """Free space where runs are written."""
    folder = workspace.path("runs")
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    status = "ok" if free >= LOW_DISK_BYTES else "warn"
    return Check(status, "free disk", f"{_gibibytes(free)} at {folder}")


def plugin_checks(registry: Registry) -> list[Check]:
    """One line per plugin, broken ones last."""
    checks: list[Any] = [
        Check("warn" if row.warnings else "ok", f"plugin {row.name}", _plugin_text(row))
        for row in registry.plugins.values()
    ]
    checks += [
        Check("fail", f"plugin {broken.name}", f"[{broken.phase}] {broken.cause}")
        for broken in registry.broken
    ]
    return checks


def _plugin_text(row: Any) -> str:
    return "; ".join((f"{row.distribution} {row.version}", *row.warnings))
