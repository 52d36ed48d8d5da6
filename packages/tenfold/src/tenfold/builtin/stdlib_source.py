"""The Python standard library as source: its modules, and the definitions inside them.

Nothing is imported or executed; files are read where they lie and parsed with `ast`.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import json
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tenfold.errors import ComponentError, ConfigError, TenfoldError, nearest
from tenfold.files import write_text
from tenfold.workspace import find_workspace

_FOREIGN = frozenset({"site-packages", "dist-packages", "__pycache__"})
_TESTS = frozenset({"test", "tests", "idle_test"})
_GENERATED = re.compile(r"_sysconfigdata_.*")
"""Written when this Python was built; full of the builder's paths."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True, slots=True)
class Module:
    """One module of the library: its dotted name and its file."""

    name: str
    path: Path

    @property
    def package(self) -> str:
        """The top-level package or module: `json` for `json.decoder`."""
        return self.name.partition(".")[0]

    def source(self) -> str:
        """The file's text, in the encoding that it declares, with `\\n` line ends."""
        with tokenize.open(self.path) as file:
            return file.read()


def find_modules(
    packages: Iterable[str] = (),
    exclude: Iterable[str] = (),
    *,
    include_tests: bool = False,
    root: Path | None = None,
) -> list[Module]:
    """The library's modules by name.

    Args:
        packages: only these packages or modules with all below them; empty means all.
        exclude: packages or modules to leave out.
        include_tests: whether the library's own tests count.
        root: the library's folder; by default this Python's.

    Raises:
        ComponentError: there is no source to read.
        ConfigError: a name in `packages` or `exclude` is no module.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    found = sorted(_walk(root, include_tests), key=lambda module: module.name)
    if not found:
        raise ComponentError(
            f"no Python source in {root}, where this Python's standard library should be",
            hint="use a Python installation that has its source files (most do)",
        )
    wanted, unwanted = list(packages), list(exclude)
    names = {name for module in found for name in _ancestors(module.name)}
    for name in (*wanted, *unwanted):
        if name not in names:
            raise ConfigError(
                f"the standard library in {root} has no module {name!r}{nearest(name, names)}"
            )
    return [
        module
        for module in found
        if (not wanted or _below(module.name, wanted)) and not _below(module.name, unwanted)
    ]


def _walk(root: Path, include_tests: bool) -> Iterator[Module]:
    skipped = _FOREIGN if include_tests else _FOREIGN | _TESTS
    for folder, subfolders, files in os.walk(root):
        # Other folders (`config-3.12-x86_64-linux-gnu`) hold no importable modules.
        subfolders[:] = [s for s in subfolders if s.isidentifier() and s not in skipped]
        parts = Path(folder).relative_to(root).parts
        for file in files:
            stem, _, ending = file.rpartition(".")
            if ending != "py" or not stem.isidentifier() or _GENERATED.fullmatch(stem):
                continue
            name = ".".join(parts if stem == "__init__" else (*parts, stem))
            if name:
                yield Module(name, Path(folder, file))


def _ancestors(name: str) -> Iterator[str]:
    """A dotted name and every package around it."""
    parts = name.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def _below(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def definitions(source: str) -> Iterator[tuple[str, Definition]]:
    """Classes and functions with their unique qualified names, in source order.

    Functions inside functions belong to the outer one and are not listed. A name that is
    defined again (property setters, `try`/`except` alternatives) gets `#2`, `#3`, ...
    Source that this Python cannot parse has none.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    counts: dict[str, int] = {}
    for qualname, node in _walk_definitions(tree.body, ""):
        counts[qualname] = number = counts.get(qualname, 0) + 1
        yield (qualname if number == 1 else f"{qualname}#{number}"), node


def _walk_definitions(body: Iterable[ast.AST], prefix: str) -> Iterator[tuple[str, Definition]]:
    for node in body:
        if isinstance(node, Definition):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _walk_definitions(node.body, f"{prefix}{node.name}.")
            continue
        for part in ("body", "handlers", "orelse", "finalbody", "cases"):
            yield from _walk_definitions(getattr(node, part, ()), prefix)


def first_line(node: ast.AST) -> int:
    """A statement's first line, decorators included (1-based)."""
    decorators = getattr(node, "decorator_list", ())
    return min([node.lineno, *(d.lineno for d in decorators)])  # ty: ignore[missing-attribute]


def dedented(lines: list[str]) -> list[str]:
    """Lines without the first one's indentation; lines with less of it (inside strings) stay."""
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    return [line.removeprefix(indent) for line in lines]


def definition_lines(lines: list[str], node: Definition) -> list[str]:
    """A definition's own source lines, decorators included, dedented."""
    return dedented(lines[first_line(node) - 1 : node.end_lineno])


def module_docstring(source: str) -> str | None:
    """A module's docstring, cleaned; reads no further than it needs to."""
    skipped = (tokenize.COMMENT, tokenize.NL)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    with suppress(tokenize.TokenError, SyntaxError, ValueError):
        first = next(token for token in tokens if token.type not in skipped)
        if first.type == tokenize.STRING and next(tokens).type == tokenize.NEWLINE:
            value = ast.literal_eval(first.string)
            return inspect.cleandoc(value).strip() if isinstance(value, str) else None
    return None


def docstring_of(node: Definition) -> str | None:
    """A definition's docstring, cleaned; None without one."""
    text = ast.get_docstring(node)
    return None if text is None else text.strip()  # blanks before the closing quotes stay in


def content_hashes(modules: Iterable[Module]) -> dict[str, str]:
    """SHA-256 of each module's file, by module name.

    Kept in the cache folder and reused while a file's size and modification time are the
    same, so that a fingerprint costs one look at each file.
    """
    modules = list(modules)
    path = find_workspace().path("cache") / "stdlib-hashes.json"
    known = _read_hashes(path)
    rows = {str(module.path): _hash_row(module.path, known) for module in modules}
    if any(known.get(name) != row for name, row in rows.items()):
        with suppress(OSError, TenfoldError):  # an unwritable cache only costs time
            write_text(path, json.dumps({**known, **rows}))
    return {module.name: str(rows[str(module.path)][2]) for module in modules}


def _hash_row(path: Path, known: Mapping[str, list[object]]) -> list[object]:
    status = path.stat()
    row = known.get(str(path), [])
    if row[:2] == [status.st_size, status.st_mtime_ns]:
        return row
    return [status.st_size, status.st_mtime_ns, _digest(path)]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_hashes(path: Path) -> dict[str, list[object]]:
    try:
        rows = json.loads(path.read_bytes())
        return {name: row for name, row in rows.items() if len(row) == 3}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
