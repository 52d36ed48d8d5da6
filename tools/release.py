"""Bumps versions and builds the wheels into `dist/`; a dry run unless told otherwise.

    python tools/release.py minor                       # what would change
    python tools/release.py patch --package tenfold-nvium --write
    python tools/release.py none --write                # build only

A core release with a new minor version moves every plugin's range (`tenfold>=0.2,<0.3`), so
all packages are bumped together then. Nothing is uploaded and nothing is committed.
"""

from __future__ import annotations

import argparse
import difflib
import re
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from check_workspace import CORE, Package, core_range, load_packages

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("none", "patch", "minor", "major")


@dataclass
class Edits:
    """Planned file contents; nothing touches the disk before `write`."""

    root: Path
    contents: dict[Path, str] = field(default_factory=dict)

    def replace(self, path: Path, pattern: str, replacement: str) -> None:
        """Replaces the one match of a multi-line pattern.

        Raises:
            SystemExit: the pattern does not match exactly once.
        """
        text = self.contents.get(path) or path.read_text(encoding="utf-8")
        text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
        if count != 1:
            raise SystemExit(f"{path}: {count} places match {pattern!r}; one was expected")
        self.contents[path] = text

    def diff(self) -> str:
        """All edits as a unified diff."""
        parts = []
        for path, text in sorted(self.contents.items()):
            name = path.relative_to(self.root).as_posix()
            before = path.read_text(encoding="utf-8").splitlines(keepends=True)
            parts += difflib.unified_diff(
                before, text.splitlines(keepends=True), f"a/{name}", f"b/{name}", n=0
            )
        return "".join(parts)

    def write(self) -> None:
        """Writes every file."""
        for path, text in self.contents.items():
            path.write_text(text, encoding="utf-8")


def bumped(version: str, part: str) -> str:
    """The next version: `0.1.4` with `minor` is `0.2.0`."""
    numbers = [int(number) for number in version.split(".")]
    index = PARTS[:0:-1].index(part)
    return ".".join(map(str, [*numbers[:index], numbers[index] + 1, *[0] * (2 - index)]))


def plan(root: Path, packages: list[Package], part: str, today: str) -> Edits:
    """The edits that give each of `packages` its next version."""
    edits = Edits(root)
    for package in packages:
        new = bumped(package.version, part)
        old = re.escape(package.version)
        edits.replace(
            package.folder / "pyproject.toml", rf'^version = "{old}"$', f'version = "{new}"'
        )
        edits.replace(
            package.folder / "src" / package.module / "__init__.py",
            rf'^__version__ = "{old}"$',
            f'__version__ = "{new}"',
        )
        edits.replace(
            root / "workspace.toml", rf'^{package.name} = "{old}"$', f'{package.name} = "{new}"'
        )
        edits.replace(
            package.folder / "CHANGELOG.md",
            r"^## Unreleased$",
            f"## Unreleased\n\n## {new} ({today})",
        )
        for name in package.plugins:
            _edit_row(edits, root, name, "version", package.version, new)
    core = next((p for p in packages if p.name == CORE), None)
    if core is not None and part in ("minor", "major"):
        _move_ranges(edits, root, packages, core.version, bumped(core.version, part))
    return edits


def _edit_row(edits: Edits, root: Path, plugin: str, key: str, old: str, new: str) -> None:
    pattern = rf'^(\[plugins\.{plugin}\]\n(?:[^\[\n].*\n)*?{key} = )"{re.escape(old)}"'
    edits.replace(root / "plugins.toml", pattern, rf'\g<1>"{new}"')


def _move_ranges(edits: Edits, root: Path, packages: list[Package], old: str, new: str) -> None:
    before, after = core_range(old), core_range(new)
    for package in packages:
        if package.name == CORE:
            continue
        edits.replace(
            package.folder / "pyproject.toml",
            rf'^    "{CORE}(\[[a-z,]+\])?{re.escape(before)}",$',
            rf'    "{CORE}\g<1>{after}",',
        )
        for name in package.plugins:
            _edit_row(edits, root, name, "core", before, after)


def build(packages: list[Package], out: Path) -> None:
    """Builds a wheel and a source archive of each package.

    Raises:
        SystemExit: a build failed.
    """
    for package in packages:
        command = ["uv", "build", "--quiet", "--out-dir", str(out), str(package.folder)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{package.name} does not build:\n{done.stderr[-3000:]}")
        print(f"built {package.name}")


def main(arguments: list[str] | None = None) -> int:
    """Shows the edits, or makes them and builds with `--write`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS, help="which part of the version to raise")
    parser.add_argument("--package", action="append", help="only this package (repeatable)")
    parser.add_argument("--write", action="store_true", help="make the edits and build")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the wheels")
    args = parser.parse_args(arguments)
    packages = load_packages(ROOT)
    known = [package.name for package in packages]
    if unknown := set(args.package or ()) - set(known):
        parser.error(f"no package {sorted(unknown)[0]!r}; there are {', '.join(known)}")
    chosen = [p for p in packages if not args.package or p.name in args.package]
    moves_core = any(p.name == CORE for p in chosen) and args.part in ("minor", "major")
    if moves_core and len(chosen) < len(packages):
        parser.error("a new minor core version moves every plugin's range: release all packages")
    if args.part != "none":
        edits = plan(ROOT, chosen, args.part, datetime.now(UTC).date().isoformat())
        print(edits.diff())
        if args.write:
            edits.write()
    if args.write:
        build(chosen, args.out)
    else:
        print("dry run: nothing was written; add --write to do it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
