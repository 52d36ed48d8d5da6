"""The cost estimate against counted runs, and `--dry-run` over it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from tenfold.errors import ConfigError
from tenfold.host import Host
from tenfold.records import PromptRecord, TextRecord
from tenfold.testing.context import FakeContext
from tenfold_dabgo.composition import run_table
from tenfold_dabgo.cost import (
    ModelSize,
    Work,
    checkpoint_size,
    estimate,
    passes,
    plan_cost,
    retraining_cost,
)
from tenfold_dabgo.evaluator import Attribution
from tenfold_dabgo.settings import AttributionSettings
from tenfold_dabgo.weights import select_parameters
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent / "support"))
import tiny_checkpoint


class Rows:
    def __init__(self, kind, rows):
        self.kind, self.rows = kind, rows

    def load(self, split="", limit=None, shuffle_seed=None):
        return iter(self.rows)


LETTERS = tiny_checkpoint.LETTERS
TEXTS = [(LETTERS * 2)[i % 26 :][:24] for i in range(96)]
QUERIES = [PromptRecord(id=f"q{i}", prompt=LETTERS[i : i + 2], reference=LETTERS[i + 2 : i + 12])
           for i in range(2)]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint.write(tmp_path_factory.mktemp("cost"))


@pytest.fixture(scope="module")
def model(folder):
    from tenfold.builtin.hf import load

    torch.set_num_threads(1)
    return load(str(folder / "model"), attention="eager")


def settings(**changes):
    return asdict(
        AttributionSettings(**{"columns": (), "top_k": 2, "token_budget": 192, **changes})
    )


def counted(model, folder, **changes):
    """FLOPs of a run, counted by torch; and its context."""
    ctx = FakeContext(folder)
    evaluator = Attribution(**{"columns": (), "top_k": 2, "token_budget": 192, **changes})
    texts = [TextRecord(id=f"t{i}", text=t) for i, t in enumerate(TEXTS)]
    data = {"train": Rows("text", texts), "queries": Rows("prompt", QUERIES)}
    items = evaluator.plan(ctx, data)
    with FlopCounterMode(display=False) as counter:
        results = list(evaluator.run(ctx, {"model": model}, items))
    assert all(r.error is None for r in results)
    return counter.get_total_flops(), ctx


CASES = {
    "recommended": {},
    "base losses": {"base_losses": True},
    "prefilter": {"prefilter": 0.1, "fisher": "identity"},
    "subsample": {"fisher_max_samples": 24},
    "paper": {"preset": "paper"},
    "few steps": {"steps": 2},
}


@pytest.mark.parametrize(
    "case",
    [
        "recommended",
        *(pytest.param(c, marks=pytest.mark.slow) for c in CASES if c != "recommended"),
    ],
)
def test_the_estimate_is_what_a_run_is_counted_to_do(model, folder, tmp_path, case):
    flops, ctx = counted(model, tmp_path, **CASES[case])
    size = checkpoint_size(folder / "model")
    assert size is not None
    tokens = sum(map(len, TEXTS))
    work = Work(len(TEXTS), tokens, tokens / len(TEXTS), len(QUERIES), 12)
    cost = estimate(size, work, settings(**CASES[case]))
    assert cost.flops == pytest.approx(flops, rel=0.15)
    # The run itself says the same of one query, from what it has built.
    (logged,) = [fields for event, fields in ctx.events if event == "cost"]
    assert logged == estimate(size, Work(96, tokens, 24, 1, 24), settings(**CASES[case])).to_json()


def test_disk_is_what_a_run_leaves(model, folder, tmp_path):
    _, ctx = counted(model, tmp_path, base_losses=True, steps=1)
    fisher = sum(p.stat().st_size for p in ctx.cache_dir.rglob("*.safetensors"))
    scores = 0
    for path in ctx.artifacts.rglob("*.npz"):
        with np.load(path) as arrays:
            scores += sum(arrays[n].nbytes for n in arrays.files if not n.startswith("sample_id"))
    size = checkpoint_size(folder / "model")
    assert size is not None
    tokens = sum(map(len, TEXTS))
    work = Work(len(TEXTS), tokens, 24, len(QUERIES), 12)
    cost = estimate(size, work, settings(base_losses=True))
    assert cost.disk_bytes == pytest.approx(fisher + scores, rel=0.1)


@pytest.mark.parametrize(
    "which", ["all", "attention", "mlp", "kv", "last-1-layers", "no-embeddings"]
)
def test_sizes_come_from_the_files_headers(model, folder, which):
    size = checkpoint_size(folder / "model", which)
    assert size is not None
    module = model.module()
    assert size.weights == sum(p.numel() for p in module.parameters())
    assert size.moved == sum(p.numel() for p in select_parameters(module, which).values())
    assert (size.vocabulary, size.attention) == (30, 2 * 16)
    products = [p for n, p in module.named_parameters() if p.dim() == 2 and "wpe" not in n]
    assert size.matrix == sum(p.numel() for p in products)  # the tied head counts


def test_folders_that_are_no_checkpoints_have_no_size(tmp_path):
    assert checkpoint_size(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    assert checkpoint_size(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert checkpoint_size(tmp_path) is None


def test_passes_follow_the_cost_model():
    """2 Q exact; 3 + Q/T once with a prefilter; the Fisher costs 3 once."""
    assert passes(settings()) == (3, 2)
    assert passes(settings(fisher="identity")) == (0, 2)
    assert passes(settings(fisher="identity", view="ascent")) == (1, 2)
    once, each = passes(settings(fisher="identity", prefilter=0.1), queries=16)
    assert (once, each) == (0, pytest.approx(2 * 0.125 + 3 / 16))
    assert passes(settings(method="bm25")) == (0, 0)
    assert passes(settings(method="trackstar", compare=("bm25",))) == (6, 0)
    assert passes(settings(fisher="identity", null_queries=4, export=("csv",))) == (8, 2)


def test_trainings_are_counted_from_the_plan():
    """The recipe's own comment says 158."""
    host = Host()
    table, path = run_table(host, "dabgo:quality-tiny")
    plan = host.plan(host.resolve(table, (), path))
    assert retraining_cost(plan, 8) == {
        "trainings": "78 once + 10 per query: 158 for at most 8 queries"
    }
    changed = host.resolve(table, ("evaluator.measure=['qld', 'loo']", "evaluator.seeds=3"), path)
    # 3 full, 2 x 3 random, 24 x 3 left out; five methods, one size, three seeds.
    assert retraining_cost(host.plan(changed), None) == {"trainings": "81 once + 15 per query"}
    attribution = {"use": "dabgo:attribution", "method": "bm25", "view": "ascent"}
    refused = host.plan(host.resolve({**table, "evaluator": attribution}, (), path))
    with pytest.raises(ConfigError, match="exists for method dabgo only, not bm25"):
        plan_cost(refused, 1)


