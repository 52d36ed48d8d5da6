"""From a row of a table to a record: which column is which field, and what it may hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tenfold.errors import ConfigError, nearest
from tenfold.records import RECORD_KINDS, Record
from tenfold.seeds import content_hash

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a record: its column, whether chat messages are allowed, and whether it
    may be missing."""

    name: str
    column: str
    messages: bool = False
    optional: bool = False

    def value(self, row: Row, where: str) -> Any:
        """The field's value in a row.

        Raises:
            ConfigError: the column is missing, or holds something else.
        """
        found = row.get(self.column)
        if found is None:
            if self.optional:
                return None
            state = "is empty" if self.column in row else "is missing"
            others = ", ".join(map(repr, row)) or "none"
            raise ConfigError(
                f"{where}: the column {self.column!r} {state}{nearest(self.column, row)} "
                f"(columns here: {others}; set {self.name}_column to name another)"
            )
        if isinstance(found, str) or (self.messages and _are_messages(found)):
            return found
        right = "a string, or a list of messages" if self.messages else "a string"
        if self.messages:
            right += ' {"role": ..., "content": ...}'
        raise ConfigError(
            f"{where}: the column {self.column!r} holds {_describe(found)}; it must be {right}"
        )


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in value
        )
    )


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:59] + '…'}"


@dataclass(frozen=True, slots=True)
class Mapped:
    """A record of a row, and whether its id was derived from its content."""

    record: Record
    derived: bool


@dataclass(frozen=True, slots=True)
class Columns:
    """Makes records of one kind from rows; other columns become metadata."""

    kind: str
    fields: tuple[Field, ...]
    id_column: str = "id"

    def record(self, row: Row, where: str) -> Mapped:
        """The record of a row; `where` names file and line in messages.

        A missing id is the hash of the record's fields. A column `metadata` that holds a
        table is merged with the other columns.

        Raises:
            ConfigError: a column is missing or of the wrong type.
        """
        values = {field.name: field.value(row, where) for field in self.fields}
        own = {field.column for field in self.fields} | {self.id_column}
        metadata = {name: plain(v) for name, v in row.items() if name not in own}
        if isinstance(inner := metadata.get("metadata"), dict):
            del metadata["metadata"]
            metadata = {**inner, **metadata}
        given = _id(row.get(self.id_column), self.id_column, where)
        name = given or content_hash([self.kind, values])
        record = RECORD_KINDS[self.kind](id=name, metadata=metadata, **values)
        return Mapped(record, derived=not given)


def _id(value: Any, column: str, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return value
    raise ConfigError(
        f"{where}: the id column {column!r} holds {_describe(value)}; "
        "it must be a string or an integer"
    )


def plain(value: Any) -> Any:
    """A value as JSON can hold it: dates and other foreign types become text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
