"""Seeds derived by name, so that no result depends on position, process or hash seed."""

from __future__ import annotations

import hashlib
import json
from typing import Any

# Made once: `json.dumps` builds an encoder at every call that is not its default.
_ENCODE = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode


def derive(root: int, *labels: object) -> int:
    """A 63-bit seed from a root seed and labels, by SHA-256 of their canonical JSON."""
    text = _ENCODE([root, *map(str, labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def content_hash(value: Any, length: int = 16) -> str:
    """Hex SHA-256 prefix of a JSON-able value's canonical form (sorted keys)."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]
