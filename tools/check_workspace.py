"""Checks the workspace's files against each other.

Compared: every package's pyproject, its `__version__`, `plugins.toml`, `workspace.toml`, the
root pyproject, and what each plugin module really registers. Prints one line per problem and
exits 1 when there is any.

    python tools/check_workspace.py [ROOT]
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

CORE = "tenfold"
ENTRY_POINT_GROUP = "tenfold.plugins"
ROW_KEYS = (
    "summary",
    "distribution",
    "path",
    "module",
    "version",
    "core",
    "paper",
    "components",
    "heavy",
    "extras",
    "status",
)
STATUSES = ("planned", "alpha", "stable")
KINDS = ("models", "datasets", "evaluators", "trainers")
FILES = ("README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml")
_PIN = re.compile(r"[a-z0-9-]+==[0-9][A-Za-z0-9.+!]*( ; .+)?")


@dataclass(frozen=True)
class Package:
    """A folder below `packages/` and its parsed pyproject."""

    folder: Path
    project: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Distribution name."""
        return str(self.project.get("name", self.folder.name))

    @property
    def version(self) -> str:
        """Version in the pyproject."""
        return str(self.project.get("version", ""))

    @property
    def module(self) -> str:
        """Import name: `tenfold_nvium` for `tenfold-nvium`."""
        return self.name.replace("-", "_")

    @property
    def plugins(self) -> Mapping[str, str]:
        """Entry points: plugin name → module."""
        return self.project.get("entry-points", {}).get(ENTRY_POINT_GROUP, {})

    def requirements(self) -> Iterator[tuple[str, Requirement]]:
        """Every requirement with the table it stands in."""
        tables = {"dependencies": self.project.get("dependencies", [])}
        for extra, lines in self.project.get("optional-dependencies", {}).items():
            tables[f"optional-dependencies.{extra}"] = lines
        for table, lines in tables.items():
            for line in lines:
                yield table, Requirement(line)


