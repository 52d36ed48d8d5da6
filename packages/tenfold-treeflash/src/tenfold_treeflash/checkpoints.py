"""Drafter checkpoints: reading and writing the published layout, without remote code.

A TreeFlash folder holds a `config.json` of `model_type: qwen3` and the names `model.*` and
`ar_approximation.*`; a DFlash folder has the backbone's names without the prefix and no
approximator; so has one of `speculators` (see `formats`), which is read too. Embeddings and head
are never in it: those are the target's.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tenfold.errors import ComponentError, ConfigError
from tenfold.files import replacing, write_json
from torch import Tensor
from transformers.initialization import no_init_weights

from tenfold_treeflash.configuration import TreeFlashConfig, from_published
from tenfold_treeflash.formats import from_speculators, is_speculators
from tenfold_treeflash.modeling import TreeFlashDraftModel

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_OWN_PARTS = ("model.", "ar_approximation.", "mask_embedding")
_TARGETS_PARTS = (
    "embed_tokens.", "lm_head.", "model.embed_tokens.", "verifier_lm_head.", "verifier_norm.",
    "t2d", "d2t",
)  # fmt: skip
"""What some exporters add; the target has it already."""
_SHOWN = 4


def read_config(folder: str | Path, **changes: Any) -> TreeFlashConfig:
    """A drafter folder's configuration.

    Args:
        changes: entries that replace the file's.

    Raises:
        ConfigError: no such folder, no or a broken `config.json`, values that make no drafter.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ConfigError(f"{folder} is no drafter checkpoint: it has no {CONFIG}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no table of settings")
    try:
        if is_speculators(values):
            values = from_speculators(values)
        if "hidden_size" not in values:
            raise ConfigError("says no hidden_size; it describes no drafter")
        return from_published(values | changes)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} describes no drafter: {error}") from error


def load_drafter(
    folder: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    ar_approximation: str | None = None,
) -> TreeFlashDraftModel:
    """A drafter from a TreeFlash or DFlash folder, in evaluation mode.

    Args:
        dtype: of the weights; None keeps the file's.
        ar_approximation: gives a DFlash backbone, which has none, a new approximator (it starts
            at zero, to be trained); None keeps what the folder says.

    Raises:
        ConfigError: files, weights or shapes are missing, broken or of another configuration.
    """
    folder = Path(folder)
    changes = {}
    if ar_approximation is not None:
        own = read_config(folder)
        treeflash = {"candidate_tokens": own.candidate_tokens, "ar_approximation": ar_approximation}
        changes = {"treeflash_config": treeflash, "ar_approximation": ar_approximation}
    config = read_config(folder, **changes)
    weights = _own_names(_read_weights(folder))
    new = ar_approximation is not None and not any(n.startswith(_OWN_PARTS[1]) for n in weights)
    with nullcontext() if new else no_init_weights():
        drafter = TreeFlashDraftModel(config)
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    drafter = drafter.to(kind or next(iter(weights.values())).dtype)
    _fill(folder, drafter, weights, new_approximator=new)
    return drafter.to(device).eval()


def save_drafter(drafter: TreeFlashDraftModel, folder: str | Path) -> None:
    """Writes the published layout: `config.json` and `model.safetensors`, each complete or not at
    all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in drafter.state_dict().items()}
    with replacing(folder / WEIGHTS) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    write_json(folder / CONFIG, published_config(drafter))


def published_config(drafter: TreeFlashDraftModel) -> dict[str, Any]:
    """The `config.json` of a drafter in the published layout."""
    config = drafter.config
    values = config.to_dict()
    for name in ("_name_or_path", "torch_dtype"):
        values.pop(name, None)
    return values | {
        "model_type": "qwen3",
        "architectures": ["TreeFlashDraftModel"],
        "block_size": config.block_size,
        "num_target_layers": config.num_target_layers,
        "dflash_config": dict(config.dflash_config or {}),
        "treeflash_config": dict(config.treeflash_config or {}),
        "tie_word_embeddings": False,
        "dtype": str(drafter.dtype).removeprefix("torch."),
    }


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, in one file or in shards."""
    index = folder / INDEX
    names = [WEIGHTS]
    if index.is_file() and not (folder / WEIGHTS).is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index} is no index of weights: {error}") from error
    out: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ConfigError(f"{folder} has no {name}: the drafter's weights are missing")
        try:
            out |= load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise ConfigError(
                f"cannot read {path}: {error}; it is damaged or incomplete"
            ) from error
    return out


def _own_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's names with their prefix (DFlash folders leave it out)."""
    kept = {n: t for n, t in weights.items() if not n.startswith(_TARGETS_PARTS)}
    return {n if n.startswith(_OWN_PARTS) else f"model.{n}": t for n, t in kept.items()}


def _fill(
    folder: Path,
    drafter: TreeFlashDraftModel,
    weights: dict[str, Tensor],
    *,
    new_approximator: bool,
) -> None:
    """Copies the weights; raises ConfigError where names or shapes are not the configuration's."""
    wanted = drafter.state_dict()
    missing = [
        name for name in wanted
        if name not in weights and not (new_approximator and name.startswith("ar_approximation."))
    ]  # fmt: skip
    surplus = [name for name in weights if name not in wanted]
    if missing or surplus:
        parts = [
            f"{what} {len(names)} ({', '.join(names[:_SHOWN])})"
            for what, names in (("lacks", missing), ("has unknown", surplus))
            if names
        ]
        raise ConfigError(
            f"the weights in {folder} are not those of its {CONFIG}: it {' and '.join(parts)}"
        )
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            raise ConfigError(
                f"{name} in {folder} has shape {list(tensor.shape)}; its {CONFIG} says "
                f"{list(wanted[name].shape)}"
            )
        if not tensor.dtype.is_floating_point:
            raise ComponentError(
                f"{name} in {folder} is {tensor.dtype}; quantised drafters are not read"
            )
    drafter.load_state_dict(weights, strict=not new_approximator)
