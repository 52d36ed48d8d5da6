"""What an attribution costs before it runs: passes over the corpus, FLOPs, memory, disk.

Imports nothing heavy, since `tenfold run --dry-run` calls it: a checkpoint's size is read from
the headers of its safetensors files. The unit is one forward pass, `2 P` FLOPs per token for
the P weights that multiply activations plus `4 T d` per layer for attention over T tokens of
width d (as kernels compute it, without skipping the masked half). A backward pass costs one
forward for the activations and one for the weights.

    Fisher, first-order scores   3 forwards: forward, activations, per-sample outer products
    exact losses                 2 forwards per query (ascent, descent), once 1 more for the base
    steps                        on the query's few tokens only
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold_dabgo.views import check_view

if TYPE_CHECKING:
    from tenfold.plan import Node, Plan

BYTES_PER_TOKEN = 4
"""Guess of a text's bytes per token, until it is tokenized."""
CHECK_SAMPLES, NOISE_SAMPLES, OPPONENT_SHARE, QUERY_BLOCK = 64, 16, 0.25, 16
"""As in `prefilter`, `precision` and `linear`, which import torch."""
LOGIT_ROWS = 1024
"""Tokens whose logits exist at once (`tenfold.lm.losses`)."""
OTHER_METHODS = {
    "bm25": (0, 0),
    "random": (0, 0),
    "perplexity": (1, 0),
    "embeddings": (1, 0),
    "gradient-dot": (0, 3),
    "gradient-cosine": (0, 3),
    "untrac-inv": (1, 1),
    "trak": (3, 0),
    "trackstar": (6, 0),
    "datainf": (6, 0),
}
"""Forward passes over the corpus of the methods to compare with: once, and per query."""
_TABLES = re.compile(r"wte|wpe|embed_tokens|embed_in|embed_positions|word_embeddings")
_HEADS = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What costs depend on.

    `weights`: all of them; `moved`: those that are perturbed; `matrix`: those that multiply
    activations (tables do not, a head does, tied or not); `attention`: layers times width.
    """

    weights: int
    moved: int
    matrix: int
    attention: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Work:
    """The corpus and the queries: samples, their tokens and mean length, and the same of the
    queries; `identity` for a Fisher that is not estimated."""

    samples: int
    tokens: int
    length: float
    queries: int
    query_tokens: float


@dataclass(frozen=True, slots=True)
class Cost:
    """An estimate. `passes_once` and `passes_per_query` are forward passes over the corpus."""

    passes_once: float
    passes_per_query: float
    flops: float
    memory_bytes: int
    disk_bytes: int

    def to_json(self) -> dict[str, Any]:
        """As a plain dictionary."""
        return asdict(self)


def passes(
    settings: Mapping[str, Any], queries: int = 1, length: float = math.inf
) -> tuple[float, float]:
    """Forward passes over the corpus: once, and per query (of `queries` in one block, over
    texts of `length` tokens)."""
    once = per_query = 0.0
    for method in {settings["method"], *settings["compare"]}:
        before = per_query
        if method != "dabgo":
            first, each = OTHER_METHODS[method]
            once, per_query = once + first, per_query + each
            if method == settings["method"]:
                once += settings["null_queries"] * each
            continue
        if settings["fisher"] not in ("identity", "file"):
            once += 3
        base = settings["base_losses"] or settings["view"] in ("ascent", "descent")
        once += 1 if base else 0
        share = settings["prefilter"]
        per_query += 2 * (1.0 if share is None else min(1.0, share * (1 + OPPONENT_SHARE)))
        if share is not None:
            # Directions are padded to a whole block.
            per_query += (3 + QUERY_BLOCK / length) / min(max(queries, 1), QUERY_BLOCK)
        if method == settings["method"]:
            once += settings["null_queries"] * (per_query - before)
    return once, per_query


def estimate(size: ModelSize, work: Work, settings: Mapping[str, Any]) -> Cost:
    """The cost of a run.

    Args:
        size: of the model.
        work: corpus and queries.
        settings: parameters of `dabgo:attribution`, by name.
    """
    once, per_query = passes(settings, work.queries, work.length)
    token = _forward(size, work.length)
    sampled = settings["fisher_max_samples"]
    if sampled and settings["fisher"] not in ("identity", "file") and once >= 3:
        once += 3 * (min(sampled / max(work.samples, 1), 1.0) - 1.0)
    flops = (once + per_query * work.queries) * work.tokens * token
    if "dabgo" in (settings["method"], *settings["compare"]):
        flops += work.queries * _per_query(size, work, settings, token)
    return Cost(
        once,
        per_query,
        flops,
        _memory(size, settings),
        _disk(size, work, settings),
    )


def _forward(size: ModelSize, length: float) -> float:
    """FLOPs of one token's forward pass in a text of `length` tokens."""
    return 2.0 * size.matrix + 4.0 * length * size.attention


