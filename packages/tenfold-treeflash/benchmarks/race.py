"""Decoding speed on a CPU: TreeFlash against everything that transformers itself can do.

Trains what FOLDER does not hold yet (`race_models.py`), then lets all contenders write the same
held-out prompts in one process, taking turns in rotating order, and writes `race.md` beside this
script. Every contender is called through `model.generate`, on the same weights and settings. The
time of a text less the time of its first token is decoding; a rate is that of all texts of a
repetition, and medians and extremes are over repetitions. Tokens per round have bootstrap
intervals over prompts.

    python packages/tenfold-treeflash/benchmarks/race.py FOLDER [--threads N] [--quick]
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import race_models as models  # ty: ignore[import-not-found]
import torch
import transformers
from tenfold.builtin import hf
from tenfold.builtin.python_prompts import PythonPrompts
from tenfold.files import write_text
from tenfold.stats import bootstrap, median
from tenfold_treeflash.assistant import as_hf_dflash_assistant
from tenfold_treeflash.checkpoints import load_drafter
from tenfold_treeflash.configuration import for_target
from tenfold_treeflash.costs import calibrate
from tenfold_treeflash.decoding import DraftSettings, SpeculativeDecoder
from tenfold_treeflash.draft_cache import DraftCache
from tenfold_treeflash.generation import tree_decoding
from tenfold_treeflash.modeling import TreeFlashDraftModel
from tenfold_treeflash.planning import Planners
from tenfold_treeflash.tables import transition_tables
from tenfold_treeflash.target import Target
from tenfold_treeflash.tree import build_tree
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria

SIZES = (8, 16, 64)
NEW_TOKENS, LONGEST_PROMPT = 64, 112
BASELINE, AUTO = "HF", "TreeFlash, auto"
LOOKUP_TOKENS = 10

Generate = Callable[..., Any]
"""`(ids [1, T], **settings of generate) -> ids`."""


class FirstToken(StoppingCriteria):
    """Remembers when it was first asked: after the first token."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Never stops anything."""
        if self.at is None:
            self.at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@dataclass
class Run:
    """One text of one contender."""

    tokens: int
    first: float
    total: float
    cpu: float
    ids: list[int]


@dataclass
class Scores:
    """All runs of a contender on a set of prompts: `runs[repetition][prompt]`."""

    runs: dict[int, list[Run]] = field(default_factory=lambda: defaultdict(list))

    def rate(self, repetition: int) -> float:
        """Decoded tokens per second of a repetition."""
        part = self.runs[repetition]
        return sum(r.tokens - 1 for r in part) / sum(r.total - r.first for r in part)

    def rates(self) -> list[float]:
        """Of every repetition."""
        return [self.rate(i) for i in sorted(self.runs)]

    def all(self) -> list[Run]:
        """Every run."""
        return [run for part in self.runs.values() for run in part]


def contenders(
    model: Any,
    drafter: TreeFlashDraftModel,
    assistant: Any,
    planners: Planners,
) -> dict[str, Generate]:
    """Who races."""

    def ours(**settings: Any) -> Generate:
        own = planners if settings.pop("auto", False) else None
        draft = DraftSettings(**settings)
        loop = tree_decoding(model, drafter, draft, checked=True, planners=own)
        return lambda ids, **kw: model.generate(ids, custom_generate=loop, **kw)

    def theirs(**settings: Any) -> Generate:
        return lambda ids, **kw: model.generate(ids, **settings, **kw)

    dflash = as_hf_dflash_assistant(drafter)
    found = {
        BASELINE: theirs(),
        "HF prompt lookup": theirs(prompt_lookup_num_tokens=LOOKUP_TOKENS),
        "HF assisted": theirs(assistant_model=assistant),
        "HF DFlash, same drafter": theirs(assistant_model=dflash, speculation_type="dflash"),
        "chain": ours(method="chain", tree_size=drafter.config.block_size),
        "marginal tree, 16": ours(method="marginal", tree_size=16),
    }
    for size in SIZES:
        found[f"TreeFlash, {size}"] = ours(tree_size=size)
    found[AUTO] = ours(tree_size=64, auto=True)
    return found


