"""The standard library as data: what records hold, how they split, what they are worth."""

from __future__ import annotations

import ast
import inspect
import json
import os
import textwrap

import pytest
from tenfold.builtin import stdlib_source
from tenfold.builtin.python_prompts import PythonPrompts, split_body, split_docstring
from tenfold.builtin.python_stdlib import PythonStdlib
from tenfold.builtin.stdlib_source import content_hashes, definitions, find_modules
from tenfold.errors import ComponentError, ConfigError

PACKAGES = ["json", "email", "textwrap"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_function_text_is_the_functions_own_source():
    records = {r.id: r for r in PythonStdlib("function", ["json"], split="all").load()}
    record = records["json.decoder:JSONDecoder.decode"]
    assert record.text == textwrap.dedent(inspect.getsource(json.JSONDecoder.decode)).rstrip("\n")
    assert record.metadata["module"] == "json.decoder"
    assert record.metadata["package"] == "json"
    assert record.metadata["qualname"] == "JSONDecoder.decode"
    assert record.metadata["lineno"] == inspect.getsourcelines(json.JSONDecoder.decode)[1]
    assert record.metadata["docstring"] == inspect.getdoc(json.JSONDecoder.decode).strip()
    assert record.metadata["summary"] == record.metadata["docstring"].split("\n")[0]


def test_each_unit_holds_what_it_says():
    load = {
        u: list(PythonStdlib(u, ["json"], split="all").load())
        for u in ("module", "class", "function", "docstring")
    }
    assert [r.id for r in load["module"]] == [
        "json",
        "json.decoder",
        "json.encoder",
        "json.scanner",
        "json.tool",
    ]
    assert load["module"][0].text == inspect.getsource(json)
    assert load["module"][0].metadata["docstring"] == inspect.getdoc(json).strip()
    assert {r.id for r in load["class"]} >= {"json.decoder:JSONDecoder", "json.encoder:JSONEncoder"}
    docstrings = {r.id: r for r in load["docstring"]}
    assert docstrings["json"].text == inspect.getdoc(json).strip()
    assert docstrings["json"].metadata["object"] == "module"
    assert docstrings["json:dumps"].text == inspect.getdoc(json.dumps).strip()
    assert docstrings["json:dumps"].metadata["object"] == "function"
    assert "docstring" not in docstrings["json:dumps"].metadata


def test_ids_are_unique_over_the_whole_library():
    many = ["asyncio", "ctypes", "email", "tkinter", "unittest", "xml"]
    for data in (PythonStdlib(split="all"), PythonStdlib("function", many, split="all")):
        ids = [r.id for r in data.load()]
        assert len(ids) == len(set(ids)) > 500


def test_splits_share_no_module_and_cover_everything():
    data = PythonStdlib(validation=0.2, test=0.2)
    modules = {s: {r.metadata["module"] for r in data.load(s)} for s in data.splits()}
    assert data.splits() == ("train", "validation", "test", "all")
    parts = [modules[s] for s in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(modules["all"]) == len(set().union(*parts))
    assert min(map(len, parts)) > 50


def test_a_larger_validation_part_leaves_the_test_part_alone():
    small = {r.id for r in PythonStdlib(validation=0.05, test=0.1).load("test")}
    large = {r.id for r in PythonStdlib(validation=0.5, test=0.1).load("test")}
    assert small == large


def test_tests_of_the_library_are_left_out_unless_asked_for():
    names = {m.name for m in find_modules()}
    assert not any(n.startswith("test.") or ".tests." in n or "site-packages" in n for n in names)
    assert "json" in names
    assert len(find_modules(include_tests=True)) >= len(names)


def test_order_is_fixed_and_shuffles_repeat():
    data = PythonStdlib("function", PACKAGES, split="all")
    plain = [r.id for r in data.load()]
    assert plain == [r.id for r in data.load()]
    first = [r.id for r in data.load(shuffle_seed=1)]
    assert first == [r.id for r in data.load(shuffle_seed=1)]
    assert first != plain
    assert sorted(first) == sorted(plain)
    own = PythonStdlib("function", PACKAGES, split="all", shuffle_seed=1, limit=5)
    assert [r.id for r in own.load()] == first[:5]
    assert [r.id for r in own.load(limit=3)] == first[:3]
    assert [r.id for r in own.load(limit=50)] == first[:5]


def test_lengths_select():
    records = list(
        PythonStdlib("function", ["json"], split="all", min_chars=200, max_chars=400).load()
    )
    assert records
    assert all(200 <= len(r.text) <= 400 for r in records)


def test_fingerprint_follows_settings_and_content():
    prints = {
        PythonStdlib("function", ["json"], split="all").fingerprint(),
        PythonStdlib("class", ["json"], split="all").fingerprint(),
        PythonStdlib("function", ["email"], split="all").fingerprint(),
        PythonStdlib("function", ["json"], split="all", min_chars=9).fingerprint(),
        PythonStdlib("function", ["json"], split="all", limit=9).fingerprint(),
        PythonStdlib("function", ["json"], split="all", shuffle_seed=9).fingerprint(),
    }
    assert len(prints) == 6
    assert PythonStdlib("function", ["json"], split="all").fingerprint() in prints


def library(root, **files):
    for name, text in files.items():
        path = root.joinpath(*name.split("__dot__"))
        path = path.with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_content_hashes_follow_the_file_and_survive_a_damaged_cache(tmp_path, cache, monkeypatch):
    root = library(tmp_path / "lib", a="x = 1\n", pkg__dot__b="y = 2\n")
    modules = find_modules(root=root)
    assert [m.name for m in modules] == ["a", "pkg.b"]
    first = content_hashes(modules)
    monkeypatch.setattr(stdlib_source, "_digest", lambda path: pytest.fail(f"read {path}"))
    assert content_hashes(modules) == first  # from sizes and times alone
    assert content_hashes(modules[1:])["pkg.b"] == first["pkg.b"]
    monkeypatch.undo()
    monkeypatch.setenv("TENFOLD_CACHE", str(cache))
    (root / "a.py").write_text("x = 3\n")
    os.utime(root / "a.py", ns=(1, 1))
    changed = content_hashes(modules)
    assert changed["a"] != first["a"]
    assert changed["pkg.b"] == first["pkg.b"]
    (cache / "stdlib-hashes.json").write_text('{"broken"')
    assert content_hashes(modules) == changed


def test_definitions_found_in_every_kind_of_block_and_named_once():
    source = textwrap.dedent(
        """
        class A:
            @property
            def p(self): return 1
            @p.setter
            def p(self, value): pass
            class B:
                def q(self):
                    def inner(): pass
        try:
            import fast
        except ImportError:
            def f(): pass
        else:
            def f(): return fast
        if True:
            async def g(): pass
        match 1:
            case 1:
                def h(): pass
        """
    )
    assert [name for name, _ in definitions(source)] == [
        "A",
        "A.p",
        "A.p#2",
        "A.B",
        "A.B.q",
        "f",
        "f#2",
        "g",
        "h",
    ]
    assert list(definitions("def broken(:")) == []


@pytest.mark.parametrize(
    ("source", "docstring"),
    [
        ('# c\n\n"""Text\n   more\n"""\nx = 1\n', "Text\nmore"),
        ("'''One'''", "One"),
        ('"a" + "b"\n', None),
        ("x = 1\n", None),
        ("", None),
        ('b"bytes"\n', None),
    ],
)
def test_module_docstring(source, docstring):
    assert stdlib_source.module_docstring(source) == docstring


def function(source):
    lines = textwrap.dedent(source).strip("\n").split("\n")
    return lines, ast.parse("\n".join(lines)).body[0]


def test_prompt_and_body_join_to_the_source():
    lines, node = function(
        '''
        @wraps(x)
        def f(a,
              b=1):
            """Doc.

            More.
            """
            # comment
            return a + b
        '''
    )
    prompt, reference = split_body(lines, node)
    assert prompt + reference == "\n".join(lines)
    assert prompt.endswith('More.\n    """\n')
    assert reference == "    # comment\n    return a + b"
    short, same = split_body(lines, node, keep_docstring=False)
    assert short == "@wraps(x)\ndef f(a,\n      b=1):\n"
    assert same == reference
    ask, doc = split_docstring(lines, node)
    assert ask == '@wraps(x)\ndef f(a,\n      b=1):\n    """'
    assert doc == 'Doc.\n\n    More.\n    """'


@pytest.mark.parametrize(
    "source",
    ["def f(): return 1", 'def f():\n    """Only a docstring."""', 'def f():\n    "d"; x = 1'],
)
def test_functions_that_cannot_be_cut_between_lines_are_left_out(source):
    lines, node = function(source)
    assert split_body(lines, node) is None


def test_every_prompt_of_the_library_continues_to_valid_python():
    records = list(PythonPrompts(split="all", min_chars=1, limit=2000).load())
    assert len(records) == 2000
    for record in records:
        tree = ast.parse(record.prompt + record.reference)
        assert isinstance(tree.body[0], ast.FunctionDef | ast.AsyncFunctionDef)
        assert record.metadata["qualname"].split("#")[0].split(".")[-1] == tree.body[0].name


def test_prompts_come_from_modules_that_training_never_sees():
    trained = {r.metadata["module"] for r in PythonStdlib().load()}
    asked = {r.metadata["module"] for r in PythonPrompts().load()}
    assert asked
    assert not asked & trained


def test_docstring_prompts_reference_the_docstring():
    for record in PythonPrompts("docstring", packages=["json"], split="all", min_chars=1).load():
        tree = ast.parse(record.prompt + record.reference + "\n")
        assert ast.get_docstring(tree.body[0]).strip() == record.metadata["docstring"]


def test_required_docstrings_are_there():
    for record in PythonPrompts(docstrings="require", limit=20).load():
        assert record.metadata["docstring"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"packages": ["jsn"]}, "no module 'jsn'; did you mean 'json'"),
        ({"exclude": ["emial"]}, "no module 'emial'; did you mean 'email'"),
        ({"validation": 0.7, "test": 0.7}, "their sum must be at most 1"),
        ({"split": "dev"}, "no split 'dev'.*splits: dev|no split 'dev'"),
        ({"split": "test", "test": 0.0}, "the split 'test' is empty"),
    ],
)
def test_wrong_settings_are_one_clear_error(arguments, message):
    with pytest.raises(ConfigError, match=message):
        PythonStdlib(**arguments)


def test_a_split_without_modules_says_so():
    with pytest.raises(ConfigError, match="none of the 1 chosen modules falls into"):
        list(PythonStdlib(packages=["abc"], split="test", validation=0.001, test=0.001).load())


def test_python_without_source_is_a_clear_error(tmp_path):
    with pytest.raises(ComponentError, match="no Python source in"):
        find_modules(root=tmp_path / "nothing")
