"""Models beyond one device: weights spread over processes by DeepSpeed ZeRO-3.

Every process keeps a part of each weight, its *shard*: a flat piece `[ceil(numel / size)]` of
it. A layer's weights are gathered while it runs, so each process evaluates other batches with
the whole model. The method is element by element, so it works on shards alone: both sets of
perturbed weights, the Fisher and the gradient are shards, and only sums over all weights (the
step size, the damping, distances) are exchanged. Since gathering needs everyone, all processes
take the same number of batches.

A gradient is a whole tensor only for the moment in which its layer's backward pass delivers it.
The Fisher takes one backward pass per sample; its squares are added up over processes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tenfold.capabilities import TokenBatch
from tenfold.errors import ComponentError, ConfigError
from tenfold.lm.quiet import quiet
from tenfold.scale.deepspeed import active_config
from torch import Tensor, nn

from tenfold_dabgo.batches import pad_id, sample_means, token_batch
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.fisher import FisherDiagonal, FisherFacts, identity_fisher
from tenfold_dabgo.perturb import Calculus
from tenfold_dabgo.settings import AttributionSettings
from tenfold_dabgo.team import ALONE, Team
from tenfold_dabgo.weights import Weights, borrowed, device_of, fingerprint

RULES = ("natural_gradient", "sgd", "sign_sgd")
FISHERS = ("sample_mean", "sample_sum", "identity", "file")
_HIDDEN = frozenset({"start", "generate", "score", "hidden_states", "exit_scores"})
"""What would run the model outside of the loss, where nobody gathers its weights."""


def zero3_config() -> dict[str, Any] | None:
    """The run's DeepSpeed configuration when it spreads weights (stage 3), else None."""
    config = active_config()
    zero = {} if config is None else config.get("zero_optimization", {})
    return config if isinstance(zero, Mapping) and zero.get("stage") == 3 else None


def spread(model: Any, settings: AttributionSettings, team: Team) -> tuple[Any, Team]:
    """The model with its weights spread over the team, where the run asks for ZeRO-3.

    Raises:
        ConfigError: a setting that needs whole weights.
        ComponentError: deepspeed is not installed.
    """
    if team.alone or zero3_config() is None:
        return model, team
    check_settings(settings)
    team = replace(team, sharded=True)
    return SpreadModel(model, team), team


def check_settings(settings: AttributionSettings) -> None:
    """Refuses what works on whole weights only.

    Raises:
        ConfigError: names the first such setting and what works.
    """
    works: dict[str, tuple[Any, ...]] = {
        "method": ("dabgo",),
        "rule": RULES,
        "fisher": FISHERS,
        "precision": ("float32",),
        "prefilter": (None,),
    }
    for name, values in works.items():
        if getattr(settings, name) not in values:
            known = ", ".join("none" if v is None else str(v) for v in values)
            raise ConfigError(
                f"{name} = {getattr(settings, name)!r} does not work with weights spread by "
                f"DeepSpeed ZeRO-3 (what works: {known})",
                hint='use launcher = "torchrun", where every process holds the whole model',
            )
    if settings.compare:
        raise ConfigError(
            f"compare = {list(settings.compare)!r} does not work with weights spread by "
            "DeepSpeed ZeRO-3: only dabgo does",
            hint='use launcher = "torchrun", where every process holds the whole model',
        )


