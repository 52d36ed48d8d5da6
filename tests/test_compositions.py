"""Components of different packages in one run: the claim that the design has to earn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import browser
import pytest
import tomli_w

TRAIN_LM = {
    "use": "core:lm",
    "dataset": {"use": "core:python-stdlib", "unit": "function", "packages": ["json", "csv"]},
    "vocab_size": 300,
    "hidden_size": 16,
    "layers": 1,
    "heads": 2,
    "context_length": 64,
    "steps": 4,
    "batch_size": 4,
    "eval_rows": 0,
}
TINY_LM = {"use": "core:tiny-lm", "train": TRAIN_LM}
TEXTS = {"use": "core:python-stdlib", "unit": "function", "packages": ["json"], "limit": 6}
PROMPTS = {"use": "core:python-prompts", "split": "all", "max_prompt_chars": 80, "limit": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One workspace for the module, so that checkpoints are trained once."""
    path = tmp_path_factory.mktemp("compositions")
    (path / "workspace.toml").write_text("")
    return path


@pytest.fixture(scope="module")
def tenfold(folder):
    def call(*arguments, check=0):
        environment = {**os.environ, "TENFOLD_CACHE": str(folder / "cache")}
        done = subprocess.run(
            [sys.executable, "-m", "tenfold", *map(str, arguments)],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        assert done.returncode == check, done.stdout + done.stderr
        return done

    return call


@pytest.fixture
def run(folder, tenfold):
    """Runs a table and returns what `run --json` printed."""

    def call(name, *arguments, **tables):
        path = folder / f"{name}.toml"
        table = {"schema": "tenfold-run/1", "name": name, "seed": 5, **tables}
        path.write_text(tomli_w.dumps(table))
        return json.loads(tenfold("run", path, "--json", "--quiet", *arguments).stdout)

    return call


def items(answer):
    lines = (Path(answer["run_dir"]) / "items.jsonl").read_text().splitlines()
    return [json.loads(line)["values"] for line in lines]


@pytest.fixture(scope="module")
def main_job(tenfold):
    """Runs the main job's recipe with a model and data of test size."""
    small = {
        "model.train.preset": "tiny",
        "model.train.steps": 6,
        "model.train.vocab_size": 300,
        "model.train.batch_size": 2,
        "datasets.train.limit": 30,
        "datasets.queries.prompts.limit": 2,
        "datasets.queries.max_new_tokens": 8,
        "evaluator.steps": 2,
        "evaluator.top_k": 3,
    }
    settings = [x for key, value in small.items() for x in ("--set", f"{key}={value}")]

    def call():
        return json.loads(
            tenfold("run", "dabgo:over-nvium", "--json", "--quiet", *settings).stdout
        )  # fmt: skip

    return call


@pytest.fixture(scope="module")
def first_job(main_job):
    return main_job()


def test_main_job_trains_writes_attributes_and_reports(first_job):
    assert first_job["items"] == {"done": 2, "failed": 0, "reused": 0}
    page = (Path(first_job["run_dir"]) / "report.html").read_text()
    for part in ("Most influential", "Most opposed", "Exits of the generation", "module"):
        assert part in page
    for values in items(first_job):
        proponents = [row["score"] for row in values["proponents"]]
        assert proponents == sorted(proponents, reverse=True)
        query = values["query"]
        assert sum(query["exit_histogram"].values()) == len(query["exits"]) > 0


def test_main_job_again_reuses_the_checkpoint_and_gives_the_same(first_job, main_job):
    again = main_job()
    record = json.loads((Path(again["run_dir"]) / "run.json").read_text())
    assert record["trained"]["models.model"]["reused"] is True
    assert items(again) == items(first_job)


@pytest.mark.skipif(browser.find_browser() is None, reason="no browser installed")
def test_main_job_report_opens_silently_in_a_browser(first_job):
    address = (Path(first_job["run_dir"]) / "report.html").as_uri()
    with browser.running(browser.find_browser()) as chromium:
        page = chromium.open(address)
        assert page.problems == []
        assert [url for url in page.requests if url != address] == []
        assert "dabgo-over-nvium" in page.evaluate("document.querySelector('h1').textContent")


def test_attribution_asks_for_grad_before_anything_is_loaded(folder, tenfold):
    path = folder / "mismatch.toml"
    table = {
        "schema": "tenfold-run/1",
        "model": {"use": "core:openai", "model": "x"},
        "datasets": {"train": TEXTS, "queries": TEXTS},
        "evaluator": {"use": "dabgo:attribution"},
    }
    path.write_text(tomli_w.dumps(table))
    script = (
        "import sys; from tenfold.cli import main; code = main(sys.argv[1:]);"
        "print(sorted({'torch', 'numpy', 'transformers', 'httpx2'} & set(sys.modules)));"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "run", str(path)],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 4
    assert "dabgo:attribution needs 'grad' of models.model" in done.stderr
    assert "core:hf" in done.stderr
    assert "nvium:causal-lm" in done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_same_evaluator_takes_either_model(run):
    nvium_train = {
        "use": "nvium:pretrain",
        "preset": "tiny",
        "steps": 4,
        "batch_size": 2,
        "vocab_size": 300,
        "eval_rows": 0,
        "dataset": TRAIN_LM["dataset"],
    }
    nvium = {"use": "nvium:causal-lm", "train": nvium_train}
    for name, model in (("ppl-lm", TINY_LM), ("ppl-nvium", nvium)):
        answer = run(name, model=model, dataset=TEXTS, evaluator={"use": "core:perplexity"})
        values = {metric["name"]: metric["value"] for metric in answer["metrics"]}
        # A model of 300 tokens that has hardly learned is near the uniform one.
        assert 100 < values["perplexity"] < 400


def test_output_of_one_run_is_the_input_of_another(run):
    written = run(
        "write",
        model=TINY_LM,
        dataset=PROMPTS,
        evaluator={"use": "core:generate", "max_new_tokens": 6, "temperature": 1.0},
    )
    assert written["items"]["done"] == 2
    answer = run(
        "attribute",
        model=TINY_LM,
        datasets={"train": TEXTS, "queries": {"use": "core:run-samples", "run": "write"}},
        evaluator={"use": "dabgo:attribution", "steps": 1, "top_k": 2, "window": 64,
                   "truncate": True},
    )  # fmt: skip
    assert answer["items"] == {"done": 2, "failed": 0, "reused": 0}


def test_capabilities_come_from_the_plan_and_hold_when_built(tenfold):
    listed = json.loads(tenfold("list", "models", "--capability", "grad", "--json").stdout)
    assert "core:hf" in json.dumps(listed)
    assert "nvium:causal-lm" in json.dumps(listed)
    assert "core:openai" not in json.dumps(listed)


def responses(run_dir, label):
    """What the agents of a cell wrote, by game, round, phase and agent."""
    found = {}
    lines = (Path(run_dir) / "items.jsonl").read_text().splitlines()
    for values in (json.loads(line)["values"] for line in lines):
        if label in values["cell"].values():
            path = Path(run_dir) / "artifacts" / "events" / f"{values['game_id']}.jsonl"
            for event in map(json.loads, path.read_text().splitlines()):
                if event["event"] == "response":
                    place = (event["round"], event["phase"], event["agent"], event["attempt"])
                    found[(values["replicate"], *place)] = event["text"]
    return found


def test_consensus_agents_decode_with_treeflash_and_write_the_same(run):
    """Greedy agents that decode in drafted trees play the games that plain decoding plays."""
    plain = {**TINY_LM, "train": {**TRAIN_LM, "vocab_size": 600, "layers": 2,
                                  "context_length": 4096, "steps": 1, "batch_size": 1}}  # fmt: skip
    drafter_train = {
        "use": "treeflash:drafter", "target": {"share": "plain"}, "dataset": TRAIN_LM["dataset"],
        "num_features": 2, "layers": 1, "steps": 2, "steps_b": 2, "batch_size": 2,
        "context_length": 32, "anchors": 2, "eval_rows": 0,
    }  # fmt: skip
    answer = run(
        "agents",
        models={
            "plain": plain,
            "tree": {
                "use": "treeflash:tree",
                "base": {"share": "plain"},
                "drafter": {"use": "treeflash:drafter", "train": drafter_train},
                "tree_size": 4,
            },
        },
        datasets={
            "games": {
                "use": "byzantine:games",
                "game": {"n_honest": 2, "n_byzantine": 1, "max_rounds": 1},
                "honest": {
                    "use": "llm",
                    "temperature": {"decide": 0.0, "vote": 0.0},
                    "max_new_tokens": {"decide": 100, "vote": 24},
                    "retries": {"attempts": 1},
                },
                "byzantine": {"use": "fixed:v=25"},
                "grid": {"honest.backend.role": ["plain", "tree"]},
            }
        },
        evaluator={"use": "byzantine:consensus"},
    )
    assert answer["items"] == {"done": 2, "failed": 0, "reused": 0}
    same = [m for m in answer["metrics"] if m["name"] == "same_course_as_base"]
    assert [m["value"] for m in same] == [1.0]
    by_plain, by_tree = (responses(answer["run_dir"], role) for role in ("plain", "tree"))
    assert by_plain == by_tree
    assert len(by_plain) == 4  # two agents decide and vote
    for (_, _, phase, _, _), text in by_plain.items():
        assert set(json.loads(text)) >= ({"value"} if phase == "decide" else {"decision"})
