"""Host overhead per item with flushed records, and memory as the number of items grows.

The evaluator does nothing, so all time is the host's. One process per size, so that peak
memory is that of the size alone. Writes the table `host.md` beside this script.

    python packages/tenfold/benchmarks/bench_host.py
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = (1_000, 10_000, 100_000)
COMPONENTS = """
from tenfold.records import ItemResult, Metric, TextRecord, WorkItem, WorkItems
class Numbers:
    kind = "text"
    def __init__(self, size): self.size = size
    def splits(self): return ("all",)
    def load(self, split="", limit=None, shuffle_seed=None):
        return (TextRecord(id=f"item-{i}", text=str(i)) for i in range(self.size))
    def fingerprint(self, split=""): return str(self.size)
class Nothing:
    def plan(self, ctx, data):
        return WorkItems((WorkItem(r.id, r) for r in data["dataset"].load()), None)
    def run(self, ctx, models, items):
        for item in items:
            yield ItemResult(item.id, {"value": 1.0, "text": item.payload.text})
    def aggregate(self, ctx, results):
        values = [0, 0.0]
        for r in results:
            values[0] += 1; values[1] += r.values["value"]
        return [Metric("mean", values[1] / values[0], values[0])]
"""
PLUGIN = """
from tenfold.hookspecs import hookimpl
from tenfold.spec import ComponentSpec, Param, PluginInfo
@hookimpl
def tenfold_plugin(): return PluginInfo("bench", "host benchmark")
@hookimpl
def tenfold_datasets():
    size = (Param("size", "int"),)
    return [ComponentSpec("numbers", "bench_components:Numbers", "n", size, ("text",))]
@hookimpl
def tenfold_evaluators():
    data = {"dataset": ("text",)}
    return [ComponentSpec("nothing", "bench_components:Nothing", "n", (), (), {}, data)]
"""
CHILD = """
import json, sys, time
from tenfold.host import Host
from tenfold.run import Options
size = int(sys.argv[1])
table = {"schema": "tenfold-run/1", "name": "bench", "dataset": {"use": "bench:numbers",
         "size": size}, "evaluator": {"use": "bench:nothing"}}
started = time.perf_counter()
outcome = Host().run(table, options=Options(progress=False))
record = json.loads((outcome.run_dir / "run.json").read_text())
print(json.dumps({"items": outcome.done, "run_s": record["seconds"]["run"],
    "all_s": time.perf_counter() - started, "rss": record["peak_memory"]["rss_bytes"]}))
"""


def measure(folder: Path, size: int) -> dict[str, float]:
    """One run of `size` items in its own process."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "TENFOLD_CACHE": str(folder / "cache")}
    environment["TENFOLD_PLUGINS"] = "bench"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(size)],
        cwd=folder, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def main() -> None:
    """Measures every size, best of three, and writes the table."""
    lines = [
        "# Host overhead",
        "",
        "An evaluator that does nothing, records appended and flushed item by item; best of three",
        f"runs, each in its own process. Python {platform.python_version()}, "
        f"{os.cpu_count()} cores. Written by `bench_host.py`.",
        "",
        "| items | host time per item (ms) | whole run per item (ms) | peak memory (MB) |",
        "|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "bench_components.py").write_text(COMPONENTS)
        (folder / "bench_plugin.py").write_text(PLUGIN)
        info = folder / "tenfold_bench-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tenfold-bench\nVersion: 0.1\n")
        (info / "entry_points.txt").write_text("[tenfold.plugins]\nbench = bench_plugin\n")
        for size in SIZES:
            rows = [measure(folder, size) for _ in range(3)]
            best = min(rows, key=lambda row: row["run_s"])
            memory = max(row["rss"] for row in rows) / 1e6
            lines.append(
                f"| {size:,} | {best['run_s'] / size * 1e3:.3f} | "
                f"{best['all_s'] / size * 1e3:.3f} | {memory:.0f} |"
            )
            print(lines[-1], flush=True)
    Path(__file__).with_name("host.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
