"""Names for parts of a model's weights: `all`, `attention`, `mlp`, `kv`, `last-N-layers`, ...

Works on names alone, and imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable

from tenfold.errors import ConfigError

PATTERNS = {
    "all": r"",
    "attention": r"(?i)(attn|attention)\.",
    "mlp": r"(?i)mlp|feed_forward|ffn",
    "kv": r"(?i)k_proj|v_proj|key|value|c_attn",
    "lora": r"(?i)lora_",
}
ADAPTER = re.compile(PATTERNS["lora"])
_LAST_LAYERS = re.compile(r"last-(\d+)-layers")
_LAYER_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")


def name_matcher(
    which: str, names: Iterable[str], tables: Collection[str]
) -> Callable[[str], bool]:
    """Whether a weight belongs to the selection `which`.

    Args:
        which: see `weights.select_parameters`.
        names: of all weights.
        tables: those of embeddings.

    Raises:
        ConfigError: unknown selection.
    """
    if which == "no-embeddings":
        return lambda name: name not in tables
    if last := _LAST_LAYERS.fullmatch(which):
        numbers = {n: int(m.group(1)) for n in names if (m := _LAYER_NUMBER.search(n))}
        first = max(numbers.values(), default=-1) + 1 - int(last.group(1))
        return lambda name: numbers.get(name, -1) >= max(first, 0)
    if which.startswith("re:"):
        try:
            pattern = re.compile(which[3:])
        except re.error as error:
            raise ConfigError(f"params = {which!r} is not a regular expression: {error}") from None
    elif which in PATTERNS:
        pattern = re.compile(PATTERNS[which])
    else:
        known = ", ".join([*PATTERNS, "no-embeddings", "last-N-layers", "re:<pattern>"])
        raise ConfigError(f"params = {which!r} is unknown (known: {known})")
    return lambda name: pattern.search(name) is not None
