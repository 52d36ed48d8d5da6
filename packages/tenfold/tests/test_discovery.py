"""Discovery survives anything a plugin does: whatever one plugin breaks, the others work."""

from __future__ import annotations

import json
import sys
import warnings

import pytest
from tenfold.errors import ComponentError, ConfigError, TenfoldWarning
from tenfold.registry import load_registry

CARD = """
from tenfold import CommandSpec, ComponentSpec, Param, PluginInfo, hookimpl

@hookimpl
def tenfold_plugin():
    return PluginInfo("{name}", "A plugin")
"""
MODELS = CARD + "\n@hookimpl\ndef tenfold_models():\n    "
SPEC = 'ComponentSpec("m", "{module}:M", "A model", provides=("generate",)'
BROKEN = {
    "import-error": ("import missing_library_xyz", "import", "missing_library_xyz"),
    "heavy-missing": ("import speechbrain.nowhere_xyz", "import", "speechbrain"),
    "syntax-error": ("def (:", "import", "SyntaxError"),
    "system-exit": ("import sys; sys.exit(4)", "import", "exit code 4"),
    "base-exception": ("class Odd(BaseException): pass\nraise Odd('odd')", "import", "Odd: odd"),
    "memory-error": ("raise MemoryError", "import", "MemoryError"),
    "recursion": ("def f(): f()\nf()", "import", "RecursionError"),
    "no-card": ("x = 1", "tenfold_plugin", "tenfold_plugin is missing"),
    "card-raises": (
        CARD.replace("return PluginInfo", "raise ValueError"),
        "tenfold_plugin",
        "ValueError",
    ),
    "card-exits": (
        CARD.replace("return PluginInfo", "raise SystemExit"),
        "tenfold_plugin",
        "SystemExit",
    ),
    "card-wrong-type": (
        CARD.replace("return PluginInfo", "return dict.fromkeys"),
        "tenfold_plugin",
        "returned dict",
    ),
    "other-name": (CARD.replace("{name}", "another"), "tenfold_plugin", "'another'"),
    "wrong-api": (
        CARD.replace('"A plugin"', '"A plugin", api=">=7.0,<8.0"'),
        "api",
        "needs plugin API >=7.0",
    ),
    "bad-api": (CARD.replace('"A plugin"', '"A plugin", api="seven"'), "api", "'seven'"),
    "hook-raises": (MODELS + "raise RuntimeError('boom')", "tenfold_models", "boom"),
    "hook-exits": (MODELS + "raise SystemExit(2)", "tenfold_models", "exit code 2"),
    "hook-none": (MODELS + "pass", "tenfold_models", "returned None"),
    "hook-single": (MODELS + f"return {SPEC})", "tenfold_models", "returned ComponentSpec"),
    "hook-text": (MODELS + "return 'models'", "tenfold_models", "returned str"),
    "hook-number": (MODELS + "return 3", "tenfold_models", "returned int"),
    "hook-element": (MODELS + f"return [{SPEC}), 'x']", "tenfold_models", "yielded str"),
    "hook-half-way": (
        MODELS + f"yield {SPEC})\n    raise KeyError('half')",
        "tenfold_models",
        "half",
    ),
    "hook-endless": (MODELS + f"\n    while True: yield {SPEC})", "tenfold_models", "more than"),
    "hook-argument": (
        CARD + "\n@hookimpl\ndef tenfold_models(config):\n    return []",
        "hooks",
        "config",
    ),
    "hook-misspelt": (
        CARD + "\n@hookimpl\ndef tenfold_model():\n    return []",
        "hooks",
        "did you mean 'tenfold_models'?",
    ),
    "bad-name": (
        MODELS + "return [" + SPEC.replace('"m"', '"Bad Name"') + ")]",
        "describe",
        "[a-z0-9]",
    ),
    "bad-target": (
        MODELS + "return [" + SPEC.replace("{module}:M", "no target") + ")]",
        "describe",
        "'no target'",
    ),
    "unknown-capability": (
        MODELS + "return [" + SPEC.replace("generate", "generat") + ")]",
        "describe",
        "did you mean 'generate'?",
    ),
    "string-for-tuple": (
        MODELS + "return [" + SPEC.replace('("generate",)', '"generate"') + ")]",
        "describe",
        "tuple of strings",
    ),
    "unknown-need": (
        MODELS + f"return [{SPEC}, requires={{'base': ('grads',)}})]",
        "describe",
        "did you mean 'grad'?",
    ),
    "bad-default": (
        MODELS + f"return [{SPEC}, params=(Param('steps', 'int', 'ten'),))]",
        "describe",
        "must be an integer",
    ),
    "bad-type": (
        MODELS + f"return [{SPEC}, params=(Param('steps', 'integer', 1),))]",
        "describe",
        "unknown type 'integer'",
    ),
    "twice": (MODELS + f"return [{SPEC}), {SPEC})]", "describe", "2 times"),
    "wrong-kind": (
        CARD
        + "\n@hookimpl\ndef tenfold_datasets():\n    return ["
        + SPEC.replace("generate", "texts")
        + ")]",
        "describe",
        "did you mean 'text'?",
    ),
    "command-for-model": (
        MODELS + "return [CommandSpec('c', '{module}:c', 'A command')]",
        "tenfold_models",
        "yielded CommandSpec",
    ),
}


