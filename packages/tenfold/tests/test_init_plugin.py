"""A plugin from an empty folder: made, installed, checked and run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PLUGIN = """\
from tenfold import ComponentSpec, PluginInfo, hookimpl
from tenfold.records import Completion


@hookimpl
def tenfold_plugin():
    return PluginInfo("shout", "Answers in capitals")


@hookimpl
def tenfold_models():
    target = "tenfold_shout:Capitals"
    return [ComponentSpec("capitals", target, "its prompt in capitals", provides=("generate",))]


class Capitals:
    def generate(self, prompts, config):
        texts = [str(prompt).upper()[: config.max_new_tokens] for prompt in prompts]
        return [[Completion(text)] * config.n for text in texts]
"""
PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "tenfold-shout"
version = "1.0"
dependencies = ["tenfold"]

[project.entry-points."tenfold.plugins"]
shout = "tenfold_shout"

[tool.hatch.build.targets.wheel]
only-include = ["tenfold_shout.py"]
"""
RUN_FILE = """
schema = "tenfold-run/1"
[model]
use = "shout:capitals"
[dataset]
use = "core:jsonl-prompts"
path = "prompts.jsonl"
[evaluator]
use = "core:generate"
"""


class Environment:
    """Processes that see wheels unpacked into one folder, as an installer would lay them."""

    def __init__(self, root):
        self.root = root
        self.site = root / "site"

    def install(self, project):
        out = self.root / "dist"
        self.run("-m", "hatchling", "build", "-t", "wheel", "-d", str(out), cwd=project)
        for wheel in out.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(self.site)

    def run(self, *arguments, cwd=None):
        search = (str(self.site), os.environ.get("PYTHONPATH"))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, search)),
            "TENFOLD_CACHE": str(self.root / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            cwd=cwd or self.root,
            env=environment,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def tenfold(self, *arguments):
        return self.run("-m", "tenfold", *arguments)


@pytest.fixture
def environment(tmp_path):
    pytest.importorskip("hatchling", reason="the wheel is built with hatchling")
    return Environment(tmp_path)


def test_the_twenty_line_plugin_installs_conforms_and_runs(environment, tmp_path):
    assert len(PLUGIN.splitlines()) <= 20
    project = tmp_path / "shout"
    project.mkdir()
    (project / "pyproject.toml").write_text(PYPROJECT)
    (project / "tenfold_shout.py").write_text(PLUGIN)
    environment.install(project)
    assert "fail" not in environment.tenfold("plugins", "check", "shout")
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "prompt": "hello"}\n')
    (tmp_path / "shout.toml").write_text(RUN_FILE)
    outcome = json.loads(environment.tenfold("run", "shout.toml", "--json", "--quiet"))
    assert outcome["status"] == "ok"
    [item] = (Path(outcome["run_dir"]) / "items.jsonl").read_text().splitlines()
    assert "HELLO" in item


def test_a_new_plugin_passes_the_kit_and_its_own_tests(environment, tmp_path):
    said = json.loads(environment.tenfold("init", "plugin", "fresh-start", "--json"))
    project = tmp_path / "tenfold-fresh-start"
    on_disk = {str(p.relative_to(project)) for p in project.rglob("*") if p.is_file()}
    assert set(said["files"]) == on_disk
    environment.install(project)
    findings = json.loads(environment.tenfold("plugins", "check", "fresh-start", "--json"))
    statuses = {f["status"] for f in findings["findings"]}
    assert statuses == {"pass"}, findings
    outcome = json.loads(environment.tenfold("run", "fresh-start:quickstart", "--json"))
    assert 0 < outcome["metrics"][0]["value"] < 1
    tests = str(project / "tests")
    assert "3 passed" in environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", tests)


def test_a_new_plugin_is_formatted_and_free_of_lint(environment, tmp_path):
    pytest.importorskip("ruff")
    environment.tenfold("init", "plugin", "neat")
    for line in (["check"], ["format", "--check"]):
        environment.run("-m", "ruff", *line, "--no-cache", "tenfold-neat")


def test_an_existing_folder_is_never_overwritten(environment, tmp_path):
    folder = tmp_path / "tenfold-taken"
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(AssertionError, match="exists already"):
        environment.tenfold("init", "plugin", "taken")
    assert [p.name for p in folder.iterdir()] == ["mine.txt"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
