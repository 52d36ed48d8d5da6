"""`tenfold dabgo ...` through the real command line, on a tiny model in a workspace of its own."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from tenfold.cli import main
from tenfold.errors import ConfigError
from tenfold.host import Host
from tenfold_dabgo.composition import evaluator_table, run_table, whole_settings
from tenfold_dabgo.doctor import in_units
from tenfold_dabgo.evaluation.agreement import agreements, overlap_at_k
from tenfold_dabgo.terminal import heat_styles, printable, show_heat

RUN = """
schema = "tenfold-run/1"
name = "tiny"
seed = 0
[model]
use = "core:hf"
[model.train]
use = "dabgo:harness"
dataset = { share = "train" }
hidden_size = 16
layers = 1
train_steps = 12
[datasets.train]
use = "dabgo:synthetic-topics"
n = 20
held_out = 2
length = 16
topics = 2
[datasets.queries]
use = "dabgo:synthetic-topics"
n = 20
held_out = 2
length = 16
topics = 2
split = "test"
[evaluator]
use = "dabgo:attribution"
top_k = 3
columns = ["topic"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "workspace.toml").write_text('[paths]\ncache = "cache"\n')
    (folder / "run.toml").write_text(RUN)
    return folder


@pytest.fixture
def call(folder, monkeypatch, capsys):
    """Runs a command line in the workspace: exit code, stdout, stderr."""
    monkeypatch.chdir(folder)

    def run(*arguments):
        code = main(["dabgo", *map(str, arguments)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run


MADE = {}


@pytest.fixture
def attributed(call, folder):
    """Result of `attribute`; the run is made once."""
    if folder not in MADE:
        code, out, _ = call("attribute", "run.toml", "--json")
        assert code == 0
        MADE[folder] = json.loads(out)
    return MADE[folder]


# --- attribute, compare, explain --------------------------------------------------------------


def test_attribute_ranks_and_leaves_a_record(call, attributed):
    ranking = attributed["rankings"]["text-00018"]
    assert ranking["method"] == "dabgo"
    assert ranking["unit"] == "nats/token"
    assert [row["rank"] for row in ranking["proponents"]] == [1, 2, 3]
    scores = [row["score"] for row in ranking["proponents"]]
    assert scores == sorted(scores, reverse=True)
    code, out, err = call("attribute", "run.toml", "--method", "bm25", "--top-k", 1, "--limit", 1)
    assert code == 0
    assert out.count("proponents") == 1
    assert "BM25" in out
    assert "report.html" in err


def test_compare_recorded_runs_and_methods(call, attributed):
    first = attributed["run_dir"]
    code, out, _ = call("attribute", "run.toml", "--method", "gradient-dot", "--json")
    assert code == 0
    second = json.loads(out)["run_dir"]
    code, out, _ = call("compare", first, second, "--json")
    [recorded] = json.loads(out)
    code, out, _ = call(
        "compare", "run.toml", "--methods", "dabgo,gradient-dot", "--k", 10, "--json"
    )
    [live] = json.loads(out)
    assert code == 0
    assert recorded["queries"] == live["queries"] == 2
    assert recorded["spearman"] == pytest.approx(live["spearman"])
    assert recorded["overlap@10"] == pytest.approx(live["overlap@10"])
    assert 0 < live["spearman"] < 1
    code, out, _ = call("compare", first, second)
    assert code == 0
    assert f"{live['spearman']:.3f} (" in out
    code, _, err = call("compare", first, first)
    assert code == 2
    assert "different runs" in err


def test_explain_from_the_record_equals_a_computation(call, attributed, folder):
    best = attributed["rankings"]["text-00018"]["proponents"][0]
    code, out, _ = call("explain", attributed["run_dir"], "--query", "text-00018", "--json")
    kept = json.loads(out)
    assert code == 0
    assert kept["sample"] == best["id"]
    assert kept["score"] == pytest.approx(best["score"])
    page = folder / "out" / "explained.html"
    code, out, _ = call(
        "explain", "run.toml", "--query", "text-00018", "--sample", best["id"],
        "--out", page, "--json",
    )  # fmt: skip
    anew = json.loads(out)
    assert code == 0
    assert kept["tokens"] == anew["tokens"]
    assert kept["token_scores"][0] is None is anew["token_scores"][0]
    np.testing.assert_allclose(kept["token_scores"][1:], anew["token_scores"][1:], atol=2e-5)
    assert np.mean(anew["token_scores"][1:]) == pytest.approx(anew["score"], abs=1e-5)
    assert "supports" in page.read_text()
    code, out, _ = call("explain", attributed["run_dir"])
    assert code == 0
    assert "supports" in out
    assert "opposes" in out


def test_perturb_shows_the_steps_that_a_run_takes(call, attributed, folder):
    code, out, _ = call("perturb", "run.toml", "--query", "text-00018", "--json")
    found = json.loads(out)
    assert code == 0
    items = folder / attributed["run_dir"] / "items.jsonl"
    rows = [json.loads(line) for line in items.read_text().splitlines()]
    [item] = [row["values"] for row in rows if row["id"] == "text-00018"]
    assert found["trace"] == item["details"]["trace"]
    assert found["step_size"] == item["details"]["step_size"]
    assert found["trace"]["ascent"][-1]["loss"] > found["trace"]["descent"][-1]["loss"]
    code, out, _ = call("perturb", "run.toml", "--set", "evaluator.steps=2")
    assert code == 0
    assert out.count("ascent") == 3


# --- fisher, doctor, eval -----------------------------------------------------------------------


def test_fisher_is_the_one_of_the_library_and_doctor_knows_it(call, folder):
    code, out, _ = call("fisher", "run.toml", "--out", folder / "f.safetensors", "--json")
    facts = json.loads(out)
    assert code == 0
    values = load_file(folder / "f.safetensors")
    assert facts["weights"] == sum(v.size for v in values.values())
    total = sum(float(v.astype(np.float64).sum()) for v in values.values())
    assert facts["mean"] == pytest.approx(total / facts["weights"])
    assert facts["samples"] == 18
    use = ["--set", "evaluator.fisher=file", "--set", "evaluator.fisher_path=f.safetensors"]
    code, out, _ = call("doctor", "run.toml", *use, "--json")
    found = json.loads(out)
    checks = {row["check"]: row for row in found["checks"]}
    assert code == 0
    assert found["ok"]
    assert checks["Fisher"]["note"].startswith("fits model and corpus")
    assert found["cost"]["total_passes"] == 4  # two queries, two passes each, F from the file
    assert found["cost"]["seconds"] > 0
    code, out, _ = call("doctor", "run.toml", *use, "--set", "datasets.train.n=19", "--json")
    checks = {row["check"]: row for row in json.loads(out)["checks"]}
    assert code == 1
    assert "estimated on something else" in checks["Fisher"]["note"]


def test_doctor_names_a_step_below_the_noise(call):
    code, out, _ = call("doctor", "run.toml", "--set", "evaluator.change=1e-7")
    assert code == 1
    assert "WRONG" in out
    assert "noise" in out


@pytest.mark.parametrize(
    ("measure", "metric", "more"),
    [
        ("tail-patch", "d_log_p", []),
        ("precision", "precision", ["--set", "evaluator.column=topic",
                                    "--set", "evaluator.null_queries=0"]),
        ("lds", "lds", ["--set", "evaluator.subsets=3", "--set", "evaluator.lds_seeds=1"]),
        ("leave-k-out", "removal_rise", ["--set", "evaluator.seeds=1",
                                         "--set", "evaluator.random_draws=1"]),
    ],
)  # fmt: skip
def test_eval_runs_the_evaluators(call, measure, metric, more):
    k = [] if measure == "lds" else ["--k", "1,2"]
    small = [] if measure in ("tail-patch", "precision") else [
        "--set", "evaluator.train_steps=2", "--set", "evaluator.train_batch_size=4"
    ]  # fmt: skip
    code, out, _ = call(
        "eval", measure, "run.toml", "--methods", "dabgo,random", *k, *small, *more, "--json"
    )
    outcome = json.loads(out)
    assert code == 0
    assert outcome["status"] == "ok"
    groups = {m["group"] for m in outcome["metrics"] if m["name"] == metric}
    assert {"method=dabgo", "method=random"} <= {g.split(",")[0] for g in groups}


# --- Errors and helpers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attribute"], "says nothing about: model, train, queries"),
        (["attribute", "no-such-run"], "no run file, no recipe and no run"),
        (["fisher", "run.toml"], "give --out"),
        (["compare", "run.toml"], "two or more --methods"),
        (["compare", "a", "b", "--methods", "dabgo"], "several runs, or one source"),
        (["explain", "run.toml"], "give --sample"),
        (["explain", "run.toml", "--sample", "text-9"], "no sample 'text-9'"),
        (["eval", "quality", "run.toml"], "quality"),
    ],
)
def test_errors_say_what_to_do(call, arguments, message):
    code, _, err = call(*arguments)
    assert code == 2
    assert message in err