def test_costs_grow_with_corpus_queries_and_steps():
    size = ModelSize(1000, 1000, 800, 32, 30)
    base = estimate(size, Work(100, 2000, 20, 1, 10), settings())
    double = estimate(size, Work(200, 4000, 20, 1, 10), settings())
    more = estimate(size, Work(100, 2000, 20, 2, 10), settings())
    part = estimate(ModelSize(1000, 10, 800, 32, 30), Work(100, 2000, 20, 1, 10), settings())
    assert base.flops < double.flops < 2 * base.flops
    assert base.flops < more.flops
    assert part.memory_bytes < base.memory_bytes


def test_a_dry_run_tells_the_cost_without_heavy_imports(folder, tmp_path):
    (tmp_path / "workspace.toml").write_text("")
    (tmp_path / "run.toml").write_text(
        f'schema = "tenfold-run/1"\nname = "edge"\n'
        f'[model]\nuse = "core:hf"\ncheckpoint = "{folder}/model"\n'
        f'[datasets.train]\nuse = "core:jsonl"\npath = "{folder}/corpus.jsonl"\n'
        f'[datasets.queries]\nuse = "core:jsonl-prompts"\npath = "{folder}/queries.jsonl"\n'
        f"limit = 3\n"
        f'[evaluator]\nuse = "dabgo:attribution"\ncolumns = []\n'
    )
    code = (
        "import sys\nfrom tenfold.cli import main\n"
        "status = main(['run', '--dry-run', 'run.toml', *sys.argv[1:]])\n"
        "heavy = {'torch', 'numpy', 'transformers'} & set(sys.modules)\n"
        "sys.exit(status or ('imports ' + str(heavy) if heavy else 0))\n"
    )

    def dry_run(*arguments):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    text = dry_run()
    assert "corpus passes: 3 forwards once + 2 per query" in text
    assert "for at most 3 queries" in text
    cost = json.loads(dry_run("--json"))["cost"]
    assert cost["weights"] == checkpoint_size(folder / "model").weights
    assert cost["FLOPs"].startswith("about ")