def prompts(model: Any, count: int) -> dict[str, list[list[int]]]:
    """Held-out prompts: heads of functions to be written, and functions to be copied."""
    plain, copied = [], []
    for record in PythonPrompts(
        max_prompt_chars=300, max_chars=160, shuffle_seed=models.SEED
    ).load():
        ids = model.prompt_ids(record.prompt)
        if len(plain) < count and len(ids) <= LONGEST_PROMPT:
            plain.append(ids)
        prompt = str(record.prompt)
        head, whole = prompt.split("\n")[0] + "\n", f"{prompt}{record.reference}\n\n"
        ids = model.prompt_ids(whole + whole + head)
        if len(copied) < count and len(ids) <= models.CONTEXT - NEW_TOKENS:
            copied.append(ids)
        if len(plain) == len(copied) == count:
            break
    return {"functions to write": plain, "functions to copy": copied}


def settings_of(model: Any, temperature: float) -> dict[str, Any]:
    """Arguments of `generate`."""
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    return {"max_new_tokens": NEW_TOKENS, "pad_token_id": model.pad_id, **sampling}


def timed(generate: Generate, ids: list[int], settings: dict[str, Any], seed: int) -> Run:
    """One text."""
    clock, given = FirstToken(), torch.tensor([ids])
    torch.manual_seed(seed)
    cpu, started = time.process_time(), time.perf_counter()
    written = generate(
        given, attention_mask=torch.ones_like(given), stopping_criteria=[clock], **settings
    )
    total, spent = time.perf_counter() - started, time.process_time() - cpu
    new = written[0, len(ids) :].tolist()
    return Run(len(new), (clock.at or started + total) - started, total, spent, new)


def race(
    model: Any,
    who: dict[str, Generate],
    texts: Sequence[list[int]],
    temperature: float,
    repeats: int,
) -> dict[str, Scores]:
    """All contenders on all prompts, one round of them per repetition; the first is a warm-up."""
    settings, names = settings_of(model, temperature), list(who)
    scores = {name: Scores() for name in names}
    for name in names:
        for ids in texts[:2]:
            timed(who[name], ids, settings, models.SEED)
    turn = 0
    for repetition in range(repeats):
        for number, ids in enumerate(texts):
            turn += 1
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                run = timed(who[name], ids, settings, models.SEED + number)
                scores[name].runs[repetition].append(run)
    return scores


def passes(module: Any, generate: Generate, ids: list[int], settings: Any, seed: int) -> float:
    """Tokens per pass of the model over a text, its prompt's pass and first token left out."""
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    hook = module.register_forward_pre_hook(counted)
    try:
        run = timed(generate, ids, settings, seed)
    finally:
        hook.remove()
    return (run.tokens - 1) / max(count - 1, 1)


# --- Tables of the page -----------------------------------------------------------------------


def span(values: Sequence[float], digits: int = 2) -> str:
    """Median and extremes."""
    low, high = min(values), max(values)
    return f"{median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def interval(values: Sequence[Any], statistic: Any) -> str:
    """A statistic with its 95 % bootstrap interval."""
    low, high = bootstrap(values, statistic) or (float("nan"), float("nan"))
    return f"{statistic(values):.2f} [{low:.2f}, {high:.2f}]"


def mean(values: Sequence[float]) -> float:
    """Mean of numbers."""
    return sum(values) / len(values)


