"""`core:hf` and `core:tiny-lm`: a causal language model from a checkpoint folder or the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tenfold.errors import ComponentError, ConfigError
from tenfold.lm.model import CausalLM

_FOLDER_HOLDS = (
    "a checkpoint folder holds config.json, *.safetensors weights and tokenizer files, as "
    "`save_pretrained` writes them"
)


def load(
    checkpoint: str,
    dtype: str | None = None,
    device: str | None = None,
    adapter: str | None = None,
    revision: str | None = None,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    offline: bool | None = True,
    batch_tokens: int = 8192,
) -> CausalLM:
    """The model of a checkpoint, with its tokenizer, ready for every capability.

    Only safetensors weights are read: nothing is unpickled.

    Args:
        checkpoint: folder, or a hub repository `owner/name` when `offline` is False.
        dtype: type of the weights; float32 by default.
        device: torch device; `cpu` by default.
        adapter: PEFT adapter folder.
        revision: hub revision.
        attention: attention implementation of transformers.
        trust_remote_code: run code that comes with the checkpoint.
        offline: never ask the hub.
        batch_tokens: most tokens in a batch.

    Raises:
        ConfigError: no such checkpoint, or an incomplete one.
        ComponentError: transformers cannot load it.
    """
    folder = Path(checkpoint).expanduser()
    local = folder.is_dir()
    if local:
        _check_folder(folder)
    elif offline or not _is_repository(checkpoint):
        raise ConfigError(
            f"no checkpoint folder {checkpoint}",
            hint=f"{_FOLDER_HOLDS}; set offline = false to load a hub repository",
        )
    source = str(folder) if local else checkpoint
    shared: dict[str, Any] = {
        "local_files_only": local or bool(offline),
        "trust_remote_code": trust_remote_code,
        "revision": revision,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **shared)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=getattr(torch, dtype or "float32"),
            attn_implementation=attention,
            use_safetensors=True,
            **shared,
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise ComponentError(
            f"cannot load the checkpoint {checkpoint}: {_first_line(error)}", hint=_FOLDER_HOLDS
        ) from error
    if adapter:
        model = _with_adapter(model, adapter)
    return CausalLM(
        model,
        tokenizer,
        device=device or "cpu",
        batch_tokens=batch_tokens,
        source=folder if local and not adapter else None,
    )


def _check_folder(folder: Path) -> None:
    """Raises ConfigError naming the part of a checkpoint that is missing."""
    config = folder / "config.json"
    if not config.is_file():
        raise ConfigError(f"{folder} has no config.json", hint=_FOLDER_HOLDS)
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{config} is not valid JSON: {error}", hint=_FOLDER_HOLDS) from error
    if not any(folder.glob("*.safetensors")):
        pickled = [*folder.glob("*.bin"), *folder.glob("*.pt")]
        more = "; pickled weights are not read, convert them to safetensors" if pickled else ""
        raise ConfigError(f"{folder} has no *.safetensors weights{more}", hint=_FOLDER_HOLDS)
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).is_file() for name in names):
        raise ConfigError(f"{folder} has no tokenizer files", hint=_FOLDER_HOLDS)


def _is_repository(name: str) -> bool:
    """Whether a name can be a hub repository: `name` or `owner/name`."""
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1


def _with_adapter(model: Any, adapter: str) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ComponentError(
            "an adapter needs the module 'peft', which is not installed", hint="install peft"
        ) from error
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise ConfigError(f"adapter folder {adapter} has no adapter_config.json")
    # Merged, so that every capability sees one plain model.
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
