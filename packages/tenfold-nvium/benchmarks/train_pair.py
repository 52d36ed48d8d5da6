"""An N-vium and its dense twin trained side by side on the same rows, with CALM and LayerSkip.

All models have one shape and (but for a thousandth) one number of parameters, read the same
packed rows of the Python standard library in the same order, and end after the same number of
steps (the two baselines may be given fewer). The dense twin comes first; its validation losses
are the curve that the N-vium's compute-penalty controller follows. Writes `pair.md` beside this
script; models that FOLDER already holds are not trained again.

    python packages/tenfold-nvium/benchmarks/train_pair.py FOLDER    # an hour on two cores

`bench_decode.py --models FOLDER` times what it leaves.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from tenfold.builtin.python_stdlib import PythonStdlib
from tenfold.host import Host
from tenfold.lm.tokenizer import token_pieces
from tenfold.run import Options
from tenfold.stats import bootstrap
from tenfold_nvium.lm import load_network
from tenfold_nvium.mixture import mixture_log_prob
from tenfold_nvium.rows import Vocabulary, rows_of, train_and_held_out
from tenfold_nvium.tokens import CLASSES, token_class

SEED, HELD_OUT = 17, 96
SHAPE: dict[str, Any] = {
    "preset": "small", "hidden_size": 192, "heads": 3, "intermediate_size": 512,
    "vocab_size": 2048, "layers": 8, "exits": [2, 4, 6], "batch_size": 8, "eval_rows": HELD_OUT,
}  # fmt: skip
DATA: dict[str, Any] = {
    "unit": "function", "min_chars": 80, "max_chars": 2000, "limit": 12000, "shuffle_seed": SEED,
}  # fmt: skip
CONTROL: dict[str, Any] = {
    "compute_penalty": 0.0, "router_warmup_ratio": 0.3, "controller_gain": 0.002,
}  # fmt: skip
"""A run of minutes needs a longer warm-up of the routers, so that deep heads learn at all, and a
gentler controller: with the defaults every token leaves at the first exit after 200 steps."""
TRAINERS = {
    "dense": "nvium:pretrain-dense",
    "nvium": "nvium:pretrain",
    "calm": "nvium:pretrain-calm",
    "layerskip": "nvium:pretrain-layerskip",
}


def run_file(name: str, steps: int, folder: Path) -> dict[str, Any]:
    """The run file that trains one of the models."""
    trainer: dict[str, Any] = {"use": TRAINERS[name], **SHAPE, "steps": steps, "save_steps": 100}
    trainer["dataset"] = {"use": "core:python-stdlib", **DATA}
    if name == "nvium":
        trainer["controller"] = str((folder / "dense" / "baseline.json").absolute())
        trainer |= CONTROL
    if name == "layerskip":
        del trainer["exits"]  # its own: every second layer
    return {"schema": "tenfold-run/1", "name": f"pair-{name}", "seed": SEED, "trainer": trainer}


def train(name: str, steps: int, folder: Path) -> None:
    """Trains one model into `folder/name`, unless it is there."""
    if (folder / name).is_dir():
        return
    outcome = Host().run(run_file(name, steps, folder), options=Options(resume=True))
    partial = folder / f".{name}"
    shutil.copytree(outcome.run_dir / "artifacts" / "checkpoint", partial, dirs_exist_ok=True)
    partial.rename(folder / name)


# --- What became of them ------------------------------------------------------------------------


@torch.no_grad()
def scored(model: Any, rows: Any) -> dict[str, torch.Tensor]:
    """Per held-out row and token: `loss [R, T-1]`, exit weights and head losses `[R, T-1, K]`."""
    parts = defaultdict(list)
    for i in range(0, len(rows), 8):
        tokens = torch.stack([rows[j]["input_ids"] for j in range(i, min(i + 8, len(rows)))])
        output = model(tokens, labels=tokens)
        weights = output.exit_log_probs[:, :-1]
        parts["loss"].append(-mixture_log_prob(weights, output.target_log_probs))
        parts["weights"].append(weights.exp())
        parts["heads"].append(-output.target_log_probs)
    return {name: torch.cat(values) for name, values in parts.items()}


def mean(values: Any) -> float:
    """Mean of numbers."""
    return sum(values) / len(values)


def report(folder: Path) -> list[str]:
    """Lines of the page."""
    dense, tokenizer, _ = load_network(str(folder / "dense"))
    nvium, _, _ = load_network(str(folder / "nvium"))
    make_rows = rows_of("text", tokenizer, dense.config.max_position_embeddings)
    _, rows = train_and_held_out(PythonStdlib(**DATA), make_rows, HELD_OUT, SEED)
    ours, theirs = scored(nvium, rows), scored(dense, rows)
    gaps = (ours["loss"] - theirs["loss"]).mean(1).tolist()
    low, high = bootstrap(gaps, mean) or (0.0, 0.0)
    depths = torch.tensor(nvium.config.depths) / nvium.config.num_hidden_layers
    depth = ours["weights"] @ depths
    logs = {
        name: json.loads((folder / name / "training.json").read_text(encoding="utf-8"))
        for name in TRAINERS
        if (folder / name).is_dir()
    }
    sizes = {m: sum(p.numel() for p in net.parameters()) for m, net in
             (("N-vium", nvium), ("dense twin", dense))}  # fmt: skip
    plan = logs["nvium"]["plan"]
    tokens = plan["steps"] * plan["batch_size"] * plan["context_length"]
    lines = [
        "# An N-vium and its dense twin",
        "",
        f"{nvium.config.num_hidden_layers} layers of width {nvium.config.hidden_size}, exits after "
        f"{', '.join(map(str, nvium.config.depths[:-1]))}, vocabulary {nvium.config.vocab_size}; "
        f"functions of the Python {platform.python_version()} standard library, {plan['steps']} "
        f"steps of {plan['batch_size']} rows of {plan['context_length']} tokens ({tokens:,} "
        f"tokens), fp32, {os.cpu_count()} cores, torch {torch.__version__}. The N-vium's compute "
        f"penalty follows the twin's validation losses (gains times {CONTROL['controller_gain']}, "
        f"routers warmed up over {CONTROL['router_warmup_ratio']:.0%} of the steps). Losses are "
        f"nats per token on {len(rows)} rows of held-out modules. Written by `train_pair.py`.",
        "",
        "| model | parameters | validation loss | expected depth |",
        "|---|---:|---:|---:|",
        f"| dense twin | {sizes['dense twin']:,} | {theirs['loss'].mean():.3f} | 1 |",
        f"| N-vium | {sizes['N-vium']:,} | {ours['loss'].mean():.3f} | {depth.mean():.3f} |",
        "",
        f"Gap {mean(gaps):+.3f} nats (95 % bootstrap over rows: {low:+.3f} to {high:+.3f}; below 0 "
        "the N-vium is better). Data and parameters match, compute does not: in training the "
        "N-vium evaluates four heads, and its early heads are three more training signals. "
        "One seed, a short training: both models still improve.",
        "",
        "## Validation loss by step",
        "",
        "| step | dense twin | N-vium | compute penalty | expected depth in training |",
        "|---:|---:|---:|---:|---:|",
        *curve(logs),
        "",
        "## Exits by class of the predicted token",
        "",
        *by_class(ours, depth, rows, tokenizer, nvium.config.depths),
    ]
    if set(logs) > {"dense", "nvium"}:
        lines += ["", "## Baselines", "", "| model | steps | last head's validation loss |",
                  "|---|---:|---:|"]  # fmt: skip
        for name in ("calm", "layerskip"):
            if name in logs:
                model, _, _ = load_network(str(folder / name), model_types=(f"nvium-{name}",))
                loss = last_head(model, rows)
                lines.append(f"| {name} | {logs[name]['plan']['steps']} | {loss:.3f} |")
    facts = [f"{tokens:,} tokens of the standard library"]
    facts += [f"{name} {log['plan']['steps']} steps" for name, log in logs.items()]
    (folder / "facts.txt").write_text(", ".join(facts) + "\n", encoding="utf-8")
    return lines


@torch.no_grad()
def last_head(model: Any, rows: Any) -> float:
    """Mean cross-entropy of the last head."""
    losses = []
    for i in range(len(rows)):
        tokens = rows[i]["input_ids"][None]
        logits = model(tokens).logits[0, :-1].log_softmax(-1)
        losses.append(-logits.gather(-1, tokens[0, 1:, None]).mean().item())
    return mean(losses)


def curve(logs: dict[str, Any]) -> list[str]:
    """Both models' evaluations, with what the controller did."""
    values: dict[int, dict[str, float]] = defaultdict(dict)
    for name in ("dense", "nvium"):
        for row in logs[name]["log"]:
            if "eval_loss" in row:
                values[row["step"]][name] = row["eval_loss"]
            elif name == "nvium" and "expected-depth" in row:
                values[row["step"]] |= {
                    "beta": row["compute-penalty"], "depth": row["expected-depth"],
                }  # fmt: skip
    return [
        f"| {step} | {row['dense']:.3f} | {row['nvium']:.3f} | {row.get('beta', float('nan')):.3f} "
        f"| {row.get('depth', float('nan')):.3f} |"
        for step, row in sorted(values.items())
        if {"dense", "nvium"} <= set(row)
    ]


