"""`tenfold dabgo attribute | fisher | perturb | explain | compare | doctor | eval`.

Each works on a SOURCE (a run file, a recipe or a run) or on paths, takes `as_json`, prints its
result on stdout, and returns an exit code. `attribute` and `eval` are runs: they leave a record
with a report, and can be resumed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tenfold.cli.output import note, print_json, print_table
from tenfold.errors import EXIT_OK, EXIT_RUN_FAILED, ConfigError
from tenfold.files import write_text
from tenfold.host import Host
from tenfold.report import render_html
from tenfold.run import Options, Outcome
from tenfold.store import RunStore

from tenfold_dabgo.composition import (
    ATTRIBUTION,
    Composition,
    evaluator_table,
    opened,
    recorded,
    run_table,
    whole_settings,
)

MEASURES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "tail-patch": ("dabgo:tail-patch", {}, ("d_log_p",)),
    "leave-k-out": ("dabgo:retraining", {"measure": ["removal"]}, ("removal_rise",)),
    "lds": ("dabgo:retraining", {"measure": ["lds"]}, ("lds", "lds_noise_ceiling")),
    "loo": ("dabgo:retraining", {"measure": ["loo"]}, ("loo",)),
    "qld": ("dabgo:retraining", {"measure": ["qld"]}, ("qld",)),
    "precision": ("dabgo:labels", {}, ("precision", "recall", "reciprocal_rank", "auprc")),
}
"""Verb's measure → evaluator, its settings, and the metrics that are shown."""
PREVIEW = 60


def attribute(
    source: str | None = None,
    model: str | None = None,
    train: str | None = None,
    queries: str | None = None,
    method: str | None = None,
    preset: str | None = None,
    view: str | None = None,
    top_k: int | None = None,
    prefilter: float | None = None,
    compare: Sequence[str] | None = None,
    export: Sequence[str] | None = None,
    null_queries: int | None = None,
    set: Sequence[str] = (),
    limit: int | None = None,
    resume: bool = False,
    as_json: bool = False,
) -> int:
    """Attributes the queries and shows their proponents and opponents."""
    host = Host()
    table, path = run_table(host, source, model=model, train=train, queries=queries)
    given = {
        "method": method, "preset": preset, "view": view, "top_k": top_k,
        "prefilter": prefilter, "compare": list(compare) if compare else None,
        "export": list(export) if export else None, "null_queries": null_queries,
    }  # fmt: skip
    table = evaluator_table(table, ATTRIBUTION, given)
    outcome = _run(host, table, path, set, limit, resume=resume)
    items = {line.id: line.values for line in RunStore(outcome.run_dir).ordered_lines()}
    if as_json:
        print_json({**outcome.to_json(), "rankings": {k: _ranking(v) for k, v in items.items()}})
        return outcome.exit_code
    for name, values in items.items():
        print(f"\n{name}: {_preview(values['query']['completion'])}")
        rows = [
            (direction, row["rank"], row["id"], f"{row['score']:+.4g}",
             _preview("".join(row["pieces"])))
            for direction in ("proponents", "opponents")
            for row in values[direction]
        ]  # fmt: skip
        print_table(("", "rank", "sample", values["unit"], "text"), rows)
    _tell(outcome)
    return outcome.exit_code


