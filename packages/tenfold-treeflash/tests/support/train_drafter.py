"""Trains a tiny drafter in this process (one of several, under a launcher) for the tests.

Usage: train_drafter.py FOLDER [SETTING=VALUE ...]; values are JSON. `data=samples` takes rows of
different lengths. `stop=N` interrupts all processes after N steps: the state is saved then.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tenfold.testing.context import FakeContext
from tenfold_treeflash.training import DrafterTrainer
from training_cases import SETTINGS, Samples, Texts, small_base


def train(folder, data="texts", stop=None, **changes):
    """One training; equal arguments give equal weights on any number of processes."""
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    context = FakeContext(Path(folder), rank=rank, world_size=world)
    if stop is not None:
        seen = 0

        def count(done):
            nonlocal seen
            seen += 1
            if seen == stop:
                raise KeyboardInterrupt

        context.on_advance = count
    rows = {"texts": Texts, "samples": Samples}[data]()
    DrafterTrainer(small_base(), rows, **(SETTINGS | changes)).fit(context, None, {})


if __name__ == "__main__":
    pairs = (pair.split("=", 1) for pair in sys.argv[2:])
    train(sys.argv[1], **{key: json.loads(value) for key, value in pairs})
