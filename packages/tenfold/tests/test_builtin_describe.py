"""Descriptions and what they describe say the same, and composing them works end to end."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest
from tenfold.build import load_target
from tenfold.builtin import describe_io
from tenfold.builtin.describe_data import GENERATION
from tenfold.describe import check_spec
from tenfold.host import Host
from tenfold.records import GenerationConfig
from tenfold.registry import load_registry
from tenfold.run import Options
from tenfold.spec import REQUIRED
from tenfold.store import RunStore
from tenfold.testing.building import Workbench
from tenfold.testing.kit import check_component

SPECS = [
    *(("model", spec) for spec in describe_io.MODELS),
    *(("dataset", spec) for spec in describe_io.DATASETS),
    *(("evaluator", spec) for spec in describe_io.EVALUATORS),
]
IDS = [f"{kind}-{spec.name}" for kind, spec in SPECS]
QUIET = Options(progress=False)


@pytest.mark.parametrize(("kind", "spec"), SPECS, ids=IDS)
def test_descriptions_are_sound(kind, spec):
    assert check_spec(kind, spec) == []
    assert all(param.help for param in spec.params)


@pytest.mark.parametrize(("kind", "spec"), SPECS, ids=IDS)
def test_described_defaults_are_the_real_ones(kind, spec):
    if "pyarrow" in spec.modules:
        pytest.importorskip("pyarrow")
    target = load_target(spec.target, spec.name)
    parameters = inspect.signature(target).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    shared = {param.name for param in GENERATION} | {
        "text_column", "prompt_column", "reference_column", "chosen_column", "rejected_column",
    }  # fmt: skip
    for param in spec.params:
        found = parameters.get(param.name)
        if found is None:
            assert free, f"{spec.name}: the target takes no {param.name}"
            assert param.name in shared
        elif found.default is inspect.Parameter.empty:
            assert param.default is REQUIRED, param.name
        else:
            same = {"extra": {}}.get(param.name, found.default)
            assert param.default == same, f"{spec.name}.{param.name}"
    described = {param.name for param in spec.params}
    assert {n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD} - described <= {
        "form", "kind", "encoding",
    }  # fmt: skip


def test_generation_defaults_are_those_of_the_configuration():
    config = GenerationConfig()
    for param in GENERATION:
        assert param.default == getattr(config, param.name), param.name


def test_describing_imports_only_the_standard_library_and_the_contracts():
    script = (
        "import sys; before = set(sys.modules)\n"
        "import tenfold.builtin.describe_io\n"
        "new = {m for m in set(sys.modules) - before}\n"
        "print([m for m in new if m.split('.')[0] not in sys.stdlib_module_names])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = set(json.loads(done.stdout.replace("'", '"')))
    assert found <= {
        "tenfold", "tenfold.spec", "tenfold.builtin", "tenfold.builtin.describe_io",
        "tenfold.builtin.describe_data",
    }  # fmt: skip


# --- together with the host -------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch):
    pytest.importorskip("tenfold.builtin.describe_lm")
    (tmp_path / "workspace.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TENFOLD_NO_PLUGINS", "1")
    rows = [{"id": f"q{i}", "prompt": f"say {i}", "reference": f"SAY {i}"} for i in range(5)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run_table(name, **tables):
    return {"schema": "tenfold-run/1", "name": name, "seed": 3, **tables}


def values(outcome):
    return {line.id: line.values for line in RunStore(outcome.run_dir).ordered_lines()}


def test_one_runs_output_is_anothers_input(project):
    host = Host()
    prompts = {"use": "core:jsonl-prompts", "path": "q.jsonl"}
    upper = {"use": "core:echo", "upper": True}
    first = host.run(
        run_table("write", model=upper, dataset=prompts, evaluator={"use": "core:generate"}),
        options=QUIET,
    )
    assert first.exit_code == 0
    assert values(first)["q3"]["completion"] == "SAY 3"
    match = {"use": "core:exact-match"}
    samples = {"use": "core:run-samples", "run": "write"}
    second = host.run(run_table("match", dataset=samples, evaluator=match), options=QUIET)
    assert second.metrics[0].value == 1.0
    replay = {"use": "core:replay", "run": "write"}
    third = host.run(
        run_table("again", model=replay, dataset=prompts, evaluator=match), options=QUIET
    )
    assert third.metrics == second.metrics
    assert {k: v["completion"] for k, v in values(third).items()} == {
        k: v["completion"] for k, v in values(first).items()
    }


def test_a_dataset_may_be_written_by_the_runs_own_model(project):
    generated = {
        "use": "core:generated",
        "model": {"share": "model"},
        "prompts": {"use": "core:jsonl-prompts", "path": "q.jsonl"},
    }
    upper = {"use": "core:echo", "upper": True}
    outcome = Host().run(
        run_table("g", model=upper, dataset=generated, evaluator={"use": "core:exact-match"}),
        options=QUIET,
    )
    assert outcome.metrics[0].value == 1.0


def test_interrupted_generation_resumes_to_the_same_items(project):
    table = run_table(
        "r",
        model={"use": "core:echo"},
        dataset={"use": "core:jsonl-prompts", "path": "q.jsonl"},
        evaluator={"use": "core:generate", "batch_size": 2},
    )
    host = Host()
    whole = host.run(table, options=QUIET)
    part = host.run(table, options=Options(progress=False, limit=3))
    done = host.resume(str(part.run_dir), Options(progress=False, limit=5))
    assert (done.done, done.reused) == (2, 3)
    assert values(part) == values(whole)
    assert done.metrics == whole.metrics


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"use": "core:jsonl-prompts"}, "datasets.dataset.path is required"),
        ({"use": "core:jsonl-prompts", "path": "p.jsonl"}, "no such file or folder: p.jsonl; did"),
        ({"use": "core:jsonl-prompts", "path": "q.jsonl", "promt_column": "x"},
         "no parameter 'promt_column'; did you mean 'prompt_column'"),
        ({"use": "core:python-stdlib", "unit": "modul"}, "did you mean 'module'"),
        ({"use": "core:jsonl-preferences", "path": "q.jsonl"},
         "core:generate needs prompt or text records"),
        ({"use": "core:run-samples", "run": "x"}, "core:generate needs prompt or text records"),
    ],
)  # fmt: skip
def test_mistakes_in_a_run_file_are_one_message_on_the_command_line(project, dataset, message):
    import tomli_w

    table = run_table(
        "bad", model={"use": "core:echo"}, dataset=dataset, evaluator={"use": "core:generate"}
    )
    (project / "bad.toml").write_text(tomli_w.dumps(table))
    done = subprocess.run(
        [sys.executable, "-m", "tenfold", "run", "bad.toml"], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_conformance_kit_passes_for_what_builds_without_torch(project):
    settings = {
        "core:jsonl": {"path": str(project / "q.jsonl"), "text_column": "prompt"},
        "core:jsonl-prompts": {"path": str(project / "q.jsonl")},
        "core:text": {"path": str(project / "q.jsonl"), "unit": "line"},
        "core:python-stdlib": {"packages": ["json"], "split": "all", "unit": "function"},
        "core:python-prompts": {"packages": ["json"], "split": "all"},
        "core:generated": {
            "model": {"use": "core:echo"},
            "prompts": {"use": "core:jsonl-prompts", "path": str(project / "q.jsonl")},
        },
    }
    registry = load_registry()
    checked = []
    with Workbench(registry, settings) as bench:
        for kind, names in {
            "model": ("echo",),
            "dataset": [name.removeprefix("core:") for name in settings],
            "evaluator": ("generate", "exact-match", "throughput"),
        }.items():
            for name in names:
                checked += check_component(registry.component(kind, f"core:{name}"), bench)
    assert len(checked) > 50
    assert [finding for finding in checked if finding.status != "pass"] == []
