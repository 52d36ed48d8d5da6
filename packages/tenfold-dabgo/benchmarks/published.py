"""The published two-pass recipe, written anew and step for step, as the thing to be faster than.

One process per direction loads the model, takes K natural-gradient steps and saves a whole state
dict; a third process loads the model, then each saved state dict in turn, and evaluates the
corpus in batches of 30 in dataset order, padded to a multiple of 8, with a log-softmax over all
logits. (Left out on purpose: dropout in the steps and half precision in the pass, which change
the scores.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

BATCH = 30
STEPS, LR, DAMPING = 10, 1e-4, 1e-6
MULTIPLE = 8


def perturb(
    network: nn.Module, ids: Tensor, prompt: int, fisher: dict[str, Tensor], n: int, sign: int
) -> None:
    """K steps `theta += sign * (alpha / N) * g / (F + eps)` on the query's loss, in place."""
    labels = ids.clone()
    labels[:, :prompt] = -100
    for _ in range(STEPS):
        network.zero_grad()
        network(input_ids=ids, labels=labels).loss.backward()
        with torch.no_grad():
            for name, p in network.named_parameters():
                if p.grad is not None:
                    p.add_(sign * (LR / n) * p.grad / (fisher[name] + DAMPING))
    network.zero_grad()


def save(network: nn.Module, path: Path) -> None:
    """The whole state dict; shared tensors once."""
    save_file({n: p.detach().contiguous() for n, p in network.named_parameters()}, path)


def load(network: nn.Module, path: Path) -> None:
    """A saved state dict into the model."""
    network.load_state_dict(load_file(path), strict=False)


@torch.no_grad()
def losses(network: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    """`[N]` mean token losses, batches of 30 in dataset order."""
    out = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        width = max(map(len, part))
        width += -width % MULTIPLE
        ids = torch.zeros((len(part), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(part):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        logits = network(input_ids=ids, attention_mask=mask).logits
        log_probs = F.log_softmax(logits[:, :-1], dim=-1)
        nll = -log_probs.gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]
        out.append(nll.sum(1) / mask[:, 1:].sum(1).clamp(min=1))
    return torch.cat(out)