def by_class(
    values: dict[str, torch.Tensor],
    depth: torch.Tensor,
    rows: Any,
    tokenizer: Any,
    depths: list[int],
) -> list[str]:
    """Mean depth, exit shares and loss by class, and what chance would make of the depths."""
    vocabulary: Any = Vocabulary(tokenizer)
    names = []
    for i in range(len(rows)):
        pieces = token_pieces(vocabulary, rows[i]["input_ids"].tolist())
        names.append([token_class(piece) for piece in pieces[1:]])
    heads = " | ".join(f"exit {k + 1} (layer {d})" for k, d in enumerate(depths))
    lines = [
        f"| class | tokens | loss | expected depth | {heads} |",
        "|---|---:|---:|---:|" + "---:|" * len(depths),
    ]
    for chosen in CLASSES:
        mask = torch.tensor([[name == chosen for name in row] for row in names])
        if not mask.any():
            continue
        shares = " | ".join(f"{s:.2f}" for s in values["weights"][mask].mean(0).tolist())
        lines.append(
            f"| {chosen} | {int(mask.sum()):,} | {values['loss'][mask].mean():.2f} "
            f"| {depth[mask].mean():.3f} | {shares} |"
        )
    heads_loss = ", ".join(f"{x:.3f}" for x in values["heads"].mean((0, 1)).tolist())
    return [*lines, "", f"Loss of each head alone, by depth: {heads_loss}."]


def main() -> None:
    """Trains what is missing, measures, and writes `pair.md`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--baseline-steps", type=int, default=600, help="of CALM and LayerSkip")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("pair.md"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in TRAINERS:
        steps = options.steps if name in ("dense", "nvium") else options.baseline_steps
        train(name, steps, options.folder)
    options.out.write_text("\n".join(report(options.folder)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
