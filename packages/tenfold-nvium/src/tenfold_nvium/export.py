"""Export of a checkpoint into a folder that loads without this package.

The folder holds weights, tokenizer and the model's code: the modules that `modeling` needs, one
file each, with their imports rewritten. `AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True)` reads it on any machine with torch and transformers; where this package
is installed too, its own classes are used.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from importlib.metadata import version
from pathlib import Path

from tenfold.errors import ConfigError
from tenfold.files import write_json

from tenfold_nvium.checkpoints import (
    check_new,
    copy_tokenizer,
    new_folder,
    read_config,
    read_weights,
)
from tenfold_nvium.configuration import NviumConfig
from tenfold_nvium.modeling import NviumForCausalLM

_ROOTS = ("tenfold", "tenfold_nvium")
_IMPORT = re.compile(rf"^(\s*from )((?:{'|'.join(_ROOTS)})\.[\w.]+)( import )", re.MULTILINE)


def export_folder(checkpoint: str | Path, out: str | Path) -> list[str]:
    """Writes the folder, complete or not at all; returns the names of its files.

    Raises:
        ConfigError: no N-vium checkpoint there; or `out` exists and is not an empty folder.
        ComponentError: transformers cannot load the checkpoint.
    """
    source, target = Path(checkpoint).expanduser(), Path(out).expanduser()
    check_new(target)
    kind = read_config(source).model_type
    if kind != NviumConfig.model_type:
        raise ConfigError(
            f"{source} holds a {kind!r} model, not an N-vium",
            hint="transformers loads dense models as they are; `tenfold nvium convert` gives exits",
        )
    network = read_weights(source)
    with new_folder(target) as folder:
        network.save_pretrained(folder)
        copy_tokenizer(source, folder)
        for module, text in model_code().items():
            (folder / _file_name(module)).write_text(text, encoding="utf-8")
        _name_classes(folder / "config.json", network)
    return sorted(path.name for path in target.iterdir())


def model_code() -> dict[str, str]:
    """Module name to its source as the folder has it, for all that `modeling` imports."""
    code: dict[str, str] = {}
    waiting = [NviumForCausalLM.__module__]
    while waiting:
        module = waiting.pop()
        if module not in code:
            source = _source(module)
            waiting += [found[2] for found in _IMPORT.finditer(source)]
            code[module] = _for_export(source)
    return code


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def _for_export(source: str) -> str:
    """A module with relative imports, and without its registrations: code of a folder must not
    replace the classes of an installed package."""
    lines = source.splitlines()
    for statement in ast.parse(source).body:
        if _registers(statement):
            assert statement.end_lineno is not None
            for number in range(statement.lineno - 1, statement.end_lineno):
                lines[number] = ""
    text = "\n".join(lines).rstrip() + "\n"
    text = _IMPORT.sub(lambda m: f"{m[1]}.{_module_name(m[2])}{m[3]}", text)
    return f"# From tenfold-nvium {version('tenfold-nvium')}, MIT License.\n{text}"


def _registers(statement: ast.stmt) -> bool:
    """Whether a statement is `Auto....register(...)`."""
    call = statement.value if isinstance(statement, ast.Expr) else None
    called = call.func if isinstance(call, ast.Call) else None
    return isinstance(called, ast.Attribute) and called.attr == "register"


def _module_name(module: str) -> str:
    return f"{module.rpartition('.')[2]}_nvium"


def _file_name(module: str) -> str:
    return f"{_module_name(module)}.py"


def _name_classes(path: Path, network: NviumForCausalLM) -> None:
    """Tells transformers which classes of the folder to load."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {
        auto: f"{_module_name(cls.__module__)}.{cls.__name__}"
        for auto, cls in (
            ("AutoConfig", type(network.config)),
            ("AutoModelForCausalLM", type(network)),
        )
    }
    write_json(path, config)