def load(site, monkeypatch, **options):
    monkeypatch.setenv("TENFOLD_PLUGINS", ",".join(dict.fromkeys(site.names)))
    return load_registry(lenient=True, **options)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_reported_and_the_others_work(case, site, monkeypatch):
    source, phase, cause = BROKEN[case]
    site.add("good")
    site.add(case, source)
    site.add("zebra")
    registry = load(site, monkeypatch)
    assert {"good", "zebra"} <= set(registry.plugins)
    assert registry.component("model", "good:echo").plugin == "good"
    [broken] = [b for b in registry.broken if b.name == case]
    assert broken.phase == phase
    assert cause in broken.cause
    assert broken.hint
    assert (broken.dist, broken.version) == (f"fake-{case}", "1.0")
    assert case not in registry.plugins


def test_keyboard_interrupt_is_not_swallowed(site, monkeypatch):
    site.add("impatient", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load(site, monkeypatch)


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        ("no_such_module_xyz", "no_such_module_xyz"),
        ("json:no_such_attribute", "no_such_attribute"),
        ("not a module", "not a module"),
    ],
)
def test_an_entry_point_that_leads_nowhere_is_broken(site, monkeypatch, value, cause):
    site.add("lost", value=value)
    site.add("good")
    registry = load(site, monkeypatch)
    [broken] = [b for b in registry.broken if b.name == "lost"]
    assert broken.phase == "import"
    assert cause in broken.cause
    assert "good" in registry.plugins


@pytest.mark.parametrize(("name", "cause"), [("core", "reserved"), ("Bad_Name", "does not match")])
def test_bad_entry_point_names_are_broken_before_import(site, monkeypatch, name, cause):
    site.add(name, "raise AssertionError('imported')")
    monkeypatch.setenv("TENFOLD_PLUGINS", name)
    broken = [b for b in load_registry(lenient=True).broken if b.dist.startswith("fake-")]
    assert [b.phase for b in broken] == ["metadata"]
    assert cause in broken[0].cause


def test_a_clash_disables_both_and_names_both(site, monkeypatch):
    site.add("same", dist="first-dist")
    site.add("same", dist="second-dist")
    site.add("good")
    registry = load(site, monkeypatch)
    assert "same" not in registry.plugins
    assert "good" in registry.plugins
    clashes = [b for b in registry.broken if b.phase == "clash"]
    assert {b.dist for b in clashes} == {"first-dist", "second-dist"}
    assert all("first-dist, second-dist" in b.cause for b in clashes)


def test_the_preferred_distribution_wins_a_clash(site, monkeypatch, tmp_path):
    site.add("same", dist="first-dist")
    site.add("same", dist="second-dist")
    (tmp_path / "work" / "plugins.toml").write_text('[policy]\nprefer = { same = "Second_Dist" }\n')
    registry = load(site, monkeypatch)
    assert registry.plugins["same"].distribution == "second-dist"
    assert not [b for b in registry.broken if b.name == "same"]


def test_a_missing_target_module_costs_only_its_component(site, monkeypatch):
    good = SPEC.replace('"m"', '"here"') + ")"
    gone = SPEC.replace("{module}:M", "no_package_xyz.deep.module:M") + ")"
    site.add("partly", MODELS + f"return [{gone}, {good}]")
    registry = load(site, monkeypatch)
    assert [c.id for c in registry.items if c.plugin == "partly"] == ["partly:here"]
    [broken] = [b for b in registry.broken if b.name == "partly"]
    assert broken.phase == "target"
    assert "model 'm': there is no module 'no_package_xyz.deep.module'" in broken.cause
    with pytest.raises(ComponentError, match="no_package_xyz"):
        registry.component("model", "partly:m")


