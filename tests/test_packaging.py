"""Laws of the wheels: complete, light, and installable one by one."""

from __future__ import annotations

import email
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import check_workspace
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {package.name: package for package in check_workspace.load_packages(ROOT)}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Every package's wheel, built without a network."""
    out = tmp_path_factory.mktemp("dist")
    for package in PACKAGES.values():
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
            cwd=package.folder,
            check=True,
            capture_output=True,
        )
    return {
        name: next(out.glob(f"{package.module}-{package.version}-*.whl"))
        for name, package in PACKAGES.items()
    }


def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        path = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(path))


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_holds_every_source_file_and_nothing_else(wheels, package):
    source = PACKAGES[package].folder / "src"
    wanted = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    packed = {name for name in names(wheels[package]) if ".dist-info/" not in name}
    assert packed == wanted
    assert f"{PACKAGES[package].module}/py.typed" in packed


def test_wheel_of_the_core_holds_its_page_templates(wheels):
    packed = names(wheels["tenfold"])
    for name in ("page.html", "blocks.html", "page.css", "page.js"):
        assert f"tenfold/report/templates/{name}" in packed


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "tenfold"])
def test_wheel_of_a_plugin_holds_its_recipes_and_entry_point(wheels, package):
    module = PACKAGES[package].module
    packed = names(wheels[package])
    recipes = list((PACKAGES[package].folder / "src" / module / "recipes").glob("*.toml"))
    assert recipes
    assert {f"{module}/recipes/{path.name}" for path in recipes} <= set(packed)
    with zipfile.ZipFile(wheels[package]) as archive:
        path = next(name for name in packed if name.endswith("entry_points.txt"))
        assert f"{module}.plugin" in archive.read(path).decode()


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_says_what_it_is(wheels, package):
    about = metadata(wheels[package])
    assert about["Name"] == package
    assert about["Version"] == PACKAGES[package].version
    assert about["License-Expression"] == "MIT"
    assert about["Requires-Python"] == "<3.14,>=3.11"
    assert about["Description-Content-Type"] == "text/markdown"
    assert len(about.get_payload()) > 400  # a README, not a title
    assert any(name.endswith("licenses/LICENSE") for name in names(wheels[package]))


def test_core_needs_nothing_heavy(wheels):
    needed = metadata(wheels["tenfold"]).get_all("Requires-Dist", [])
    always = [line for line in needed if "extra ==" not in line]
    assert sorted(line.split(">")[0].split("<")[0] for line in always) == [
        "jinja2", "pluggy", "rich", "tomli-w",
    ]  # fmt: skip


def clean_environment(folder):
    """An empty virtual environment; its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"


def install(python, *wheels):
    """Installs wheels and what they need, at the versions of this environment."""
    frozen = subprocess.run(
        ["uv", "pip", "freeze", "--python", sys.executable, "--exclude-editable"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    constraints = python.parent.parent / "constraints.txt"
    constraints.write_text("".join(f"{line}\n" for line in frozen.split("\n") if "==" in line))
    command = ["uv", "pip", "install", "--quiet", "--python", str(python)]
    subprocess.run([*command, "-c", str(constraints), *map(str, wheels)], check=True)


def say(python, *arguments, cwd, **environment):
    done = subprocess.run(
        [str(python), *arguments],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_core_alone_installs_and_works_in_a_clean_environment(wheels, tmp_path):
    python = clean_environment(tmp_path / "env")
    install(python, wheels["tenfold"])
    version = PACKAGES["tenfold"].version
    assert say(python, "-m", "tenfold", "--version", cwd=tmp_path) == f"tenfold {version}\n"
    assert "core" in say(python, "-m", "tenfold", "plugins", cwd=tmp_path, TENFOLD_STRICT="1")
    page = "from tenfold.report import *; print(render_html('t', [Paragraph('p')])[:15])"
    assert say(python, "-c", page, cwd=tmp_path) == "<!DOCTYPE html>\n"
    gone = "import importlib.util as u; print(u.find_spec('torch'), u.find_spec('numpy'))"
    assert say(python, "-c", gone, cwd=tmp_path) == "None None\n"


@pytest.mark.slow
@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "tenfold"])
def test_a_plugin_installs_beside_the_core_only(wheels, package, tmp_path):
    python = clean_environment(tmp_path / "env")
    install(python, wheels["tenfold"], wheels[package])
    (plugin,) = PACKAGES[package].plugins
    listed = say(python, "-m", "tenfold", "plugins", cwd=tmp_path, TENFOLD_STRICT="1")
    assert [line.split()[0] for line in listed.splitlines()[1:]] == ["core", plugin]
    say(python, "-c", f"import {PACKAGES[package].module}", cwd=tmp_path)