def speed_table(model: Any, who: dict[str, Generate], scores: dict[str, Scores],
                texts: Sequence[list[int]], temperature: float) -> list[str]:  # fmt: skip
    """One row per contender."""
    settings = settings_of(model, temperature)
    lines = [
        "| contender | tokens/s | speed-up | first token, ms | CPU ms per token | tokens per pass "
        "| texts as HF's |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    base = scores[BASELINE]
    for name, own in scores.items():
        ratios = [a / b for a, b in zip(own.rates(), base.rates(), strict=True)]
        first = median([1000 * run.first for run in own.all()])
        cpu = 1000 * sum(r.cpu for r in own.all()) / sum(r.tokens for r in own.all())
        per_pass = [
            passes(model.module(), who[name], ids, settings, models.SEED + number)
            for number, ids in enumerate(texts)
        ]
        equal = sum(
            a.ids == b.ids for a, b in zip(own.all(), base.all(), strict=True)
        ) / len(own.all())  # fmt: skip
        label = name
        if name == BASELINE:
            label = "HF sampling" if temperature else "HF greedy"
        lines.append(
            f"| {label} | {span(own.rates(), 1)} | {span(ratios)} | {first:.1f} | {cpu:.1f} "
            f"| {interval(per_pass, mean)} | {equal:.0%} |"
        )
    return lines


def efficiency(
    model: Any, drafter: TreeFlashDraftModel, texts: Sequence[list[int]], temperature: float
) -> list[str]:
    """Tokens per round of the three methods at the same sizes, and paired ratios."""
    settings = settings_of(model, temperature)
    found: dict[str, list[float]] = {}

    def measure(name: str, **draft: Any) -> None:
        loop = tree_decoding(model.module(), drafter, DraftSettings(**draft), checked=True)

        def generate(ids: Any, **kw: Any) -> Any:
            return model.module().generate(ids, custom_generate=loop, **kw)

        found[name] = [
            passes(model.module(), generate, ids, settings, models.SEED + number)
            for number, ids in enumerate(texts)
        ]

    def ratio(pairs: Sequence[tuple[float, float]]) -> float:
        return sum(a for a, _ in pairs) / sum(b for _, b in pairs)

    measure("chain", method="chain", tree_size=drafter.config.block_size)
    lines = [
        "| nodes | chain | marginal tree | TreeFlash | TreeFlash / marginal | marginal / chain |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for size in SIZES:
        measure("marginal", method="marginal", tree_size=size)
        measure("tree", tree_size=size)
        columns = [interval(found[name], mean) for name in ("chain", "marginal", "tree")]
        for a, b in (("tree", "marginal"), ("marginal", "chain")):
            columns.append(interval(list(zip(found[a], found[b], strict=True)), ratio))
        lines.append(f"| {size} | {' | '.join(columns)} |")
    return lines


@torch.inference_mode()
def build_times(model: Any, drafter: TreeFlashDraftModel, texts: Sequence[list[int]]) -> list[str]:
    """Milliseconds of building trees from the tables behind real prompts."""
    target = Target(model.module())
    times: dict[int, list[float]] = defaultdict(list)
    with target.features(drafter.config.target_layer_ids) as features:
        for ids in texts:
            cache, context = target.new_cache(), DraftCache()
            target.prefill(torch.tensor(ids[:-1]), cache)
            drafter.extend(context, features(), torch.arange(len(ids) - 1)[None])
            block = drafter.config.block_size
            hidden = drafter.draft(context, ids[-1], target.embedding, block)
            tables = transition_tables(drafter, hidden, ids[-1], target.embedding, target.head)
            for size in SIZES:
                for _ in range(20):
                    started = time.perf_counter()
                    build_tree(tables, ids[-1], size)
                    times[size].append(1000 * (time.perf_counter() - started))
    return [f"| {size} | {median(values):.3f} |" for size, values in times.items()]


class Greedy:
    """The arg-max rule, for a fixed length."""

    greedy = True

    def __init__(self, end: int) -> None:
        self._end = end

    def choose(self, ids: list[int], logits: torch.Tensor) -> int:
        """See `Chooser`."""
        return int(logits.argmax())

    def ends(self, ids: list[int]) -> bool:
        """See `Chooser`."""
        return len(ids) >= self._end


def overhead(repeats: int) -> list[str]:
    """Where rounds of a random model of 90 M weights spend their time."""
    torch.manual_seed(models.SEED)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=12, max_position_embeddings=512,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    drafter = TreeFlashDraftModel(
        for_target(config, num_hidden_layers=2, num_features=4, mask_token_id=0)
    ).eval()
    target = Target(model)
    size = sum(p.numel() for p in model.parameters())
    lines = [
        f"| nodes | {size / 1e6:.0f} M: ms per round | drafter | tables | verify | commit | tree "
        "| walk | rest | loop's share |",
        "|---:" * 10 + "|",
    ]
    for nodes in SIZES:
        decoder = SpeculativeDecoder(target, drafter, DraftSettings(tree_size=nodes))
        rows = []
        for repetition in range(repeats + 1):
            _, stats = decoder.decode(list(range(64)), Greedy(64 + 24))
            if repetition:
                parts = {k: 1000 * v / stats.rounds for k, v in stats.seconds.items()}
                total = 1000 * (stats.total_s - stats.first_token_s) / stats.rounds
                del parts["prefill"]
                rows.append([total, *(parts[k] for k in
                             ("draft", "tables", "verify", "commit", "tree", "walk"))])  # fmt: skip
        columns = [median([row[i] for row in rows]) for i in range(len(rows[0]))]
        rest = max(columns[0] - sum(columns[1:]), 0.0)
        share = (columns[5] + columns[6] + rest) / columns[0]
        cells = " | ".join(f"{value:.2f}" for value in [*columns, rest])
        lines.append(f"| {nodes} | {cells} | {share:.1%} |")
    return lines


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def page(options: argparse.Namespace) -> list[str]:
    """Everything."""
    folder = options.folder.absolute()
    target_folder = models.train_target(folder)
    drafter_folder = models.train_drafter(target_folder, folder)
    assistant_folder = models.train_assistant(folder)
    model: Any = hf.load(str(target_folder))
    assistant = hf.load(str(assistant_folder)).module()
    drafter = load_drafter(drafter_folder).eval()
    if options.train_only:
        return []
    module = model.module()
    costs = calibrate(Target(module), drafter, repeats=9, choices=True, context=128)
    planners = Planners(costs)
    count, repeats = (2, 2) if options.quick else (options.prompts, options.repeats)
    sets = prompts(model, max(count, 4 if options.quick else options.tau_prompts))
    weights = [sum(p.numel() for p in m.parameters()) for m in (module, drafter, assistant)]
    config = module.config
    lines = [
        "# The race",
        "",
        f"A Llama-type model of {weights[0] / 1e6:.2f} M weights ({config.num_hidden_layers} "
        f"layers of width {config.hidden_size}, vocabulary {config.vocab_size}) trained on "
        f"functions of the Python standard library; its drafter "
        f"({drafter.config.num_hidden_layers} layers, blocks of {drafter.config.block_size}, "
        f"{weights[1] / 1e6:.2f} M weights), trained on texts that the model wrote to "
        f"{models.TEXTS['prompts']} prompts ({models.DRAFTER['steps']} + "
        f"{models.DRAFTER['steps_b']} steps); an assistant of {weights[2] / 1e6:.2f} M weights for "
        f"transformers' assisted generation. Prompts come from held-out modules, {count} per set; "
        f"up to {NEW_TOKENS} new tokens; {repeats} repetitions, contenders taking turns. Numbers: "
        "median (least-most) over repetitions; [95 % bootstrap interval over prompts].",
        "",
        f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), fp32; Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}. Written by `race.py`.",
    ]
    who = contenders(module, drafter, assistant, planners)
    for temperature in (0.0, 1.0):
        for name, texts in sets.items():
            scores = race(model, who, texts[:count], temperature, repeats)
            lines += ["", f"## Temperature {temperature:g}: {name}", ""]
            lines += speed_table(model, who, scores, texts[:count], temperature)
            print("\n".join(lines[-len(who) - 4 :]), flush=True)
    for temperature in (0.0, 1.0):
        texts = sets["functions to write"]
        title = f"## Tokens per pass, temperature {temperature:g}, {len(texts)} prompts"
        lines += ["", title, "", *efficiency(model, drafter, texts, temperature)]
        print("\n".join(lines[-6:]), flush=True)
    ratio = ", ".join(f"{n}: {s / costs.verify[1]:.2f}" for n, s in costs.verify.items())
    tables = ", ".join(
        f"{size.top_m}x{size.top_k}{'' if size.shortlist is None else f' of {size.shortlist}'}: "
        f"{1000 * seconds:.2f} ms" for size, seconds in costs.tables.items()
    )  # fmt: skip
    lines += [
        "", "## Costs", "",
        f"One token: {1000 * costs.verify[1]:.2f} ms. Passes by number of nodes, in tokens: {ratio}"
        f". A drafter's pass with tables and tree, by width: {tables}. Peak memory of the process, "
        f"all contenders: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB.",
        "", "| nodes | building the tree, ms |", "|---:|---:|",
        *build_times(model, drafter, sets["functions to write"][:8]),
        "", *overhead(2 if options.quick else 5),
    ]  # fmt: skip
    return lines


def main() -> None:
    """Trains what is missing, races, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where models are kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=8, help="per set, timed")
    parser.add_argument("--tau-prompts", type=int, default=48, help="for tokens per pass")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a few minutes, to try it out")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("race.md"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    lines = page(options)
    if lines:
        write_text(options.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