def _ranking(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a machine wants of an item."""
    rows = {
        direction: [{k: row[k] for k in ("rank", "id", "score")} for row in values[direction]]
        for direction in ("proponents", "opponents")
    }
    return {"method": values["method"], "view": values["view"], "unit": values["unit"], **rows}


def fisher(
    source: str | None = None,
    out: str | None = None,
    model: str | None = None,
    train: str | None = None,
    kind: str = "sample_mean",
    params: str = "all",
    max_samples: int | None = None,
    set: Sequence[str] = (),
    as_json: bool = False,
) -> int:
    """Estimates the diagonal Fisher and writes it to a file."""
    from tenfold_dabgo.fisher_estimate import estimate_fisher

    if out is None:
        raise ConfigError("give --out FILE.safetensors")
    target = Path(out).expanduser()
    host = Host()
    table, path = run_table(host, source, model=model, train=train, needs_queries=False)
    table = evaluator_table(table, ATTRIBUTION, {"fisher": kind, "params": params})
    with opened(host, table, path, set, ["dabgo"], needs_queries=False) as c:
        size = int(c.bench.dataset.scorable.sum())
        with c.ctx.progress("Fisher", min(size, max_samples or size), "samples") as bar:
            found = estimate_fisher(
                c.model, c.bench.dataset, kind, params=params, max_samples=max_samples,
                seed=c.settings.seed, token_budget=max(c.settings.token_budget // 2, 1),
                advance=bar.advance, resume=target.with_suffix(".partial"),
            )  # fmt: skip
    found.save(target)
    facts = {
        "path": str(target),
        "kind": found.facts.kind,
        "samples": found.facts.n_samples,
        "tokens": found.facts.n_tokens,
        "model_hash": found.facts.model_hash,
        "data_hash": found.facts.data_hash,
        "weights": sum(v.numel() for v in found.values.values()),
        "mean": found.mean(),
        "quantiles": {f"{q:.0%}": v for q, v in found.quantiles().items()},
    }
    if as_json:
        print_json(facts)
    else:
        print_table(("Fisher", ""), [(k, _show(v)) for k, v in facts.items()])
    return EXIT_OK


def perturb(
    source: str | None = None,
    query: str | None = None,
    model: str | None = None,
    train: str | None = None,
    queries: str | None = None,
    set: Sequence[str] = (),
    as_json: bool = False,
) -> int:
    """Takes one query's steps both ways and shows what they do; scores nothing."""
    from tenfold_dabgo.attributor import BidirectionalAttributor

    host = Host()
    table, path = run_table(host, source, model=model, train=train, queries=queries)
    table = evaluator_table(table, ATTRIBUTION, {"method": "dabgo"})
    with opened(host, table, path, set, ["dabgo"]) as c:
        chosen = _query(c, query)
        engine = c.bench.scorer.engine(c.bench.scorer.sources[0])
        assert isinstance(engine, BidirectionalAttributor)
        moved = engine.perturb(chosen)
    traces = {"ascent": moved.ascent_trace, "descent": moved.descent_trace}
    if as_json:
        facts = {k: getattr(moved, k) for k in ("lr", "step_size", "damping", "backtracks")}
        steps = {name: [asdict(step) for step in trace] for name, trace in traces.items()}
        print_json({"query": chosen.id, **facts, "warnings": moved.warnings, "trace": steps})
        return EXIT_OK
    for warning in moved.warnings:
        note(f"warning: {warning}")
    print(f"query {chosen.id}: step {moved.step_size:.4g}, damping {moved.damping:.4g}")
    columns = ("direction", "step", "query loss", "distance", "largest change", "KL(base, now)")
    rows = [
        (name, s.step, f"{s.loss:.4g}", f"{s.distance:.3g}", f"{s.max_change:.3g}",
         "" if s.kl is None else f"{s.kl:.3g}")
        for name, trace in traces.items()
        for s in trace
    ]  # fmt: skip
    print_table(columns, rows)
    return EXIT_OK


def explain(
    source: str | None = None,
    query: str | None = None,
    sample: str | None = None,
    out: str | None = None,
    model: str | None = None,
    train: str | None = None,
    queries: str | None = None,
    set: Sequence[str] = (),
    as_json: bool = False,
) -> int:
    """Shows which tokens of one training sample carry its score for one query."""
    found = _explanation(source, query, sample, model, train, queries, set)
    if out is not None:
        title = f"{found.sample_id} for {found.query_id}"
        write_text(Path(out).expanduser(), render_html(title, found.blocks(), {}))
        note(f"written: {out}")
    if as_json:
        print_json(found.to_json())
        return EXIT_OK
    from tenfold_dabgo.terminal import show_heat

    print(f"query {found.query_id}: {_preview(found.query_text)}")
    print(f"sample {found.sample_id}: {found.score:+.4g} nats/token")
    show_heat(found.pieces, found.values)
    return EXIT_OK


def _explanation(
    source: str | None,
    query: str | None,
    sample: str | None,
    model: str | None,
    train: str | None,
    queries: str | None,
    settings: Sequence[str],
) -> Any:
    """From the record of a run where it kept the tokens, computed anew otherwise."""
    from tenfold_dabgo import explain as library
    from tenfold_dabgo.attributor import BidirectionalAttributor

    host = Host()
    store = recorded(host, source) if source is not None else None
    if store is not None and not any((model, train, queries, settings)):
        for line in store.ordered_lines():
            if query in (None, line.id) and "proponents" in line.values:
                found = library.from_item(line.values, sample)
                if found is not None:
                    return found
                break
    if sample is None:
        raise ConfigError(
            "which training text? give --sample ID",
            hint="a run of dabgo:attribution as SOURCE shows the best one by itself",
        )
    table, path = run_table(host, source, model=model, train=train, queries=queries)
    table = evaluator_table(table, ATTRIBUTION, {"method": "dabgo"})
    with opened(host, table, path, settings, ["dabgo"]) as c:
        index = library.sample_index(c.bench.dataset, sample)
        if not c.bench.dataset.scorable[index]:
            raise ConfigError(f"sample {sample!r} is one token long: it has no loss, so no score")
        chosen = _query(c, query)
        engine = c.bench.scorer.engine(c.bench.scorer.sources[0])
        assert isinstance(engine, BidirectionalAttributor)
        return library.explain(engine, c.model, chosen, index)


def _query(c: Composition, name: str | None) -> Any:
    """The query of a name; without one, the first."""
    known = c.bench.queries
    if name is None:
        if not known:
            raise ConfigError(f"no query can be scored: {next(iter(c.bench.errors.values()))}")
        return next(iter(known.values()))
    if name in c.bench.errors:
        raise ConfigError(c.bench.errors[name])
    if name not in known:
        raise ConfigError(f"there is no query {name!r} (there are: {', '.join(list(known)[:8])})")
    return known[name]


def compare(
    sources: Sequence[str],
    methods: Sequence[str] = (),
    k: int = 10,
    set: Sequence[str] = (),
    as_json: bool = False,
) -> int:
    """Compares recorded runs, or several methods on one source."""
    from tenfold_dabgo.evaluation.agreement import agreements

    host = Host()
    if len(sources) == 1:
        scores = _method_scores(host, sources[0], methods, set)
    elif methods:
        raise ConfigError("give several runs, or one source with --methods")
    else:
        scores = _recorded_scores(host, sources)
    pairs = agreements(scores, k)
    rows = [
        {
            "a": p.a, "b": p.b, "queries": p.spearman.n,
            "spearman": p.spearman.value, "spearman_interval": p.spearman.interval,
            f"overlap@{k}": p.overlap.value, f"overlap@{k}_interval": p.overlap.interval,
        }
        for p in pairs
    ]  # fmt: skip
    if as_json:
        print_json(rows)
        return EXIT_OK
    print_table(
        ("", "", "queries", "Spearman", f"overlap@{k}"),
        [
            (p.a, p.b, p.spearman.n, _estimate(p.spearman), _estimate(p.overlap))
            for p in pairs
        ],
    )  # fmt: skip
    return EXIT_OK


def _method_scores(
    host: Host, source: str, methods: Sequence[str], settings: Sequence[str]
) -> list[dict[str, np.ndarray]]:
    if len(methods) < 2:
        raise ConfigError("one source needs two or more --methods, for instance dabgo,bm25")
    table, path = run_table(host, source)
    table = evaluator_table(table, ATTRIBUTION, {})
    with opened(host, table, path, settings, methods) as c:
        with c.ctx.progress("queries", len(c.bench.queries), "queries") as bar:
            out = []
            for query in c.bench.queries.values():
                out.append(c.bench.scorer.scores(query))
                bar.advance()
        return out


def _recorded_scores(host: Host, sources: Sequence[str]) -> list[dict[str, np.ndarray]]:
    """Scores of the queries that all runs have.

    Raises:
        ConfigError: fewer than two runs, no common query, or different corpora.
    """
    from tenfold_dabgo.evaluation.sources import read_scores, score_files

    if len({*sources}) < max(len(sources), 2):
        raise ConfigError("give two or more different runs to compare")
    runs = {name: score_files(name) for name in sources}
    first, *others = runs.values()
    common = [q for q in first if all(q in other for other in others)]
    if not common:
        raise ConfigError("the runs have no query in common")
    out = []
    for query in common:
        read = {name: read_scores(files[query]) for name, files in runs.items()}
        ids = [ids for ids, _ in read.values()]
        if any(other != ids[0] for other in ids):
            raise ConfigError("the runs score different corpora and cannot be compared")
        out.append({name: values for name, (_, values) in read.items()})
    return out


def doctor(
    source: str | None = None,
    model: str | None = None,
    train: str | None = None,
    queries: str | None = None,
    set: Sequence[str] = (),
    as_json: bool = False,
) -> int:
    """Checks noise floor, hashes, memory and cost; exit code 1 when something is wrong."""
    from tenfold_dabgo.doctor import diagnose, in_units

    host = Host()
    table, path = run_table(host, source, model=model, train=train, queries=queries)
    table = evaluator_table(table, ATTRIBUTION, {})
    with opened(host, table, path, set, ["dabgo"]) as c:
        checks, cost = diagnose(c)
    ok = all(check.ok is not False for check in checks)
    if as_json:
        rows = [{"check": x.name, "ok": x.ok, "value": x.value, "note": x.note} for x in checks]
        print_json({"ok": ok, "checks": rows, "cost": cost})
        return EXIT_OK if ok else EXIT_RUN_FAILED
    words = {True: "ok", False: "WRONG", None: ""}
    print_table(
        ("check", "", "value", "note"), [(x.name, words[x.ok], x.value, x.note) for x in checks]
    )
    passes = ", ".join(f"{name} {amount:g}" for name, amount in cost["passes"].items() if amount)
    seconds = f", about {cost['seconds']:.3g} s at this speed" if "seconds" in cost else ""
    print(
        f"\n{cost['queries']} queries over {cost['corpus_tokens']:,} tokens: "
        f"{cost['total_passes']:g} forward passes ({passes}), {cost['flops']:.2e} FLOPs, "
        f"{in_units(cost['disk_bytes'])} of disk{seconds}"
    )
    return EXIT_OK if ok else EXIT_RUN_FAILED


def evaluate(
    measure: str,
    source: str | None = None,
    model: str | None = None,
    train: str | None = None,
    queries: str | None = None,
    methods: Sequence[str] | None = None,
    k: Sequence[int] | None = None,
    set: Sequence[str] = (),
    limit: int | None = None,
    resume: bool = False,
    as_json: bool = False,
) -> int:
    """Measures the quality of one or more methods; a run with a report."""
    use, settings, shown = MEASURES[measure]
    host = Host()
    table, path = run_table(host, source, model=model, train=train, queries=queries)
    given = {**settings, "methods": list(methods) if methods else None,
             "k": list(k) if k else None}  # fmt: skip
    table = evaluator_table(table, use, given)
    outcome = _run(host, table, path, set, limit, resume=resume)
    if as_json:
        print_json(outcome.to_json())
        return outcome.exit_code
    rows = [
        (m.name, m.group, f"{m.value:.4g} {m.unit}".rstrip(), _interval(m.interval), m.n)
        for m in outcome.metrics
        if m.name in (*shown, *(f"{name}_p" for name in shown))
    ]
    print_table(("measure", "of", "value", "95 % interval", "queries"), rows)
    _tell(outcome)
    return outcome.exit_code


def _run(
    host: Host,
    table: Mapping[str, Any],
    path: Path | None,
    settings: Sequence[str],
    limit: int | None,
    *,
    resume: bool,
) -> Outcome:
    config = host.resolve(table, whole_settings(settings), path)
    options = Options(limit=limit, resume=resume, argv=tuple(sys.argv[1:]))
    return host.run_config(config, options)


def _tell(outcome: Outcome) -> None:
    """Where the record is, and what went wrong."""
    note(f"run: {outcome.run_dir}")
    if (outcome.run_dir / "report.html").is_file():
        note(f"report: {outcome.run_dir / 'report.html'}")
    if outcome.message:
        note(f"{outcome.status}: {outcome.message}")


def _preview(text: str) -> str:
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return flat if len(flat) <= PREVIEW else flat[: PREVIEW - 1] + "…"


def _estimate(e: Any) -> str:
    interval = "" if e.interval is None else f" ({e.interval[0]:.3f} to {e.interval[1]:.3f})"
    return f"{e.value:.3f}{interval}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_show(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
