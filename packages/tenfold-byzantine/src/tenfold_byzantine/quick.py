"""Cheaper constructors for the records that a game makes by the thousand.

A frozen dataclass sets each field through `object.__setattr__`, which makes building a `View` cost
several times the work that is done with it. `speed_up` gives such a class a constructor of the
same signature that fills the slots of an unfrozen twin and then turns it into the frozen class.
The records stay frozen, comparable and replaceable.
"""

from __future__ import annotations

from dataclasses import MISSING, fields, make_dataclass
from typing import Any

_ABSENT: Any = object()


def speed_up(record: Any) -> None:
    """Replaces the constructor of a dataclass made with `frozen=True, slots=True`."""
    twin = make_dataclass(
        f"_{record.__name__}", [(f.name, Any) for f in fields(record)], slots=True
    )
    names: dict[str, Any] = {
        "thaw": object.__setattr__,
        "Twin": twin,
        "Record": record,
        "ABSENT": _ABSENT,
    }
    signature, body = ["self"], ["thaw(self, '__class__', Twin)"]
    for f in fields(record):
        default = f.name
        if f.default is not MISSING:
            names[f"default_{f.name}"] = f.default
            default = f"{f.name}=default_{f.name}"
        elif f.default_factory is not MISSING:
            names[f"make_{f.name}"] = f.default_factory
            default = f"{f.name}=ABSENT"
            body.append(f"if {f.name} is ABSENT: {f.name} = make_{f.name}()")
        signature.append(default)
        body.append(f"self.{f.name} = {f.name}")
    body.append("self.__class__ = Record")
    source = f"def __init__({', '.join(signature)}):\n    " + "\n    ".join(body)
    exec(source, names)
    record.__init__ = names["__init__"]