def test_a_missing_hook_marker_is_noticed(site, monkeypatch):
    site.add("unmarked", CARD + "\ndef tenfold_models():\n    return []")
    registry = load(site, monkeypatch)
    assert registry.plugins["unmarked"].warnings == (
        "tenfold_models is ignored: it lacks @hookimpl",
    )


@pytest.mark.parametrize("is_plugin", [True, False])
def test_unreadable_metadata_harms_nobody_and_is_told_of_plugins_only(site, monkeypatch, is_plugin):
    site.add("good")
    info = site.path / "rotten-1.0.dist-info"
    info.mkdir()
    group = "tenfold.plugins" if is_plugin else "console_scripts"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rotten\n")
    (info / "entry_points.txt").write_text(f"[{group}]\nthis is no entry point\n")
    site.settle()
    registry = load(site, monkeypatch)
    assert "good" in registry.plugins
    rotten = [b.phase for b in registry.broken if b.dist == "rotten"]
    assert rotten == (["metadata"] if is_plugin else [])


def test_a_plugin_object_can_be_an_attribute(site, monkeypatch):
    source = """
    from tenfold import PluginInfo, hookimpl
    class Plugin:
        @hookimpl
        def tenfold_plugin(self):
            return PluginInfo("{name}", "An object")
    plugin = Plugin()
    """
    path = site.add("object", source)
    site.add("object-like", source, value=f"{path.stem}:plugin")
    registry = load(site, monkeypatch)
    assert "object" not in registry.plugins
    [broken] = [b for b in registry.broken if b.name == "object-like"]
    assert "'object'" in broken.cause  # the object was found; only its name is another's


def test_policy_enables_and_disables(site, monkeypatch, tmp_path):
    site.add("one")
    site.add("two")
    site.add("three")
    monkeypatch.delenv("TENFOLD_PLUGINS", raising=False)
    (tmp_path / "work" / "plugins.toml").write_text(
        '[policy]\nenable = ["one", "two", "absent"]\ndisable = ["two"]\n'
    )
    registry = load_registry(lenient=True)
    assert set(registry.plugins) <= {"core", "one"}
    assert {"two", "three"} <= set(registry.disabled)
    [broken] = [b for b in registry.broken if b.name == "absent"]
    assert broken.phase == "policy"


def test_no_plugins_loads_core_alone(site, monkeypatch):
    site.add("one")
    monkeypatch.setenv("TENFOLD_NO_PLUGINS", "1")
    assert set(load_registry(lenient=True).plugins) == {"core"}


def test_strict_policy_makes_a_broken_plugin_an_error(site, monkeypatch):
    site.add("bad", "raise ValueError('x')")
    monkeypatch.setenv("TENFOLD_PLUGINS", "bad")
    monkeypatch.setenv("TENFOLD_STRICT", "1")
    with pytest.raises(ComponentError, match="'bad'"):
        load_registry()
    monkeypatch.setenv("TENFOLD_STRICT", "0")
    with pytest.warns(TenfoldWarning, match="'bad'"):
        load_registry()


def test_deprecated_names_resolve_with_a_warning_that_names_the_new_one(site, monkeypatch):
    spec = SPEC + ', deprecated={"old": "renamed in 2.0"})'
    site.add("moved", MODELS + f"return [{spec}]")
    registry = load(site, monkeypatch)
    for name in ("old", "moved:old"):
        with pytest.warns(TenfoldWarning, match="now called 'moved:m'.*renamed in 2.0"):
            assert registry.component("model", name).id == "moved:m"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.component("model", "moved:m")


def test_names_resolve_when_unique_and_errors_say_what_is_likely(site, monkeypatch):
    site.add("one", MODELS + f"return [{SPEC}), {SPEC.replace(chr(34) + 'm', chr(34) + 'solo')})]")
    site.add("two", MODELS + f"return [{SPEC})]")
    registry = load(site, monkeypatch)
    assert registry.component("model", "solo").id == "one:solo"
    for name, message in (
        ("m", "ambiguous; write one of one:m, two:m"),
        ("one:solp", "did you mean 'one:solo'"),
        ("sola", "did you mean 'solo'"),
        ("onne:solo", "no plugin 'onne'; did you mean 'one'"),
    ):
        with pytest.raises(ComponentError, match=message):
            registry.component("model", name)
    with pytest.raises(ComponentError, match="it names a model"):
        registry.component("dataset", "solo")


