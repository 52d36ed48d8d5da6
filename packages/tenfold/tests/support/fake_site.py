"""Fake installed distributions: modules, dist-info folders and entry points in one folder."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

GOOD = """
from tenfold import ComponentSpec, PluginInfo, hookimpl

@hookimpl
def tenfold_plugin():
    return PluginInfo("{name}", "A good plugin")

@hookimpl
def tenfold_models():
    return [ComponentSpec("echo", "{module}:Echo", "Says it again", provides=("generate",))]

class Echo:
    def generate(self, prompts, config):
        raise NotImplementedError
"""


class FakeSite:
    """A folder for `sys.path` with fake plugins in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self._clock = 1_700_000_000
        path.mkdir(parents=True, exist_ok=True)

    def add(self, name, source=GOOD, *, dist=None, value=None, version="1.0", files=None):
        """Installs the plugin `name`; `{name}` and `{module}` in the source are filled in."""
        module = f"fake_{name.replace('-', '_')}_{abs(hash(dist or name)) % 9973}"
        dist = dist or f"fake-{name}"
        text = textwrap.dedent(source).replace("{name}", name).replace("{module}", module)
        (self.path / f"{module}.py").write_text(text)
        for file, content in (files or {}).items():
            path = self.path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        info = self.path / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
        entry = f"{name} = {value or module}\n"
        entries = info / "entry_points.txt"
        before = entries.read_text() if entries.exists() else "[tenfold.plugins]\n"
        entries.write_text(before + entry)
        self.names.append(name)
        self.settle()
        return self.path / f"{module}.py"

    def settle(self):
        """Dates everything back, so that the index takes the files for settled.

        Every call gives the folder another date: importlib caches listings by it.
        """
        self._clock += 1
        for path in (*self.path.rglob("*"), self.path):
            os.utime(path, (self._clock, self._clock))

    def environment(self, **more):
        """Variables for a process that has this folder installed, and its own cache."""
        search = filter(None, (str(self.path), os.environ.get("PYTHONPATH")))
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(search),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TENFOLD_CACHE": str(self.path.parent / "cache"),
            "TENFOLD_PLUGINS": ",".join(dict.fromkeys(self.names)),
            **more,
        }

    def tenfold(self, *arguments, cwd=None, **environment):
        """Runs `python -m tenfold` with this folder installed."""
        return self.python("-m", "tenfold", *map(str, arguments), cwd=cwd, **environment)

    def python(self, *arguments, cwd=None, **environment):
        """Runs Python with this folder installed."""
        work = cwd or self.path.parent / "work"
        work.mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            cwd=work,
            env=self.environment(**environment),
            timeout=120,
        )
