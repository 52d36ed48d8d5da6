"""Trains a tiny model in this process (one of several, under a launcher) for the tests.

Usage: train_worker.py FOLDER [SETTING=VALUE ...]; `kill=N` kills the process after step N,
`term=N` sends SIGTERM to rank 1 then.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from lm_models import TEXTS, network, tokenizer
from tenfold.lm.packing import pack_tokens
from tenfold.lm.training import TrainingPlan, fit_causal_lm
from tenfold.testing.context import FakeContext

DEFAULTS = {
    "steps": 8, "batch_size": 8, "context_length": 16, "save_steps": 3, "log_steps": 1,
    "learning_rate": 3e-3,
}  # fmt: skip


def train(folder, on_advance=None, callbacks=(), compute_loss=None, dropout=0.1, **changes):
    """One training; equal arguments give equal weights."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    ctx = FakeContext(Path(folder), rank=rank, world_size=world, on_advance=on_advance)
    model = network(scale=0.05, attention_dropout=dropout)
    rows = pack_tokens(TEXTS * 6, tokenizer(), 16)
    kept, held_out = rows.split(5)
    plan = TrainingPlan(**{**DEFAULTS, **changes})
    checkpoint = fit_causal_lm(
        ctx, model, tokenizer(), kept, plan,
        eval_dataset=held_out, callbacks=callbacks, compute_loss=compute_loss,
    )  # fmt: skip
    return ctx, checkpoint


def main() -> None:
    """Trains as the command line says."""
    settings = dict(pair.split("=") for pair in sys.argv[2:])
    kill, term = int(settings.pop("kill", "0")), int(settings.pop("term", "0"))

    def on_advance(done: int) -> None:
        if kill and done >= kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if term and done == term and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    numbers = {name: int(value) for name, value in settings.items()}
    train(sys.argv[1], on_advance, **{"dropout": 0.0, **numbers})


if __name__ == "__main__":
    main()
