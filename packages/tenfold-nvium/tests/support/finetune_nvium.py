"""Continues a tiny N-vium in this process (one of several, under a launcher) for the tests.

Usage: finetune_nvium.py FOLDER CHECKPOINT PARTS.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from nvium_cases import Texts
from tenfold.testing.context import FakeContext
from tenfold_nvium.finetune import Finetuner

SETTINGS = {"steps": 6, "eval_steps": 3, "context_length": 48, "learning_rate": 5e-3, "bf16": False}


def finetune(folder, checkpoint, parts):
    """One training; equal arguments give equal weights on any number of processes."""
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    trainer = Finetuner(
        Texts(), str(checkpoint), train_parts=parts, hold_base_loss=parts == "all", **SETTINGS
    )
    trainer.fit(FakeContext(Path(folder), rank=rank, world_size=world), None, {})


if __name__ == "__main__":
    finetune(*sys.argv[1:])
