"""The conformance kit: a good component passes every law, and each law catches its breach."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from tenfold.testing import check_model, check_plugin
from tenfold.testing.findings import Finding

SUPPORT = Path(__file__).parent / "support"

DATA = """
import itertools
from tenfold import ComponentSpec, Param, PluginInfo, hookimpl

@hookimpl
def tenfold_plugin():
    return PluginInfo("{name}", "Data")

@hookimpl
def tenfold_models():
    return [ComponentSpec("same", "{module}:Same", "the same", provides=("generate",))]

@hookimpl
def tenfold_datasets():
    return [
        ComponentSpec(n.lower(), "{module}:" + n, "rows", provides=("text",), params=(
            Param("size", "int", 6, minimum=1),
        ))
        for n in ("Good", "TwiceId", "Endless", "Loose", "AnySplit", "Unstable", "Random")
    ]

@hookimpl
def tenfold_evaluators():
    return [
        ComponentSpec(n.lower(), "{module}:" + n, "measures", (), (), {"model": ("generate",)},
                      {"dataset": ("text",)})
        for n in ("Fine", "Counting", "Failing", "Positional", "Moody")
    ]

class Same:
    def generate(self, prompts, config):
        from tenfold.records import Completion
        return [[Completion(str(p)[: config.max_new_tokens])] * config.n for p in prompts]

class Good:
    kind = "text"
    def __init__(self, size):
        self.size = size
    def splits(self):
        return ("all",)
    def rows(self):
        from tenfold.records import TextRecord
        return [TextRecord(id=f"r{i}", text=f"row {i}") for i in range(self.size)]
    def load(self, split="", limit=None, shuffle_seed=None):
        import random
        from tenfold.errors import ConfigError
        if split not in ("", "all"):
            raise ConfigError("no such split")
        rows = self.rows()
        if shuffle_seed is not None:
            random.Random(shuffle_seed).shuffle(rows)
        return iter(rows[:limit])
    def fingerprint(self, split=""):
        from tenfold.seeds import content_hash
        return content_hash([r.to_json() for r in self.load()])

class TwiceId(Good):
    def rows(self):
        return [*super().rows(), super().rows()[0]]

class Endless(Good):
    def load(self, split="", limit=None, shuffle_seed=None):
        return super().load(split, None, shuffle_seed)

class Loose(Good):
    def load(self, split="", limit=None, shuffle_seed=None):
        rows = list(super().load(split, None, shuffle_seed))
        return iter(rows[1:limit] if shuffle_seed is not None else rows[:limit])

class AnySplit(Good):
    def load(self, split="", limit=None, shuffle_seed=None):
        return super().load("", limit, shuffle_seed)

class Unstable(Good):
    def fingerprint(self, split=""):
        return str(hash("text"))

class Random(Good):
    calls = itertools.count()
    def rows(self):
        from dataclasses import replace
        return [replace(r, text=f"{r.text} {next(self.calls)}") for r in super().rows()]

class Fine:
    def plan(self, ctx, data):
        from tenfold.records import WorkItem, WorkItems
        return WorkItems([WorkItem(r.id, r) for r in data["dataset"].load()])
    def value(self, ctx, item, number):
        return len(item.payload.text)
    def run(self, ctx, models, items):
        from tenfold.records import ItemResult
        for number, item in enumerate(items):
            yield ItemResult(item.id, {"value": self.value(ctx, item, number)})
    def aggregate(self, ctx, results):
        from tenfold.records import Metric
        values = [r.values["value"] for r in results]
        return [Metric("mean", sum(values) / len(values), len(values))] if values else []

class Counting(Fine):
    calls = itertools.count()
    def plan(self, ctx, data):
        from tenfold.records import WorkItem, WorkItems
        call = next(self.calls)
        return WorkItems([WorkItem(f"{call}-{r.id}", r) for r in data["dataset"].load()])

class Failing(Fine):
    def value(self, ctx, item, number):
        raise ValueError("cannot")

class Positional(Fine):
    def value(self, ctx, item, number):
        return number

class Moody(Fine):
    calls = itertools.count()
    def value(self, ctx, item, number):
        return next(self.calls)
"""
BREACHES = {
    "dataset d:twiceid": "records have the described kind",
    "dataset d:endless": "limits take the first",
    "dataset d:loose": "shuffles repeat",
    "dataset d:anysplit": "splits are known",
    "dataset d:unstable": "fingerprints are stable",
    "dataset d:random": "order is fixed",
    "evaluator d:counting": "items repeat",
    "evaluator d:failing": "items repeat",
    "evaluator d:positional": "shards add up",
    "evaluator d:moody": "items repeat",
}


def support(name):
    spec = importlib.util.spec_from_file_location(f"support_{name}", SUPPORT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def broken(findings: list[Finding]):
    return {(f.subject, f.law.partition(": ")[2] or f.law) for f in findings if f.status == "fail"}


@pytest.fixture(scope="module")
def bag():
    pytest.importorskip("torch")
    return support("bag_model")


@pytest.fixture(scope="module")
def data_findings(tmp_path_factory):
    """The findings about the plugin above, from the command line's own JSON."""
    FakeSite = support("fake_site").FakeSite
    site = FakeSite(tmp_path_factory.mktemp("data") / "site")
    site.add("d", DATA)
    done = site.tenfold("plugins", "check", "d", "--json")
    assert done.returncode == 3, done.stderr
    return [Finding(**row) for row in json.loads(done.stdout)["findings"]]


