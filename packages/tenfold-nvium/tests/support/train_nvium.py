"""Trains a tiny N-vium with a controlled penalty in this process (one of several, under a
launcher) for the tests.

Usage: train_nvium.py FOLDER [SETTING=VALUE ...]. Each process writes the betas it went through
to `FOLDER/betas-<rank>.json`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

import tenfold_nvium.trainers as trainers
import torch
from nvium_cases import Texts
from tenfold.testing.context import FakeContext
from tenfold_nvium.training import PenaltyCallback

CURVE = {"3": 6.05, "6": 5.7, "9": 5.75, "12": 4.9}
"""A baseline in whose neighbourhood the tiny model's loss runs, so that every move differs."""
SETTINGS = {"preset": "tiny", "steps": 12, "eval_steps": 3, "compute_penalty": 0.3, "bf16": False}


def train(folder, **changes):
    """One training; equal arguments give equal weights on any number of processes."""
    torch.set_num_threads(1)
    folder = Path(folder)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    curve = folder / f"curve-{rank}.json"
    curve.write_text(json.dumps(CURVE))
    made = []

    class Watched(PenaltyCallback):
        def __init__(self, model, controller):
            super().__init__(model, controller)
            made.append(controller)

    with patch.object(trainers, "PenaltyCallback", Watched):
        trainer = trainers.Pretrainer(Texts(), controller=str(curve), **(SETTINGS | changes))
        trainer.fit(FakeContext(folder, rank=rank, world_size=world), None, {})
    (controller,) = made
    (folder / f"betas-{rank}.json").write_text(json.dumps(controller.history))


if __name__ == "__main__":
    train(sys.argv[1], **{k: int(v) for k, v in (pair.split("=") for pair in sys.argv[2:])})
