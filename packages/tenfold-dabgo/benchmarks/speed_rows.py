"""The rows of `bench_speed.py`; each runs in a process of its own and returns its measurements.

`prepare` writes what all rows share into a folder: a model as a transformers checkpoint, the
corpus and queries as token ids, and a Fisher.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import published  # ty: ignore[import-not-found]
import torch
from safetensors.torch import load_file
from tenfold.builtin.python_stdlib import PythonStdlib
from tenfold.lm.model import CausalLM
from tenfold.lm.tokenizer import train_bpe
from tenfold_dabgo.attributor import BidirectionalAttributor
from tenfold_dabgo.baselines.bergson import BergsonAttributor
from tenfold_dabgo.baselines.bm25 import Bm25Index, words
from tenfold_dabgo.baselines.kronfluence import KronfluenceAttributor
from tenfold_dabgo.batches import length_buckets, sample_means, token_batch
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.fisher import FisherDiagonal
from tenfold_dabgo.fisher_estimate import estimate_fisher
from tenfold_dabgo.linear import linear_scores
from tenfold_dabgo.queries import Query
from tenfold_dabgo.weights import Weights, borrowed
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

Measured = dict[str, Any]
QUERIES, PROMPT, COMPLETION = 16, 16, 32
TOP = 10


# --- what all rows share ------------------------------------------------------------------------


def prepare(folder: Path, sizes: dict[str, Any]) -> Measured:
    """Writes model, tokenizer, corpus, queries and Fisher of one setting."""
    started = time.perf_counter()
    records = list(PythonStdlib(unit="function").load(shuffle_seed=0, limit=sizes["texts"]))
    texts = [record.text for record in records]
    tokenizer = train_bpe(texts, sizes["vocabulary"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes["vocabulary"], hidden_size=sizes["width"],
        intermediate_size=sizes["inner"], num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"], max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = CausalLM(LlamaForCausalLM(config), tokenizer)
    rows = [model.encode(text)[: sizes["window"]] for text in texts]
    rows = [row for row in rows if len(row) >= PROMPT + COMPLETION]
    asked, rows = rows[:QUERIES], rows[QUERIES : QUERIES + sizes["samples"]]
    dataset = TokenDataset.from_ids(rows)
    if sizes["epochs"]:
        train(model, dataset, sizes["epochs"])
    network: Any = model.module()
    network.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    queries = [
        {"prompt": row[:PROMPT], "completion": row[PROMPT : PROMPT + COMPLETION]} for row in asked
    ]
    (folder / "data.json").write_text(json.dumps({"rows": rows, "queries": queries}))
    begun = time.perf_counter()
    fisher = estimate_fisher(model, dataset)
    fisher.save(folder / "fisher.safetensors")
    return {
        "seconds": {"prepare": begun - started, "fisher": time.perf_counter() - begun},
        "tokens": int(dataset.lengths.sum()),
        "samples": len(dataset),
        "parameters": sum(p.numel() for p in model.module().parameters()),
    }


def train(model: CausalLM, dataset: TokenDataset, epochs: int) -> None:
    """A short AdamW training on length buckets in random order."""
    generator = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.module().parameters(), lr=2e-3, weight_decay=0.01)
    buckets = length_buckets(dataset, np.arange(len(dataset)), 2048)
    total = epochs * len(buckets)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=total)
    for _ in range(epochs):
        for number in generator.permutation(len(buckets)):
            batch = token_batch(dataset, buckets[number], 0)
            optimizer.zero_grad()
            sample_means(model.token_loss(batch), batch).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.module().parameters(), 1.0)
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()


def load_setting(folder: Path) -> tuple[CausalLM, TokenDataset, list[Query]]:
    """Model, corpus and queries."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = CausalLM(LlamaForCausalLM.from_pretrained(folder / "model"), tokenizer)
    data = json.loads((folder / "data.json").read_text())
    queries = [
        Query(f"q{i}", tuple(q["prompt"]), tuple(q["completion"]))
        for i, q in enumerate(data["queries"])
    ]
    return model, TokenDataset.from_ids(data["rows"]), queries


# --- rows ---------------------------------------------------------------------------------------