def _per_query(size: ModelSize, work: Work, settings: Mapping[str, Any], token: float) -> float:
    """Steps on the query, the probes of the noise, and token scores of the ranking's ends."""
    steps = settings["steps"]
    automatic = settings["lr"] is None and settings["preset"] != "paper"
    forwards = 2 * (steps + 1) + (2 * steps + 1) + automatic  # with the KL trace
    backwards = 2 * (2 * steps + automatic)
    query = (forwards + backwards) * work.query_tokens * _forward(size, work.query_tokens)
    shown = min(2 * settings["top_k"], work.samples)
    probes = 2 * min(NOISE_SAMPLES, work.samples)
    samples = 2 * (shown + probes)
    if settings["prefilter"] is not None:
        samples += 2 * min(CHECK_SAMPLES, work.samples)
    return query + samples * work.length * token


def _memory(size: ModelSize, settings: Mapping[str, Any]) -> int:
    """Bytes of weights and their copies in float32, and of the logits of one chunk."""
    copies = 4 + 1  # base, ascent, descent, gradient; a step's product
    if settings["rule"] in ("natural_gradient", "ewc_adamw"):
        copies += 2  # F, and 1 / (F + epsilon) or the optimizer's first moment
    logits = 2 * min(LOGIT_ROWS, settings["token_budget"]) * size.vocabulary
    return 4 * (2 * size.weights + copies * size.moved + logits)


def _disk(size: ModelSize, work: Work, settings: Mapping[str, Any]) -> int:
    """Bytes that stay: the Fisher, and each query's scores (shards of a pass are deleted)."""
    estimated = settings["fisher"] not in ("identity", "file")
    columns = 3 + (settings["base_losses"] or settings["view"] in ("ascent", "descent"))
    dabgo = settings["method"] == "dabgo"
    row = 8 * (columns if dabgo else 1) + 8
    return int(4 * size.moved * (estimated and dabgo) + work.queries * work.samples * row)


# --- From a plan, before anything is loaded ---------------------------------------------------


def plan_cost(plan: Plan, items: int | None) -> dict[str, Any]:
    """Lines for `--dry-run`: what can be told without loading the model or reading the texts.

    Args:
        plan: the checked plan.
        items: upper bound of the number of queries, when there is one.
    """
    assert plan.evaluator is not None
    settings = plan.evaluator.params
    check_view(settings["method"], settings["view"])
    once, per_query = passes(settings, items or QUERY_BLOCK)
    rows: dict[str, Any] = {
        "corpus passes": f"{once:g} forwards once + {per_query:.3g} per query",
    }
    size = _planned_size(plan.models["model"], settings["params"])
    read = _bytes(plan.datasets["train"])
    if size is None:
        rows["FLOPs"] = "unknown until the model exists"
        return rows
    rows["weights"] = size.weights
    rows["memory"] = f"{_memory(size, settings) / 1e6:.4g} MB for weights and their copies"
    if read is None:
        rows["FLOPs per corpus token"] = f"{_forward(size, _length(size, settings)):.3g}"
        return rows
    tokens = read // BYTES_PER_TOKEN
    if settings["window"] and settings["stride"]:
        tokens = math.ceil(tokens * settings["window"] / settings["stride"])
    queries = items or 1
    length = _length(size, settings)
    work = Work(max(int(tokens / length), 1), tokens, length, queries, length)
    cost = estimate(size, work, settings)
    whose = f"for at most {items} queries" if items else "for one query"
    rows["corpus tokens"] = f"about {tokens} ({BYTES_PER_TOKEN} bytes per token assumed)"
    rows["FLOPs"] = f"about {cost.flops:.3g} {whose}"
    rows["disk"] = f"about {cost.disk_bytes / 1e6:.3g} MB {whose}"
    return rows


