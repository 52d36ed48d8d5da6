"""Drafters in other layouts: DFlash folders, and those of vLLM's `speculators`.

Both hold the backbone alone, under names without a prefix; an approximator has no place there.
`speculators` nests the layers' configuration, counts the layers it reads from 1 (the embeddings
are 0 there), and may carry the target's embeddings, which are left out here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tenfold.errors import ConfigError
from tenfold.files import replacing, write_json
from torch import Tensor

from tenfold_treeflash.modeling import TreeFlashDraftModel

FORMATS = ("treeflash", "dflash", "speculators")
_OTHERS = ("architectures", "auto_map", "block_size", "dflash_config", "treeflash_config",
           "num_target_layers", "ar_intermediate_size", "input_embedding_scale", "dtype",
           "transformers_version")  # fmt: skip
"""Entries that do not describe the layers."""


def is_speculators(values: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is one of `speculators`."""
    return "speculators_model_type" in values


def from_speculators(values: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a DFlash drafter of `speculators` in the published layout.

    Raises:
        ConfigError: another kind of speculator, or one with settings that have no equal here.
    """
    kind = values["speculators_model_type"]
    if kind != "dflash":
        raise ConfigError(f"it is a {kind!r} speculator; only dflash is read")
    layers = values.get("transformer_layer_config")
    ids = values.get("aux_hidden_state_layer_ids")
    if not isinstance(layers, dict) or not isinstance(ids, list) or not ids:
        raise ConfigError("it lacks transformer_layer_config or aux_hidden_state_layer_ids")
    if values.get("sample_from_anchor"):
        raise ConfigError("sample_from_anchor is set: its slots predict other positions than here")
    vocabulary = layers.get("vocab_size")
    if values.get("draft_vocab_size", vocabulary) != vocabulary:
        raise ConfigError(
            f"draft_vocab_size is {values['draft_vocab_size']} of {vocabulary}; drafters of a "
            "reduced vocabulary are not read"
        )
    if "sliding_attention" in (layers.get("layer_types") or []):
        raise ConfigError("its layers use sliding attention, which drafters here do not have")
    target = values.get("target_hidden_size")
    if target not in (None, layers.get("hidden_size")):
        raise ConfigError(f"target_hidden_size is {target}, another one than the drafter's own")
    dflash = {
        "mask_token_id": values.get("mask_token_id"),
        "target_layer_ids": [i - 1 for i in ids],
    }
    return {**layers, "block_size": values.get("block_size", 8), "dflash_config": dflash}


def save_dflash(drafter: TreeFlashDraftModel, folder: str | Path) -> list[str]:
    """Writes a DFlash folder; returns the parts that have no place there."""
    from tenfold_treeflash.checkpoints import published_config

    weights, left_out = _backbone(drafter)
    values = published_config(drafter)
    del values["treeflash_config"]
    values["architectures"] = ["DFlashDraftModel"]
    _write(Path(folder), weights, values)
    return left_out


def save_speculators(
    drafter: TreeFlashDraftModel, folder: str | Path, target: Any, name: str
) -> list[str]:
    """Writes a folder that `speculators` (0.9) and vLLM load; returns the parts left out.

    Args:
        target: the target's configuration.
        name: folder or repository that they find the target under.

    Raises:
        ConfigError: a learned mask, which that format has no place for.
    """
    config = drafter.config
    if config.mask_token_id is None:
        raise ConfigError("this drafter's mask is a learned vector; speculators needs a mask token")
    weights, left_out = _backbone(drafter)
    layers = {k: v for k, v in config.to_diff_dict().items() if k not in _OTHERS}
    values = {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": "dflash",
        "speculators_version": "0.9.0",
        "transformer_layer_config": {
            **layers, "model_type": "qwen3", "vocab_size": config.vocab_size,
            "head_dim": config.head_dim, "tie_word_embeddings": False,
        },
        "draft_vocab_size": config.vocab_size,
        "block_size": config.block_size,
        "aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        "mask_token_id": config.mask_token_id,
        "speculators_config": {
            "algorithm": "dflash",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": config.block_size - 1}
            ],
            "verifier": {
                "name_or_path": name, "architectures": list(target.architectures or []),
            },
        },
        "dtype": str(drafter.dtype).removeprefix("torch."),
    }  # fmt: skip
    _write(Path(folder), weights, values)
    return left_out


def _backbone(drafter: TreeFlashDraftModel) -> tuple[dict[str, Tensor], list[str]]:
    """The backbone's tensors without their prefix, and the first names of all others."""
    tensors = drafter.state_dict()
    kept = {
        name.removeprefix("model."): tensor.detach().cpu().contiguous()
        for name, tensor in tensors.items()
        if name.startswith("model.")
    }
    others = (name.partition(".")[0] for name in tensors if not name.startswith("model."))
    return kept, list(dict.fromkeys(others))


def _write(folder: Path, weights: dict[str, Tensor], values: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "model.safetensors") as path:
        save_file(weights, path, metadata={"format": "pt"})
    write_json(folder / "config.json", values)
