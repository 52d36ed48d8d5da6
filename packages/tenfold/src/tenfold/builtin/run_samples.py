"""`core:run-samples`: what a model wrote in an earlier run, as sample records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tenfold.builtin.samples import sample_records
from tenfold.builtin.selection import Selection, shuffle
from tenfold.errors import ConfigError, nearest
from tenfold.records import SampleRecord
from tenfold.seeds import content_hash
from tenfold.workspace import find_workspace

if TYPE_CHECKING:
    from tenfold.store import ItemLine, RunStore

VERSION = 1


class RunSamples:
    """Sample records of a run's items, in the order of its plan; ids are the items' own.

    Reads runs of `core:generate`, and of any evaluator whose items hold `prompt` and
    `completion`.

    Args:
        run: a run folder, a run id, or a run's name for its newest finished run.
        role: only samples of this model role.
        partial: also accept a run that did not finish well.
        limit: at most this many records.
        shuffle_seed: shuffle by this seed, before `limit`.

    Raises:
        ConfigError: there is no such run, or it has not finished.
    """

    kind = "sample"

    def __init__(
        self,
        run: str,
        role: str = "",
        partial: bool = False,
        limit: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        self.store = finished_run(run, partial=partial)
        self.role = role
        self._selection = Selection(limit, shuffle_seed)
        self._print = ""

    def splits(self) -> Sequence[str]:
        """One split, `all`."""
        return ("all",)

    def load(
        self, split: str = "", limit: int | None = None, shuffle_seed: int | None = None
    ) -> Iterator[SampleRecord]:
        """The samples, streamed; a shuffle holds them in memory.

        Raises:
            ConfigError: the run's items are no samples, or none has the role.
        """
        _check_split(split)
        records = self._records()
        seed = self._selection.seed(shuffle_seed)
        if seed is not None:
            shuffled = list(records)
            shuffle(shuffled, seed)
            records = iter(shuffled)
        return islice(records, self._selection.count(limit))

    def fingerprint(self, split: str = "") -> str:
        """Hash of the items and of what selects from them; the run's name does not count."""
        _check_split(split)
        if not self._print:
            content = hashlib.sha256()
            for line in self._lines():
                row = json.dumps([line.id, line.values], sort_keys=True, default=str)
                content.update(row.encode(errors="surrogatepass"))
            selection = [self._selection.limit, self._selection.shuffle_seed]
            self._print = content_hash(["run-samples", VERSION, selection, content.hexdigest()])
        return self._print

    def _lines(self) -> Iterator[ItemLine]:
        for line in self.store.ordered_lines():
            if not self.role or line.values.get("role", "model") == self.role:
                yield line

    def _records(self) -> Iterator[SampleRecord]:
        count = 0
        for line in self._lines():
            try:
                found = list(sample_records(line.id, line.values))
            except (KeyError, TypeError):
                raise self._no_samples(line) from None
            count += len(found)
            yield from found
        if not count:
            raise self._nothing()

    def _no_samples(self, line: ItemLine) -> ConfigError:
        return ConfigError(
            f"run {self.store.path}: its item {line.id!r} holds no prompt and completion "
            f"(it holds: {', '.join(line.values) or 'nothing'})",
            hint="name a run of core:generate",
        )

    def _nothing(self) -> ConfigError:
        if not self.role:
            return ConfigError(f"run {self.store.path} has no items")
        lines = self.store.ordered_lines()
        roles = {str(line.values.get("role", "model")) for line in lines}
        return ConfigError(
            f"run {self.store.path} has no samples of the role {self.role!r}"
            f"{nearest(self.role, roles)} (roles: {', '.join(sorted(roles)) or 'none'})"
        )


def _check_split(split: str) -> None:
    if split not in ("", "all"):
        raise ConfigError(f"no split {split!r} (splits: all)")


def finished_run(name: str, *, partial: bool = False) -> RunStore:
    """A run by folder, by id, or by name: then the newest that finished well.

    Args:
        name: a relative folder is looked for here and in the workspace.
        partial: whether a run that did not finish well counts.

    Raises:
        ConfigError: there is none.
    """
    from tenfold.store import RunStore, all_runs, find_run

    workspace = find_workspace()
    runs = workspace.path("runs")
    for folder in (Path.cwd(), workspace.root or Path.cwd()):
        path = folder / Path(name).expanduser()
        if (path / "run.json").is_file():
            return _finished(RunStore(path), partial)
    named = [store for store in all_runs(runs) if store.path.parent.name == name]
    if not named:
        return _finished(find_run(runs, name), partial)
    for store in reversed(named):
        if partial or store.status == "ok":
            return store
    raise ConfigError(
        f"no run {name!r} under {runs} has finished well; the newest, {named[-1].id}, is "
        f"{named[-1].status!r}",
        hint=f"finish it with `tenfold run --resume {named[-1].path}`, or set partial = true",
    )


def _finished(store: RunStore, partial: bool) -> RunStore:
    if not partial and store.status != "ok":
        raise ConfigError(
            f"run {store.path} has not finished well: its status is {store.status!r}",
            hint=f"finish it with `tenfold run --resume {store.path}`, or set partial = true",
        )
    return store
