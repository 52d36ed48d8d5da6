"""Nothing heavy is imported before a component is built, by any command."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from tenfold.cli import COMMANDS
from tenfold.spec import HEAVY_MODULES

PROBE = """
import json, sys
from tenfold.cli import main
code = main(sys.argv[1:])
sys.stdout.flush()
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""
RUN_FILE = """
schema = "tenfold-run/1"
[model]
use = "core:hf"
checkpoint = "nowhere"
[dataset]
use = "core:python-stdlib"
[evaluator]
use = "core:perplexity"
"""
COMMAND_LINES = [
    ["--help"],
    ["--version"],
    ["plugins"],
    ["plugins", "check"],
    ["plugins", "show", "core"],
    ["list"],
    ["list", "models", "--capability", "grad"],
    ["list", "--capability", "score", "--json"],
    ["show", "core:hf"],
    ["show", "core:perplexity", "--json"],
    ["recipes"],
    ["run", "--dry-run", "run.toml"],
    ["run", "--dry-run", "run.toml", "--json"],
    ["runs"],
    ["workspace", "check"],
    ["doctor", "--no-gpu"],
    ["completion", "bash"],
    ["init", "plugin", "fresh"],
    *([name, "--help"] for name in COMMANDS),
]


def modules_after(arguments, folder, probe=PROBE, **environment):
    """Exit code and modules of a process that ran one command line."""
    done = subprocess.run(
        [sys.executable, "-c", probe, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "TENFOLD_CACHE": str(folder / "cache"), **environment},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("lazy")
    (path / "run.toml").write_text(RUN_FILE)
    return path


@pytest.mark.parametrize("arguments", COMMAND_LINES, ids=" ".join)
def test_no_command_imports_a_heavy_module(arguments, folder):
    code, modules = modules_after(arguments, folder)
    assert code == 0
    assert not set(modules) & set(HEAVY_MODULES)


@pytest.mark.parametrize(
    "arguments",
    [["plugins"], ["list"], ["show", "core:hf"], ["run", "--dry-run", "run.toml"]],
    ids=" ".join,
)
def test_with_an_index_neither_pluggy_nor_a_plugin_is_imported(arguments, folder):
    modules_after(["list"], folder)  # writes the index
    code, modules = modules_after(arguments, folder)
    assert code == 0
    plugins = [name for name in modules if name.endswith(".plugin") or name.endswith("_plugin")]
    assert not plugins
    assert not {"pluggy", "importlib.metadata", "rich"} & set(modules)


def test_help_builds_no_parser_and_no_description(folder):
    modules_after(["list"], folder)  # writes the index, from which help names plugins' commands
    _, modules = modules_after(["--help"], folder)
    assert "tenfold.index_file" in modules
    assert not {"argparse", "tenfold.registry", "tenfold.spec", "pluggy"} & set(modules)
    _, modules = modules_after(["--version"], folder)
    assert not {"argparse", "tenfold.workspace", "dataclasses"} & set(modules)


@pytest.mark.parametrize(
    "module",
    ["tenfold", "tenfold.spec", "tenfold.hookspecs", "tenfold.registry", "tenfold.plan",
     "tenfold.builtin.plugin", "tenfold.testing.findings"],
)  # fmt: skip
def test_importing_the_light_modules_imports_nothing_heavy(module, folder):
    probe = "import json, sys; __import__(sys.argv[1]);"
    probe += "print(json.dumps([0, sorted(sys.modules)]), file=sys.stderr)"
    _, modules = modules_after([module], folder, probe)
    assert module in modules
    assert not set(modules) & set(HEAVY_MODULES)
