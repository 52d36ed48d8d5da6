"""Will an attribution work here, and what will it cost? Measured on a small probe.

The probe runs the method itself for one query over a few samples: the noise floor, the movement
of the query's loss and the speed are those of the real run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tenfold.errors import ConfigError, RunFailed, TenfoldError

from tenfold_dabgo.attributor import BidirectionalAttributor
from tenfold_dabgo.composition import Composition
from tenfold_dabgo.fisher import FisherDiagonal
from tenfold_dabgo.fisher_estimate import estimate_fisher
from tenfold_dabgo.precision import SAFE_RATIO, probe_indices
from tenfold_dabgo.weights import select_parameters

PROBE_SAMPLES = 128
FISHER_SAMPLES = 64
WEIGHT_COPIES = 8
"""Model, snapshot, theta_0, both directions, Fisher, 1 / (F + epsilon), gradient."""
FISHER_PASSES, QUERY_PASSES = 3, 2
"""In forward passes over the corpus (forward and backward with per-sample gradients: 3)."""


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; `ok` is None for a fact that is neither right nor wrong."""

    name: str
    ok: bool | None
    value: str
    note: str = ""


def diagnose(composition: Composition) -> tuple[list[Check], dict[str, Any]]:
    """Checks, and the estimated cost as numbers."""
    checks = [*_data_checks(composition), *_weight_checks(composition)]
    fisher, found = _fisher(composition)
    checks += found
    cost = estimate_cost(composition, None)
    if fisher is not None and composition.bench.queries:
        found, speed = _probe(composition, fisher)
        checks += found
        cost = estimate_cost(composition, speed)
    return [*checks, _memory_check(cost)], cost


def _data_checks(c: Composition) -> list[Check]:
    """Corpus and queries."""
    dataset, bench = c.bench.dataset, c.bench
    duplicates = len(dataset) - len(dataset.deduplicated())
    unscorable = int((~dataset.scorable).sum())
    first = next(iter(bench.errors.items()), None)
    return [
        Check("corpus", True, f"{len(dataset)} samples, {int(dataset.lengths.sum())} tokens",
              f"hash {dataset.content_hash()}"),
        Check("samples without a score", None, str(unscorable), "one token long"),
        Check("repeated samples", None, str(duplicates),
              "dedupe = true leaves them out" if duplicates else ""),
        Check("queries", not bench.errors, f"{len(bench.queries)} of "
              f"{len(bench.queries) + len(bench.errors)} can be scored",
              f"{first[0]}: {first[1]}" if first else ""),
    ]  # fmt: skip


def _weight_checks(c: Composition) -> list[Check]:
    """The model's weights."""
    module = c.model.module()
    moved = select_parameters(module, c.settings.params)
    everything = sum(p.numel() for p in module.parameters())
    finite = all(bool(torch.isfinite(p).all()) for p in moved.values())
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in moved.values()})
    return [
        Check("weights", finite, f"{everything:,} in all, "
              f"{sum(p.numel() for p in moved.values()):,} move",
              f"hash {c.bench.model_hash}" if finite else "some are not finite"),
        Check("number type", kinds in (["float32"], ["float64"]), ", ".join(kinds),
              "scores are small differences: keep fp32 weights" if kinds != ["float32"] else ""),
    ]  # fmt: skip


