"""`tenfold init plugin NAME`: a package with one component of each usual kind, and tests."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from string import Template

from tenfold import __version__
from tenfold.cli import COMMANDS
from tenfold.cli.output import print_json
from tenfold.cli.parser import Actions
from tenfold.errors import EXIT_OK, ConfigError
from tenfold.spec import NAME_PATTERN

SUMMARY = "start a new plugin package"

# File of the new package → template; both are filled in.
_FILES = {
    "pyproject.toml": "pyproject.toml.tmpl",
    "README.md": "README.md.tmpl",
    "src/$package/__init__.py": "init.py.tmpl",
    "src/$package/plugin.py": "plugin.py.tmpl",
    "src/$package/models.py": "models.py.tmpl",
    "src/$package/datasets.py": "datasets.py.tmpl",
    "src/$package/evaluators.py": "evaluators.py.tmpl",
    "src/$package/recipes/quickstart.toml": "quickstart.toml.tmpl",
    "tests/test_plugin.py": "test_plugin.py.tmpl",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the only action."""
    plugin = Actions(parser).add("plugin", "write a package that passes the conformance kit")
    plugin.add_argument("name", metavar="NAME", help="plugin name: lower case, digits, hyphens")
    plugin.add_argument(
        "--dir", metavar="FOLDER", help="where to write it (default: ./tenfold-NAME)"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the package and says what to do next."""
    folder = Path(args.dir or f"tenfold-{args.name}")
    written = write_plugin(args.name, folder)
    if args.json:
        print_json({"plugin": args.name, "folder": str(folder), "files": written})
        return EXIT_OK
    print(f"wrote {folder}:")
    for file in written:
        print(f"  {file}")
    print(f"\nnext:\n  pip install -e {folder}\n  tenfold plugins check {args.name}")
    print(f"  tenfold run {args.name}:quickstart")
    return EXIT_OK


def write_plugin(name: str, folder: Path) -> list[str]:
    """Writes a new plugin package to `folder`, all of it or nothing; returns its files.

    Raises:
        ConfigError: the name is not allowed, or the folder exists and is not empty.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise ConfigError(
            f"plugin name {name!r}: use lower-case letters, digits and hyphens, e.g. 'my-plugin'"
        )
    if name == "core" or name in COMMANDS:
        raise ConfigError(f"plugin name {name!r} is taken by tenfold itself")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists already", hint="give another folder with --dir")
    values = _values(name)
    try:
        return _write(folder, values)
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror}") from error


def _values(name: str) -> dict[str, str]:
    major, minor = __version__.split(".")[:2]
    return {
        "name": name,
        "package": f"tenfold_{name.replace('-', '_')}",
        "distribution": f"tenfold-{name}",
        "core_range": f">={major}.{minor},<{major}.{int(minor) + 1}",
    }


def _write(folder: Path, values: dict[str, str]) -> list[str]:
    templates = files("tenfold") / "scaffold"
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        written = []
        for pattern, template in _FILES.items():
            file = Template(pattern).substitute(values)
            text = (templates / template).read_text(encoding="utf-8")
            path = temporary / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(Template(text).substitute(values), encoding="utf-8")
            written.append(file)
        temporary.chmod(0o755)
        temporary.replace(folder)
        return written
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
