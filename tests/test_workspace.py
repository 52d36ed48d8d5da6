"""Laws of the workspace: its files agree, and the tools that keep them so notice each lie."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import check_workspace
import pin_constraints
import pytest
import release
from tenfold.workspace import find_workspace

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def copy(tmp_path):
    """The workspace's descriptive files, without the code."""
    for name in ("pyproject.toml", "plugins.toml", "workspace.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    for package in check_workspace.load_packages(ROOT):
        target = tmp_path / "packages" / package.folder.name
        source = target / "src" / package.module
        source.mkdir(parents=True)
        for name in check_workspace.FILES:
            shutil.copy(package.folder / name, target / name)
        for name in ("__init__.py", "py.typed"):
            shutil.copy(package.folder / "src" / package.module / name, source / name)
    return tmp_path


def edit(path, old, new, count=1):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


def test_this_workspace_has_no_problem():
    assert check_workspace.check(ROOT) == []


def test_the_tool_exits_0_when_all_agree_and_1_when_not(copy, capsys):
    assert check_workspace.main([str(copy)]) == 0
    edit(copy / "workspace.toml", 'tenfold = "0.', 'tenfold = "9.')
    assert check_workspace.main([str(copy)]) == 1
    assert capsys.readouterr().out.endswith("1 problems\n")


LIES = {
    "version in __init__": (
        "packages/tenfold-nvium/src/tenfold_nvium/__init__.py",
        '__version__ = "0',
        '__version__ = "7',
        "tenfold_nvium/__init__.py",
    ),
    "version in workspace.toml": (
        "workspace.toml",
        'tenfold-dabgo = "0',
        'tenfold-dabgo = "7',
        "packages.tenfold-dabgo is",
    ),
    "package without a row": (
        "plugins.toml",
        "[plugins.nvium]",
        "[plugins.other]",
        "no row plugins.nvium",
    ),
    "row without a package": (
        "plugins.toml",
        "[plugins.nvium]",
        "[plugins.other]",
        "entry point 'other'",
    ),
    "module": (
        "plugins.toml",
        '"tenfold_nvium.plugin"',
        '"tenfold_nvium.plugins"',
        "module is",
    ),
    "planned although it exists": (
        "plugins.toml",
        'status = "alpha"',
        'status = "planned"',
        "status is 'planned' but",
    ),
    "unknown status": ("plugins.toml", 'status = "alpha"', 'status = "done"', "status is 'done'"),
    "unknown kind": ("plugins.toml", "evaluators = ", "evaluator = ", "components.evaluator;"),
    "unknown key": ("plugins.toml", "\nheavy = ", "\nheavvy = ", "unknown key 'heavvy'"),
    "components": ("plugins.toml", '"attribution"', '"attributions"', "registers ["),
    "heavy": (
        "plugins.toml",
        'heavy = ["',
        'heavy = ["speechbrain", "',
        "heavy names 'speechbrain'",
    ),
    "floor": (
        "packages/tenfold-nvium/pyproject.toml",
        "torch>=2.11,<2.15",
        "torch>=2.10",
        "dependencies.torch",
    ),
    "core range": (
        "packages/tenfold-nvium/pyproject.toml",
        '"tenfold>=0',
        '"tenfold>=9.0,>=0',
        "depends on 'tenfold",
    ),
    "plugin on plugin": (
        "packages/tenfold-nvium/pyproject.toml",
        "dependencies = [",
        'dependencies = [\n    "tenfold-dabgo>=0.1",',
        "a plugin never depends on a plugin",
    ),
    "bad requirement": (
        "packages/tenfold-nvium/pyproject.toml",
        '"safetensors>=',
        '"safetensors=>',
        "safetensors",
    ),
    "licence": (
        "packages/tenfold/pyproject.toml",
        'license = "MIT"',
        'license = "GPL-3.0"',
        "must be 'MIT'",
    ),
    "not in the root": (
        "pyproject.toml",
        '    "tenfold-nvium",\n',
        "",
        "dependencies lack 'tenfold-nvium'",
    ),
    "host in a pin": (
        "pyproject.toml",
        "jinja2==",
        "jinja2 @ https://x.y/",
        "is not 'name==version'",
    ),
    "changelog": (
        "packages/tenfold/CHANGELOG.md",
        "## 0.",
        "## 9.",
        "no section '## 0.",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_each_disagreement_is_named(copy, lie):
    file, old, new, message = LIES[lie]
    edit(copy / file, old, new)
    problems = check_workspace.check(copy)
    assert any(message in problem for problem in problems), problems


def test_a_missing_file_is_named(copy):
    (copy / "packages/tenfold/src/tenfold/py.typed").unlink()
    (copy / "packages/tenfold/README.md").unlink()
    problems = check_workspace.check(copy, imports=False)
    assert len(problems) == 2


def test_a_plugin_that_cannot_be_imported_is_one_line(copy):
    assert list(check_workspace.check_components("x", "no_such_module_here.plugin", {})) == [
        "no_such_module_here.plugin: cannot be imported: "
        "ModuleNotFoundError: No module named 'no_such_module_here'"
    ]


def test_the_host_reads_both_files():
    workspace = find_workspace(ROOT)
    assert workspace.root == ROOT
    assert len(workspace.policy.catalogue) == 10
    assert workspace.policy.enable == "all"


def test_the_lock_file_is_not_committed_and_pins_name_no_host():
    assert "uv.lock" in (ROOT / ".gitignore").read_text().split()
    text = (ROOT / "pyproject.toml").read_text()
    pins = text[text.index("constraint-dependencies") :].split("]")[0]
    assert pins.count("==") > 50
    assert "://" not in pins
    assert " @ " not in pins


def test_pinning_changes_the_list_and_nothing_else():
    before = (ROOT / "pyproject.toml").read_text()
    after = pin_constraints.with_pins(before, ["a==1.0", "b==2 ; sys_platform == 'linux'"])
    pattern = re.compile(r"constraint-dependencies = \[.*?\n?\]\n", re.DOTALL)
    assert pattern.sub("", before) == pattern.sub("", after)
    assert pin_constraints.with_pins(after, ["a==1.0", "b==2 ; sys_platform == 'linux'"]) == after


@pytest.mark.parametrize(
    ("part", "new"), [("patch", "0.1.5"), ("minor", "0.2.0"), ("major", "1.0.0")]
)
def test_versions_are_raised_at_the_named_part(part, new):
    assert release.bumped("0.1.4", part) == new


@pytest.mark.parametrize("part", ["patch", "minor"])
def test_a_release_leaves_the_workspace_consistent(copy, part):
    packages = check_workspace.load_packages(copy)
    edits = release.plan(copy, packages, part, "2026-01-31")
    assert check_workspace.check(copy, imports=False) == []  # planning writes nothing
    edits.write()
    assert check_workspace.check(copy, imports=False) == []
    released = check_workspace.load_packages(copy)
    assert [release.bumped(p.version, part) for p in packages] == [p.version for p in released]
    wanted = check_workspace.core_range(released[0].version)
    assert f'"tenfold{wanted}"' in (copy / "packages/tenfold-nvium/pyproject.toml").read_text()


def test_a_plugin_can_be_released_alone(copy):
    packages = [p for p in check_workspace.load_packages(copy) if p.name == "tenfold-nvium"]
    edits = release.plan(copy, packages, "minor", "2026-01-31")
    assert {path.name for path in edits.contents} == {
        "pyproject.toml", "__init__.py", "workspace.toml", "CHANGELOG.md", "plugins.toml",
    }  # fmt: skip
    edits.write()
    assert check_workspace.check(copy, imports=False) == []


def test_a_new_core_minor_cannot_be_released_alone(capsys):
    with pytest.raises(SystemExit):
        release.main(["minor", "--package", "tenfold"])
    assert "release all packages" in capsys.readouterr().err


def test_a_release_is_a_dry_run_unless_told_otherwise(capsys):
    before = (ROOT / "workspace.toml").read_text()
    assert release.main(["patch"]) == 0
    assert (ROOT / "workspace.toml").read_text() == before
    assert "dry run" in capsys.readouterr().out
