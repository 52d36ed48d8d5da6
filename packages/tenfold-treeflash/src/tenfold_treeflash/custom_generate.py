"""A folder for `model.generate(ids, custom_generate=FOLDER, trust_remote_code=True, drafter=...)`.

transformers reads `custom_generate/generate.py` of a folder; ours says where the function is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tenfold.files import write_text

from tenfold_treeflash.generation import generate as _generate

_SOURCE = '''"""Tree speculative decoding; needs tenfold-treeflash."""

from tenfold_treeflash.custom_generate import generate  # noqa: F401
'''
_OWN = ("drafter", "settings", "tokenizer", "seeds", "checked", "streamer", "budget")


def generate(model: Any, **arguments: Any) -> Any:
    """What transformers calls with all arguments of `model.generate`; `drafter=` is among them."""
    given = {name: value for name, value in arguments.items() if value is not None}
    inputs = given.pop("inputs", None)
    own = {name: given.pop(name) for name in _OWN if name in given}
    return _generate(model, inputs, drafter=own.pop("drafter", None), **own, **given)


def write_custom_generate(folder: str | Path) -> Path:
    """Writes the folder; beside a drafter's weights, too."""
    path = Path(folder) / "custom_generate" / "generate.py"
    write_text(path, _SOURCE)
    return path
