"""The index answers only while nothing changed, never fails, and loses nothing."""

from __future__ import annotations

import json
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenfold.index import decode_command, decode_component, encode_spec
from tenfold.spec import REQUIRED, CommandSpec, ComponentSpec, Param

PROBE = """
import json, sys
import tenfold.index as index
from tenfold.registry import load_registry
from tenfold.workspace import find_workspace
hit = index.read(find_workspace())
registry = load_registry(lenient=True)
print(json.dumps({
    "hit": hit is not None,
    "same": hit is None or hit.items == registry.items,
    "ids": [c.id for c in registry.items if c.plugin != "core"],
    "broken": [b.name for b in registry.broken if b.name != "core"],
    "pluggy": "pluggy" in sys.modules,
}))
"""
MODEL = """
from tenfold import ComponentSpec, PluginInfo, hookimpl

@hookimpl
def tenfold_plugin():
    return PluginInfo("{name}", "A plugin")

@hookimpl
def tenfold_models():
    return [ComponentSpec(n, "json:loads", "A model", provides=("generate",)) for n in NAMES]

NAMES = ["first"]
"""

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner, max_size=3)
    ),
    max_leaves=8,
)
params = st.builds(
    Param,
    name=st.text(),
    type=st.sampled_from(["int", "list[str]", "component:model"]),
    default=st.just(REQUIRED) | plain,
    help=st.text(),
    choices=st.lists(st.integers() | st.text()).map(tuple),
    minimum=st.none() | st.floats(allow_nan=False),
    maximum=st.none() | st.integers(),
    identity=st.booleans(),
    positional=st.booleans(),
)
words = st.lists(st.text()).map(tuple)
components = st.builds(
    ComponentSpec,
    name=st.text(),
    target=st.text(),
    summary=st.text(),
    params=st.lists(params, max_size=3).map(tuple),
    provides=words,
    requires=st.dictionaries(st.text(), words, max_size=2),
    data=st.dictionaries(st.text(), words, max_size=2),
    inherits=st.text(),
    trainer=st.text(),
    modules=words,
    extras=words,
    tags=words,
    version=st.integers(),
    deprecated=st.dictionaries(st.text(), st.text(), max_size=2),
)


@given(components)
def test_a_component_description_survives_the_index(spec):
    again = decode_component(json.loads(json.dumps(encode_spec(spec))))
    assert again == spec
    assert [p.default is REQUIRED for p in again.params] == [p.required for p in spec.params]
    assert repr(again) == repr(spec)  # tuples are tuples again, 1 is not 1.0


@given(
    st.builds(CommandSpec, st.text(), st.text(), st.text(), st.lists(params, max_size=3).map(tuple))
)
def test_a_command_description_survives_the_index(spec):
    assert decode_command(json.loads(json.dumps(encode_spec(spec)))) == spec


@pytest.fixture
def probe(site):
    def run(**environment):
        done = site.python("-c", PROBE, **environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_the_second_command_reads_the_index_and_imports_no_pluggy(site, probe):
    site.add("indexed", MODEL)
    first, second = probe(), probe()
    assert (first["hit"], second["hit"]) == (False, True)
    assert second["same"]
    assert second["ids"] == ["indexed:first"]
    assert (first["pluggy"], second["pluggy"]) == (True, False)


def test_editing_plugin_py_invalidates_the_index(site, probe):
    path = site.add("edited", MODEL)
    probe()
    path.write_text(path.read_text().replace('["first"]', '["first", "second"]'))
    site.settle()
    after = probe()
    assert not after["hit"]
    assert after["ids"] == ["edited:first", "edited:second"]


def test_editing_a_module_that_plugin_py_imports_invalidates_the_index(site, probe):
    files = {"fake_names.py": "NAMES = ['first']\n"}
    site.add(
        "split", MODEL.replace('NAMES = ["first"]', "from fake_names import NAMES"), files=files
    )
    probe()
    (site.path / "fake_names.py").write_text("NAMES = ['other']\n")
    site.settle()
    assert probe()["ids"] == ["split:other"]


def test_installing_and_removing_a_plugin_invalidates_the_index(site, probe):
    path = site.add("stays", MODEL)
    probe()
    gone = site.add("comes", MODEL)
    after = probe()
    assert after["ids"] == ["comes:first", "stays:first"]
    for file in (site.path / "fake_comes-1.0.dist-info").iterdir():
        file.unlink()
    (site.path / "fake_comes-1.0.dist-info").rmdir()
    gone.unlink()
    site.settle()
    last = probe()
    assert last["ids"] == ["stays:first"]
    assert path.exists()


def test_policy_and_environment_have_indexes_of_their_own(site, probe):
    site.add("one", MODEL)
    site.add("two", MODEL)
    assert len(probe()["ids"]) == 2
    assert probe(TENFOLD_PLUGINS="two")["ids"] == ["two:first"]
    assert probe(TENFOLD_NO_PLUGINS="1")["ids"] == []
    both = probe()
    assert both["hit"]
    assert len(both["ids"]) == 2


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"\xff\x00", b'{"key": 1}', b'{"key": null, "stamps": 3}', None],
)
def test_a_damaged_index_is_ignored_and_replaced(site, probe, damage):
    site.add("indexed", MODEL)
    probe()
    [file] = (site.path.parent / "cache" / "index").glob("*.json")
    if damage is None:  # the right key and stamps, but components of another shape
        content = json.loads(file.read_bytes())
        content["registry"]["components"] = [["indexed", "model", [1, 2]]]
        damage = json.dumps(content).encode()
    file.write_bytes(damage)
    after = probe()
    assert not after["hit"]
    assert after["ids"] == ["indexed:first"]
    assert probe()["hit"]


def test_an_unwritable_cache_is_no_error(site, probe):
    site.add("indexed", MODEL)
    (site.path.parent / "not-a-folder").write_text("")
    cache = str(site.path.parent / "not-a-folder" / "cache")
    for _ in range(2):
        assert probe(TENFOLD_CACHE=cache)["ids"] == ["indexed:first"]


def test_a_failed_import_is_tried_again(site, probe):
    source = "import os\nif 'LET_ME' not in os.environ: raise RuntimeError('no')\n" + MODEL
    site.add("moody", source)
    assert probe()["broken"] == ["moody"]
    assert probe(LET_ME="1")["ids"] == ["moody:first"]


def test_a_file_changed_after_discovery_began_is_not_indexed_yet(site, probe):
    path = site.add("fresh", MODEL)
    soon = time.time() + 60
    os.utime(path, (soon, soon))
    assert [probe()["hit"], probe()["hit"]] == [False, False]
    site.settle()
    assert [probe()["hit"], probe()["hit"]] == [False, True]


def test_old_indexes_are_removed(site, probe):
    site.add("indexed", MODEL)
    folder = site.path.parent / "cache" / "index"
    folder.mkdir(parents=True)
    for i in range(30):
        (folder / f"old{i}.json").write_text("{}")
    probe()
    assert len(list(folder.glob("*.json"))) == 16
    assert probe()["hit"]
