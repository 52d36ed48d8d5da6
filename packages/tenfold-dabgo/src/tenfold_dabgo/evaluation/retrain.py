"""The retraining harness: one small recipe for the full and for every reduced training set.

Rules that make differences mean something: the same initial weights, optimizer, schedule and
number of optimizer *steps* (not epochs) whatever was removed; initialization and order have
seeds of their own. Outcomes are kept on disk, so that a stopped evaluation goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tenfold.capabilities import Grad
from tenfold.errors import ConfigError
from tenfold.files import write_json
from tenfold.lm.batching import scored_positions
from tenfold.seeds import content_hash, derive
from torch import nn

from tenfold_dabgo.batches import pad_id, token_batch
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.queries import Query
from tenfold_dabgo.weights import Weights, borrowed, copy_of, device_of, load


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is trained from scratch: AdamW with a cosine schedule over whole samples.

    The defaults are those of the tiny reference benchmark (20 epochs of 192 samples). With
    `same_epochs` a reduced set gets steps in proportion to its size, so that each sample is
    seen as often as in the full set; otherwise every set gets the same number of steps.
    """

    steps: int = 120
    batch_size: int = 32
    lr: float = 3e-3
    weight_decay: float = 0.01
    warmup_ratio: float = 0.0
    clip: float = 1.0
    same_epochs: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError for settings out of range."""
        if self.steps < 1 or self.batch_size < 1 or self.lr <= 0:
            raise ConfigError("a training recipe needs steps, batch_size and lr above 0")

    def for_share(self, share: float) -> Recipe:
        """The recipe for a set with this share of the corpus."""
        if not self.same_epochs:
            return self
        return replace(self, steps=max(1, round(share * self.steps)))

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then cosine to 0."""
        warmup = int(self.warmup_ratio * self.steps)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        progress = (step - warmup) / max(self.steps - warmup, 1)
        return 0.5 * self.lr * (1 + math.cos(math.pi * progress))


def fresh_weights(model: Grad, seed: int) -> Weights:
    """Untrained weights of the model's own architecture, a function of the seed.

    Raises:
        ConfigError: the module cannot be built anew from its configuration.
    """
    module: Any = model.module()
    config = getattr(module, "config", None)
    if config is None:
        raise ConfigError(
            f"{type(module).__name__} has no configuration to build it anew from: "
            "retraining metrics need a transformers model"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        new: nn.Module = type(module)(config)
    named = dict(new.named_parameters())
    return {n: named[n].detach().to(p) for n, p in module.named_parameters()}


def batches_of(indices: np.ndarray, recipe: Recipe, seed: int) -> Iterator[np.ndarray]:
    """`recipe.steps` batches: epochs of fresh permutations, cut where batches end."""
    stream: list[int] = []
    epoch = 0
    for _ in range(recipe.steps):
        while len(stream) < min(recipe.batch_size, len(indices)):
            generator = np.random.default_rng(derive(seed, "epoch", epoch))
            stream += generator.permutation(indices).tolist()
            epoch += 1
        yield np.asarray(stream[: recipe.batch_size])
        stream = stream[recipe.batch_size :]


@dataclass
class Retrainer:
    """Trains the model's architecture on parts of the corpus and measures query losses.

    Attributes:
        model: its architecture; its own weights are put back after each call.
        dataset: the full corpus.
        queries: what is measured.
        recipe: the training recipe.
        folder: where outcomes are kept; None keeps none.
    """

    model: Grad
    dataset: TokenDataset
    queries: Sequence[Query]
    recipe: Recipe = field(default_factory=Recipe)
    folder: Path | None = None

    def train(self, indices: np.ndarray, init_seed: int = 0, order_seed: int = 0) -> Weights:
        """Weights after training on some samples.

        Raises:
            ConfigError: no sample is left that can be trained on.
        """
        with borrowed(self.model) as params:
            self._train(params, indices, init_seed, order_seed)
            return copy_of(params)

    def query_losses(
        self, indices: np.ndarray, init_seed: int = 0, order_seed: int = 0
    ) -> np.ndarray:
        """`[Q]` losses of the queries under a model trained on these samples."""
        path = self._path(indices, init_seed, order_seed)
        if path is not None and path.is_file():
            return np.asarray(json.loads(path.read_text(encoding="utf-8"))["losses"])
        with borrowed(self.model) as params:
            self._train(params, indices, init_seed, order_seed)
            losses = query_losses(self.model, self.queries)
        if path is not None:
            write_json(
                path, {"removed": len(self.dataset) - len(indices), "losses": losses.tolist()}
            )
        return losses

    def _train(
        self, params: dict[str, nn.Parameter], indices: np.ndarray, init_seed: int, order_seed: int
    ) -> None:
        usable = np.asarray(indices)[self.dataset.scorable[np.asarray(indices, dtype=np.int64)]]
        if usable.size == 0:
            raise ConfigError("no training sample is left after the removal")
        recipe = self.recipe.for_share(len(usable) / int(self.dataset.scorable.sum()))
        load(params, fresh_weights(self.model, init_seed))
        optimizer = torch.optim.AdamW(
            list(params.values()), lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        device = device_of(self.model)
        for step, rows in enumerate(batches_of(usable, recipe, order_seed)):
            batch = token_batch(self.dataset, rows, pad_id(self.model), device)
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
            with torch.enable_grad():
                loss = self.model.token_loss(batch).sum() / scored_positions(batch).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if recipe.clip > 0:
                nn.utils.clip_grad_norm_(list(params.values()), recipe.clip)
            optimizer.step()

    def _path(self, indices: np.ndarray, init_seed: int, order_seed: int) -> Path | None:
        if self.folder is None:
            return None
        asked = [[q.prompt_ids, q.completion_ids, q.span] for q in self.queries]
        shapes = [[n, list(p.shape)] for n, p in self.model.module().named_parameters()]
        key = [self.dataset.content_hash(), sorted(map(int, indices)), asdict(self.recipe)]
        return self.folder / f"{content_hash([*key, asked, shapes, init_seed, order_seed])}.json"


@torch.no_grad()
def query_losses(model: Grad, queries: Sequence[Query]) -> np.ndarray:
    """`[Q]` mean losses over the scored tokens at the model's current weights."""
    device = device_of(model)
    out = []
    for query in queries:
        batch = query.batch(device)
        low, high = query.scored
        out.append(float(model.token_loss(batch)[0, low:high].double().mean()))
    return np.asarray(out)


def half_subsets(n: int, count: int, seed: int, share: float = 0.5) -> np.ndarray:
    """`[count, n]` bool: random subsets with `round(share n)` samples each."""
    generator = np.random.default_rng(derive(seed, "subsets"))
    out = np.zeros((count, n), dtype=bool)
    for row in out:
        row[generator.choice(n, size=round(share * n), replace=False)] = True
    return out
