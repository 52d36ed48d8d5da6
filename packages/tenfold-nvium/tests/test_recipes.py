"""Recipes: every one plans, sweeps hold the paper's lists, and the trade-off runs end to end."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tenfold_nvium
from tenfold.host import Host
from tenfold.sweeps import expand_sweep
from tenfold_nvium.presets import GRID, matched_intermediate_size, preset
from tenfold_nvium.trainers import Pretrainer

RECIPES = sorted((Path(tenfold_nvium.__file__).parent / "recipes").glob("*.toml"))
SWEEPS = [p for p in RECIPES if "sweep" in tomllib.loads(p.read_text())]
PAPER_HEADS = {
    (12,): 2112, (8, 16): 2144, (6, 12, 18): 2184, (4, 8, 12, 16, 20): 2248,
    (3, 6, 9, 12, 15, 18, 21): 2320, (2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22): 2464,
}  # fmt: skip
"""Exits of the ablation of the number of heads, and the dense twins' MLP widths."""


def tenfold(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "tenfold", *map(str, arguments)],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def points(name):
    """Settings and run table of each point of a sweep."""
    source = Host().read(f"nvium:{name}")
    return [(point.settings, point.table) for point in expand_sweep(source.table)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_plans(path, tmp_path):
    verb = "sweep" if path in SWEEPS else "run"
    printed = tenfold(tmp_path, verb, f"nvium:{path.stem}", "--dry-run")
    assert "✗" not in printed
    assert printed
    assert path.read_text().startswith("# ")


def test_the_grid_holds_all_thirty_cells_beside_their_own_twins():
    found = points("grid")
    assert [s["model.train.preset"] for s, _ in found] == list(GRID)
    assert [s["models.dense.train.preset"] for s, _ in found] == list(GRID)


def test_ablations_hold_the_papers_lists():
    betas = [s["model.train.compute_penalty"] for s, _ in points("ablation-beta")]
    assert betas == [round(0.05 * i, 2) for i in range(13)]
    places = [s["model.train.exits"] for s, _ in points("ablation-position")]
    assert places == [[2 * i] for i in range(1, 12)]
    heads = points("ablation-heads")
    assert [tuple(s["model.train.exits"]) for s, _ in heads] == list(PAPER_HEADS)
    for settings, table in heads:
        assert settings["models.dense.train.exits"] == settings["model.train.exits"]
        assert table["model"]["train"]["compute_penalty"] == 0.1


def test_ablation_presets_have_the_papers_twins_and_settings():
    for exits, width in PAPER_HEADS.items():
        config = preset("ablation-heads").config(exit_layers=list(exits))
        assert matched_intermediate_size(config) == width
    assert matched_intermediate_size(preset("ablation-beta").config()) == 2184
    for name, rate, steps, beta in (
        ("ablation-beta", 6e-4, 17254, 0.15),
        ("ablation-heads", 6e-4, 17254, 0.1),
        ("ablation-position", 5e-4, 16937, 0.0),
    ):
        chosen = preset(name)
        assert (chosen.learning_rate, chosen.steps, chosen.batch_size) == (rate, steps, 256)
        assert chosen.config().compute_penalty == beta


@pytest.mark.parametrize("name", [path.stem for path in SWEEPS])
def test_every_point_of_a_sweep_is_a_possible_model(name):
    from nvium_cases import Texts

    for _, table in points(name):
        for role in (table["model"], table["models"]["dense"]):
            train = {k: v for k, v in role["train"].items() if k not in ("use", "dataset")}
            Pretrainer(Texts(), **train)


def test_the_tradeoff_runs_end_to_end(tmp_path):
    small = {
        "model.train.preset": "tiny", "models.dense.train.preset": "tiny",
        "datasets.train.limit": 40, "datasets.dataset.limit": 3, "datasets.train.max_chars": 2000,
        "datasets.dataset.max_chars": 2000, "evaluator.time_runs": 1,
        "evaluator.time_tokens": 6, "evaluator.time_prompts": 1,
    }  # fmt: skip
    settings = [x for key, value in small.items() for x in ("--set", f"{key}={value}")]
    answer = json.loads(tenfold(tmp_path, "run", "nvium:tradeoff", "--json", "--quiet", *settings))
    assert answer["items"] == {"done": 4, "failed": 0, "reused": 0}
    metrics = {(m["name"], m["group"]): m["value"] for m in answer["metrics"]}
    assert metrics["perplexity", ""] == metrics["perplexity", "offset=0"] > 1
    assert metrics["gap_to_dense", ""] == pytest.approx(
        metrics["nats_per_token", ""] - metrics["nats_per_token", "dense"]
    )
    assert metrics["speedup", "dense"] == 1
    folder = Path(answer["run_dir"])
    assert (folder / "artifacts/tradeoff.csv").is_file()
    assert "Loss against depth" in (folder / "report.html").read_text()
