"""What rounds cost: measured seconds of drafting and of passes over so many nodes.

With the tree's nodes in the order they were chosen, path probabilities P_1 >= P_2 >= ...; a round
of `n` drafted nodes gives `1 + P_1 + ... + P_n` tokens if the drafter is right, and costs
`draft + verify(1 + n)` seconds. `CostModel.best` takes the `n` with the highest ratio; `planning`
decides with what it learns while decoding.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from tenfold.errors import ConfigError
from tenfold.files import write_json
from tenfold.seeds import content_hash
from tenfold.workspace import user_cache

from tenfold_treeflash.draft_cache import DraftCache
from tenfold_treeflash.modeling import TreeFlashDraftModel
from tenfold_treeflash.tables import transition_tables
from tenfold_treeflash.target import Target, own_masks
from tenfold_treeflash.tree import DraftTree, build_tree

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_CONTEXT = 48
FORMAT = "treeflash-costs/2"
WIDTHS = (16, 8, 4, 2)
SHORTLISTS = (256, 64)
"""Narrower tables and shorter lists that are worth measuring."""


class TableSize(NamedTuple):
    """How much of a drafter's distributions is looked at; see `DraftSettings`."""

    top_m: int
    top_k: int
    shortlist: int | None


@dataclass(frozen=True)
class CostModel:
    """Measured seconds.

    Attributes:
        draft: of one drafter pass with its tables and tree.
        verify: nodes to seconds of one pass of the target.
        tables: the same as `draft` for narrower tables; empty where none were measured.
    """

    draft: float
    verify: Mapping[int, float]
    tables: Mapping[TableSize, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ConfigError for a table without one node, or times that are no times."""
        values = [self.draft, *self.verify.values(), *self.tables.values()]
        if 1 not in self.verify or not all(math.isfinite(v) and v >= 0 for v in values):
            raise ConfigError("a cost model needs finite seconds, of one node among others")

    @property
    def sizes(self) -> list[int]:
        """Measured sizes, ascending."""
        return sorted(self.verify)

    def cost(self, nodes: int) -> float:
        """Seconds of a drafted round with so many nodes."""
        return self.draft + self.verified(nodes)

    def verified(self, nodes: int) -> float:
        """Seconds of a pass over so many nodes: between measured sizes on a line, beyond them
        along the last one."""
        return self._curve(nodes)

    @cached_property
    def _curve(self) -> Callable[[int], float]:
        sizes = self.sizes
        seconds = [self.verify[s] for s in sizes]
        slope = 0.0
        if len(sizes) > 1:
            slope = max(0.0, (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2]))
        known = np.interp(np.arange(sizes[-1] + 1), sizes, seconds).tolist()

        def curve(nodes: int) -> float:
            beyond = nodes - sizes[-1]
            return known[nodes] if beyond <= 0 else seconds[-1] + slope * beyond

        return curve

    def for_rows(self, rows: int) -> CostModel:
        """An estimate for `rows` texts side by side: passes cost what as many nodes of one text
        do, and drafting grows as a pass over eight nodes does."""
        if rows == 1:
            return self
        growth = self.verified(8 * rows) / max(self.verified(8), 1e-12)
        return CostModel(
            self.draft * growth,
            {size: self.verified(size * rows) for size in self.sizes},
            {size: seconds * growth for size, seconds in self.tables.items()},
        )

    def best(self, log_probs: Sequence[float]) -> int:
        """Nodes to keep of a tree whose nodes have these log path probabilities (root first)."""
        expected, best, best_rate = 0.0, 1, 0.0
        for nodes, log_prob in enumerate(log_probs, start=1):
            expected += math.exp(log_prob)
            rate = expected / self.cost(nodes)
            if rate > best_rate:
                best, best_rate = nodes, rate
        return best

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        verify = {str(size): seconds for size, seconds in sorted(self.verify.items())}
        tables = [[*size, seconds] for size, seconds in self.tables.items()]
        return {"format": FORMAT, "draft": self.draft, "verify": verify, "tables": tables}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CostModel:
        """From `to_json`.

        Raises:
            ConfigError: another format.
        """
        if values.get("format") != FORMAT:
            raise ConfigError(
                f"no cost model: its format is {values.get('format')!r}, not {FORMAT}"
            )
        verify = {int(k): float(v) for k, v in values["verify"].items()}
        tables = {
            TableSize(int(m), int(k), None if s is None else int(s)): float(seconds)
            for m, k, s, seconds in values["tables"]
        }
        return cls(float(values["draft"]), verify, tables)

    def save(self, path: Path) -> None:
        """Writes a JSON file, atomically."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> CostModel:
        """Reads what `save` wrote.

        Raises:
            ConfigError: no such file, or another content.
        """
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            raise ConfigError(f"cannot read the cost model {path}: {error}") from error


@torch.inference_mode()
def calibrate(
    target: Target,
    drafter: TreeFlashDraftModel,
    *,
    sizes: Sequence[int] = SIZES,
    repeats: int = 5,
    context: int = _CONTEXT,
    block_size: int | None = None,
    choices: bool = False,
    **tables: Any,
) -> CostModel:
    """Measures a pair on this machine: medians over `repeats`, sizes taking turns.

    Args:
        sizes: trees to measure; 1 is added.
        context: tokens before the tree, fewer where the model has no positions for them.
        block_size: slots that are drafted; None: the drafter's own.
        choices: measure narrower tables too, of each width the fastest shortlist.
        tables: further arguments of `transition_tables`.
    """
    vocabulary = target.embedding.shape[0]
    block = block_size or drafter.config.block_size
    wanted = sorted({1, *sizes})
    deepest = max(_comb(max(wanted), vocabulary).depths)
    context = max(1, min(context, target.deepest(0) - max(deepest, block)))
    ids = torch.arange(context, device=target.device) * 7 % vocabulary
    layers = drafter.config.target_layer_ids
    with own_masks(target.model), target.features(layers) as features:
        cache, draft_cache = target.new_cache(), DraftCache()
        target.prefill(ids, cache)
        positions = torch.arange(context, device=target.device)
        drafter.extend(draft_cache, features(), positions[None])
        verify: dict[int, list[float]] = {size: [] for size in wanted}
        sizes_of_tables = _table_sizes(vocabulary, tables) if choices else []
        options: list[dict[str, Any]] = [tables, *(tables | s._asdict() for s in sizes_of_tables)]
        draft: list[list[float]] = [[] for _ in options]
        for turn in range(repeats + 1):
            for times, option in zip(draft, options, strict=True):
                started = _now(target.device)
                hidden = drafter.draft(draft_cache, 0, target.embedding, block)
                table = transition_tables(
                    drafter, hidden, 0, target.embedding, target.head, **option
                )
                build_tree(table, 0, 16)
                if turn:
                    times.append(_now(target.device) - started)
            for size in wanted:
                started = _now(target.device)
                target.verify(_comb(size, vocabulary), cache)
                if turn:
                    verify[size].append(_now(target.device) - started)
                cache.keep(context, [])
    seconds = [median(times) for times in draft]
    return CostModel(
        seconds[0],
        _rising({size: median(times) for size, times in verify.items()}),
        _fastest(dict(zip(sizes_of_tables, seconds[1:], strict=True))),
    )


def _rising(seconds: Mapping[int, float]) -> dict[int, float]:
    """More nodes never cost less: what says otherwise is noise, and would draw sizes to it."""
    out, least = {}, math.inf
    for size in sorted(seconds, reverse=True):
        out[size] = least = min(least, seconds[size])
    return dict(sorted(out.items()))


def _table_sizes(vocabulary: int, tables: Mapping[str, Any]) -> list[TableSize]:
    """Tables no wider than these, with each shortlist that is much shorter than the vocabulary
    (or the one that is asked for)."""
    if tables.get("marginal"):
        return []
    most, children = tables.get("top_m", WIDTHS[0]), tables.get("top_k", WIDTHS[0])
    asked = tables.get("shortlist")
    lists: list[int | None] = [None, *(s for s in SHORTLISTS if 4 * s <= vocabulary)]
    return [
        TableSize(width, min(children, max(2 * width, 4)), shortlist)
        for width in sorted({most, *(w for w in WIDTHS if w < most)}, reverse=True)
        for shortlist in (lists if asked is None else [asked])
    ]


def _fastest(tables: Mapping[TableSize, float]) -> dict[TableSize, float]:
    """Of each width, the fastest shortlist."""
    best: dict[int, TableSize] = {}
    for size, seconds in tables.items():
        if size.top_m not in best or seconds < tables[best[size.top_m]]:
            best[size.top_m] = size
    return {size: tables[size] for size in best.values()}


def cached_costs(
    target: Target, drafter: TreeFlashDraftModel, folder: Path | None = None, **settings: Any
) -> CostModel:
    """The pair's cost model, measured once per machine, shape, number type and thread count;
    `settings` are further arguments of `calibrate`."""
    facts = {
        "target": target.model.config.to_dict(),
        "drafter": drafter.config.to_dict(),
        "device": _device_name(target.device),
        "dtype": str(next(target.model.parameters()).dtype),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "settings": settings,
    }
    path = (folder or user_cache() / "treeflash" / "costs") / f"{content_hash(facts)}.json"
    if path.is_file():
        with suppress(ConfigError):  # a broken entry is measured again
            return CostModel.load(path)
    model = calibrate(target, drafter, **settings)
    model.save(path)
    return model


def _device_name(device: torch.device) -> str:
    """What decides how fast it is: the kind of GPU, or this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} {platform.node()} {platform.processor()} {os.cpu_count()}"


def _comb(size: int, vocabulary: int) -> DraftTree:
    """A tree of `size` nodes, two children per inner node."""
    parents = [-1, *((i - 1) // 2 for i in range(1, size))]
    depths = [0] * size
    for node in range(1, size):
        depths[node] = depths[parents[node]] + 1
    return DraftTree([i % vocabulary for i in range(size)], parents, depths, [0.0] * size)


def _now(device: torch.device) -> float:
    """The clock, once the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
