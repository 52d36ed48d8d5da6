"""Sweeps: one run file, many points.

`[sweep.grid]` takes the product of its lists, `[sweep.zip]` steps through lists of equal
length together, `sweep.replicates` repeats each point with derived seeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tenfold.config import apply_settings, merge
from tenfold.errors import ConfigError, nearest
from tenfold.seeds import derive

_KEYS = ("grid", "zip", "replicates")


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One point: what was set, and the run table with it applied."""

    settings: Mapping[str, Any]
    table: Mapping[str, Any]


def expand_sweep(table: Mapping[str, Any], where: str = "run") -> list[SweepPoint]:
    """Every point of a run table's `[sweep]`, in a fixed order; one point without a sweep.

    Raises:
        ConfigError: an unknown key, lists of unequal length in `zip`, or an empty list.
    """
    sweep = dict(table.get("sweep", {}))
    base = {key: value for key, value in table.items() if key != "sweep"}
    for key in sweep:
        if key not in _KEYS:
            raise ConfigError(f"{where}: unknown key sweep.{key}{nearest(key, _KEYS)}")
    grid = _axes(sweep.get("grid", {}), f"{where}: sweep.grid")
    zipped = _axes(sweep.get("zip", {}), f"{where}: sweep.zip")
    lengths = {len(values) for values in zipped.values()}
    if len(lengths) > 1:
        sizes = ", ".join(f"{key} has {len(values)}" for key, values in zipped.items())
        raise ConfigError(f"{where}: lists in sweep.zip must be equally long ({sizes})")
    replicates = sweep.get("replicates", 1)
    if not isinstance(replicates, int) or isinstance(replicates, bool) or replicates < 1:
        raise ConfigError(f"{where}: sweep.replicates is {replicates!r}; at least 1")
    points = []
    for zip_row in range(lengths.pop() if lengths else 1):
        for values in itertools.product(*grid.values()):
            settings = {key: column[zip_row] for key, column in zipped.items()}
            settings |= dict(zip(grid, values, strict=True))
            for replicate in range(replicates):
                points.append(_point(base, settings, replicate if replicates > 1 else None))
    return points


def _axes(table: Any, where: str) -> dict[str, list[Any]]:
    """Dotted key → list of values, from nested tables or quoted dotted keys."""
    axes: dict[str, list[Any]] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                walk(child, f"{path}.{key}" if path else key)
        elif isinstance(value, list) and value:
            axes[path] = value
        else:
            raise ConfigError(f"{where}.{path} is {value!r}; it must be a non-empty list")

    walk(table, "")
    return axes


def _point(base: Mapping[str, Any], settings: dict[str, Any], replicate: int | None) -> SweepPoint:
    table = dict(base)
    for key, value in settings.items():
        change: Any = value
        for part in reversed(key.split(".")):
            change = {part: change}
        table = merge(table, change)
    if replicate is not None:
        settings = {**settings, "replicate": replicate}
        table = apply_settings(table, [f"seed={derive(table.get('seed', 0), replicate)}"])
    return SweepPoint(settings, table)
