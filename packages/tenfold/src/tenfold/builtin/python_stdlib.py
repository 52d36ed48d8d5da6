"""`core:python-stdlib`: the standard library on the user's own machine, as text records.

Real text with natural granularities (module, class, function, docstring) and known origins,
read where it lies. Splits go by module, so that no two of them share a file.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from tenfold.builtin.selection import Selection, Splits, shuffle
from tenfold.builtin.stdlib_source import (
    Module,
    content_hashes,
    definition_lines,
    definitions,
    docstring_of,
    find_modules,
    first_line,
    module_docstring,
)
from tenfold.errors import ConfigError
from tenfold.records import TextRecord
from tenfold.seeds import content_hash

VERSION = 1
"""Part of the fingerprint; raised when equal files would give other records."""


class PythonStdlib:
    """Text records of one unit; ids are `json.decoder:JSONDecoder.decode`.

    Metadata: `module`, `package`, `unit`, `qualname`, `lineno`, `docstring`, `summary` (the
    docstring's first line), and for docstrings `object` (module, class or function).

    Args:
        unit: `module`, `class`, `function` (methods too) or `docstring` (of all three).
        packages: only these packages or modules; empty means all.
        exclude: packages or modules to leave out.
        include_tests: whether the library's own tests count.
        min_chars: shorter texts are left out.
        max_chars: longer texts are left out.
        split: the split that `load` reads by default.
        validation: share of modules in the split `validation`.
        test: share of modules in the split `test`.
        limit: at most this many records.
        shuffle_seed: shuffle by this seed, before `limit`.

    Raises:
        ConfigError: an unknown module name, bad shares, or nothing left.
        ComponentError: this Python has no source files.
    """

    kind = "text"

    def __init__(
        self,
        unit: str = "module",
        packages: Sequence[str] = (),
        exclude: Sequence[str] = (),
        include_tests: bool = False,
        min_chars: int = 1,
        max_chars: int | None = None,
        split: str = "train",
        validation: float = 0.05,
        test: float = 0.05,
        limit: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        self.unit = unit
        self.min_chars, self.max_chars = min_chars, max_chars
        self.modules = find_modules(packages, exclude, include_tests=include_tests)
        self._splits = Splits(split, validation, test)
        self._selection = Selection(limit, shuffle_seed)

    def splits(self) -> Sequence[str]:
        """`train`, `validation`, `test` (where their share is above 0) and `all`."""
        return self._splits.names()

    def load(
        self, split: str = "", limit: int | None = None, shuffle_seed: int | None = None
    ) -> Iterator[TextRecord]:
        """Records by module name and line, or shuffled."""
        modules = modules_of(self.modules, self._splits, split)
        records = self._records(modules)
        seed = self._selection.seed(shuffle_seed)
        if seed is not None:
            shuffled = list(records)
            shuffle(shuffled, seed)
            records = iter(shuffled)
        return islice(records, self._selection.count(limit))

    def fingerprint(self, split: str = "") -> str:
        """Hash of the split's file contents and of everything that selects from them."""
        modules = modules_of(self.modules, self._splits, split)
        settings = [self.unit, self.min_chars, self.max_chars]
        selection = [self._selection.limit, self._selection.shuffle_seed]
        return content_hash(
            ["python-stdlib", VERSION, settings, selection, content_hashes(modules)]
        )

    def _records(self, modules: Sequence[Module]) -> Iterator[TextRecord]:
        for module in modules:
            for unit in module_units(module, self.unit):
                size = len(unit.text)
                if size >= self.min_chars and (self.max_chars is None or size <= self.max_chars):
                    yield unit.record(module)


def modules_of(modules: Sequence[Module], splits: Splits, split: str) -> list[Module]:
    """The modules of a split.

    Raises:
        ConfigError: there is no such split, or no module falls into it.
    """
    name = splits.check(split)
    chosen = [module for module in modules if splits.holds(name, module.name)]
    if not chosen:
        raise ConfigError(
            f"none of the {len(modules)} chosen modules falls into the split {name!r}",
            hint='choose more packages, a larger share, or split = "all"',
        )
    return chosen


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of a module before it becomes a record."""

    unit: str
    qualname: str
    lineno: int
    text: str
    docstring: str | None
    object: str = ""

    def record(self, module: Module) -> TextRecord:
        """The record, with where it comes from in its metadata."""
        metadata = {
            "module": module.name,
            "package": module.package,
            "unit": self.unit,
            "qualname": self.qualname,
            "lineno": self.lineno,
            "docstring": self.docstring,
            "summary": (self.docstring or "").partition("\n")[0],
        }
        if self.object:
            del metadata["docstring"]  # it is the text itself
            metadata["object"] = self.object
        name = f"{module.name}:{self.qualname}" if self.qualname else module.name
        return TextRecord(id=name, text=self.text, metadata=metadata)


def module_units(module: Module, unit: str) -> Iterator[Unit]:
    """The units of one module, in source order."""
    source = module.source()
    if unit == "module":
        yield Unit(unit, "", 1, source, module_docstring(source))
        return
    if unit == "docstring" and (text := module_docstring(source)):
        yield Unit(unit, "", 1, text, text, "module")
    lines = source.split("\n")
    for qualname, node in definitions(source):
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        docstring = docstring_of(node)
        if unit == "docstring" and docstring:
            yield Unit(unit, qualname, node.lineno, docstring, docstring, kind)
        elif unit == kind:
            text = "\n".join(definition_lines(lines, node))
            yield Unit(unit, qualname, first_line(node), text, docstring)
