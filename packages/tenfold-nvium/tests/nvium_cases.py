"""Small models with well-mixed weights: random enough that every exit matters."""

from __future__ import annotations

import torch
from tenfold.records import TextRecord
from tenfold.seeds import content_hash
from tenfold_nvium.configuration import NviumConfig
from tenfold_nvium.modeling import NviumForCausalLM


def tiny_config(**changes) -> NviumConfig:
    values = {
        "vocab_size": 23,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "exit_layers": [1, 2, 3],
        "compute_penalty": 0.05,
        "bos_token_id": None,
        "eos_token_id": None,
        "loss_chunk_tokens": 0,
    }
    return NviumConfig(**(values | changes))


def shake(model: torch.nn.Module, seed: int = 0, scale: float = 0.3) -> None:
    """Random weights everywhere, adapters and gates included, so that no term is trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            base = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_((base + scale * noise).to(parameter.dtype))


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> NviumForCausalLM:
    model = NviumForCausalLM(tiny_config(**changes)).to(dtype).eval()
    shake(model, seed)
    return model


TEXTS = [
    f"def add_{i}(a, b):\n    # adds {i} numbers\n    return a + b + {i}\n" for i in range(60)
] + [f"class Point{i}:\n    def __init__(self, x):\n        self.x = x * {i}\n" for i in range(40)]


class Texts:
    """A dataset of toy code."""

    kind = "text"

    def __init__(self, texts=TEXTS) -> None:
        self._records = [TextRecord(id=str(i), text=text) for i, text in enumerate(texts)]

    def splits(self):
        return ["train"]

    def load(self, split="", limit=None, shuffle_seed=None):
        return iter(self._records[:limit])

    def fingerprint(self, split="") -> str:
        return content_hash([r.text for r in self._records])
