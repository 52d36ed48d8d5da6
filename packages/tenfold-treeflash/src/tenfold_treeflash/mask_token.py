"""Which token stands in the slots to be drafted."""

from __future__ import annotations

from typing import Any

from tenfold.errors import ConfigError

from tenfold_treeflash.target import Target

LEARNED = "learned"


def find_mask_token(target: Target, tokenizes: Any, mask: str) -> int | None:
    """The mask token's id, or None for a learned vector.

    `mask` is an id, `learned`, or `auto`: the tokenizer's own mask token, else a row of the
    embeddings that no token uses, else a padding token that does not end texts, else a learned
    vector.

    Raises:
        ConfigError: an id that the target has no row for, or another word.
    """
    rows = target.embedding.shape[0]
    if mask == LEARNED:
        return None
    if mask != "auto":
        try:
            number = int(mask)
        except ValueError:
            number = -1
        if not 0 <= number < rows:
            raise ConfigError(
                f"mask is {mask!r}; it must be auto, learned, or a token id below {rows}"
            )
        return number
    tokenizer = getattr(tokenizes, "tokenizer", None)
    own = getattr(tokenizer, "mask_token_id", None)
    if own is not None and own < rows:
        return int(own)
    if tokenizer is not None and len(tokenizer) < rows:
        return len(tokenizer)
    pad = getattr(tokenizes, "pad_id", None)
    if pad is not None and pad != getattr(tokenizes, "eos_id", None):
        return int(pad)
    return None
