"""Shards of a loss pass on disk: written atomically, found again after an interruption."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tenfold.errors import ConfigError
from tenfold.files import replacing, write_text


@dataclass(frozen=True)
class ShardStore:
    """A folder of `.npz` shards that belong to one key (hash of model, corpus, settings)."""

    folder: Path
    key: str

    @classmethod
    def open(cls, folder: Path, key: str) -> ShardStore:
        """Opens or creates the folder, see `prepare`."""
        store = cls(folder, key)
        store.prepare()
        return store

    def prepare(self, *, force: bool = False) -> None:
        """Creates the folder, or checks that its shards belong to the key.

        Raises:
            ConfigError: it holds shards of another model, corpus or setting, and `force`,
                which discards them, is not set.
        """
        marker = self.folder / "key.txt"
        if not marker.is_file():
            # Shards without a key belong to nobody knows what.
            self.remove()
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(marker, self.key + "\n")
            return
        found = marker.read_text(encoding="utf-8").strip()
        if found != self.key and force:
            self.remove()
            self.prepare()
        elif found != self.key:
            raise ConfigError(
                f"{self.folder} holds the losses of another model, corpus or setting "
                f"(key {found}, now {self.key})",
                hint="the corpus or the model changed since: restore it, or set force = true to "
                "start this pass anew",
            )

    def path(self, number: int) -> Path:
        """File of one shard."""
        return self.folder / f"losses-{number:06d}.npz"

    def read(self, number: int) -> dict[str, np.ndarray] | None:
        """A finished shard, or None when it is missing or unreadable."""
        try:
            with np.load(self.path(number), allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except (OSError, EOFError, ValueError, zipfile.BadZipFile):
            return None

    def write(self, number: int, rows: Mapping[str, np.ndarray]) -> None:
        """Writes a shard atomically.

        Raises:
            RunFailed: the disk is full; finished shards stay and are reused.
        """
        write_arrays(self.path(number), rows)

    def remove(self) -> None:
        """Deletes what a pass wrote, and its folder when nothing else is in it."""
        for path in (*self.folder.glob("losses-*.npz"), self.folder / "key.txt"):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an `.npz` file atomically."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **dict[str, Any](arrays))
