"""Decoding speed at batch 1: N-vium against dense loops, transformers, CALM and LayerSkip.

Two tables, written to `decode.md` beside this script:

- *scripted exits*: random weights, every gate forced to the same probability. Shows what the
  decoder makes of given exit shares: against the limit of the time model, and what closed gates
  cost. Nothing about quality.
- *trained models*: the checkpoints of `train_pair.py`, sampling from their own distributions.

All contenders of a table run in one process and take turns, prompt by prompt; the time of a text
less the time of its first token is decoding. Ratios are between medians over rounds.

    python packages/tenfold-nvium/benchmarks/bench_decode.py [--models FOLDER] [--threads N]
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from tenfold_nvium.baselines.calm import CalmDecoder
from tenfold_nvium.baselines.layerskip import LayerSkipDecoder
from tenfold_nvium.configuration import NviumConfig
from tenfold_nvium.decode import PiggybackDecoder
from tenfold_nvium.lm import load_network
from tenfold_nvium.modeling import NviumForCausalLM
from tenfold_nvium.presets import GRID_EXITS, dense_twin
from tenfold_nvium.runner_cache import packed_runner
from tenfold_nvium.sampling import Warp
from tenfold_nvium.speed_model import measure, merged
from transformers import LlamaConfig, LlamaForCausalLM

Decode = Callable[[list[int], int, int], tuple[int, Any]]
"""`(prompt, new tokens, seed) -> tokens written, the decoder's trace or None`."""

SHAPES = {"h256-l12": (256, 12, 4, 688), "h512-l24": (512, 24, 8, 1368)}
"""Width, layers, heads, MLP of the scripted table."""
GATES = (0.0, 0.35, 0.6)


@dataclass
class Timing:
    """One contender: seconds per decoded token of every round, and its last trace."""

    seconds: list[float]
    trace: Any = None

    @property
    def ms(self) -> float:
        """Median milliseconds per token."""
        return 1000 * median(self.seconds)


def take_turns(
    contenders: dict[str, Decode], prompts: Sequence[list[int]], new: int, rounds: int
) -> dict[str, Timing]:
    """Times every contender on every prompt, `rounds` times, after one round that is not timed."""
    timings = {name: Timing([]) for name in contenders}
    names = list(contenders)
    for turn in range(rounds + 1):
        spent, tokens = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
        for i, prompt in enumerate(prompts):
            first = (turn + i) % len(names)
            for name in names[first:] + names[:first]:
                decode = contenders[name]
                started = time.perf_counter()
                decode(prompt, 1, i)
                middle = time.perf_counter()
                written, trace = decode(prompt, new, i)
                ended = time.perf_counter()
                spent[name] += (ended - middle) - (middle - started)
                tokens[name] += written - 1
                timings[name].trace = trace
        if turn:
            for name in names:
                timings[name].seconds.append(spent[name] / max(1, tokens[name]))
    return timings


def ours(decoder: Any) -> Decode:
    """A decoder of this package."""

    def decode(prompt: list[int], new: int, seed: int) -> tuple[int, Any]:
        done = decoder.generate([prompt], new, seeds=[seed])
        return len(done.rows[0].tokens), done.trace

    return decode


def by_transformers(model: Any, **settings: Any) -> Decode:
    """`generate` of transformers; plain sampling unless the settings say otherwise."""
    settings = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "use_cache": True} | settings

    def decode(prompt: list[int], new: int, seed: int) -> tuple[int, Any]:
        torch.manual_seed(seed)
        ids = torch.tensor([prompt])
        done = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **settings
        )
        return done.shape[1] - len(prompt), None

    return decode


def as_llama(model: NviumForCausalLM) -> LlamaForCausalLM:
    """A dense model of this package as transformers' own class; logits are equal bit for bit."""
    known = LlamaConfig().to_dict()
    values = {k: v for k, v in model.config.to_dict().items() if k in known}
    values.pop("architectures", None)
    values.pop("model_type", None)
    llama = LlamaForCausalLM(LlamaConfig(**values)).eval()
    llama.load_state_dict(model.state_dict())
    llama.generation_config.eos_token_id = model.generation_config.eos_token_id
    return llama


# --- Scripted exits -----------------------------------------------------------------------------