def retraining_cost(plan: Plan, items: int | None) -> dict[str, Any]:
    """The trainings that `dabgo:retraining` does at most: sets that all queries share, and each
    query's own removals (methods that remove the same samples share one).

    Args:
        plan: the checked plan.
        items: upper bound of the number of queries, when there is one.
    """
    assert plan.evaluator is not None
    p = plan.evaluator.params
    measure, seeds = set(p["measure"]), p["seeds"]
    sizes = len(set(p["k"])) * ("removal" in measure) + ("qld" in measure)
    shared = seeds * (1 + sizes * p["random_draws"]) if sizes else 0
    shared += p["subsets"] * p["lds_seeds"] * ("lds" in measure)
    shared += p["loo_samples"] * seeds * ("loo" in measure)
    shared += p["attributed"] == "retrained"
    each = len(p["methods"]) * sizes * seeds
    total = "" if items is None else f": {shared + each * items} for at most {items} queries"
    return {"trainings": f"{shared} once + {each} per query{total}"}


def _length(size: ModelSize, settings: Mapping[str, Any]) -> float:
    return float(settings["window"] or 256)


def _planned_size(node: Node, which: str) -> ModelSize | None:
    """The size of a planned model's checkpoint; None when it has none yet."""
    folder = node.params.get("checkpoint")
    if not isinstance(folder, str | Path) or not Path(folder).is_dir():
        return None
    return checkpoint_size(Path(folder), which)


def _bytes(node: Node) -> int | None:
    """Bytes of the files of a planned dataset; None for one that is not made of files."""
    path = node.params.get("path")
    if not isinstance(path, str | Path):
        return None
    place = Path(path)
    if place.is_file():
        return place.stat().st_size
    pattern = str(node.params.get("pattern") or "**/*")
    return sum(p.stat().st_size for p in place.glob(pattern) if p.is_file()) or None


def checkpoint_size(folder: Path, which: str = "all") -> ModelSize | None:
    """The size of a checkpoint, from its configuration and the headers of its weight files.

    None when the folder is not one of these.
    """
    shapes: dict[str, list[int]] = {}
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                table = json.loads(file.read(length))
            shapes |= {n: row["shape"] for n, row in table.items() if n != "__metadata__"}
    except (OSError, ValueError, KeyError, struct.error):
        return None
    return shaped_size(shapes, config, which) if shapes else None


def shaped_size(
    shapes: Mapping[str, Any], config: Mapping[str, Any], which: str = "all"
) -> ModelSize:
    """The size of a model with these weights."""
    from tenfold_dabgo.selections import name_matcher

    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    tables = {n for n, shape in shapes.items() if len(shape) == 2 and _TABLES.search(n)}
    heads = [n for n in shapes if _HEADS.search(n)]
    matrix = sum(c for n, c in counts.items() if len(shapes[n]) == 2 and n not in tables)
    if not heads and tables:  # a tied head multiplies by the table
        rows = _first(config, "vocab_size")
        matrix += max((counts[n] for n in tables if not rows or shapes[n][0] == rows), default=0)
    matches = name_matcher(which, list(shapes), tables)
    layers = _first(config, "num_hidden_layers", "n_layer")
    width = _first(config, "hidden_size", "n_embd")
    return ModelSize(
        weights=sum(counts.values()),
        moved=sum(count for name, count in counts.items() if matches(name)),
        matrix=matrix,
        attention=layers * width,
        vocabulary=_first(config, "vocab_size"),
    )


def _first(config: Mapping[str, Any], *names: str) -> int:
    """The first of some configuration values that is there; 0 for none."""
    return next((int(config[n]) for n in names if isinstance(config.get(n), int)), 0)
