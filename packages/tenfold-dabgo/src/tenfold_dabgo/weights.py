"""Which weights move, and how they are put in place and back.

Perturbed weights live in memory as plain tensors; the model itself is changed only inside
`borrowed`, which puts every bit back, whatever happens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from tenfold.capabilities import Grad
from tenfold.errors import ConfigError
from torch import Tensor, nn

from tenfold_dabgo.selections import ADAPTER, name_matcher

Weights = dict[str, Tensor]
"""Parameter name → value; names are those of `module.named_parameters()`."""


def select_parameters(module: nn.Module, which: str = "all") -> dict[str, nn.Parameter]:
    """Floating-point parameters by name, each tied weight once.

    Args:
        module: the model's module.
        which: `all`, `attention`, `mlp`, `kv` (keys and values; GPT-2's fused projection
            counts), `no-embeddings`, `last-N-layers`, `lora`, or `re:<pattern>` matched
            anywhere in the name.

    Raises:
        ConfigError: unknown selection, it selects nothing, or it would move the base weights
            of a model with a separate adapter (only `re:` may do that).
    """
    named = {n: p for n, p in module.named_parameters() if p.is_floating_point()}
    tables = {id(sub.weight) for sub in module.modules() if isinstance(sub, nn.Embedding)}
    matches = name_matcher(which, named, {n for n, p in named.items() if id(p) in tables})
    chosen = {n: p for n, p in named.items() if matches(n)}
    if not chosen:
        sample = ", ".join(list(named)[:4])
        hint = "the model has no adapter" if which == "lora" else "check the pattern"
        raise ConfigError(
            f"params = {which!r} selects none of the model's {len(named)} weights "
            f"(they are called {sample}, ...)",
            hint=hint,
        )
    _keep_base_of_adapter(named, chosen, which)
    return chosen


def _keep_base_of_adapter(named: Mapping[str, Any], chosen: Mapping[str, Any], which: str) -> None:
    """A model with an adapter was trained by moving the adapter; so is it perturbed."""
    adapter = [name for name in named if ADAPTER.search(name)]
    base = [name for name in chosen if not ADAPTER.search(name)]
    if adapter and base and not which.startswith("re:"):
        raise ConfigError(
            f"params = {which!r} would move {len(base)} weights of the base model, such as "
            f"{base[0]}, but the model carries an adapter of {len(adapter)} weights",
            hint='use params = "lora" to move the adapter only, merge_adapter = true to move '
            'the merged weights, or "re:<pattern>" to choose weights yourself',
        )


def copy_of(params: Mapping[str, Tensor]) -> Weights:
    """Copies of the current values."""
    return {name: p.detach().clone() for name, p in params.items()}


@torch.no_grad()
def load(params: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Copies values into the parameters, in place (tied weights and views follow)."""
    names = [name for name in params if name in weights]
    torch._foreach_copy_([params[n].data for n in names], [weights[n] for n in names])


def device_of(model: Grad) -> torch.device:
    """Device of the model's first parameter."""
    return next(iter(model.module().parameters())).device


@contextmanager
def borrowed(
    model: Grad, which: str = "all", *, grad: bool = True, train_mode: bool = False
) -> Iterator[dict[str, nn.Parameter]]:
    """The selected parameters, free to be changed inside the block.

    Dropout is off unless `train_mode`. Afterwards the weights are bit-identical (restored
    from a copy, never by subtracting a change), and so are training flags, `requires_grad`
    and gradients.
    """
    module = model.module()
    params = select_parameters(module, which)
    modes = [(sub, sub.training) for sub in module.modules()]
    wanted = [(p, p.requires_grad, p.grad) for p in module.parameters()]
    token = model.snapshot()
    try:
        module.train(train_mode)
        chosen = {id(p) for p in params.values()}
        for p, _, _ in wanted:
            if p.is_floating_point():
                p.requires_grad_(grad and id(p) in chosen)
        shards = getattr(model, "shards", None)
        yield params if shards is None else shards(params)
    finally:
        model.restore(token)
        for sub, mode in modes:
            sub.training = mode
        for p, required, gradient in wanted:
            p.requires_grad_(required)
            p.grad = gradient


def fingerprint(model: Grad) -> str:
    """The model's own `fingerprint()` when it offers one, else a hash of its weights."""
    own = getattr(model, "fingerprint", None)
    if callable(own):
        return str(own())
    return weights_hash(model.module().state_dict().items())


def weights_hash(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 prefix over names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in named:
        value = tensor.detach().contiguous().cpu()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
