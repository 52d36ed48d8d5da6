"""Checkpoint folders: reading their configuration, weights and tokenizer, writing new ones; every
failure is one clear error that names the folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tenfold.errors import ComponentError, ConfigError
from tenfold.files import disk_full_is_an_error
from tenfold.lm.quiet import quiet
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import tenfold_nvium.modeling  # noqa: F401 - registers the model type

FOLDER_HOLDS = "a checkpoint folder is what `save_pretrained` writes"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


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


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block succeeds: complete or not at all.

    Raises:
        ConfigError: writing there would replace something.
    """
    check_new(target)
    target = target.absolute()
    partial = target.with_name(f".{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with disk_full_is_an_error(partial), quiet():
            partial.mkdir()
            yield partial
        if target.is_dir():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new(target: Path) -> None:
    """Raises ConfigError when writing a folder there would replace something."""
    if target.is_file():
        raise ConfigError(f"{target} is a file; give a folder that does not exist yet")
    if target.is_dir() and target.samefile("."):
        raise ConfigError(f"{target} is the current folder; give a new one")
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(
            f"{target} is not empty; nothing is overwritten",
            hint="give a folder that does not exist yet, or remove this one",
        )


def copy_tokenizer(source: Path, target: Path) -> None:
    """A folder's tokenizer, file by file; a folder without one leaves the other without one.

    Where no file says which class reads it, the model's type did; that answer is written down.
    """
    present = [name for name in _TOKENIZER_FILES if (source / name).is_file()]
    if not present:
        return
    settings = source / "tokenizer_config.json"
    named = settings.is_file() and '"tokenizer_class"' in settings.read_text(encoding="utf-8")
    if named:
        for name in present:
            shutil.copyfile(source / name, target / name)
        return
    read_tokenizer(source).save_pretrained(target)


def _reason(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
