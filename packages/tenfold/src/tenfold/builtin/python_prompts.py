"""`core:python-prompts`: functions of held-out modules as prompts with known answers.

The prompt is a function's signature with its docstring, the reference its body; or, for the
task `docstring`, the prompt ends with the opening quotes and the reference is the docstring.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from itertools import islice

from tenfold.builtin.python_stdlib import VERSION, modules_of
from tenfold.builtin.selection import Selection, Splits, shuffle
from tenfold.builtin.stdlib_source import (
    Module,
    content_hashes,
    definition_lines,
    definitions,
    docstring_of,
    find_modules,
    first_line,
)
from tenfold.records import PromptRecord
from tenfold.seeds import content_hash

Function = ast.FunctionDef | ast.AsyncFunctionDef
_OPENING = re.compile(r"""\s*[rRuU]?(?:\"{3}|'{3}|"|')""")


class PythonPrompts:
    """Prompt records of functions; ids are those of `core:python-stdlib`'s functions.

    With the same `validation` and `test` shares as a training set of `core:python-stdlib`,
    the split `test` holds functions of modules that training never saw.

    Args:
        task: `body` or `docstring`, what is to be written.
        docstrings: for `body`: `keep` them in prompts, `drop` them, or `require` them.
        packages: only these packages or modules; empty means all.
        exclude: packages or modules to leave out.
        include_tests: whether the library's own tests count.
        min_chars: shorter references are left out.
        max_chars: longer references are left out.
        max_prompt_chars: longer prompts are left out.
        split: the split that `load` reads by default.
        validation: share of modules in the split `validation`.
        test: share of modules in the split `test`.
        limit: at most this many records.
        shuffle_seed: shuffle by this seed, before `limit`.

    Raises:
        ConfigError: an unknown module name, bad shares, or nothing left.
        ComponentError: this Python has no source files.
    """

    kind = "prompt"

    def __init__(
        self,
        task: str = "body",
        docstrings: str = "keep",
        packages: Sequence[str] = (),
        exclude: Sequence[str] = (),
        include_tests: bool = False,
        min_chars: int = 40,
        max_chars: int | None = None,
        max_prompt_chars: int | None = None,
        split: str = "test",
        validation: float = 0.05,
        test: float = 0.05,
        limit: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        self.task, self.docstrings = task, docstrings
        self.min_chars, self.max_chars = min_chars, max_chars
        self.max_prompt_chars = max_prompt_chars
        self.modules = find_modules(packages, exclude, include_tests=include_tests)
        self._splits = Splits(split, validation, test)
        self._selection = Selection(limit, shuffle_seed)

    def splits(self) -> Sequence[str]:
        """`train`, `validation`, `test` (where their share is above 0) and `all`."""
        return self._splits.names()

    def load(
        self, split: str = "", limit: int | None = None, shuffle_seed: int | None = None
    ) -> Iterator[PromptRecord]:
        """Records by module name and line, or shuffled."""
        records = self._records(modules_of(self.modules, self._splits, split))
        seed = self._selection.seed(shuffle_seed)
        if seed is not None:
            shuffled = list(records)
            shuffle(shuffled, seed)
            records = iter(shuffled)
        return islice(records, self._selection.count(limit))

    def fingerprint(self, split: str = "") -> str:
        """Hash of the split's file contents and of everything that selects from them."""
        modules = modules_of(self.modules, self._splits, split)
        settings = [self.task, self.docstrings, self.min_chars, self.max_chars]
        selection = [self.max_prompt_chars, self._selection.limit, self._selection.shuffle_seed]
        return content_hash(
            ["python-prompts", VERSION, settings, selection, content_hashes(modules)]
        )

    def _records(self, modules: Sequence[Module]) -> Iterator[PromptRecord]:
        for module in modules:
            source = module.source()
            lines = source.split("\n")
            for qualname, node in definitions(source):
                if isinstance(node, ast.ClassDef):
                    continue
                pair = self._pair(lines, node)
                if pair is not None and self._fits(*pair):
                    yield _record(module, qualname, node, *pair)

    def _pair(self, lines: list[str], node: Function) -> tuple[str, str] | None:
        if self.task == "docstring":
            return split_docstring(lines, node)
        if self.docstrings == "require" and ast.get_docstring(node) is None:
            return None
        return split_body(lines, node, keep_docstring=self.docstrings != "drop")

    def _fits(self, prompt: str, reference: str) -> bool:
        size = len(reference)
        return (
            size >= self.min_chars
            and (self.max_chars is None or size <= self.max_chars)
            and (self.max_prompt_chars is None or len(prompt) <= self.max_prompt_chars)
        )


def split_body(
    lines: list[str], node: Function, *, keep_docstring: bool = True
) -> tuple[str, str] | None:
    """A function's signature (with its docstring) and its body; None where a line holds both.

    Joined, the two parts are the function's source, unless the docstring was dropped.
    """
    statements = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    if not statements or not all(_begins_line(lines, s) for s in (node.body[0], statements[0])):
        return None
    own, start = definition_lines(lines, node), first_line(node)
    header = first_line(node.body[0]) - start
    if statements is node.body:
        return "\n".join([*own[:header], ""]), "\n".join(own[header:])
    body = (node.body[0].end_lineno or 0) + 1 - start
    kept = own[:body] if keep_docstring else own[:header]
    return "\n".join([*kept, ""]), "\n".join(own[body:])


def split_docstring(lines: list[str], node: Function) -> tuple[str, str] | None:
    """A function's signature up to the docstring's opening quotes, and the docstring with its
    closing ones; None for functions without one."""
    if ast.get_docstring(node) is None or not _begins_line(lines, node.body[0]):
        return None
    own, start = definition_lines(lines, node), first_line(node)
    header = first_line(node.body[0]) - start
    stop = (node.body[0].end_lineno or 0) + 1 - start
    text = "\n".join(own[header:stop])
    opening = _OPENING.match(text)
    if opening is None:  # a docstring in parentheses
        return None
    prompt = "\n".join([*own[:header], opening[0]])
    return prompt, text[opening.end() :]


def _begins_line(lines: list[str], statement: ast.stmt) -> bool:
    line = lines[statement.lineno - 1]
    return not line.encode()[: statement.col_offset].strip()


def _record(
    module: Module, qualname: str, node: Function, prompt: str, reference: str
) -> PromptRecord:
    docstring = docstring_of(node)
    metadata = {
        "module": module.name,
        "package": module.package,
        "qualname": qualname,
        "lineno": first_line(node),
        "docstring": docstring,
        "summary": (docstring or "").partition("\n")[0],
    }
    name = f"{module.name}:{qualname}"
    return PromptRecord(id=name, prompt=prompt, reference=reference, metadata=metadata)
