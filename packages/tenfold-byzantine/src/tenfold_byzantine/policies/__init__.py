"""How agents behave: exact rules and algorithms, filters around them, and adversaries.

`registry.policy("dlpsw:f=2")` builds one from its text; every class here is a frozen dataclass
whose fields are its parameters, a `contracts.Policy`, and a function of a view alone.
"""

from __future__ import annotations

from tenfold_byzantine.policies.registry import Entry, entries, policy, with_filter

__all__ = ["Entry", "entries", "policy", "with_filter"]
