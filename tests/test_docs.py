"""Laws of the documentation: its blocks run, its generated pages are current, it builds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

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
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "COLUMNS": "100",
    }
    environment.setdefault("OMP_NUM_THREADS", "2")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for block in docs_blocks.blocks(page):
            where = f"{name(page)}:{block.line}"
            if block.verb == "file":
                path = folder / block.options
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
    import tomllib

    for page in PAGES:
        for body in re.findall(r"^```toml\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            tomllib.loads(body)


def test_output_matching_is_strict_but_for_dots():
    assert docs_blocks.matches("a ... d\ne", "a b\nc d\ne  \n")
    assert docs_blocks.matches("x  y\n", "x y")
    assert not docs_blocks.matches("a ... d", "a b c")
    assert not docs_blocks.matches("a", "a\nb")


def test_site_builds_strictly_and_loads_nothing_from_outside(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    loads = re.compile(
        r'<(?:script|img|iframe|source)[^>]+src="(?:https?:)?//'
        r'|<link[^>]+rel="(?:stylesheet|preconnect|icon)"[^>]+href="(?:https?:)?//'
    )
    built = list(tmp_path.rglob("*.html"))
    assert len(built) > 25
    assert [path.name for path in built if loads.search(path.read_text())] == []
