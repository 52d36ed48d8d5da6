"""Memory and speed of training by number of exits, with the chunked loss and without.

K heads of `[tokens, V]` logits are what an N-vium adds to the training of a dense model. Each
cell trains a few steps (forward, backward, AdamW) in a process of its own, since peak memory
never falls: its increase is that over the model and optimizer before the first batch. Cells take
turns over the repeats, so that a machine that slows down slows all of them. K = 1 is the same
network with one exit; the layers are the same everywhere. Writes the table `training.md` beside
this script.

    python packages/tenfold-nvium/benchmarks/bench_training.py          # several minutes
    python packages/tenfold-nvium/benchmarks/bench_training.py --quick  # seconds, writes nothing
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

EXITS = (1, 2, 4, 8)
CHUNKS = (1024, 0)
"""Tokens whose logits exist at once in the loss; 0 is all of them."""
FULL = {
    "hidden_size": 256, "layers": 8, "heads": 4, "vocab_size": 32000, "rows": 8, "length": 256,
    "steps": 3, "repeats": 1,
}  # fmt: skip
QUICK = {
    "hidden_size": 32, "layers": 8, "heads": 2, "vocab_size": 2000, "rows": 2, "length": 32,
    "steps": 2, "repeats": 1,
}  # fmt: skip


def peak_bytes() -> int:
    """Peak resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def train(cell: dict[str, Any]) -> dict[str, float]:
    """Trains one cell in this process: peak increase in bytes, tokens per second after the
    first step (which allocates), and the last loss."""
    import torch
    from tenfold_nvium.configuration import NviumConfig
    from tenfold_nvium.modeling import NviumForCausalLM

    torch.manual_seed(0)
    model = NviumForCausalLM(
        NviumConfig(
            vocab_size=cell["vocab_size"], hidden_size=cell["hidden_size"],
            intermediate_size=8 * cell["hidden_size"] // 3 // 8 * 8,
            num_hidden_layers=cell["layers"], num_attention_heads=cell["heads"],
            max_position_embeddings=cell["length"], num_exits=cell["exits"],
            loss_chunk_tokens=cell["chunk"], tie_word_embeddings=True,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():  # gradients and moments are not what is measured
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    before = peak_bytes()
    shape, times = (cell["rows"], cell["length"]), []
    loss = torch.zeros(())
    for step in range(cell["steps"] + 1):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(cell["vocab_size"], shape, generator=generator)
        started = time.perf_counter()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        times.append(time.perf_counter() - started)
    return {
        "increase": float(peak_bytes() - before),
        "tokens_per_second": cell["rows"] * cell["length"] / statistics.median(times[1:]),
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "loss": float(loss),
    }


def measure(cell: dict[str, Any]) -> dict[str, float]:
    """One cell in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--cell", json.dumps(cell)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"cell {cell} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(size: dict[str, Any], progress: bool = True) -> list[str]:
    """Measures every cell and returns the page's lines."""
    cells = [
        {**size, "exits": exits, "chunk": min(chunk, size["rows"] * size["length"] // 2)}
        for exits in EXITS
        for chunk in CHUNKS
    ]
    found: list[list[dict[str, float]]] = [[] for _ in cells]
    for _ in range(size["repeats"]):
        for rows, cell in zip(found, cells, strict=True):
            rows.append(measure(cell))
            if progress:
                print(cell["exits"], cell["chunk"], rows[-1], file=sys.stderr, flush=True)
    tokens = size["rows"] * size["length"]
    lines = [
        "# Training memory and speed",
        "",
        f"{size['layers']} Llama layers of width {size['hidden_size']}, vocabulary "
        f"{size['vocab_size']}, {size['rows']} rows of {size['length']} tokens per step, fp32, "
        "AdamW.",
        "Memory is the increase of the process's peak over model, gradients and optimizer; one "
        f"fp32 copy of all logits of one head is {tokens * size['vocab_size'] * 4 / 1e6:.0f} MB.",
        f"Medians of {size['steps']} steps, {size['repeats']} process(es) per cell, taking turns. "
        f"Python {platform.python_version()}, torch {metadata.version('torch')}, "
        f"{os.cpu_count()} cores ({platform.machine()}), "
        f"{os.environ.get('OMP_NUM_THREADS', 'all')} threads. "
        "Written by `bench_training.py`.",
        "",
        "| exits | loss in chunks of | parameters (M) | memory (MB) | tokens/s | speed to K = 1 |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    base = {
        cell["chunk"]: _median(rows, "tokens_per_second")
        for cell, rows in zip(cells, found, strict=True)
        if cell["exits"] == 1
    }
    losses: dict[int, float] = {}
    for cell, rows in zip(cells, found, strict=True):
        speed = _median(rows, "tokens_per_second")
        loss = losses.setdefault(cell["exits"], rows[0]["loss"])
        if abs(loss - rows[0]["loss"]) > 1e-3:
            sys.exit(f"chunked and unchunked losses differ: {loss} and {rows[0]['loss']}")
        lines.append(
            f"| {cell['exits']} | {cell['chunk'] or 'all'} | {rows[0]['parameters'] / 1e6:.1f} "
            f"| {_median(rows, 'increase') / 1e6:.0f} | {speed:.0f} "
            f"| {speed / base[cell['chunk']]:.2f} |"
        )
    return lines


def _median(rows: list[dict[str, float]], name: str) -> float:
    return statistics.median(row[name] for row in rows)


def main() -> None:
    """Measures and writes the table; `--quick` prints it only."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing is written")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(train(json.loads(arguments.cell))))
        return
    text = "\n".join(table(QUICK if arguments.quick else FULL)) + "\n"
    print(text)
    if not arguments.quick:
        Path(__file__).with_name("training.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
