"""Copies and content hashes of a module's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tenfold.errors import ConfigError

_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class WeightSnapshot:
    """A copy of every parameter and buffer, by name; tied weights are held once."""

    tensors: dict[str, Tensor]


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers (those never saved included), each tensor once."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def snapshot(module: nn.Module) -> WeightSnapshot:
    """A copy of the weights, on the device they are on."""
    return WeightSnapshot({name: t.detach().clone() for name, t in named_tensors(module)})


@torch.no_grad()
def restore(module: nn.Module, token: WeightSnapshot) -> None:
    """Writes a snapshot back bit for bit, in place: optimizers and ties keep their tensors.

    Raises:
        ConfigError: the snapshot is of another module.
    """
    present = dict(named_tensors(module))
    shapes = {name: t.shape for name, t in present.items()}
    if shapes != {name: t.shape for name, t in token.tensors.items()}:
        raise ConfigError("the snapshot belongs to another model: names or shapes differ")
    for name, tensor in present.items():
        tensor.copy_(token.tensors[name])


def hash_tensors(module: nn.Module) -> str:
    """Content hash of all weights (names, types, shapes, bytes)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors(module)):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # Bytes rather than numbers: numpy has no bfloat16.
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(data.numpy().tobytes())
    return digest.hexdigest()[:16]


def hash_files(paths: Iterable[Path]) -> str:
    """Content hash of files, in the order of their names; where they lie does not count."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()[:16]
