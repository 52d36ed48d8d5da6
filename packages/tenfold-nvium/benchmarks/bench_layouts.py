"""What the layout of weights is worth in decoding: time of all layers on a block, by its width.

Three ways with the same arithmetic: the layers' own modules, matrices packed and transposed, and
oneDNN's blocked layout beside them for 2 to 16 tokens. Random weights; ways take turns. Writes the
table `layouts.md` beside this script.

    python packages/tenfold-nvium/benchmarks/bench_layouts.py
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
from tenfold_nvium import packing
from tenfold_nvium.configuration import NviumConfig
from tenfold_nvium.layers import SegmentRunner
from tenfold_nvium.modeling import NviumForCausalLM
from tenfold_nvium.speed_model import SpeedModel, measure, merged

SHAPES = {"h256-l12": (256, 12, 4, 688), "h512-l24": (512, 24, 8, 1368)}
"""Width, layers, heads, MLP."""
WIDTHS = (1, 2, 4, 8, 16)
NEVER = 1 << 62
ROUNDS = 3


def runner(model: NviumForCausalLM, blocked_from: int | None) -> SegmentRunner:
    """A way to run the layers: modules (None), or packed with blocked copies of matrices of at
    least so many weights."""
    packing._BLOCKED_SIZE = NEVER if blocked_from is None else blocked_from
    made = SegmentRunner(model, packed=blocked_from is not None)
    measure(model, made, context=32, widths=WIDTHS, repeats=1)  # makes the lazy copies
    return made


def main() -> None:
    """Measures both shapes and writes the table."""
    torch.set_num_threads(1)
    columns = " | ".join(f"{w} token{'s' if w > 1 else ''}" for w in WIDTHS)
    lines = [
        "# Layouts of weights",
        "",
        f"Milliseconds of all layers on a block, behind 64 positions; fp32, one thread of "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}; "
        f"medians, {ROUNDS} rounds in turns. `PackedLinear` keeps blocked copies of matrices of "
        f"{packing._BLOCKED_SIZE:,} weights and more. Written by `bench_layouts.py`.",
        "",
        f"| shape | layout | {columns} |",
        "|---|---|" + "---:|" * len(WIDTHS),
    ]
    for shape, (hidden, layers, heads, inner) in SHAPES.items():
        torch.manual_seed(0)
        config = NviumConfig(
            vocab_size=4000, hidden_size=hidden, num_hidden_layers=layers,
            num_attention_heads=heads, intermediate_size=inner, exit_layers=[],
            final_adapter=False, adapter_size=0,
        )  # fmt: skip
        model = NviumForCausalLM(config).eval()
        ways = {"modules": None, "packed, transposed": NEVER, "packed, blocked copies": 0}
        runners = {name: runner(model, size) for name, size in ways.items()}
        found: dict[str, list[SpeedModel]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in runners.items():
                found[name].append(measure(model, way, context=64, widths=WIDTHS, repeats=5))
        for name, models in found.items():
            costs = merged(models).costs
            cells = " | ".join(f"{1000 * sum(table[w] for table in costs):.2f}" for w in WIDTHS)
            lines.append(f"| {shape} | {name} | {cells} |")
            print(lines[-1], flush=True)
    Path(__file__).with_name("layouts.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
