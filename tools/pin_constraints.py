"""Regenerates `[tool.uv] constraint-dependencies` in the root pyproject.

The lock file names download hosts, so it is not committed; this list of exact versions (with
environment markers, nothing else) is what makes an installation repeatable.

    python tools/pin_constraints.py            # the versions of uv.lock as it is
    python tools/pin_constraints.py --upgrade  # newest versions the ranges allow
    python tools/pin_constraints.py --check    # exit 1 when the list is out of date
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import tomlkit

ROOT = Path(__file__).resolve().parent.parent
EXPORT = (
    *("uv", "export", "--no-hashes", "--no-emit-workspace", "--no-header", "--no-annotate"),
    *("--all-groups", "--all-extras", "--format", "requirements-txt", "--quiet"),
)


def resolved(root: Path, *, upgrade: bool) -> list[str]:
    """`name==version` lines with their markers, sorted, as uv resolves the workspace."""
    command = [*EXPORT, *(["--upgrade"] if upgrade else [])]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"uv export failed:\n{done.stderr.strip()}")
    lines = (line.strip() for line in done.stdout.splitlines())
    return sorted(line for line in lines if "==" in line and not line.startswith(("#", "-")))


def with_pins(text: str, pins: list[str]) -> str:
    """The pyproject's text with these pins, everything else untouched."""
    document = tomlkit.parse(text)
    array = tomlkit.array()
    array.extend(pins)
    array.multiline(multiline=True)
    document["tool"]["uv"]["constraint-dependencies"] = array
    return tomlkit.dumps(document)


def main() -> int:
    """Rewrites the list, or compares it with `--check`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upgrade", action="store_true", help="drop the old pins first")
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    path = ROOT / "pyproject.toml"
    before = path.read_text(encoding="utf-8")
    if args.upgrade:
        path.write_text(with_pins(before, []), encoding="utf-8")
    try:
        pins = resolved(ROOT, upgrade=args.upgrade)
        after = with_pins(before, pins)
    except BaseException:
        path.write_text(before, encoding="utf-8")
        raise
    if args.check:
        print("pins are up to date" if after == before else "pins are out of date")
        return int(after != before)
    path.write_text(after, encoding="utf-8")
    print(f"{len(pins)} pins written to {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
