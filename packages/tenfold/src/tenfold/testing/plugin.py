"""Laws of a plugin as a whole: what importing it costs, and whether its targets fit."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from typing import Any

from tenfold.build import load_target
from tenfold.discovery import SLOW_IMPORT_SECONDS
from tenfold.errors import ComponentError
from tenfold.registry import PluginRow
from tenfold.spec import HEAVY_MODULES, CommandSpec, ComponentSpec
from tenfold.testing.findings import (
    LawBrokenError,
    NotApplicableError,
    WeaknessError,
    require,
)

IMPORT_TIMEOUT_S = 120
_PROBE = """
import json, sys, time
import tenfold.hookspecs, tenfold.spec
before = time.process_time()
__import__(sys.argv[1])
print(json.dumps([time.process_time() - before, sorted(sys.modules)]))
"""


def imports_nothing_heavy(row: PluginRow) -> None:
    """`plugin.py`, alone in a fresh process, imports none of the heavy modules."""
    _, modules = _import_alone(row)
    heavy = sorted(set(modules) & set(HEAVY_MODULES))
    require(not heavy, f"plugin.py imports {', '.join(heavy)}; import them where they are used")


def imports_fast(row: PluginRow) -> None:
    """Importing `plugin.py` in a fresh process stays below the budget."""
    seconds, _ = _import_alone(row)
    if seconds > SLOW_IMPORT_SECONDS:
        raise WeaknessError(f"takes {seconds:.2f} CPU-seconds, above {SLOW_IMPORT_SECONDS:.2f}")


def _import_alone(row: PluginRow) -> tuple[float, list[str]]:
    module = row.module.partition(":")[0]
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, module],
        capture_output=True,
        text=True,
        timeout=IMPORT_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise LawBrokenError(f"importing {module} alone failed: {last}")
    # The plugin itself may print on import; the probe's answer is the last line.
    seconds, modules = json.loads(done.stdout.splitlines()[-1])
    return seconds, modules


def target_accepts_parameters(spec: ComponentSpec | CommandSpec, what: str) -> None:
    """The target exists, takes every described parameter by name, and needs no other."""
    try:
        target = load_target(spec.target, what, getattr(spec, "extras", ()))
    except ComponentError as error:
        if isinstance(error.__cause__, ModuleNotFoundError) and getattr(spec, "extras", ()):
            raise NotApplicableError(str(error).splitlines()[0]) from error
        raise LawBrokenError(str(error).splitlines()[0]) from error
    require(callable(target), f"{spec.target} is not callable")
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        raise NotApplicableError(f"{spec.target} does not tell its signature") from None
    _compare(spec, parameters)


def _compare(spec: ComponentSpec | CommandSpec, parameters: Any) -> None:
    described = {param.name for param in spec.params}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    by_name = {
        name: p
        for name, p in parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    unknown = described - set(by_name)
    if unknown and not anything:
        raise LawBrokenError(f"{spec.target} takes no {', '.join(sorted(unknown))}")
    needed = {name for name, p in by_name.items() if p.default is p.empty} - described
    require(not needed, f"{spec.target} needs {', '.join(sorted(needed))}, which is not described")
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_ONLY]
    require(not positional, f"{spec.target}: {', '.join(positional)} cannot be given by name")
