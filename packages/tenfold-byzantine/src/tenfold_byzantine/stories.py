"""Which games a report shows in full: the first of each outcome."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tenfold_byzantine.reports import Story
from tenfold_byzantine.summary import cell_label
from tenfold_byzantine.transcript import read_transcript, transcript_blocks


class Examples:
    """Chooses games while rows pass by, and reads their event logs afterwards.

    Args:
        folder: where event logs lie, in itself or in folders below.
        most: how many games to show.
    """

    def __init__(self, folder: Path, most: int = 6) -> None:
        self._folder, self._most = folder, most
        self._chosen: dict[str, tuple[str, str]] = {}

    def watch(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """The rows, unchanged; the first of each outcome is remembered."""
        for row in rows:
            self._chosen.setdefault(row["outcome"], (row["game_id"], _title(row)))
            yield row

    def stories(self) -> list[Story]:
        """The chosen games whose logs there are, in the order of their outcomes' names."""
        found = []
        for _, (game_id, title) in sorted(self._chosen.items()):
            if len(found) == self._most:
                break
            path = next(iter(sorted(self._folder.glob(f"**/{game_id}.jsonl"))), None)
            if path is not None:
                transcript = read_transcript(path)
                blocks = list(transcript_blocks(transcript))
                found.append(Story(title, transcript.result, blocks))
        return found


def _title(row: Mapping[str, Any]) -> str:
    where = cell_label(row["cell"])
    return f"{row['outcome']}: {where}, replicate {row['replicate']}, {row['rounds']} rounds"
