"""What a frozen target says of every training row, stored once and read while training.

Per token the outputs of the layers that the drafter reads and the state before the head, in
safetensors shards of about `shard_tokens` tokens; logits are computed from the state when they are
needed. Shards are complete or not there, so storing goes on where it was interrupted, and they are
read through a memory map, a row at a time.

Shapes: `S` tokens of a row, `F` layers, `H` hidden.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tenfold.errors import ConfigError
from tenfold.files import replacing, write_json
from tenfold.lm import architecture
from tenfold.lm.weights import hash_tensors
from tenfold.scale import process
from torch import Tensor

from tenfold_treeflash.target import Target

FORMAT = "treeflash-features/1"
MANIFEST = "features.json"
SHARD_TOKENS = 32768
_OPEN_SHARDS = 8


def read_features(
    target: Target, ids: Tensor, layers: Sequence[int], mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The target's states before its head `[B, S, H]`, and its features `[B, S, F H]`, of rows
    `[B, S]` padded on the right."""
    arguments = {} if mask is None else {"attention_mask": mask}
    with torch.no_grad(), architecture.block_states(target.model, {i + 1 for i in layers}) as seen:
        output = architecture.decoder(target.model)(input_ids=ids, use_cache=False, **arguments)
    return output[0], torch.cat([seen[i + 1] for i in layers], dim=-1)


class FeatureStore:
    """Features of the rows of one data set, read back by row number.

    Raises:
        ConfigError: no finished store at `folder`, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder} holds no stored features: {error}") from error
        self._ends: list[list[int]] = self._manifest["ends"]
        self._first: list[int] = self._manifest["first"]
        missing = [name for name in map(_shard_name, range(len(self._first)))
                   if not (folder / name).is_file()]  # fmt: skip
        if missing:
            raise ConfigError(f"{folder} lacks {missing[0]}; delete the folder to store it anew")
        self._open = lru_cache(maxsize=_OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        return int(self._manifest["rows"])

    def row(self, number: int) -> tuple[Tensor, Tensor]:
        """States `[S, H]` and features `[S, F H]` of one row.

        Raises:
            ConfigError: a damaged shard.
        """
        shard = bisect_right(self._first, number) - 1
        place = number - self._first[shard]
        begin = self._ends[shard][place - 1] if place else 0
        end = self._ends[shard][place]
        opened = self._open(shard)
        return opened.get_slice("states")[begin:end], opened.get_slice("features")[begin:end]

    def batch(self, rows: Sequence[int], length: int, device: Any) -> tuple[Tensor, Tensor]:
        """States `[B, length, H]` and features `[B, length, F H]`; zeros behind a row's end."""
        parts = [self.row(row) for row in rows]
        out = []
        for values in zip(*parts, strict=True):
            whole = values[0].new_zeros((len(rows), length, values[0].shape[-1]))
            for row, value in zip(whole, values, strict=True):
                row[: len(value)] = value
            out.append(whole.to(device))
        return out[0], out[1]

    def _open_shard(self, shard: int) -> Any:
        path = self.folder / _shard_name(shard)
        try:
            return safe_open(path, "pt").__enter__()
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"cannot read {path}: {error}; delete the folder to store it anew"
            ) from error


def store_features(
    target: Target,
    rows: Any,
    layers: Sequence[int],
    folder: Path,
    *,
    advance: Callable[[int], None] = lambda rows: None,
    shard_tokens: int = SHARD_TOKENS,
) -> FeatureStore:
    """Stores the features of rows, or goes on where an interrupted call stopped.

    Several processes share the shards among them and wait for each other at the end. One row at a
    time goes through the target, so results do not depend on neighbours.

    Args:
        target: the frozen model.
        rows: rows with `input_ids`, and a `fingerprint`.
        layers: whose outputs the drafter reads.
        advance: told how many more rows are stored.

    Raises:
        ConfigError: `folder` holds the features of other rows, layers or weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    identity = {
        "format": FORMAT, "target": hash_tensors(target.model), "data": rows.fingerprint(),
        "layers": list(layers), "dtype": str(target.dtype), "rows": len(rows),
        "shard_tokens": shard_tokens,
    }  # fmt: skip
    plan = folder / "plan.json"
    if plan.is_file():
        found = json.loads(plan.read_text(encoding="utf-8"))
        if changed := [name for name, value in identity.items() if found.get(name) != value]:
            raise ConfigError(
                f"{folder} holds features for other {', '.join(changed)}; name another folder, or "
                "delete this one"
            )
    elif process.rank() == 0:
        write_json(plan, identity)
    first, ends = _layout(rows, shard_tokens)
    bounds = [*first, len(rows)]
    for shard in range(len(first)):
        path = folder / _shard_name(shard)
        count = bounds[shard + 1] - bounds[shard]
        if shard % process.asked_world_size() == process.rank() and not path.is_file():
            _write(target, rows, range(bounds[shard], bounds[shard + 1]), layers, path)
        advance(count)
    process.barrier()
    if process.rank() == 0:
        write_json(folder / MANIFEST, {**identity, "first": first, "ends": ends})
    process.barrier()
    return FeatureStore(folder)


def _layout(rows: Any, shard_tokens: int) -> tuple[list[int], list[list[int]]]:
    """First row of every shard, and per shard the tokens up to the end of each of its rows."""
    first: list[int] = []
    ends: list[list[int]] = []
    for number in range(len(rows)):
        length = len(rows[number]["input_ids"])
        if not first or ends[-1][-1] + length > shard_tokens:
            first.append(number)
            ends.append([length])
        else:
            ends[-1].append(ends[-1][-1] + length)
    return first, ends


def _write(target: Target, rows: Any, numbers: range, layers: Sequence[int], path: Path) -> None:
    states, features = [], []
    for number in numbers:
        ids = rows[number]["input_ids"][None].to(target.device)
        state, feature = read_features(target, ids, layers)
        states.append(state[0].cpu())
        features.append(feature[0].cpu())
    tensors: Mapping[str, Tensor] = {
        "states": torch.cat(states).contiguous(), "features": torch.cat(features).contiguous(),
    }  # fmt: skip
    with replacing(path) as temporary:
        save_file(dict(tensors), temporary)


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"
