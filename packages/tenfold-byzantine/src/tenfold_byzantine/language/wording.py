"""Prompts from versioned data files (spec, 2.7).

A file has blocks per phase, role and awareness; a system prompt is its blocks in the order that
the file gives. The file's hash is part of every game's identity.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from string import Template
from typing import Any

from tenfold.errors import ConfigError, nearest

from tenfold_byzantine.contracts import View
from tenfold_byzantine.language import context as shown
from tenfold_byzantine.rules import Context

_FALLBACK = {"standard": "may_exist", "detailed": "may_exist"}
"""Awareness presets that vote with another one's prompt."""
ANY = "any"


@dataclass(frozen=True)
class Wording:
    """One version of all prompts.

    Attributes:
        version: its name.
        hash: SHA-256 of its file.
        table: the file.
    """

    version: str
    hash: str
    table: Mapping[str, Any]

    def system(self, view: View, awareness: str, order: str = "paper") -> str:
        """The system prompt of an agent and phase."""
        role = self.table[view.phase][view.role]
        blocks = role.get(awareness) or role.get(_FALLBACK.get(awareness, ANY)) or role.get(ANY)
        if blocks is None:
            raise ConfigError(
                f"prompts {self.version} have no awareness {awareness!r} for {view.role} agents"
                f"{nearest(awareness, role)}; they have: {', '.join(role)}"
            )
        shared = self.table["blocks"]
        named = {**shared, **blocks}
        named.setdefault("if_believe", "")
        chosen = [named.get(name, "") for name in self.table["order"][order]]
        written = []
        for text in chosen:
            for _ in range(2):  # blocks may name blocks, which name values
                text = Template(text).safe_substitute(named)
            written.append(text.strip())
        return _filled("\n\n".join(text for text in written if text), self._values(view))

    def user(self, view: View, context: Context) -> str:
        """The user prompt of an agent and phase."""
        parts = self.table["parts"]
        values = self._values(view) | {
            "history": shown.history(view, context, parts),
            "notes": shown.notes(view, context, parts),
            "allies": self._allies(view, context),
            "overheard": self._overheard(view, context),
        }
        if view.phase == "vote":
            values["listing"] = shown.listing(view, context, parts)
        return _filled(self.table["user"][f"{view.phase}_{view.role}"].strip(), values)

    def retry(self, reason: str) -> str:
        """What is added to a user prompt whose answer was not accepted."""
        return _filled(self.table["parts"]["retry"], {"reason": reason})

    def _allies(self, view: View, context: Context) -> str:
        if not view.allies:
            return ""
        names = ", ".join(f"agent_{ally}" for ally in view.allies)
        notes = shown.ally_notes(view, context) or self.table["parts"]["no_notes"]
        return _filled(self.table["parts"]["allies"], {"names": names, "notes": notes})

    def _overheard(self, view: View, context: Context) -> str:
        if not view.overheard:
            return ""
        lines = shown.messages(view.overheard, context.listing_chars)
        listing = "\n".join(lines) or self.table["parts"]["nobody"]
        return _filled(self.table["parts"]["overheard"], {"listing": listing})

    def _values(self, view: View) -> dict[str, Any]:
        rules = view.rules
        none = self.table["parts"]["no_value"]
        return {
            "agent": view.name,
            "agents": rules.agents,
            "low": rules.low,
            "high": rules.high,
            "quota": rules.quota,
            "max_rounds": rules.max_rounds,
            "round": view.round,
            "initial": none if view.initial is None else view.initial,
            "held": none if view.held is None else view.held,
        }


def _filled(text: str, values: Mapping[str, Any]) -> str:
    """One pass, so that what agents wrote is never read as a template."""
    return Template(text).substitute(values)


@cache
def wording(version: str = "v1") -> Wording:
    """The prompts of a version.

    Raises:
        ConfigError: there is no such version.
    """
    folder = resources.files("tenfold_byzantine.language") / "prompts"
    known = sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if ".toml" in f.name)
    if version not in known:
        raise ConfigError(
            f"there are no prompts {version!r}{nearest(version, known)}; known: {', '.join(known)}"
        )
    raw = (folder / f"{version}.toml").read_bytes()
    return Wording(version, hashlib.sha256(raw).hexdigest(), tomllib.loads(raw.decode()))
