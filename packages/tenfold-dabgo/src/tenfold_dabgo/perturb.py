"""Bidirectional perturbation: K steps of descent and of ascent on the query's loss.

The default rule is the natural-gradient step

    theta <- theta + sigma * (alpha / N) * g / (F + epsilon)        (sigma = +1 ascent, -1 descent)

with the gradient g recomputed each step and the diagonal Fisher F fixed at theta_0: the Newton
step on `-sigma L_x + (N/2) (theta - theta_0)^T F (theta - theta_0)`. See `rules` for the others.
The engine knows nothing about language models: it takes parameters and a loss function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from tenfold.errors import ConfigError, RunFailed
from torch import Tensor

from tenfold_dabgo.amounts import number_or_prefixed
from tenfold_dabgo.fisher import FisherDiagonal
from tenfold_dabgo.rules import METHODS, Rule, make_rule, predicted_rate
from tenfold_dabgo.weights import Weights, copy_of, load

ASCENT, DESCENT = +1, -1
MAX_BACKTRACKS = 12
RISE_LIMIT = 8.0
"""With an automatic step, the largest change of the query's loss accepted in either direction,
as a multiple of the wanted first-order change."""


@dataclass(frozen=True, slots=True)
class Perturbation:
    """Settings of the perturbation. The defaults are the recommended preset.

    Attributes:
        method: `natural_gradient`, `ewc_adamw`, `sgd` or `sign_sgd`.
        steps: K, in each direction.
        lr: alpha, or `auto:D`: the size for which the first-order change of the query's loss
            after K steps is D nats per token.
        damping: epsilon, or `relative:R`: R times the mean of F over the moved weights.
        dataset_size: N of the natural-gradient step; None takes the number of samples.
        params: which weights move, see `weights.select_parameters`.
        ewc_weight: lambda of `ewc_adamw`.
        weight_decay, grad_clip: of `ewc_adamw` (clip: global norm; None for none).
        dropout: keep dropout active (both directions then see the same noise).
        seed: seed of that noise.
    """

    method: str = "natural_gradient"
    steps: int = 10
    lr: float | str = "auto:1.0"
    damping: float | str = "relative:1.5"
    dataset_size: int | None = None
    params: str = "all"
    ewc_weight: float = 50.0
    weight_decay: float = 0.0
    grad_clip: float | None = None
    dropout: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError for settings out of range."""
        if self.method not in METHODS:
            raise ConfigError(f"method is {self.method!r}; known: {', '.join(METHODS)}")
        if self.steps < 0:
            raise ConfigError(f"steps is {self.steps}; it must be 1 or more")
        if self.dataset_size is not None and self.dataset_size < 1:
            raise ConfigError(f"dataset_size is {self.dataset_size}; it must be at least 1")
        number_or_prefixed("lr", self.lr, "auto")
        number_or_prefixed("damping", self.damping, "relative", zero_allowed=True)

    @classmethod
    def paper(cls, **changes: Any) -> Perturbation:
        """The published constants: K = 10, alpha = 1e-4, epsilon = 1e-6, N = corpus size."""
        return replace(cls(lr=1e-4, damping=1e-6), **changes)

    def to_json(self) -> dict[str, Any]:
        """Settings as a plain dictionary, for cache keys and records."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TraceStep:
    """State after `step` updates: query loss (nats/token), ||theta - theta_0||, the largest
    |change| relative to its tensor's root mean square, and KL(theta_0 || theta) per scored
    token of the query (None when the model offers no logits)."""

    step: int
    loss: float
    distance: float
    max_change: float
    kl: float | None = None


@dataclass(frozen=True, slots=True)
class Perturbed:
    """Outcome of both directions: weights, traces, and the step size actually used."""

    ascent: Weights
    descent: Weights
    ascent_trace: list[TraceStep]
    descent_trace: list[TraceStep]
    lr: float
    step_size: float
    damping: float
    backtracks: int = 0
    warnings: list[str] = field(default_factory=list)

    @property
    def base_loss(self) -> float:
        """L_x at theta_0, nats per token."""
        return self.ascent_trace[0].loss


class Diverged(Exception):
    """One direction left the useful range; internal signal of `perturb_both`."""


def perturb_both(
    params: Mapping[str, Tensor],
    loss: Callable[[], Tensor],
    settings: Perturbation,
    fisher: FisherDiagonal | None,
    n_samples: int,
    kl: Callable[[], float] | None = None,
    calculus: Calculus | None = None,
) -> Perturbed:
    """Runs ascent and descent from the current weights and puts those back.

    Args:
        params: the weights to move, by name; they require gradients.
        loss: the query's loss at the current weights, a scalar in nats per token.
        settings: see `Perturbation`.
        fisher: diagonal Fisher at theta_0; None stands for F = 1 (then epsilon should be 0).
        n_samples: corpus size, N unless `settings.dataset_size` says otherwise.
        kl: KL(theta_0 || theta) at the current weights.
        calculus: how gradients are taken and numbers are added up over all weights.

    Raises:
        RunFailed: the loss became non-finite; says at which step and what to change.
    """
    calculus = calculus or Calculus()
    base = copy_of(params)
    precondition, damping = _precondition(params, settings, fisher)
    auto, number = number_or_prefixed("lr", settings.lr, "auto")
    size = settings.dataset_size or n_samples
    lr = number
    if auto:
        lr = _automatic_lr(params, loss, settings, precondition, size, number, calculus)
    limit = RISE_LIMIT * number if auto else math.inf
    for backtracks in range(MAX_BACKTRACKS + 1):
        rule = make_rule(settings, params, base, precondition, fisher, lr, size)
        try:
            ascent = _walk(params, loss, rule, settings, ASCENT, base, kl, limit, calculus)
            descent = _walk(params, loss, rule, settings, DESCENT, base, kl, limit, calculus)
        except Diverged as problem:
            load(params, base)
            if not auto or backtracks == MAX_BACKTRACKS:
                raise RunFailed(
                    f"the perturbation diverged: {problem}",
                    hint=f"use a smaller lr than {lr:.3g} or a larger damping than {damping:.3g}",
                ) from None
            lr /= 2
            continue
        break
    result = Perturbed(
        ascent=ascent[0],
        descent=descent[0],
        ascent_trace=ascent[1],
        descent_trace=descent[1],
        lr=lr,
        step_size=rule.step_size,
        damping=damping,
        backtracks=backtracks,
    )
    result.warnings.extend(_trace_warnings(result))
    return result


def _precondition(
    params: Mapping[str, Tensor], settings: Perturbation, fisher: FisherDiagonal | None
) -> tuple[Weights | None, float]:
    """Pi = 1 / (F + epsilon) and epsilon; None for the methods that do not use it."""
    if settings.method != "natural_gradient" or fisher is None:
        return None, 0.0
    return fisher.precondition(params, settings.damping)


def _automatic_lr(
    params: Mapping[str, Tensor],
    loss: Callable[[], Tensor],
    settings: Perturbation,
    precondition: Weights | None,
    size: int,
    change: float,
    calculus: Calculus,
) -> float:
    """The alpha for which K steps change the loss by `change` to first order."""
    gradients = calculus.gradient(params, loss())
    (rate,) = calculus.totals([predicted_rate(settings.method, gradients, precondition, size)])
    if not math.isfinite(rate) or rate <= 0:
        raise RunFailed(
            f"the query's loss has a gradient of size {rate:.3g}: no step can change it",
            hint="the weights may be non-finite, or the query is predicted perfectly already",
        )
    return change / (rate * max(settings.steps, 1))


def _walk(
    params: Mapping[str, Tensor],
    loss: Callable[[], Tensor],
    rule: Rule,
    settings: Perturbation,
    sign: int,
    base: Weights,
    kl: Callable[[], float] | None,
    limit: float,
    calculus: Calculus,
) -> tuple[Weights, list[TraceStep]]:
    """K steps in one direction from `base`; leaves the parameters at `base` again."""
    load(params, base)
    rule.reset()
    trace: list[TraceStep] = []
    scales = _scales({name: base[name] for name in params}, calculus)
    devices = sorted({p.device.index or 0 for p in params.values() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(settings.seed)
        for step in range(settings.steps + 1):
            with torch.enable_grad():
                value = loss()
            _guard(value, step, sign, trace, limit)
            trace.append(_state(step, value, params, base, scales, kl, calculus))
            if step < settings.steps:
                rule.step(calculus.gradient(params, value), sign)
    moved = copy_of(params)
    load(params, base)
    return moved, trace


def _guard(value: Tensor, step: int, sign: int, trace: list[TraceStep], limit: float) -> None:
    name = "ascent" if sign == ASCENT else "descent"
    number = float(value.detach())
    if not math.isfinite(number):
        raise Diverged(f"the query's loss is {number} at step {step} of {name}")
    if trace and abs(number - trace[0].loss) > limit:
        raise Diverged(
            f"the query's loss went from {trace[0].loss:.3g} to {number:.3g} nats/token "
            f"at step {step} of {name}"
        )
    if sign == DESCENT and trace and math.isfinite(limit) and number > trace[0].loss + 1e-4:
        raise Diverged(f"descent raised the query's loss at step {step}")


def _state(
    step: int,
    value: Tensor,
    params: Mapping[str, Tensor],
    base: Weights,
    scales: list[float],
    kl: Callable[[], float] | None,
    calculus: Calculus,
) -> TraceStep:
    """The trace's entry; `scales` are the root mean squares of the tensors of `base`."""
    if step == 0:
        return TraceStep(0, float(value.detach()), 0.0, 0.0, 0.0)
    changes = torch._foreach_sub([p.detach() for p in params.values()], [base[n] for n in params])
    [squared] = calculus.totals([math.fsum(float(x) ** 2 for x in torch._foreach_norm(changes))])
    peaks = [float(c.abs().max()) if c.numel() else 0.0 for c in changes]
    largest = max((x / s for x, s in zip(peaks, scales, strict=True)), default=0.0)
    largest = calculus.largest(largest)
    divergence = kl() if kl is not None else None
    return TraceStep(step, float(value.detach()), math.sqrt(squared), largest, divergence)


