"""Quality on two small benchmarks: LDS, removal and planted duplicates of every method, in one run.

    python packages/tenfold-dabgo/benchmarks/bench_quality.py [--out FILE] [--cache FOLDER]

Ground truth are models retrained on 36 half-size subsets (LDS) and without each method's own
top k (removal). Outcomes of single trainings are kept in the cache folder, so that a stopped
run goes on. Writes a Markdown table with 95 % bootstrap intervals over queries.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from reference import Setting, stdlib, tiny  # ty: ignore[import-not-found]
from tenfold.files import write_text
from tenfold.workspace import user_cache
from tenfold_dabgo.attributor import Attributor, BidirectionalAttributor
from tenfold_dabgo.baselines.bm25 import Bm25Attributor
from tenfold_dabgo.baselines.datainf import DataInfAttributor
from tenfold_dabgo.baselines.embeddings import EmbeddingAttributor
from tenfold_dabgo.baselines.gradient import GradientAttributor
from tenfold_dabgo.baselines.trackstar import TrackStarAttributor
from tenfold_dabgo.baselines.trak import TrakAttributor
from tenfold_dabgo.baselines.trivial import RandomAttributor
from tenfold_dabgo.baselines.untrac import UnTracInvAttributor
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.evaluation import counterfactual as cf
from tenfold_dabgo.evaluation.retrain import Retrainer, half_subsets, query_losses
from tenfold_dabgo.fisher_estimate import estimate_fisher
from tenfold_dabgo.perturb import Perturbation
from tenfold_dabgo.queries import Query
from tenfold_dabgo.weights import load, select_parameters

SUBSETS = 36
LDS_SEEDS = ((0, 0), (0, 1))
"""Seeds of initialization and order per subset; their mean is the ground truth."""
REMOVAL_QUERIES = 16
REMOVAL_K = {"tiny": (10, 30), "stdlib": (10,)}
PLANTED_METHODS = ("DABGO recommended", "gradient dot", "TrackStar", "BM25", "random")
REMOVAL_METHODS = ("DABGO recommended", "DABGO recommended, abs", "BM25", "gradient dot",
                   "TrackStar", "random")  # fmt: skip
REMOVAL_SEEDS = ((0, 1), (0, 2))
"""Not the seeds of the model that wrote the generated queries: it favours its own texts."""


def methods(s: Setting) -> dict[str, Attributor]:
    """Every method under its name in the table."""
    fisher = estimate_fisher(s.model, s.dataset)

    def dabgo(perturbation: Perturbation) -> BidirectionalAttributor:
        return BidirectionalAttributor(s.model, s.dataset, fisher, perturbation)

    return {
        "DABGO recommended": dabgo(Perturbation()),
        "DABGO, eta 1e-5, eps 1e-3": dabgo(Perturbation(lr=1e-5, damping=1e-3, dataset_size=1)),
        "DABGO paper": dabgo(Perturbation.paper()),
        "EWC-AdamW 10 x 1e-4": dabgo(Perturbation(method="ewc_adamw", lr=1e-4)),
        "UnTrac-Inv": UnTracInvAttributor(s.model, s.dataset),
        "TrackStar": TrackStarAttributor(s.model, s.dataset, fisher, rank=8),
        "TRAK": TrakAttributor(s.model, s.dataset),
        "DataInf": DataInfAttributor(s.model, s.dataset, fisher),
        "gradient dot": GradientAttributor(s.model, s.dataset),
        "gradient cosine": GradientAttributor(s.model, s.dataset, cosine=True),
        "embeddings": EmbeddingAttributor(s.model, s.dataset),
        "BM25": Bm25Attributor(s.model, s.dataset, split=s.split),
        "random": RandomAttributor(s.dataset),
    }


def all_scores(s: Setting) -> dict[str, np.ndarray]:
    """Method → `[Q, N]`; the absolute views of DABGO as methods of their own."""
    out: dict[str, np.ndarray] = {}
    for name, method in methods(s).items():
        started = time.perf_counter()
        out[name] = np.stack([r.values for r in method.attribute(s.queries)])
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
        if name.startswith("DABGO"):
            out[f"{name}, abs"] = np.abs(out[name])
    return out


def lds_table(s: Setting, scores: dict[str, np.ndarray], cache: Path) -> list[str]:
    """Rows `method, LDS of generated and held-out queries`."""
    trainer = s.retrainer(cache)
    trainer.recipe = replace(s.recipe, same_epochs=True)
    subsets = half_subsets(len(s.dataset), SUBSETS, 0)
    runs = []
    for seeds in LDS_SEEDS:
        rows = []
        for number, kept in enumerate(subsets):
            rows.append(trainer.query_losses(np.flatnonzero(kept), *seeds))
            print(f"LDS: seeds {seeds}, subset {number + 1}/{SUBSETS}", flush=True)
        runs.append(np.stack(rows))
    losses, half = np.mean(runs, axis=0), len(s.generated)
    lines = ["| method | LDS generated | LDS held-out | LDS all |", "|---|---|---|---|"]
    for name, values in scores.items():
        per_query = cf.lds(values, subsets, losses)
        cells = [cell(part) for part in (per_query[:half], per_query[half:], per_query)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    ceiling = cf.noise_ceiling(runs[0], runs[1])
    lines.append(
        f"\nRank correlation between the two training seeds: generated "
        f"{ceiling[:half].mean():.2f}, held-out {ceiling[half:].mean():.2f}."
    )
    return lines


def removal_table(s: Setting, scores: dict[str, np.ndarray], cache: Path) -> list[str]:
    """Rows `method, rise of the query's loss without its top k`, and paired tests."""
    trainer = s.retrainer(cache)
    trainer.recipe = replace(s.recipe, same_epochs=True)
    chosen = [*range(REMOVAL_QUERIES // 2)]
    chosen += [len(s.generated) + i for i in range(REMOVAL_QUERIES - len(chosen))]
    everything = np.arange(len(s.dataset))
    full = np.stack([trainer.query_losses(everything, *seeds) for seeds in REMOVAL_SEEDS])
    own = query_losses(s.model, s.queries)
    # As in numbers that count the model that wrote a query among the full ones.
    favoured = np.concatenate([full, own[None]])
    sizes = REMOVAL_K[s.name]
    heads = [f"k = {k}" for k in sizes] + [f"k = {k}, generated, own model" for k in sizes]
    heads += [f"k = {k}, generated, own model alone" for k in sizes]
    lines = [f"| method | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    effects: dict[str, list[np.ndarray]] = {}
    others_way: dict[str, list[np.ndarray]] = {}
    alone: dict[str, list[np.ndarray]] = {}
    for k in sizes:
        for name in REMOVAL_METHODS:
            rises, against_own, against_writer = [], [], []
            for q in chosen:
                kept = np.setdiff1d(everything, cf.removed_samples(scores[name][q], k))
                reduced = np.stack([trainer.query_losses(kept, *seeds) for seeds in REMOVAL_SEEDS])
                one = reduced[:, q : q + 1]
                rises.append(cf.removal_effect(one, full[:, q : q + 1])[0])
                if q < len(s.generated):
                    against_own.append(cf.removal_effect(one, favoured[:, q : q + 1])[0])
                    against_writer.append(cf.removal_effect(one, own[None, q : q + 1])[0])
            effects.setdefault(name, []).append(np.asarray(rises))
            others_way.setdefault(name, []).append(np.asarray(against_own))
            alone.setdefault(name, []).append(np.asarray(against_writer))
            print(f"removal: {name}, k = {k}: {cell(effects[name][-1])}", flush=True)
    for name in REMOVAL_METHODS:
        cells = [cell(e) for e in (*effects[name], *others_way[name], *alone[name])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    best = effects["DABGO recommended"]
    tests = []
    for name, others in effects.items():
        if not name.startswith("DABGO"):
            values = [cf.wilcoxon_signed_rank(a, b) for a, b in zip(best, others, strict=True)]
            tests.append(f"{name} {', '.join(f'{p:.3f}' for p in values)}")
    lines.append(f"\nPaired Wilcoxon p-values of DABGO recommended against: {'; '.join(tests)}.")
    spread = full.std(axis=0, ddof=1)[chosen].mean()
    lines.append(f"Spread of the full model's query losses over {len(full)} seeds: {spread:.3f}.")
    return lines


def planted_table(s: Setting) -> list[str]:
    """Rows `method, share of queries that find themselves at rank 1, mean reciprocal rank`: the
    held-out texts are put into the corpus before training and are the queries."""
    n, texts = len(s.dataset), [q.ids for q in s.held_out]
    rows = [s.dataset.ids(i).tolist() for i in range(n)] + [list(map(int, t)) for t in texts]
    dataset = TokenDataset.from_ids(rows)
    queries = [Query(f"planted-{i}", (), tuple(row)) for i, row in enumerate(rows[n:])]
    token = s.model.snapshot()
    try:
        trained = Retrainer(s.model, dataset, [], s.recipe).train(np.arange(len(dataset)))
        load(select_parameters(s.model.module()), trained)
        twin = replace(s, dataset=dataset)
        found = methods(twin)
        lines = ["| method | rank 1 | mean reciprocal rank |", "|---|---|---|"]
        for name in PLANTED_METHODS:
            ranks = np.array([
                1 + int((r.values > r.values[n + i]).sum())
                for i, r in enumerate(found[name].attribute(queries))
            ])  # fmt: skip
            lines.append(f"| {name} | {(ranks == 1).mean():.0%} | {(1 / ranks).mean():.3f} |")
            print(f"planted: {lines[-1]}", flush=True)
    finally:
        s.model.restore(token)
    return lines


def cell(per_query: np.ndarray) -> str:
    """Mean and 95 % interval."""
    e = cf.estimate(per_query)
    low, high = e.interval or (np.nan, np.nan)
    return f"{e.value:.3f} ({low:.3f} to {high:.3f})"


def report(s: Setting, cache: Path) -> list[str]:
    """The section of one setting."""
    scores = all_scores(s)
    parameters = sum(p.numel() for p in s.model.module().parameters())
    return [
        f"## {s.name}",
        "",
        f"{type(s.model.module()).__name__} of {parameters:,} parameters, {len(s.dataset)} samples "
        f"of up to {s.dataset.lengths.max()} tokens, {s.recipe.steps} steps.",
        "",
        f"LDS against {SUBSETS} half-size subsets, {len(LDS_SEEDS)} order seeds each, equal "
        "epochs.",
        "",
        *lds_table(s, scores, cache),
        "",
        "Removal: rise of the query's loss (nats/token) after retraining without a method's top k,",
        f"mean of {len(REMOVAL_SEEDS)} order seeds paired with those of the full set, "
        f"{REMOVAL_QUERIES} queries (half of them generated), equal epochs. *own model*: generated "
        "queries only, and the model that wrote them counted among the full ones, or alone: it "
        "favours its own texts, so that every removal seems to harm them, a random one too.",
        "",
        *removal_table(s, scores, cache),
        "",
        f"Planted: {len(s.held_out)} texts put into the corpus, each its own query.",
        "",
        *planted_table(s),
        "",
    ]


def main() -> None:
    """Runs the benchmark and writes its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "quality.md")
    parser.add_argument("--cache", type=Path, default=user_cache() / "dabgo-bench")
    options = parser.parse_args()
    torch.set_num_threads(1)  # so small models gain nothing from more
    lines = ["# Quality on two small benchmarks", ""]
    lines += ["Means and 95 % bootstrap intervals over queries. Written by `bench_quality.py`.", ""]
    for prepare in (tiny, stdlib):
        lines += report(prepare(), options.cache)
    write_text(options.out, "\n".join(lines).rstrip() + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
