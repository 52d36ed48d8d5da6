"""A small model with a tokenizer, what it may learn from, and settings of a short training."""

from __future__ import annotations

import torch
from tenfold.lm.model import CausalLM
from tenfold.lm.tokenizer import train_bpe
from tenfold.records import SampleRecord, TextRecord
from treeflash_cases import llama

SETTINGS = {
    "layers": 1, "block_size": 5, "num_features": 2, "steps": 12, "steps_b": 8, "batch_size": 4,
    "context_length": 24, "anchors": 6, "bf16": False, "eval_rows": 4, "learning_rate": 5e-3,
}  # fmt: skip


class Texts:
    """A dataset of toy code."""

    kind = "text"

    def __init__(self, count=60):
        self._records = [
            TextRecord(id=str(i), text=f"def f{i % 7}(a, b):\n    return a + b + {i % 5}\n")
            for i in range(count)
        ]

    def splits(self):
        return ["train"]

    def load(self, split="", limit=None, shuffle_seed=None):
        return iter(self._records[:limit])

    def fingerprint(self, split=""):
        return f"{self.kind}-{len(self._records)}"


class Samples(Texts):
    """What a model wrote, rows of different lengths."""

    kind = "sample"

    def load(self, split="", limit=None, shuffle_seed=None):
        for i, record in enumerate(self._records[:limit]):
            text = record.text[: 20 + i % 15]
            yield SampleRecord(id=record.id, prompt=text[:9], completion=text[9:])


def small_base():
    """A random Llama with a tokenizer of its own."""
    tokenizer = train_bpe((r.text for r in Texts().load()), 280)
    model = llama(dtype=torch.float32, vocab_size=len(tokenizer), eos_token_id=0)
    return CausalLM(model, tokenizer)