def _scales(base: Weights, calculus: Calculus) -> list[float]:
    """Root mean square of each whole tensor; 1 where it is zero."""
    squares = [float(x) ** 2 for x in torch._foreach_norm(list(base.values()))]
    counts = [float(b.numel()) for b in base.values()]
    totals = calculus.totals([*squares, *counts])
    pairs = zip(totals[: len(squares)], totals[len(squares) :], strict=True)
    return [math.sqrt(square / max(count, 1.0)) or 1.0 for square, count in pairs]


def gradient(params: Mapping[str, Tensor], loss: Tensor) -> Weights:
    """Gradient of a scalar by parameter name; weights that play no part get zeros.

    Raises:
        RunFailed: the loss depends on none of the weights.
    """
    if not loss.requires_grad:
        raise RunFailed(
            "the query's loss does not depend on the selected weights",
            hint='choose other weights, for instance params = "all"',
        )
    values = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    pairs = zip(params.items(), values, strict=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}


@dataclass(frozen=True, slots=True)
class Calculus:
    """How gradients are taken, and how numbers over all weights are made of those over the
    weights at hand: here, all weights are at hand (see `zero3` for another)."""

    gradient: Callable[[Mapping[str, Tensor], Tensor], Weights] = gradient
    totals: Callable[[Sequence[float]], Sequence[float]] = list
    largest: Callable[[float], float] = float


def _trace_warnings(result: Perturbed) -> list[str]:
    warnings = []
    asc, desc = result.ascent_trace, result.descent_trace
    if len(asc) > 1 and asc[-1].loss <= asc[0].loss:
        warnings.append("ascent did not raise the query's loss")
    if len(desc) > 1 and desc[-1].loss >= desc[0].loss:
        warnings.append("descent did not lower the query's loss: the step is too large")
    return warnings
