"""Reads the runnable blocks of a documentation page.

A comment before a fenced block says what to do with it:

    <!-- run -->            run it: `python` blocks in one namespace per page, `console` blocks
                            line by line (`$ command`), their shown output compared
    <!-- run: exit 4 -->    the commands of a `console` block end with this code
    <!-- run: slow -->      only with the slow tests
    <!-- file: a/b.toml --> write the block to this file, in the page's own empty folder

In shown output `...` stands for anything, also for several lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(
    r"<!-- (?P<verb>run|file)(?:: (?P<options>[^>]*?))? -->\n+"
    r"(?P<fence>`{3,})(?P<language>[a-z]+)[^\n]*\n(?P<body>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A marked block: what to do (`run` or `file`), the language, the text, where it is."""

    verb: str
    options: str
    language: str
    body: str
    line: int

    @property
    def slow(self) -> bool:
        """Whether it runs only with the slow tests."""
        return "slow" in self.options.split(", ")

    @property
    def exit_code(self) -> int:
        """The exit code that its commands must have."""
        found = re.search(r"exit (\d+)", self.options)
        return int(found[1]) if found else 0

    def commands(self) -> Iterator[tuple[str, str]]:
        """The commands of a `console` block, each with the output shown below it."""
        parts = re.split(r"^\$ ", self.body, flags=re.MULTILINE)
        for part in parts[1:]:
            command, _, shown = part.partition("\n")
            while command.endswith("\\"):
                more, _, shown = shown.partition("\n")
                command = command[:-1] + more.removeprefix("> ")
            yield command, shown


def blocks(page: Path) -> list[Block]:
    """The marked blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            match["verb"],
            match["options"] or "",
            match["language"],
            match["body"],
            text.count("\n", 0, match.start()) + 1,
        )
        for match in _BLOCK.finditer(text)
    ]


def matches(shown: str, actual: str) -> bool:
    """Whether output is as shown: white space at line ends aside, `...` for anything."""
    pattern = re.escape("\n".join(line.rstrip() for line in shown.strip().splitlines()))
    pattern = re.sub(r"(\\ )+", r"\\ +", pattern).replace(r"\.\.\.", ".*")
    found = "\n".join(line.rstrip() for line in actual.strip().splitlines())
    return re.fullmatch(pattern, found, re.DOTALL) is not None