def test_defaults_of_plugins_toml_are_checked(site, monkeypatch, tmp_path):
    site.add("tuned", MODELS + f"return [{SPEC}, params=(Param('size', 'int', 1),))]")
    file = tmp_path / "work" / "plugins.toml"
    file.write_text("[plugins.tuned.defaults.m]\nsize = 3\n")
    registry = load(site, monkeypatch)
    assert registry.defaults(registry.component("model", "tuned:m")) == {"size": 3}
    file.write_text("[plugins.tuned.defaults.m]\nsizes = 3\n")
    registry = load(site, monkeypatch)
    with pytest.raises(ConfigError, match="did you mean 'size'"):
        registry.defaults(registry.component("model", "tuned:m"))


def test_recipes_are_found_beside_plugin_py(site, monkeypatch):
    source = CARD.replace("{name}", "packaged")
    files = {
        "packaged_xyz/__init__.py": "",
        "packaged_xyz/plugin.py": source,
        "packaged_xyz/recipes/quick.toml": 'summary = "Quick"',
    }
    site.add("packaged", value="packaged_xyz.plugin", files=files)
    registry = load(site, monkeypatch)
    path = registry.recipe("packaged:quick")
    assert path is not None
    assert path.read_text() == 'summary = "Quick"'
    assert registry.recipe("run.toml") is None
    assert [r.id for r in registry.recipes() if r.plugin == "packaged"] == ["packaged:quick"]
    with pytest.raises(ComponentError, match="did you mean 'packaged:quick'"):
        registry.recipe("packaged:quik")


def test_what_a_plugin_prints_stays_off_stdout(site):
    site.add("chatty", "print('hello from plugin.py')\n" + CARD)
    done = site.tenfold("plugins", "--json")
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)
    assert "hello from plugin.py" in done.stderr


def test_heavy_and_slow_imports_are_warned_about(site):
    heavy = {"speechbrain/__init__.py": ""}  # stands for any of the heavy modules
    site.add("heavy", "import speechbrain\n" + CARD, files=heavy)
    slow = "import time\nend = time.process_time() + 0.4\nwhile time.process_time() < end: pass\n"
    site.add("slow", slow + CARD)
    done = site.tenfold("plugins", "check")
    assert "plugin.py imports speechbrain" in done.stdout
    assert "importing plugin.py takes" in done.stdout


def test_everything_broken_at_once_costs_one_line_each(site):
    site.add("good")
    for case, (source, _, _) in BROKEN.items():
        site.add(case, source)
    done = site.tenfold("list", "--plugin", "good")
    assert done.returncode == 0, done.stderr
    assert "good:echo" in done.stdout
    lines = [line for line in done.stderr.splitlines() if "is broken" in line]
    assert {line.split("'")[1] for line in lines} >= set(BROKEN)
    assert "Traceback" not in done.stderr
    check = site.tenfold("plugins", "check")
    assert check.returncode == 3
    assert "ok      good" in check.stdout
    assert all(f"BROKEN  {case} " in check.stdout for case in BROKEN)
    assert "raise RuntimeError('boom')" in check.stdout


def test_trace_writes_timings_to_stderr(site):
    site.add("good")
    done = site.tenfold("list", TENFOLD_TRACE="1")
    assert "trace: load good" in done.stderr
    assert "trace" not in done.stdout


def test_observers_are_isolated_from_the_run_and_from_each_other(site, monkeypatch, capsys):
    source = """
    from tenfold import PluginInfo, hookimpl
    seen = []

    @hookimpl
    def tenfold_plugin():
        return PluginInfo("{name}", "Watches")

    class Watcher:
        @hookimpl
        def tenfold_plugin(self):
            return PluginInfo("{name}", "Watches")

        @hookimpl
        def tenfold_item_end(self, item):
            seen.append(item["id"])
            if item["id"] == "BAD":
                raise SystemExit(3)

    watcher = Watcher()
    """
    modules = {}
    for name in ("fragile", "robust"):
        text = source.replace("BAD", "b" if name == "fragile" else "none")
        path = site.add(name, text, value="placeholder")
        entries = site.path / f"fake_{name}-1.0.dist-info" / "entry_points.txt"
        entries.write_text(f"[tenfold.plugins]\n{name} = {path.stem}:watcher\n")
        modules[name] = path.stem
    site.settle()
    observers = load(site, monkeypatch).observers()
    for item in ("a", "b", "c"):
        observers.item_end({}, {"id": item})
    seen = {name: sys.modules[module].seen for name, module in modules.items()}
    assert seen == {"fragile": ["a", "b"], "robust": ["a", "b", "c"]}
    assert "'fragile' failed in tenfold_item_end" in capsys.readouterr().err