def test_a_good_model_passes_every_law(bag):
    findings = check_model(bag.Bag(), bag.PROVIDES)
    assert {f.status for f in findings} <= {"pass", "warn"}, [f.line() for f in findings]
    laws = {f.law.partition(": ")[2] or f.law for f in findings}
    assert laws >= {model.law for model in bag.BROKEN}


def test_each_law_catches_the_model_that_breaks_it(bag):
    missed = []
    for model in bag.BROKEN:
        findings = check_model(model(bag.Bag()), bag.PROVIDES)
        if model.law not in {law for _, law in broken(findings)}:
            missed.append((model.__name__, model.law))
    assert not missed


def test_a_model_without_a_claimed_member_fails_before_any_law(bag):
    findings = check_model(object(), ("generate",))
    assert [(f.law, f.status) for f in findings] == [("has its members", "fail")]
    assert "no generate" in findings[0].message


def test_good_components_pass(data_findings):
    for subject in ("dataset d:good", "evaluator d:fine", "model d:same"):
        mine = [f for f in data_findings if f.subject == subject]
        assert mine
        assert {f.status for f in mine} == {"pass"}, [f.line() for f in mine]


@pytest.mark.parametrize("subject", BREACHES)
def test_each_law_catches_the_component_that_breaks_it(data_findings, subject):
    assert (subject, BREACHES[subject]) in broken(data_findings)


def test_core_hf_passes_every_law(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    import torch
    from tenfold.lm.tokenizer import train_bpe
    from tenfold.registry import load_registry
    from tenfold.testing.building import Workbench
    from tenfold.testing.kit import check_component

    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    tokenizer = train_bpe([Path(__file__).read_text()], 400)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.4,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    registry = load_registry(lenient=True)
    settings = {"core:hf": {"checkpoint": str(tmp_path / "model")}}
    with Workbench(registry, settings) as bench:
        findings = list(check_component(registry.component("model", "core:hf"), bench))
    assert {f.status for f in findings} == {"pass"}, [f.line() for f in findings]
    assert len(findings) > 20


def test_an_unknown_plugin_is_one_finding():
    [finding] = check_plugin("no-such-plugin")
    assert finding.status == "fail"


def test_heavy_imports_and_wrong_targets_fail(site):
    source = """
    import speechbrain
    from tenfold import ComponentSpec, Param, PluginInfo, hookimpl

    @hookimpl
    def tenfold_plugin():
        return PluginInfo("{name}", "Wrong")

    @hookimpl
    def tenfold_models():
        one = (Param("size", "int", 1),)
        return [
            ComponentSpec("gone", "{module}:Gone", "no such class", provides=("generate",)),
            ComponentSpec("other", "{module}:Other", "other names", one, ("generate",)),
            ComponentSpec("more", "{module}:More", "needs more", one, ("generate",)),
            ComponentSpec("raises", "{module}:Raises", "raises", provides=("generate",)),
        ]

    class Other:
        def __init__(self, width): ...

    class More:
        def __init__(self, size, width): ...

    class Raises:
        def __init__(self):
            raise ValueError("never")
    """
    site.add("wrong", source, files={"speechbrain/__init__.py": ""})
    done = site.tenfold("plugins", "check", "wrong", "--json")
    assert done.returncode == 3
    rows = [Finding(**row) for row in json.loads(done.stdout)["findings"]]
    found = {(f.subject, f.law): f.message for f in rows if f.status == "fail"}
    assert "imports speechbrain" in found["wrong", "imports nothing heavy"]
    law = "target accepts parameters"
    assert "Gone" in found["model wrong:gone", law]
    assert "takes no size" in found["model wrong:other", law]
    assert "needs width, which is not described" in found["model wrong:more", law]
    assert "never" in found["model wrong:raises", "builds"]


def test_what_cannot_be_built_is_skipped_with_a_reason(site):
    source = """
    from tenfold import ComponentSpec, Param, PluginInfo, hookimpl

    @hookimpl
    def tenfold_plugin():
        return PluginInfo("{name}", "Needs things")

    @hookimpl
    def tenfold_models():
        path = (Param("checkpoint", "path"),)
        return [ComponentSpec("m", "{module}:M", "a model", path, ("generate",))]

    class M:
        def __init__(self, checkpoint):
            from tenfold.errors import ConfigError
            raise ConfigError(f"no weights in {checkpoint}")
    """
    site.add("needy", source)
    done = site.tenfold("plugins", "check", "needy", "--json")
    assert done.returncode == 0, done.stdout
    rows = [Finding(**row) for row in json.loads(done.stdout)["findings"]]
    [skipped] = [f for f in rows if f.status == "skip"]
    assert (skipped.law, skipped.message) == ("builds", "needs checkpoint")
