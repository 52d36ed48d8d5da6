"""Speed of attribution beside its peers, in one run: writes `speed.md` beside this script.

    python packages/tenfold-dabgo/benchmarks/bench_speed.py            # about 10 minutes
    python packages/tenfold-dabgo/benchmarks/bench_speed.py --quick    # a minute, writes nothing

Two settings on functions of the machine's standard library: a Llama-type model of 30 M random
weights (what a pass costs does not depend on their values), and a small trained one, on which the
prefilter's recall and time are measured against the exact scores of all queries. Every row runs
in a process of its own (peak memory is per process), rows take turns over the rounds, all with
the same model, corpus, queries and threads. Peers that are not installed are listed as missing:

    pip install 'tenfold-dabgo[bergson,kronfluence]' rank-bm25
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from tenfold.files import write_text

ROWS = Path(__file__).with_name("speed_rows.py")
LARGE = {
    "texts": 1500, "samples": 120, "window": 256, "vocabulary": 8192, "width": 512, "inner": 1408,
    "layers": 8, "heads": 8, "epochs": 0,
}  # fmt: skip
SMALL = {
    "texts": 5000, "samples": 1600, "window": 256, "vocabulary": 1024, "width": 192, "inner": 512,
    "layers": 2, "heads": 4, "epochs": 3,
}  # fmt: skip
QUICK = {
    "texts": 300, "samples": 60, "window": 96, "vocabulary": 400, "width": 32, "inner": 64,
    "layers": 2, "heads": 2, "epochs": 1,
}  # fmt: skip
ROUNDS = {"limit": 3, "exact": 3, "published": 3, "linear": 3, "bergson": 1,
          "kronfluence-diagonal": 1, "kronfluence": 1, "bm25": 1}  # fmt: skip
QUERIES = 16
NAMES = {
    "published": "published recipe, two passes",
    "exact": "DABGO, exact",
    "linear": "first-order scores, one pass",
    "bergson": "Bergson, `trackstar`",
    "kronfluence-diagonal": "Kronfluence, diagonal",
    "kronfluence": "Kronfluence, EK-FAC",
}
PARTS = ("load", "fisher", "perturb", "pass", "rest")


def run(row: str, folder: Path, threads: int, *more: str) -> dict[str, Any]:
    """One row in its own process; failures are part of the table, not the end of it."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    begun = time.perf_counter()
    command = [sys.executable, str(ROWS), row, str(folder), *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    took = time.perf_counter() - begun
    print(f"{took:7.1f} s  {row}", file=sys.stderr, flush=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        print(done.stderr[-2000:], file=sys.stderr)
        return {"failed": lines[-1] if lines else f"exit code {done.returncode}", "wall": took}
    return {**json.loads(done.stdout.splitlines()[-1]), "wall": took}


def median(values: list[float]) -> str:
    """Median, with the range when there are several."""
    middle = statistics.median(values)
    if len(values) == 1:
        return f"{middle:.1f}"
    return f"{middle:.1f} ({min(values):.1f} to {max(values):.1f})"


def speed_table(facts: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The large setting: seconds by part, tokens/s, share of the limit, memory, disk."""
    bound = statistics.median(r["seconds"]["limit"] for r in results["limit"])
    rate = statistics.median(r["gflops"] for r in results["limit"])
    tokens = facts["tokens"]
    lines = [
        f"Llama type, {facts['parameters']:,} random weights, {facts['samples']} functions, "
        f"{tokens:,} tokens. The matrix products of two forwards of the corpus take "
        f"{bound:.1f} s at the rate measured for their shapes ({rate:.0f} GFLOP/s): the limit.",
        "",
        "| method | queries | " + " | ".join(f"{p} s" for p in PARTS)
        + " | tokens/s | limit reached | peak memory MB | disk MB |",
        "|---" + "|---:" * (len(PARTS) + 5) + "|",
    ]  # fmt: skip
    for row, name in NAMES.items():
        found = results.get(row, [])
        problem = next((r for r in found if "failed" in r or "missing" in r), None)
        if problem is not None:
            text = problem.get("failed") or f"missing: {problem['missing']} is not installed"
            lines.append(f"| {name} | " + " | ".join([text, *[""] * (len(PARTS) + 4)]) + " |")
            continue
        queries = 1 if row in ("exact", "published") else QUERIES
        cells = [
            median([r["seconds"][p] for r in found]) if p in found[0]["seconds"] else ""
            for p in PARTS
        ]
        passes = statistics.median(r["seconds"]["pass"] for r in found)
        two = row in ("exact", "published")
        cells.append(f"{2 * tokens / passes:,.0f}" if two else "")
        cells.append(f"{bound / passes:.2f}" if two else "")
        cells.append(f"{max(r['peak'] for r in found) / 2**20:,.0f}")
        cells.append(f"{max(r.get('disk', 0) for r in found) / 2**20:,.0f}")
        lines.append(f"| {name} | {queries} | " + " | ".join(cells) + " |")
    lines += ["", *_remarks(facts, results)]
    return lines


def _remarks(facts: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [f"Fisher of ours, once per model and corpus: {facts['seconds']['fisher']:.1f} s. "]
    exact = [r["seconds"]["pass"] for r in results["exact"] if "failed" not in r]
    first = [r["seconds"]["pass"] for r in results["linear"] if "failed" not in r]
    theirs = [r["seconds"]["pass"] for r in results["published"] if "failed" not in r]
    if exact and first:
        ratio = statistics.median(first) / (1.5 * statistics.median(exact))
        lines[0] += f"First-order scores of {QUERIES} queries take {ratio:.2f} times three forwards"
        lines[0] += " (a forward is half of the exact pass). "
    if exact and theirs:
        ratio = statistics.median(theirs) / statistics.median(exact)
        lines[0] += f"The published pass takes {ratio:.2f} times as long as ours."
    return lines


def prefilter_table(facts: dict[str, Any], all_: dict[str, Any], pre: dict[str, Any]) -> list[str]:
    """The small setting: exact against prefiltered, time and recall."""
    for result in (all_, pre):
        if "failed" in result:
            return [f"failed: {result['failed']}"]
    found = [len(set(a) & set(b)) / len(a) for a, b in zip(all_["tops"], pre["tops"], strict=True)]
    slow, fast = sum(all_["each"]), sum(pre["each"])
    lines = [
        f"Llama type, {facts['parameters']:,} weights trained on the corpus, {facts['samples']:,} "
        f"functions, {facts['tokens']:,} tokens, {QUERIES} held-out functions as queries, "
        "recommended steps. Seconds without loading.",
        "",
        "| method | all queries s | perturb s | pass s | rest s | peak memory MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, r in (("exact", all_), ("prefilter 10 % and exact rerank", pre)):
        s = r["seconds"]
        lines.append(
            f"| {name} | {sum(r['each']):.1f} | {s['perturb']:.1f} | {s['pass']:.1f} | "
            f"{s['rest']:.1f} | {r['peak'] / 2**20:,.0f} |"
        )
    estimated = statistics.mean(x for x in pre["recalls"] if x is not None)
    lines += [
        "",
        f"The prefilter is {slow / fast:.2f} times as fast and finds {statistics.mean(found):.3f} "
        f"of the exact top 10 (lowest query {min(found):.1f}; its own estimate {estimated:.3f}). "
        "Rest: the first-order pass of all queries, the noise probe and the ranking.",
    ]
    return lines


def bm25_table(result: dict[str, Any]) -> list[str]:
    """Index and query times."""
    if "failed" in result:
        return [f"failed: {result['failed']}"]
    lines = ["| library | index ms | query ms |", "|---|---:|---:|"]
    for name, times in result["rows"].items():
        lines.append(f"| {name} | {times['index'] * 1e3:.0f} | {times['query'] * 1e3:.2f} |")
    if "missing" in result:
        return [*lines, "| rank-bm25 | missing: not installed | |"]
    return [*lines, "", f"Largest difference between the two scores: {result['difference']:.1e}."]


def versions() -> str:
    """Of what was measured, with what is missing."""
    out = []
    for name in ("torch", "transformers", "bergson", "kronfluence", "rank-bm25"):
        try:
            out.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            out.append(f"{name} missing")
    return ", ".join(out)


def main() -> None:
    """Runs the benchmark and writes its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("speed.md"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="tiny sizes; prints, writes nothing")
    options = parser.parse_args()
    large, small = (QUICK, QUICK) if options.quick else (LARGE, SMALL)
    with tempfile.TemporaryDirectory(prefix="dabgo-speed-") as name:
        folder = Path(name) / "large"
        folder.mkdir()
        facts = run("prepare", folder, options.threads, json.dumps(large))
        results: dict[str, list[dict[str, Any]]] = {}
        for turn in range(1 if options.quick else max(ROUNDS.values())):
            for row, rounds in ROUNDS.items():
                if turn < rounds:
                    results.setdefault(row, []).append(run(row, folder, options.threads))
        other = Path(name) / "small"
        other.mkdir()
        small_facts = run("prepare", other, options.threads, json.dumps(small))
        exact, pre = (run(row, other, options.threads) for row in ("exact-all", "prefiltered"))
    lines = [
        "# Speed",
        "",
        f"fp32 on a CPU, {options.threads} threads, Python {platform.python_version()}, "
        f"{versions()}. Medians, and the range where a row ran more than once. Written by "
        "`bench_speed.py`.",
        "",
        "## Passes over the corpus",
        "",
        *speed_table(facts, results),
        "",
        "## Prefilter",
        "",
        *prefilter_table(small_facts, exact, pre),
        "",
        "## BM25",
        "",
        *bm25_table(results["bm25"][0]),
    ]
    print("\n".join(lines))
    if not options.quick:
        write_text(options.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
