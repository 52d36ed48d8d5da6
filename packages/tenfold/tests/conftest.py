"""A workspace with the plugin `toy`, in this process and in sub-processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parent / "support"


@pytest.fixture(scope="session")
def toy_site(tmp_path_factory):
    """A folder on PYTHONPATH that holds the plugin `toy` as an installed distribution."""
    site = tmp_path_factory.mktemp("toy-site")
    for source in SUPPORT.glob("toy_*.py"):
        (site / source.name).symlink_to(source)
    info = site / "tenfold_toy-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tenfold-toy\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[tenfold.plugins]\ntoy = toy_plugin\n")
    return site


@pytest.fixture
def workspace_dir(tmp_path, monkeypatch, toy_site):
    """The current folder is a fresh workspace; the plugin `toy` is installed."""
    (tmp_path / "workspace.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TENFOLD_PLUGINS", "toy")
    monkeypatch.syspath_prepend(str(toy_site))
    monkeypatch.setenv("PYTHONPATH", str(toy_site))
    return tmp_path


@pytest.fixture
def host(workspace_dir):
    """A host over that workspace."""
    from tenfold.host import Host

    return Host()


@pytest.fixture
def cli(workspace_dir):
    """Calls `python -m tenfold` in the workspace."""

    def call(*arguments, check=None, **environment):
        done = subprocess.run(
            [sys.executable, "-m", "tenfold", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=workspace_dir,
            env={**os.environ, **environment},
            timeout=240,
        )
        if check is not None:
            assert done.returncode == check, done.stdout + done.stderr
        return done

    return call


def run_table(**changes):
    """A run of the toy evaluator; keywords replace whole tables."""
    table = {
        "schema": "tenfold-run/1",
        "name": "toy",
        "seed": 3,
        "model": {"use": "toy:upper"},
        "dataset": {"use": "toy:numbers"},
        "evaluator": {"use": "toy:lengths"},
    }
    return {**table, **changes}


@pytest.fixture
def table():
    """Makes run tables."""
    return run_table


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty folder of fake plugins, installed in this process for the length of a test."""
    sys.path.insert(0, str(SUPPORT))
    from fake_site import FakeSite

    sys.path.remove(str(SUPPORT))
    fake = FakeSite(tmp_path / "site")
    (tmp_path / "work").mkdir()
    modules = set(sys.modules)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TENFOLD_PLUGINS", raising=False)
    monkeypatch.syspath_prepend(str(fake.path))
    yield fake
    for name in set(sys.modules) - modules:
        if name.startswith("fake_"):
            del sys.modules[name]
