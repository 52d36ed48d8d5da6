"""Small components for the host's tests: no heavy library, failures on demand."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tenfold.capabilities import Delegate
from tenfold.records import (
    Checkpoint,
    Completion,
    ItemResult,
    Metric,
    TextRecord,
    WorkItem,
    WorkItems,
)
from tenfold.seeds import content_hash


class Numbers:
    """A dataset of `size` numbers as text."""

    kind = "text"

    def __init__(self, size=5, limit=None, salt=""):
        self.size, self.limit, self.salt = size, limit, salt

    def splits(self):
        return ("all",)

    def load(self, split="", limit=None, shuffle_seed=None):
        for i in range(min(self.size, self.limit or self.size, limit or self.size)):
            yield TextRecord(id=f"n{i}", text=f"{i}{self.salt}")

    def fingerprint(self, split=""):
        extra = Path(self.salt).read_text() if self.salt.startswith("/") else self.salt
        return content_hash([self.size, self.limit, extra])


class Upper:
    """A model that writes its prompt in capitals, with a prefix."""

    def __init__(self, checkpoint=None, prefix="", device=None, seed=None):
        self.prefix, self.device, self.seed = prefix, device, seed
        if checkpoint:
            self.prefix = (Path(checkpoint) / "prefix.txt").read_text()

    def generate(self, prompts, config):
        return [[Completion(self.prefix + p.upper())] for p in prompts]


class Twice(Delegate):
    """A decoder that repeats what its base writes."""

    def generate(self, prompts, config):
        rows = self.base.generate(prompts, config)
        return [[Completion(c.text * 2) for c in row] for row in rows]

    def constraint_kinds(self):
        return frozenset()


class Lengths:
    """An evaluator: length of the model's answer per item; fails or dies on demand."""

    def __init__(self, batch=1, fail=(), die_after=0, slow=0.0, factor=1.0, trace=""):
        self.batch, self.fail, self.die_after = batch, set(fail), die_after
        self.slow, self.factor, self.trace = slow, factor, trace

    def plan(self, ctx, data):
        records = data["dataset"].load()
        return WorkItems(
            (WorkItem(r.id, r) for r in records), getattr(data["dataset"], "size", None)
        )

    def run(self, ctx, models, items):
        done = 0
        chunk = []
        for item in items:
            chunk.append(item)
            if len(chunk) == self.batch:
                yield from self._batch(ctx, models, chunk)
                done += len(chunk)
                chunk = []
                if self.die_after and done >= self.die_after:
                    os.kill(os.getpid(), signal.SIGKILL)
        yield from self._batch(ctx, models, chunk)

    def _batch(self, ctx, models, chunk):
        if self.slow:
            time.sleep(self.slow)
        if self.trace:
            with Path(self.trace).open("a") as file:
                file.writelines(f"{item.id}\n" for item in chunk)
        bad = [item.id for item in chunk if item.id in self.fail]
        if bad:
            raise ValueError(f"cannot work on {bad[0]}")
        answers = models["model"].generate([item.payload.text for item in chunk], None)
        for item, [answer] in zip(chunk, answers, strict=True):
            noise = ctx.derive(item.id) % 1000
            yield ItemResult(item.id, {"length": len(answer.text), "noise": noise})

    def aggregate(self, ctx, results):
        lengths = [r.values["length"] * self.factor for r in results]
        return [Metric("mean_length", sum(lengths) / max(1, len(lengths)), len(lengths))]


class Learn:
    """A trainer that "learns" a prefix and counts how often it ran."""

    def __init__(self, dataset=None, word="hi", log="", steps=1):
        self.dataset, self.word, self.log, self.steps = dataset, word, log, steps

    def fit(self, ctx, model, data):
        folder = ctx.work_dir / "checkpoint"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prefix.txt").write_text(self.word)
        if self.log:
            with Path(self.log).open("a") as file:
                file.write("trained\n")
        return Checkpoint(folder, [Metric("loss", 0.5, 1)])


def broken(**params):
    raise RuntimeError("no luck")


class Lies:
    """Says it generates, and does not."""


def needs_module():
    import no_such_module

    return no_such_module


def cost(plan, items):
    """What `lengths` says of its cost; fails for a factor of 10."""
    factor = plan.evaluator.params["factor"]
    return {"work": f"{factor / (10 - factor):.2f} of {items}"}
