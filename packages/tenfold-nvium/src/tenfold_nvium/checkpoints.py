"""Reading checkpoint folders: configuration, weights, tokenizer; every failure is one clear
error that names the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tenfold.errors import ComponentError, ConfigError
from tenfold.lm.quiet import quiet
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import tenfold_nvium.modeling  # noqa: F401 - registers the model type

FOLDER_HOLDS = "a checkpoint folder is what `save_pretrained` writes"


def read_config(folder: Path, hint: str = FOLDER_HOLDS) -> Any:
    """The model configuration of a folder.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} is no checkpoint: it has no config.json", hint=hint)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"cannot read {path}: {_reason(error)}") from error


def read_weights(folder: Path, dtype: str | torch.dtype | None = None) -> Any:
    """The folder's model on the CPU, evaluation mode; `dtype` None keeps the checkpoint's own.
    Only safetensors are read.

    Raises:
        ConfigError: the checkpoint lacks weights of its own configuration.
        ComponentError: transformers cannot load it.
    """
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=kind or "auto", local_files_only=True, use_safetensors=True,
                output_loading_info=True,
            )  # fmt: skip
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise ComponentError(
            f"cannot load the checkpoint {folder}: {_reason(error)}", hint=FOLDER_HOLDS
        ) from error
    network, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"{folder} lacks {len(missing)} weights of its own configuration, such as "
            f"{missing[0]}; the checkpoint is incomplete"
        )
    return network.eval()


def read_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer.

    Raises:
        ConfigError: it has none that can be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder} has no tokenizer that can be loaded: {_reason(error)}", hint=FOLDER_HOLDS
        ) from error


def _reason(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