def shaped(shape: str, exits: Sequence[int], **changes: Any) -> NviumConfig:
    """Configuration of a shape; texts never end by themselves."""
    hidden, layers, heads, inner = SHAPES[shape]
    values: dict[str, Any] = {
        "vocab_size": 4000, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": inner, "exit_layers": list(exits),
        "eos_token_id": None, "bos_token_id": None,
    }  # fmt: skip
    return NviumConfig(**(values | changes))


def with_gates(config: NviumConfig, gate: float) -> NviumForCausalLM:
    """A random model whose routers all answer `gate`, whatever they read."""
    torch.manual_seed(0)
    model = NviumForCausalLM(config).eval()
    odds = torch.logit(torch.tensor(gate)) if gate else torch.tensor(-1e4)
    with torch.no_grad():
        for at_exit in model.exits:
            at_exit.router.head.weight.zero_()
            at_exit.router.head.bias.copy_(torch.tensor([0.0, float(odds)]))
    return model


def scripted(shape: str, new: int, rounds: int, prompts: int) -> list[str]:
    """Rows of the scripted table for one shape."""
    layers = SHAPES[shape][1]
    config = shaped(shape, GRID_EXITS[layers])
    matched = dense_twin(config)
    torch.manual_seed(0)
    dense = NviumForCausalLM(shaped(shape, [], final_adapter=False, adapter_size=0)).eval()
    wide = NviumForCausalLM(matched).eval()
    models = {gate: with_gates(config, gate) for gate in GATES}
    texts = [[(7 * i + j) % 4000 for j in range(32)] for i in range(prompts)]
    contenders = {
        "dense, same MLP": ours(PiggybackDecoder(dense)),
        "dense, matched MLP": ours(PiggybackDecoder(wide)),
        "transformers": by_transformers(as_llama(wide)),
        **{f"g = {gate:g}": ours(PiggybackDecoder(m)) for gate, m in models.items()},
    }
    timings = take_turns(contenders, texts, new, rounds)
    own, match, theirs = (
        timings[name].ms for name in ("dense, same MLP", "dense, matched MLP", "transformers")
    )
    rows = []
    for gate, model in models.items():
        timing = timings[f"g = {gate:g}"]
        limits, depths = [], []
        for i, text in enumerate(texts):
            trace = PiggybackDecoder(model).generate([text], new, seeds=[i]).trace
            fitted = merged(
                [measure(model, packed_runner(model), context=32 + new // 2) for _ in range(3)]
            )
            limits.append(1000 * fitted.of_widths(trace.blocks, new - 1))
            depths.append(trace.mean_depth)
        depth = sum(depths) / len(depths)
        limit = sum(limits) / len(limits)
        rows.append(
            f"| {shape} | {gate:g} | {depth:.3f} | {1 / depth:.2f} | {timing.ms:.2f} | {limit:.2f} "
            f"| {limit / timing.ms:.2f} | {own / timing.ms:.2f} | {match / timing.ms:.2f} "
            f"| {theirs / timing.ms:.2f} |"
        )
        print(rows[-1], flush=True)
    print(f"dense {own:.2f} ms, matched {match:.2f} ms, transformers {theirs:.2f} ms", flush=True)
    return rows


SCRIPTED_HEAD = """\
## Scripted exits

Random weights, all gates at the same probability g (0: closed), 3 early exits. *limit*: the time
model of `speed_model`, measured in the same process: segments alone on the blocks that really
occurred, plus one head per token. *own dense*: the same loop on the dense model of the same MLP;
*matched*: of as many parameters (wider MLP). *transformers*: `generate` of the matched model.
A limit reached above 1 means that segments timed alone, between blocks of other widths,
found colder caches than in decoding.

| shape | g | mean depth d | 1/d | ms/token | limit ms | limit reached | × own dense | × matched \
| × transformers |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|
"""


# --- Trained models -----------------------------------------------------------------------------


def trained(folder: Path, new: int, rounds: int, prompts: int) -> list[str]:
    """Rows of the table of trained models, and the limit of the N-vium among them."""
    nvium, tokenizer, _ = load_network(str(folder / "nvium"))
    dense, _, _ = load_network(str(folder / "dense"))
    llama = as_llama(dense)
    for model in (nvium, dense, llama):
        model.generation_config.eos_token_id = None
    contenders: dict[str, Decode] = {
        "N-vium, `PiggybackDecoder`": ours(PiggybackDecoder(nvium)),
        "N-vium, `generate()`": by_transformers(nvium),
        "N-vium greedy, certified": ours(PiggybackDecoder(nvium, "certified", warp=Warp(0.0))),
        "dense twin, our loop": ours(PiggybackDecoder(dense)),
        "dense twin, `transformers.generate`": by_transformers(llama),
        "dense twin, `transformers.generate`, static cache": by_transformers(
            llama, cache_implementation="static"
        ),
        "dense twin greedy, `assistant_early_exit=2`": by_transformers(
            llama, assistant_early_exit=2, do_sample=False, top_k=None
        ),
    }
    if (folder / "calm").is_dir():
        calm, _, _ = load_network(str(folder / "calm"), model_types=("nvium-calm",))
        for threshold in (0.3, 0.6):
            contenders[f"CALM, margin > {threshold} (approximate)"] = ours(
                CalmDecoder(calm, threshold)
            )
    if (folder / "layerskip").is_dir():
        skip, _, _ = load_network(str(folder / "layerskip"), model_types=("nvium-layerskip",))
        skip_llama = as_llama(skip)
        for length in (2, 4):
            contenders[f"LayerSkip, exit 2, draft {length}"] = ours(
                LayerSkipDecoder(skip, 2, length)
            )
        contenders["LayerSkip greedy, exit 2, draft 4"] = ours(
            LayerSkipDecoder(skip, 2, 4, warp=Warp(0.0))
        )
        contenders["LayerSkip greedy, `assistant_early_exit=2`"] = by_transformers(
            skip_llama, assistant_early_exit=2, do_sample=False, top_k=None
        )
    texts = [tokenizer.encode(text)[:24] for text in TEXTS[:prompts]]
    timings = take_turns(contenders, texts, new, rounds)
    own = timings["dense twin, our loop"].ms
    theirs = timings["dense twin, `transformers.generate`"].ms
    rows = []
    for name, timing in timings.items():
        depth = "" if timing.trace is None else f"{timing.trace.mean_depth:.2f}"
        rows.append(
            f"| {name} | {timing.ms:.2f} | {own / timing.ms:.2f} | {theirs / timing.ms:.2f} "
            f"| {depth} |"
        )
        print(rows[-1], flush=True)
    decoder, limits, times = PiggybackDecoder(nvium), 0.0, 0.0
    for i, text in enumerate(texts):
        trace = decoder.generate([text], new, seeds=[i]).trace
        fitted = measure(nvium, packed_runner(nvium), context=24 + new // 2)
        limits += 1000 * fitted.of_widths(trace.blocks, new - 1)
        times += timings["N-vium, `PiggybackDecoder`"].ms
    rows += [
        "",
        f"The N-vium reaches {limits / times:.2f} of the time model's limit for its exits.",
    ]
    print(rows[-1], flush=True)
    return rows


TEXTS = [
    "def read_lines(path):\n    ",
    "class Node:\n    def __init__(self, value, next=None):\n        ",
    "def test_split(self):\n        self.assertEqual(",
    '    def close(self):\n        """Close the ',
    "def parse_args(argv):\n    parser = argparse.ArgumentParser(",
    "    def __repr__(self):\n        return ",
    "def main():\n    import sys\n    ",
    "async def _wait(self, fut):\n    try:\n        ",
]

TRAINED_HEAD = """\
## Trained models

The models of `train_pair.py` ({facts}), batch 1, plain sampling at temperature 1 where not said
otherwise. The dense twin under `transformers.generate` is a `LlamaForCausalLM` with the same
weights. *depth*: of the last text.

| decoder | ms/token | × dense twin, our loop | × `transformers.generate` | depth |
|---|---:|---:|---:|---:|
"""


def main() -> None:
    """Runs both tables and writes `decode.md`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="folder written by train_pair.py")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("decode.md"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = options.new_tokens, options.rounds, options.prompts
    page = [
        "# Decoding speed",
        "",
        f"CPU, fp32, batch 1, {options.threads} thread(s) of {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}. {options.prompts} prompts, "
        f"{options.new_tokens} new tokens, medians over {options.rounds} rounds in turns. "
        "Written by `bench_decode.py`. No GPU was at hand.",
        "",
    ]
    if options.models is not None:
        facts = (options.models / "facts.txt").read_text(encoding="utf-8").strip()
        page.append(TRAINED_HEAD.format(facts=facts).rstrip("\n"))
        page += [*trained(options.models, *sizes), ""]
    page.append(SCRIPTED_HEAD.rstrip("\n"))
    for shape in SHAPES:
        page += scripted(shape, *sizes)
    options.out.write_text("\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