def test_paths_stand_for_components(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table, _ = run_table(Host(), None, model="m", train="texts", queries="q.jsonl")
    assert table["model"] == {"use": "core:hf", "checkpoint": str(tmp_path / "m")}
    assert table["datasets"]["train"]["use"] == "core:text"
    assert table["datasets"]["queries"]["use"] == "core:jsonl-prompts"
    assert table["datasets"]["queries"]["reference_column"] == "completion"
    with pytest.raises(ConfigError, match="queries"):
        run_table(Host(), None, model="m", train="texts")
    table, _ = run_table(Host(), None, model="m", train="t.csv", needs_queries=False)
    assert table["datasets"]["train"]["use"] == "core:csv"


def test_another_evaluator_keeps_the_methods_settings_only():
    table = {"evaluator": {"use": "dabgo:attribution", "steps": 3, "top_k": 2, "window": 9}}
    found = evaluator_table(table, "dabgo:labels", {"k": [1], "methods": None})["evaluator"]
    assert found == {"use": "dabgo:labels", "steps": 3, "window": 9, "k": [1]}
    same = evaluator_table(table, "dabgo:attribution", {"top_k": 5})["evaluator"]
    assert same == {"use": "dabgo:attribution", "steps": 3, "top_k": 5, "window": 9}
    foreign = {"evaluator": {"use": "core:perplexity", "window": 3}}
    assert evaluator_table(foreign, "dabgo:labels", {})["evaluator"] == {"use": "dabgo:labels"}


def test_settings_with_commas_stay_whole():
    parts = ["evaluator.k=[1", " 2]", "seed=3"]
    assert whole_settings(parts) == ["evaluator.k=[1, 2]", "seed=3"]


def test_overlap_and_agreement_ignore_samples_without_a_score():
    a = np.array([0.9, 0.8, np.nan, 0.1])
    b = np.array([0.1, 0.8, 0.9, np.nan])
    assert overlap_at_k(a, b, 1) == 0.0
    assert overlap_at_k(a, b, 9) == 1.0
    assert np.isnan(overlap_at_k(a, np.full(4, np.nan), 2))
    [pair] = agreements([{"a": a, "b": -a}, {"a": a, "b": a}], 1)
    assert pair.spearman.value == pytest.approx(0.0)
    assert pair.overlap.value == pytest.approx(0.5)


def test_a_terminal_gets_shades_and_no_control_characters():
    styles = heat_styles([1.0, -1.0, 0.0, None])
    assert styles[2:] == ["", ""]
    assert styles[0] != styles[1]
    assert printable("a\x1b[31mb\n") == "a\ufffd[31mb\n"
    file = io.StringIO()
    show_heat(["a", "\x1b[31mb"], [1.0, -0.5], file)
    assert "\x1b[31m" not in file.getvalue()
    assert "supports" in file.getvalue()


def test_amounts_have_units():
    assert [in_units(n) for n in (5, 2048, 3 * 2**30)] == ["5 B", "2 KiB", "3 GiB"]