def limit(folder: Path) -> Measured:
    """Seconds of two forwards of the corpus if only its matrix products had to be done, each at
    the rate measured for its shape on 2048 rows."""
    model, dataset, _ = load_setting(folder)
    tokens, scored = int(dataset.lengths.sum()), int(dataset.n_scored.sum())
    total, flops = 0.0, 0.0
    shapes: dict[tuple[int, int], int] = {}
    for name, p in model.module().named_parameters():
        if p.dim() == 2:
            rows = scored if "embed" in name else tokens  # the tied table is the head
            shape = (p.shape[0], p.shape[1])
            shapes[shape] = shapes.get(shape, 0) + rows
    for (out_size, in_size), rows in shapes.items():
        x, w = torch.randn(2048, in_size), torch.randn(out_size, in_size)
        torch.nn.functional.linear(x, w)
        times = []
        for _ in range(7):
            begun = time.perf_counter()
            torch.nn.functional.linear(x, w)
            times.append(time.perf_counter() - begun)
        total += 2 * rows * float(np.median(times)) / 2048
        flops += 2 * 2.0 * rows * out_size * in_size
    return {"seconds": {"limit": total}, "gflops": flops / total / 1e9, "flops": flops}


def exact(folder: Path, prefilter: float | None = None, queries: int = 1) -> Measured:
    """Ours, from loading to ranking; with all queries, every query's total on its own too."""
    begun = time.perf_counter()
    model, dataset, asked = load_setting(folder)
    fisher = FisherDiagonal.load(folder / "fisher.safetensors")
    loaded = time.perf_counter()
    attributor = BidirectionalAttributor(model, dataset, fisher, prefilter=prefilter)
    seconds = {"load": loaded - begun, "perturb": 0.0, "pass": 0.0, "rest": 0.0}
    tops, each, recalls, last = [], [], [], time.perf_counter()
    for result in attributor.attribute(asked[:queries]):
        tops.append([row.index for row in result.topk(TOP)])
        now = time.perf_counter()
        each.append(now - last)
        last = now
        for part in ("perturb", "pass"):
            seconds[part] += result.details["seconds"][part]
        if prefilter:
            recalls.append(result.details["prefilter"]["recall"])
    seconds["rest"] = sum(each) - seconds["perturb"] - seconds["pass"]
    return {
        "seconds": seconds, "tops": tops, "each": each, "recalls": recalls,
        "tokens": int(dataset.lengths.sum()), "pass_s": seconds["pass"] / queries,
    }  # fmt: skip


def prefiltered(folder: Path) -> Measured:
    """All queries with a prefilter of 10 %."""
    return exact(folder, 0.1, QUERIES)


def exact_all(folder: Path) -> Measured:
    """All queries exactly."""
    return exact(folder, None, QUERIES)


def linear(folder: Path) -> Measured:
    """First-order scores of all queries in one pass; the queries' gradients apart."""
    begun = time.perf_counter()
    model, dataset, queries = load_setting(folder)
    fisher = FisherDiagonal.load(folder / "fisher.safetensors")
    attributor = BidirectionalAttributor(model, dataset, fisher)
    loaded, spent = time.perf_counter(), [0.0]
    with borrowed(model) as params:
        directions = clocked(attributor.directions(params, queries), spent)
        linear_scores(model, params, dataset, directions, token_budget=4096)
    passing = time.perf_counter() - loaded - spent[0]
    return {"seconds": {"load": loaded - begun, "perturb": spent[0], "pass": passing}}


def clocked(items: Iterator[Weights], spent: list[float]) -> Iterator[Weights]:
    """The items; adds the seconds that making them took to `spent[0]`."""
    while True:
        begun = time.perf_counter()
        item = next(items, None)
        spent[0] += time.perf_counter() - begun
        if item is None:
            return
        yield item


def published_recipe(folder: Path) -> Measured:
    """The published recipe for one query: three processes, two saved state dicts."""
    work = folder / "published"
    work.mkdir(exist_ok=True)
    seconds: dict[str, float] = {}
    for stage in ("ascent", "descent", "losses"):
        command = [sys.executable, __file__, "published-stage", str(folder), stage]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        for part, value in json.loads(done.stdout.splitlines()[-1]).items():
            seconds[part] = seconds.get(part, 0.0) + value
    size = sum(f.stat().st_size for f in work.glob("*.safetensors"))
    return {"seconds": seconds, "pass_s": seconds["pass"], "disk": size}


