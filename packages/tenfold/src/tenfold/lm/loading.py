"""Causal language models from checkpoint folders, or from the hub when that is allowed.

Only safetensors weights are read, so nothing is unpickled; a checkpoint that lacks a part is
refused with a message that names it.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tenfold.errors import ComponentError, ConfigError
from tenfold.lm.quiet import quiet
from tenfold.scale.process import local_device

FOLDER_HOLDS = (
    "a checkpoint folder holds config.json, *.safetensors weights and tokenizer files, as "
    "`save_pretrained` writes them"
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_INDEX = "model.safetensors.index.json"


def checkpoint_source(checkpoint: str, *, offline: bool) -> tuple[str, bool]:
    """What transformers is to load: `(folder or hub name, whether it is a folder)`.

    Raises:
        ConfigError: no such folder (and the hub is off, or it is no repository's name), or a
            folder that lacks a part of a checkpoint.
    """
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        check_folder(folder)
        return str(folder), True
    is_name = not checkpoint.startswith((".", "/", "~")) and checkpoint.count("/") <= 1
    if offline or not is_name:
        raise ConfigError(
            f"no checkpoint folder {checkpoint}",
            hint=f"{FOLDER_HOLDS}; set offline = false to load a hub repository",
        )
    return checkpoint, False


def check_folder(folder: Path) -> None:
    """Raises ConfigError naming the part of a checkpoint that a folder lacks."""
    config = folder / "config.json"
    if not config.is_file():
        raise ConfigError(f"{folder} has no config.json", hint=FOLDER_HOLDS)
    _read_json(config)
    if not any(folder.glob("*.safetensors")):
        pickled = [*folder.glob("*.bin"), *folder.glob("*.pt")]
        more = "; pickled weights are not read, convert them to safetensors" if pickled else ""
        raise ConfigError(f"{folder} has no *.safetensors weights{more}", hint=FOLDER_HOLDS)
    _check_shards(folder)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigError(f"{folder} has no tokenizer files", hint=FOLDER_HOLDS)


def _check_shards(folder: Path) -> None:
    """Raises ConfigError for weight files that the folder's own index names but lacks."""
    if not (folder / _INDEX).is_file():
        return
    table = _read_json(folder / _INDEX).get("weight_map", {})
    named = sorted(set(table.values()))
    if missing := [name for name in named if not (folder / name).is_file()]:
        raise ConfigError(
            f"{folder} lacks {len(missing)} of {len(named)} weight files, such as {missing[0]}",
            hint=FOLDER_HOLDS,
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}", hint=FOLDER_HOLDS) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object", hint=FOLDER_HOLDS)
    return value


def load_pretrained(
    source: str,
    *,
    dtype: str = "float32",
    attention: str = "sdpa",
    revision: str | None = None,
    trust_remote_code: bool = False,
    local_only: bool = True,
) -> tuple[Any, Any]:
    """`(model, tokenizer)` of a folder or hub repository, on the CPU.

    Raises:
        ConfigError: the checkpoint lacks some of its model's weights.
        ComponentError: transformers cannot load it.
    """
    shared: dict[str, Any] = {
        "local_files_only": local_only,
        "trust_remote_code": trust_remote_code,
        "revision": revision,
    }
    try:
        with quiet():
            tokenizer = _tokenizer_class(Path(source)).from_pretrained(source, **shared)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=getattr(torch, dtype),
                attn_implementation=attention,
                use_safetensors=True,
                output_loading_info=True,
                **shared,
            )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ComponentError(
            f"cannot load the checkpoint {source}: {reason}", hint=FOLDER_HOLDS
        ) from error
    model, report = loaded
    # transformers would fill missing weights with random numbers and go on.
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"the checkpoint {source} lacks {len(missing)} of its model's weights, such as "
            f"{missing[0]}",
            hint=FOLDER_HOLDS,
        )
    return model, tokenizer


def _tokenizer_class(folder: Path) -> Any:
    """What reads a checkpoint's tokenizer.

    `AutoTokenizer` goes by the model's type, and gives a tokenizer of a folder's own the
    normalizer and splitting rules of that type's original. Where the folder says that
    `tokenizer.json` is the whole tokenizer, it is.
    """
    config = folder / "tokenizer_config.json"
    if config.is_file() and (folder / "tokenizer.json").is_file():
        name = str(_read_json(config).get("tokenizer_class"))
        if name in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            return PreTrainedTokenizerFast
    return AutoTokenizer


def with_adapter(model: Any, adapter: str, *, merge: bool = True) -> Any:
    """The model with a PEFT adapter: merged into its weights, one plain model again, or as
    layers beside them, so that the adapter's weights can be told from the model's.

    Raises:
        ConfigError: the folder is no adapter with safetensors weights.
        ComponentError: peft is not installed, or the adapter is for another model.
    """
    folder = Path(adapter).expanduser()
    if not (folder / "adapter_config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{adapter} is no adapter: it must hold adapter_config.json and *.safetensors weights"
        )
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ComponentError(
            "an adapter needs the module 'peft', which is not installed", hint="install peft"
        ) from error
    try:
        adapted = peft.PeftModel.from_pretrained(model, str(folder))
        return adapted.merge_and_unload() if merge else adapted.base_model.model
    except (ValueError, RuntimeError, KeyError) as error:
        raise ComponentError(f"adapter {adapter} does not fit the model: {error}") from error


def usable_device(name: str) -> str:
    """This process's device of the kind `name`.

    Raises:
        ConfigError: no such device here.
    """
    kind = name.partition(":")[0]
    present = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if kind != "cpu" and not present.get(kind, lambda: False)():
        raise ConfigError(
            f"device {name!r} is not available here", hint='use device = "cpu", or "auto"'
        )
    return local_device(name)