def _fisher(c: Composition) -> tuple[FisherDiagonal | None, list[Check]]:
    """The Fisher of the settings, estimated on few samples, or the file if one is named."""
    settings, dataset = c.settings, c.bench.dataset
    try:
        if settings.fisher == "file":
            fisher = FisherDiagonal.load(Path(str(settings.fisher_path)))
            fisher.check(
                c.bench.model_hash, dataset.content_hash(), len(dataset),
                force=settings.fisher_force,
            )  # fmt: skip
            origin = "; ".join(fisher.warnings) or "fits model and corpus"
        else:
            with c.ctx.progress("Fisher of a probe", None, "samples") as bar:
                fisher = estimate_fisher(
                    c.model, dataset, settings.fisher, params=settings.params,
                    max_samples=FISHER_SAMPLES, seed=settings.seed,
                    token_budget=max(settings.token_budget // 2, 1), advance=bar.advance,
                )  # fmt: skip
            origin = f"of {fisher.facts.n_samples} samples"
    except TenfoldError as error:
        return None, [Check("Fisher", False, "not usable", str(error))]
    params = select_parameters(c.model.module(), settings.params)
    try:
        _, epsilon = fisher.precondition(params, settings.perturbation().damping)
    except ConfigError as error:
        return None, [Check("Fisher", False, "not usable", str(error))]
    values = fisher.aligned(params)
    below = sum(int((v < epsilon).sum()) for v in values.values())
    share = below / max(sum(v.numel() for v in values.values()), 1)
    mean = fisher.mean(params)
    points = ", ".join(f"{q:.0%}: {v:.2e}" for q, v in fisher.quantiles().items())
    return fisher, [
        Check("Fisher", True, f"{settings.fisher}, mean {mean:.3e}", f"{origin}; {points}"),
        Check("damping", None, f"{epsilon:.3e}", f"{share:.1%} of the weights have less "
              "Fisher than that: for them the step is a plain gradient step"),
    ]  # fmt: skip


def _probe(c: Composition, fisher: FisherDiagonal) -> tuple[list[Check], float]:
    """The method on one query and a few samples; tokens per second of the loss pass."""
    query = next(iter(c.bench.queries.values()))
    dataset = c.bench.dataset
    size = c.settings.dataset_size or len(dataset)
    attributor = BidirectionalAttributor(
        c.model,
        dataset.subset(probe_indices(dataset, PROBE_SAMPLES)),
        None if c.settings.fisher == "identity" else fisher,
        replace(c.settings.perturbation(), dataset_size=size),
        token_budget=c.settings.token_budget,
        precision=c.settings.precision,
        seed=c.settings.seed,
        model_hash=c.bench.model_hash,
    )
    try:
        details = attributor.score(query).details
    except RunFailed as error:
        return [Check("noise floor", False, "no usable scores", str(error))], 0.0
    noise, trace = details["noise"], details["trace"]
    loss = {name: [step["loss"] for step in steps] for name, steps in trace.items()}
    rise, fall = (abs(loss[name][-1] - loss[name][0]) for name in ("ascent", "descent"))
    warnings = [w for w in details["warnings"] if "rounding noise" not in w]
    return [
        Check("noise floor", noise["ratio"] >= SAFE_RATIO, f"{noise['floor']:.1e} nats/token",
              f"typical score {noise['median_score']:.1e}, {noise['ratio']:.3g} times the noise "
              f"(at least {SAFE_RATIO:g})"),
        Check("perturbation", not warnings, f"query loss {loss['ascent'][0]:.3g}, "
              f"+{rise:.2g} unlearned, -{fall:.2g} learned",
              "; ".join(warnings) or f"{noise['weights_moved']:.0%} of the weights moved"),
        Check("precision", details["precision"] == c.settings.precision, details["precision"],
              "" if details["precision"] == c.settings.precision
              else f"{c.settings.precision} ranks the probe differently"),
    ], float(details["tokens_per_second"])  # fmt: skip


def estimate_cost(c: Composition, tokens_per_second: float | None) -> dict[str, Any]:
    """Passes, FLOPs, seconds and bytes of a run over all queries.

    FLOPs take 2 per weight and token for a forward pass, and leave attention's own out.
    """
    settings, dataset, module = c.settings, c.bench.dataset, c.model.module()
    weights = sum(p.numel() for p in module.parameters())
    width = max(p.element_size() for p in module.parameters())
    tokens = int(dataset.lengths[dataset.scorable].sum())
    share = 1.0 if settings.prefilter is None else float(settings.prefilter)
    queries = len(c.bench.queries)
    needed = settings.fisher not in ("identity", "file")
    part = min(1.0, (settings.fisher_max_samples or len(dataset)) / max(len(dataset), 1))
    passes = {
        "fisher": FISHER_PASSES * part if needed else 0.0,
        "prefilter": 0.0 if settings.prefilter is None else float(FISHER_PASSES),
        "queries": QUERY_PASSES * share * queries,
        "base": 1.0 if settings.needs_base_losses else 0.0,
    }
    total = sum(passes.values())
    logits = 4 * settings.token_budget * int(c.model.vocabulary_size)
    cost: dict[str, Any] = {
        "queries": queries,
        "corpus_tokens": tokens,
        "passes": {k: round(v, 3) for k, v in passes.items()},
        "total_passes": round(total, 3),
        "flops": 2 * weights * tokens * total,
        "weight_bytes": WEIGHT_COPIES * width * weights,
        "logits_bytes": 2 * logits,
        "corpus_bytes": int(dataset.tokens.nbytes + dataset.spans.nbytes),
        "disk_bytes": 4 * weights + 16 * len(dataset) * queries,
    }
    if tokens_per_second:
        cost["tokens_per_second"] = tokens_per_second
        cost["seconds"] = total * tokens / tokens_per_second
    return cost


def _memory_check(cost: dict[str, Any]) -> Check:
    """Estimated against available memory (of the host; a GPU's is not looked at)."""
    needed = cost["weight_bytes"] + cost["logits_bytes"] + cost["corpus_bytes"]
    available = available_memory()
    text = f"about {in_units(needed)} at most"
    if available is None:
        return Check("memory", None, text, "how much is free is not known here")
    return Check("memory", needed < available, text, f"{in_units(available)} are free")


def available_memory() -> int | None:
    """Bytes that processes can still get, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(line for line in lines if line.startswith("MemAvailable"))
        return int(free.split()[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    try:
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return None


def in_units(amount: float) -> str:
    """Bytes with a unit."""
    if amount < 1024:
        return f"{amount:.0f} B"
    steps = min(int(np.log2(amount) // 10), 4)
    return f"{amount / 1024**steps:.3g} {('KiB', 'MiB', 'GiB', 'TiB')[steps - 1]}"