def read(path: Path) -> dict[str, Any]:
    """The tables of a TOML file."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def load_packages(root: Path) -> list[Package]:
    """All packages of the workspace, by folder name."""
    paths = sorted((root / "packages").glob("*/pyproject.toml"))
    return [Package(path.parent, read(path)["project"]) for path in paths]


def check(root: Path, *, imports: bool = True) -> list[str]:
    """All problems of the workspace at `root`, as messages.

    Args:
        root: folder with `plugins.toml`, `workspace.toml` and `packages/`.
        imports: also import the plugin modules and compare what they register.
    """
    packages = load_packages(root)
    if problems := list(check_requirements(packages)):
        return problems  # nothing that follows could read them
    workspace, catalogue = read(root / "workspace.toml"), read(root / "plugins.toml")
    rows = catalogue.get("plugins", {})
    project = read(root / "pyproject.toml")
    problems = [*check_packages(packages), *check_ranges(packages, workspace)]
    problems += check_versions(packages, workspace.get("packages", {}))
    problems += check_root(packages, project)
    problems += check_rows(rows)
    problems += check_catalogue(root, packages, rows)
    if imports:
        for package in packages:
            for name, module in package.plugins.items():
                problems += check_components(name, module, rows.get(name, {}))
    return problems


def check_requirements(packages: Iterable[Package]) -> Iterator[str]:
    """Requirements that cannot be parsed."""
    for package in packages:
        try:
            list(package.requirements())
        except InvalidRequirement as error:
            yield f"packages/{package.folder.name}/pyproject.toml: {error}"


def check_packages(packages: Iterable[Package]) -> Iterator[str]:
    """Files, names, licence and typing marker of each package."""
    for package in packages:
        where = f"packages/{package.folder.name}"
        if package.name != package.folder.name:
            yield f"{where}: the distribution is called {package.name!r}, the folder is not"
        for name in FILES:
            if not (package.folder / name).is_file():
                yield f"{where}: no {name}"
        if not (package.folder / "src" / package.module / "py.typed").is_file():
            yield f"{where}: no src/{package.module}/py.typed, so its types are not published"
        if package.project.get("license") != "MIT":
            yield f"{where}: license is {package.project.get('license')!r}; it must be 'MIT'"


def check_versions(packages: Iterable[Package], listed: Mapping[str, str]) -> Iterator[str]:
    """One version per package: pyproject, `__version__`, `workspace.toml`, changelog."""
    names = set()
    for package in packages:
        where = f"packages/{package.folder.name}"
        names.add(package.name)
        inside = module_version(package.folder / "src" / package.module / "__init__.py")
        if inside != package.version:
            yield (
                f"{where}: version is {package.version} in pyproject.toml "
                f"and {inside} in {package.module}/__init__.py"
            )
        if listed.get(package.name) != package.version:
            yield (
                f"workspace.toml: packages.{package.name} is {listed.get(package.name)!r}; "
                f"its pyproject says {package.version!r}"
            )
        log = package.folder / "CHANGELOG.md"
        if log.is_file() and f"## {package.version}" not in log.read_text(encoding="utf-8"):
            yield f"{where}/CHANGELOG.md: no section '## {package.version}'"
    yield from (f"workspace.toml: packages.{n} has no package" for n in sorted(set(listed) - names))


def module_version(path: Path) -> str | None:
    """The literal `__version__` of a module, read without importing it."""
    if not path.is_file():
        return None
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__version__")], value=ast.Constant(value=value)):
                return str(value)
    return None


def check_ranges(packages: Iterable[Package], workspace: Mapping[str, Any]) -> Iterator[str]:
    """Dependency ranges: heavy libraries as in `workspace.toml`, the core's range, no plugin
    that depends on another plugin."""
    packages = list(packages)
    floors = {
        canonicalize_name(name): SpecifierSet(spec)
        for name, spec in workspace.get("dependencies", {}).items()
    }
    core = next((p for p in packages if p.name == CORE), None)
    for package in packages:
        where = f"packages/{package.folder.name}/pyproject.toml"
        requirements = list(package.requirements())
        for table, needed in requirements:
            name = canonicalize_name(needed.name)
            if name in floors and needed.specifier != floors[name]:
                yield (
                    f"{where}: {table} says '{needed}'; "
                    f"workspace.toml says dependencies.{name} = '{floors[name]}'"
                )
            if name.startswith(f"{CORE}-"):
                yield f"{where}: {table} needs {name}; a plugin never depends on a plugin"
        if core is not None and package is not core:
            yield from _check_core_range(where, requirements, core.version)


def _check_core_range(
    where: str, requirements: Iterable[tuple[str, Requirement]], version: str
) -> Iterator[str]:
    right = core_range(version)
    found = [r for table, r in requirements if r.name == CORE and table == "dependencies"]
    if not found:
        yield f"{where}: dependencies do not name '{CORE}{right}'"
    for needed in found:
        if needed.specifier != SpecifierSet(right):
            yield f"{where}: depends on '{needed}'; it must be '{CORE}{right}'"


def core_range(version: str) -> str:
    """The range of cores that a plugin of today accepts: `>=0.1,<0.2` for `0.1.3`."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return f">={major}.{minor},<{major}.{minor + 1}"


def check_root(packages: Iterable[Package], project: Mapping[str, Any]) -> Iterator[str]:
    """The root pyproject lists every package, and its pins hold names and versions only."""
    tool = project.get("tool", {}).get("uv", {})
    needed = {Requirement(line).name for line in project["project"].get("dependencies", [])}
    for package in packages:
        if package.name not in needed:
            yield f"pyproject.toml: project.dependencies lack {package.name!r}"
        if not tool.get("sources", {}).get(package.name, {}).get("workspace"):
            yield f"pyproject.toml: tool.uv.sources.{package.name} is not {{ workspace = true }}"
    pins = tool.get("constraint-dependencies", [])
    if not pins:
        yield "pyproject.toml: no constraint-dependencies; run tools/pin_constraints.py"
    for pin in pins:
        if not _PIN.fullmatch(pin):
            yield f"pyproject.toml: constraint {pin!r} is not 'name==version' (with a marker)"