def published_stage(folder: Path, stage: str) -> dict[str, float]:
    """One process of the published recipe."""
    begun = time.perf_counter()
    network = LlamaForCausalLM.from_pretrained(folder / "model")
    network.eval()
    data = json.loads((folder / "data.json").read_text())
    work = folder / "published"
    if stage != "losses":
        fisher = load_file(folder / "fisher.safetensors")
        loaded = time.perf_counter()
        query = data["queries"][0]
        ids = torch.tensor([query["prompt"] + query["completion"]])
        sign = 1 if stage == "ascent" else -1
        published.perturb(network, ids, PROMPT, fisher, len(data["rows"]), sign)
        published.save(network, work / f"{stage}.safetensors")
        return {"load": loaded - begun, "perturb": time.perf_counter() - loaded}
    loading, passing, found = time.perf_counter() - begun, 0.0, {}
    for name in ("ascent", "descent"):
        begun = time.perf_counter()
        published.load(network, work / f"{name}.safetensors")
        loaded = time.perf_counter()
        found[name] = published.losses(network, data["rows"])
        loading += loaded - begun
        passing += time.perf_counter() - loaded
    begun = time.perf_counter()
    (found["ascent"] - found["descent"]).abs().argsort(descending=True)
    return {"load": loading, "pass": passing, "rest": time.perf_counter() - begun}


def bergson(folder: Path) -> Measured:
    """`bergson trackstar` for all queries."""
    if importlib.util.find_spec("bergson") is None:
        return {"missing": "bergson"}
    begun = time.perf_counter()
    model, dataset, queries = load_setting(folder)
    loaded = time.perf_counter()
    results = list(BergsonAttributor(model, dataset).attribute(queries))
    details = results[0].details
    seconds = {"load": loaded - begun + details["seconds"]["write"]}
    seconds["pass"] = details["seconds"]["bergson"]
    return {"seconds": seconds, "disk": details["disk"]["bytes"]}


def kronfluence(folder: Path, strategy: str = "ekfac") -> Measured:
    """Kronfluence for all queries."""
    if importlib.util.find_spec("kronfluence") is None:
        return {"missing": "kronfluence"}
    begun = time.perf_counter()
    model, dataset, queries = load_setting(folder)
    loaded = time.perf_counter()
    results = list(KronfluenceAttributor(model, dataset, strategy).attribute(queries))
    details = results[0].details
    seconds = {"load": loaded - begun, "fisher": details["seconds"]["factors"]}
    seconds["pass"] = details["seconds"]["scores"]
    return {"seconds": seconds, "disk": details["disk"]["bytes"]}


def kronfluence_diagonal(folder: Path) -> Measured:
    """Kronfluence with a diagonal curvature."""
    return kronfluence(folder, "diagonal")


def bm25(folder: Path) -> Measured:
    """Index and query times of rank-bm25 and of ours, milliseconds; largest difference."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model")
    data = json.loads((folder / "data.json").read_text())
    documents = [words(tokenizer.decode(row)) for row in data["rows"]]
    queries = [words(tokenizer.decode(q["completion"])) for q in data["queries"]]
    begun = time.perf_counter()
    index = Bm25Index(documents)
    built = time.perf_counter()
    mine = [index.scores(query) for query in queries]
    out = {"ours": {"index": built - begun, "query": (time.perf_counter() - built) / len(queries)}}
    if importlib.util.find_spec("rank_bm25") is None:
        return {"rows": out, "missing": "rank-bm25"}
    import rank_bm25

    begun = time.perf_counter()
    library = rank_bm25.BM25Okapi(documents)
    built = time.perf_counter()
    theirs = [library.get_scores(query) for query in queries]
    done = time.perf_counter()
    out["rank-bm25"] = {"index": built - begun, "query": (done - built) / len(queries)}
    gap = max(float(np.abs(a - b).max()) for a, b in zip(mine, theirs, strict=True))
    return {"rows": out, "difference": gap}


ROWS = {
    "limit": limit, "exact": exact, "exact-all": exact_all, "prefiltered": prefiltered,
    "linear": linear, "published": published_recipe, "bergson": bergson,
    "kronfluence": kronfluence, "kronfluence-diagonal": kronfluence_diagonal, "bm25": bm25,
}  # fmt: skip


def peak_bytes() -> int:
    """Peak resident memory of this process and of the largest of its children."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    usage = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(who).ru_maxrss for who in usage) * unit


def main() -> None:
    """`speed_rows.py ROW FOLDER [SIZES]`: prints the measurements as one line of JSON."""
    row, folder = sys.argv[1], Path(sys.argv[2])
    if row == "published-stage":
        print(json.dumps(published_stage(folder, sys.argv[3])))
        return
    done = prepare(folder, json.loads(sys.argv[3])) if row == "prepare" else ROWS[row](folder)
    print(json.dumps({**done, "peak": peak_bytes()}))


if __name__ == "__main__":
    main()