class _Loss(nn.Module):
    """The model's loss as one module, so that weights are gathered while it runs."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.inner = base.module()
        self._base = [base]  # in a list: a model is no submodule

    def forward(self, ids: Tensor, attention: Tensor, scored: Tensor | None) -> Tensor:
        """`[B, T]` token losses."""
        return self._base[0].token_loss(TokenBatch(ids, attention, scored))


class SpreadModel:
    """`grad` and `tokenize` over a model whose weights are spread; see the module's text.

    Args:
        base: the model, whole; its weights are taken apart for good.
        team: the processes.
    """

    def __init__(self, base: Any, team: Team) -> None:
        self.base, self.team = base, team
        self._fingerprint = fingerprint(base)
        self._settle()
        loss = _Loss(base)
        with quiet():
            engine = _deepspeed().initialize(model=loss, config=_engine_config())[0]
        self._offload = engine.optimizer
        self._run = engine.module
        self._names = dict(base.module().named_parameters())
        self._received: Callable[[str, Tensor], None] | None = None
        for name, p in self._names.items():
            p.requires_grad_(True)
            p.register_post_accumulate_grad_hook(self._receiver(name))
        self.calculus = Calculus(self.gradient, self._totals, self._largest)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "base" or name in _HIDDEN:
            raise AttributeError(name)
        return getattr(self.base, name)

    @torch.no_grad()
    def _settle(self) -> None:
        """Lets the model find out about itself while its weights are whole."""
        ids = torch.zeros((1, 2), dtype=torch.long, device=device_of(self.base))
        self.base.token_loss(TokenBatch(ids, torch.ones_like(ids)))

    def _receiver(self, name: str) -> Callable[[Tensor], None]:
        def receive(p: Tensor) -> None:
            gradient, p.grad = p.grad, None
            if gradient is not None and self._received is not None:
                self._received(name, gradient)

        return receive

    # --- grad ---

    def token_loss(self, batch: TokenBatch) -> Tensor:
        """`[B, T]` nats; every process has to call it equally often."""
        return self._run(batch.input_ids, batch.attention_mask, batch.loss_mask)

    def module(self) -> nn.Module:
        """The module, whose parameters are empty between its runs."""
        return self.base.module()

    def fingerprint(self) -> str:
        """That of the whole model."""
        return self._fingerprint

    def snapshot(self) -> tuple[Weights, dict[str, Tensor]]:
        """Copies of this process's shards and of the buffers."""
        buffers = {n: b.clone() for n, b in self.module().named_buffers()}
        return {n: p.ds_tensor.clone() for n, p in self._spread_weights()}, buffers

    @torch.no_grad()
    def restore(self, token: tuple[Weights, dict[str, Tensor]]) -> None:
        """Puts shards and buffers back, bit for bit."""
        shards, buffers = token
        for name, p in self._spread_weights():
            p.ds_tensor.copy_(shards[name])
        for name, buffer in self.module().named_buffers():
            buffer.copy_(buffers[name])
        self._offload.partition_all_parameters()

    def _spread_weights(self) -> Iterator[tuple[str, Any]]:
        yield from self._names.items()

    # --- shards ---

    def shards(self, params: Mapping[str, Any]) -> Weights:
        """This process's parts of some parameters, by name; changes in place are changes of
        the model."""
        return {name: p.ds_tensor[: self._bounds(p)[1]] for name, p in params.items()}

    def _bounds(self, p: Any) -> tuple[int, int]:
        """Where this process's shard begins in the flat weight, and its length."""
        size = p.ds_tensor.numel()
        first = size * self.team.rank
        return first, min(max(p.ds_numel - first, 0), size)

    def shard_of(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a tensor that is shaped like the whole weight."""
        first, length = self._bounds(self._names[name])
        return whole.detach().reshape(-1)[first : first + length].clone()

    def shape(self, name: str) -> torch.Size:
        """Shape of the whole weight."""
        return self._names[name].ds_shape

    # --- gradients ---

    def gradient(self, params: Mapping[str, Tensor], loss: Tensor) -> Weights:
        """Shards of the gradient of a scalar that is the same on every process."""
        found: Weights = {}

        def keep(name: str, gradient: Tensor) -> None:
            found[name] = self.shard_of(name, gradient)

        self._backward(loss, keep)
        return {name: found.get(name, torch.zeros_like(p)) for name, p in params.items()}

    def add_squares(self, totals: Weights, loss: Tensor, weight: float) -> None:
        """Adds everybody's `weight * gradient^2` to the shards `totals`, in place."""

        def add(name: str, gradient: Tensor) -> None:
            squares = gradient.detach().square().mul_(weight)
            dist.all_reduce(squares)
            totals[name] += self.shard_of(name, squares)

        self._backward(loss, add)

    def _backward(self, loss: Tensor, receive: Callable[[str, Tensor], None]) -> None:
        with self._receiving(receive):
            loss.backward()
        # Weights that no hook releases (of layers whose input has no gradient) would be stale.
        self._offload.partition_all_parameters()

    @contextmanager
    def _receiving(self, receive: Callable[[str, Tensor], None]) -> Iterator[None]:
        self._received = receive
        try:
            yield
        finally:
            self._received = None

    def _totals(self, values: Sequence[float]) -> Sequence[float]:
        return self.team.sum_numbers(*values)

    def _largest(self, value: float) -> float:
        return max(self.team.gather(value))


@dataclass(frozen=True)
class SpreadFisher(FisherDiagonal):
    """A Fisher whose values are shards."""

    team: Team = ALONE

    def mean(self, names: Mapping[str, Any] | None = None) -> float:
        """Mean over all weights of all processes, or over those named."""
        chosen = [v for n, v in self.values.items() if names is None or n in names]
        local = sum(float(v.double().sum()) for v in chosen)
        total, count = self.team.sum_numbers(local, sum(v.numel() for v in chosen))
        return total / max(count, 1)


def spread_fisher(
    model: SpreadModel,
    dataset: TokenDataset,
    kind: str,
    params: str,
    chosen: np.ndarray,
    whole: FisherDiagonal | None = None,
    advance: Callable[[int], None] | None = None,
) -> SpreadFisher:
    """The Fisher of spread weights.

    Args:
        model: the model.
        dataset: the corpus.
        kind: one of `FISHERS`.
        params: which weights.
        chosen: samples that it is taken over.
        whole: for kind `file`: what the file holds.
        advance: called with the number of samples done.

    Raises:
        ConfigError: a file that does not fit the weights, or no sample has two tokens.
    """
    with borrowed(model, params) as weights:
        if whole is not None:
            return SpreadFisher(
                _aligned(model, weights, whole), whole.facts, whole.warnings, model.team
            )
        if kind == "identity":
            ones = identity_fisher(weights)
            return SpreadFisher(ones.values, ones.facts, team=model.team)
        if not len(chosen):
            raise ConfigError("no training sample has two tokens: the Fisher cannot be estimated")
        totals = {name: torch.zeros_like(p) for name, p in weights.items()}
        size = model.team.size
        for start in range(0, len(chosen), size):
            # Everyone takes part in every round; those who have no sample add nothing.
            place = start + model.team.rank
            real = place < len(chosen)
            batch = token_batch(
                dataset, [chosen[place if real else 0]], pad_id(model), device_of(model)
            )
            reduction = "mean" if kind == "sample_mean" else "sum"
            with torch.enable_grad():
                loss = sample_means(model.token_loss(batch), batch, reduction)[0]
            model.add_squares(totals, loss, float(real))
            if advance is not None:
                advance(min(size, len(chosen) - start))
    facts = FisherFacts(
        kind,
        len(chosen),
        int(dataset.n_scored[chosen].sum()),
        model.fingerprint(),
        dataset.content_hash(),
        len(dataset),
    )
    values = {name: total / len(chosen) for name, total in totals.items()}
    return SpreadFisher(values, facts, team=model.team)


def _aligned(model: SpreadModel, weights: Mapping[str, Tensor], whole: FisherDiagonal) -> Weights:
    shapes = {name: torch.empty(model.shape(name), device="meta") for name in weights}
    return {
        name: model.shard_of(name, value.to(weights[name].device))
        for name, value in whole.aligned_to(shapes).items()
    }


def _engine_config() -> dict[str, Any]:
    """The run's configuration without what belongs to training, and without caches of whole
    weights, which would be stale after a step."""
    config = zero3_config() or {}
    zero = {
        key: value
        for key, value in config.get("zero_optimization", {}).items()
        if key.startswith("offload_param") or key == "stage"
    }
    zero |= {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
        "stage3_prefetch_bucket_size": 0,
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
    }


def _deepspeed() -> Any:
    try:
        return importlib.import_module("deepspeed")
    except ImportError as error:
        raise ComponentError(
            "spread weights need the module 'deepspeed', which is not installed",
            hint='pip install "tenfold[deepspeed]"',
        ) from error