def check_rows(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Each row of the catalogue on its own: keys, status, kinds."""
    for name, row in rows.items():
        where = f"plugins.toml: plugins.{name}"
        known = (*ROW_KEYS, "defaults")
        yield from (f"{where}: no key {key!r}" for key in ROW_KEYS if key not in row)
        yield from (f"{where}: unknown key {key!r}" for key in row if key not in known)
        if row.get("status") not in STATUSES:
            yield f"{where}: status is {row.get('status')!r}; one of {', '.join(STATUSES)}"
        for kind in row.get("components", {}):
            if kind not in KINDS:
                yield f"{where}: components.{kind}; the kinds are {', '.join(KINDS)}"


def check_catalogue(
    root: Path, packages: Iterable[Package], rows: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """The catalogue against the packages: each has its row, each row tells the truth."""
    plugins = {name: (p, module) for p in packages for name, module in p.plugins.items()}
    core = next((p for p in packages if p.name == CORE), None)
    for name in sorted(set(plugins) - set(rows) - {"core"}):
        yield f"plugins.toml: no row plugins.{name} for {plugins[name][0].name}"
    for name, row in rows.items():
        where = f"plugins.toml: plugins.{name}"
        exists = (root / str(row.get("path", ""))).is_dir()
        if row.get("status") == "planned":
            if name in plugins or exists:
                yield f"{where}: status is 'planned' but {row.get('path')} exists"
            continue
        if name not in plugins:
            yield f"{where}: no package has the entry point {name!r} in {ENTRY_POINT_GROUP}"
            continue
        package, module = plugins[name]
        truth = {
            "distribution": package.name,
            "path": f"packages/{package.folder.name}",
            "module": module,
            "version": package.version,
            "extras": sorted(package.project.get("optional-dependencies", {})),
        }
        if core is not None:
            truth["core"] = core_range(core.version)
        for key, value in truth.items():
            if row.get(key) != value:
                yield f"{where}: {key} is {row.get(key)!r}; the package says {value!r}"
        yield from _check_heavy(where, package, row.get("heavy", []))


def _check_heavy(where: str, package: Package, heavy: Iterable[str]) -> Iterator[str]:
    declared = {canonicalize_name(requirement.name) for _, requirement in package.requirements()}
    for name in heavy:
        if canonicalize_name(name) not in declared:
            yield f"{where}: heavy names {name!r}, which {package.name} does not require"


def check_components(name: str, module: str, row: Mapping[str, Any]) -> Iterator[str]:
    """What the plugin module registers against its row in the catalogue."""
    try:
        plugin = importlib.import_module(module)
    except Exception as error:  # whatever a plugin raises is one line here
        yield f"{module}: cannot be imported: {type(error).__name__}: {error}"
        return
    info = plugin.tenfold_plugin()
    if info.name != name:
        yield f"{module}: PluginInfo.name is {info.name!r}; its entry point is {name!r}"
    if row and info.paper and row.get("paper") != info.paper:
        yield f"plugins.toml: plugins.{name}.paper is {row['paper']!r}; {module} has {info.paper!r}"
    if not row:
        return
    for kind in KINDS:
        hook = getattr(plugin, f"tenfold_{kind}", None)
        registered = sorted(spec.name for spec in hook()) if hook else []
        listed = sorted(row.get("components", {}).get(kind, []))
        if registered != listed:
            yield (
                f"plugins.toml: plugins.{name}.components.{kind} is {listed}; "
                f"{module} registers {registered}"
            )


def main(arguments: list[str]) -> int:
    """Prints the problems; 1 when there are any."""
    root = Path(arguments[0]) if arguments else Path(__file__).resolve().parent.parent
    problems = check(root)
    for problem in problems:
        print(problem)
    count = len(problems)
    print(f"{count} problems" if count else "workspace: packages, catalogue and ranges agree")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
