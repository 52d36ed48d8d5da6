"""Reading tables of a settings file, with errors that name the file and the field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tenfold.errors import ConfigError, nearest


class Table:
    """One table of a file: its values, and where it stands.

    Raises:
        ConfigError: it is not a table.
    """

    def __init__(self, values: Any, source: str, path: str = "") -> None:
        self.source = source
        self.path = path
        if not isinstance(values, Mapping):
            raise ConfigError(f"{self.where} is {values!r}; it must be a table of settings")
        self.values: Mapping[str, Any] = values

    @property
    def where(self) -> str:
        """The file and the table's name, for messages."""
        return f"{self.source}: [{self.path}]" if self.path else self.source

    @property
    def where_key(self) -> str:
        """The table's own name."""
        return self.path

    def name(self, key: str) -> str:
        """The full name of a field, for messages."""
        return f"{self.source}: {self.path}.{key}" if self.path else f"{self.source}: {key}"

    def _below(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def only(self, *known: str) -> None:
        """Refuses keys that mean nothing.

        Raises:
            ConfigError: an unknown key; it names the nearest known one.
        """
        for key in self.values:
            if key not in known:
                raise ConfigError(
                    f"{self.name(key)} is not a setting{nearest(key, known)}",
                    hint=f"known here: {', '.join(sorted(known))}",
                )

    def table(self, key: str) -> Table:
        """A table below this one, empty where it is not given."""
        return Table(self.values.get(key, {}), self.source, self._below(key))

    def tables(self, key: str) -> list[Table]:
        """An array of tables below this one."""
        return [
            Table(entry, self.source, f"{self._below(key)}[{i}]")
            for i, entry in enumerate(self.sequence(key))
        ]

    def sequence(self, key: str) -> Sequence[Any]:
        """A list."""
        value = self.values.get(key, ())
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ConfigError(f"{self.name(key)} is {value!r}; it must be a list")
        return value

    def flags(self, *known: str) -> dict[str, bool]:
        """True and false settings."""
        self.only(*known)
        for key, value in self.values.items():
            if not isinstance(value, bool):
                raise ConfigError(f"{self.name(key)} is {value!r}; it must be true or false")
        return dict(self.values)
