"""Laws of the documentation: its blocks run, its generated pages are current, it builds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import browser
import docs_blocks
import gen_docs
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "README.md",
    *sorted((ROOT / "packages").glob("*/README.md")),
]
RUNNABLE = [page for page in PAGES if docs_blocks.blocks(page)]


def name(page):
    return page.relative_to(ROOT).as_posix()


def run_page(page, folder, *, slow):
    """Carries out the blocks of a page in `folder`; slow ones only when asked."""
    namespace = {"__name__": "__main__"}
    environment = page_environment(page, folder / "env")
    work = folder / "work"
    work.mkdir()
    before = Path.cwd()
    os.chdir(work)
    try:
        for block in docs_blocks.blocks(page):
            where = f"{name(page)}:{block.line}"
            if block.verb == "file":
                path = work / block.options
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.body)
            elif block.slow and not slow:
                continue
            elif block.language == "python":
                exec(compile(block.body, where, "exec"), namespace)
            else:
                assert block.language == "console", f"{where}: cannot run {block.language}"
                run_console(block, where, environment)
    finally:
        os.chdir(before)


def page_environment(page, folder):
    """Variables for a page's commands; a page that installs gets an environment of its own."""
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {**os.environ, "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    if "uv pip install" in page.read_text():
        layered_environment(folder)
        paths.insert(0, str(folder / "bin"))
        environment["VIRTUAL_ENV"] = str(folder)
    return {**environment, "PATH": os.pathsep.join(paths)}


def layered_environment(folder):
    """A virtual environment on top of this one, into which uv installs without a network."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    under = sysconfig.get_path("purelib")
    (site / "under.pth").write_text(f"import site; site.addsitedir({under!r})\n")
    scripts = {
        "tenfold": f"#!{python}\nimport sys\nfrom tenfold.cli import main\nsys.exit(main())\n",
        "uv": f'#!/bin/sh\nexec {shutil.which("uv")} "$@" --no-deps --no-build-isolation\n',
    }
    for name, text in scripts.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)


def run_console(block, where, environment):
    for command, shown in block.commands():
        done = subprocess.run(
            ["bash", "-c", command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == block.exit_code, f"{where}: $ {command}\n{done.stdout}"
        if shown.strip():
            assert docs_blocks.matches(shown, done.stdout), (
                f"{where}: $ {command}\nshown:\n{shown}\nprinted:\n{done.stdout}"
            )


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_blocks_of_a_page_do_what_it_says(page, tmp_path):
    run_page(page, tmp_path, slow=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "page", [p for p in RUNNABLE if any(b.slow for b in docs_blocks.blocks(p))], ids=name
)
def test_slow_blocks_of_a_page_do_what_it_says(page, tmp_path):
    run_page(page, tmp_path, slow=True)


def test_there_are_runnable_blocks_in_every_part():
    parts = {page.relative_to(ROOT / "docs").parts[0] for page in RUNNABLE if "docs" in page.parts}
    assert {"concepts", "howto", "plugin", "start"} <= parts


def test_every_mark_stands_before_a_block():
    for page in PAGES:
        text = page.read_text()
        marks = len(re.findall(r"^<!-- (run|file)\b", text, re.MULTILINE))
        assert marks == len(docs_blocks.blocks(page)), name(page)


def test_generated_pages_are_current():
    assert [path.relative_to(ROOT).as_posix() for path in gen_docs.stale(ROOT)] == []


def test_drift_is_noticed(monkeypatch):
    right = gen_docs.pages(ROOT)
    path = ROOT / "docs" / "cli.md"
    monkeypatch.setattr(gen_docs, "pages", lambda root: {**right, path: right[path] + "more"})
    assert list(gen_docs.stale(ROOT)) == [path]


def test_every_toml_block_is_toml():
    for page in PAGES:
        for body in re.findall(r"^```toml\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            tomllib.loads(body)


def test_output_matching_is_strict_but_for_dots():
    assert docs_blocks.matches("a ... d\ne", "a b\nc d\ne  \n")
    assert docs_blocks.matches("x  y\n", "x y")
    assert not docs_blocks.matches("a ... d", "a b c")
    assert not docs_blocks.matches("a", "a\nb")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; building strictly is a law of its own."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        # Not --quiet: that would hide the warnings which --strict counts.
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_site_builds_strictly_and_loads_nothing_from_outside(site):
    loads = re.compile(
        r'<(?:script|img|iframe|source)[^>]+src="(?:https?:)?//'
        r'|<link[^>]+rel="(?:stylesheet|preconnect|icon)"[^>]+href="(?:https?:)?//'
    )
    built = list(site.rglob("*.html"))
    assert len(built) > 25
    assert [path.name for path in built if loads.search(path.read_text())] == []


@pytest.mark.skipif(browser.find_browser() is None, reason="no browser installed")
def test_site_opens_silently_in_a_browser(site):
    executable = browser.find_browser()
    assert executable
    with browser.serving(site) as address, browser.running(executable) as running:
        for path in ("index.html", "concepts/planning.html", "api/spec.html", "cli.html"):
            page = running.open(f"{address}/{path}")
            assert page.problems == []
            assert [u for u in page.requests if not u.startswith((address, "data:"))] == []
