"""Attributes the tiny queries in this process (one of several, under a launcher).

Usage: attribute_worker.py FOLDER [SETTING=JSON ...]. `die=N` kills the process with SIGKILL
when it would write its Nth shard; at `full=N` the disk is full for that one. Values go to
`FOLDER/values-<rank>.json`.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from tenfold.builtin.hf import load
from tenfold.builtin.tables import jsonl_prompt, jsonl_text
from tenfold.files import disk_full_is_an_error
from tenfold.testing.context import FakeContext
from tenfold_dabgo import shards
from tenfold_dabgo.evaluator import Attribution

SETTINGS = {"top_k": 3, "columns": ["author"], "token_budget": 60, "shard_samples": 9}


def attribute(folder, **changes):
    """Items of this process; equal arguments give equal items on any number of processes."""
    torch.set_num_threads(1)
    folder = Path(folder)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    ctx = FakeContext(folder, rank=rank, world_size=world)
    ctx.events = Events(folder / f"events-{rank}.jsonl")
    model = load(str(folder / "model"))
    evaluator = Attribution(**{**SETTINGS, **changes})
    data = {
        "train": jsonl_text(path=folder / "corpus.jsonl"),
        "queries": jsonl_prompt(path=folder / "queries.jsonl"),
    }
    items = list(evaluator.plan(ctx, data))[rank::world]
    return [(r.id, r.values, r.error) for r in evaluator.run(ctx, {"model": model}, items)]


class Events(list):
    """A list that is a file too."""

    def __init__(self, path):
        self.path = path

    def append(self, event):
        with self.path.open("a") as file:
            file.write(json.dumps(event, default=str) + "\n")


def fail_at(last, how):
    """Something else than the Nth shard."""
    plain, written = shards.ShardStore.write, []

    def write(self, number, rows):
        written.append(number)
        if len(written) == last:
            how()
        plain(self, number, rows)

    patch.object(shards.ShardStore, "write", write).start()


def fill_disk():
    """What a write says then."""
    with disk_full_is_an_error(Path("shard")):
        raise OSError(errno.ENOSPC, "No space left on device")


if __name__ == "__main__":
    settings = {k: json.loads(v) for k, v in (pair.split("=", 1) for pair in sys.argv[2:])}
    if number := settings.pop("die", 0):
        fail_at(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
    if number := settings.pop("full", 0):
        fail_at(number, fill_disk)
    rows = attribute(sys.argv[1], **settings)
    name = f"values-{os.environ.get('RANK', '0')}.json"
    (Path(sys.argv[1]) / name).write_text(json.dumps(rows))
