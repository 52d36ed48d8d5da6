"""Update rules of the perturbation.

(A) `natural_gradient`: the method. (B) `ewc_adamw`: AdamW on `-sigma L_x + lambda sum_j F_j
(theta_j - theta_0j)^2`, with the penalty's sign as in the objective (the first published code
rewarded distance in ascent). `sgd` and `sign_sgd` are controls; the first AdamW step equals a
sign step, since Adam's first update is `lr g / (|g| + 1e-8)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from tenfold.errors import ConfigError
from torch import Tensor

from tenfold_dabgo.weights import Weights

if TYPE_CHECKING:
    from tenfold_dabgo.fisher import FisherDiagonal
    from tenfold_dabgo.perturb import Perturbation

METHODS = ("natural_gradient", "ewc_adamw", "sgd", "sign_sgd")


class Rule(Protocol):
    """One way to move the weights along a gradient."""

    step_size: float
    """eta: the factor before the (preconditioned) gradient."""

    def reset(self) -> None:
        """Forgets optimizer state; called before each direction."""
        ...

    def step(self, gradients: Weights, sign: int) -> None:
        """Moves the weights in place, up the loss for `sign=+1`, down for `-1`."""
        ...


class NaturalGradient:
    """theta <- theta + sigma * (alpha / N) * Pi g; without Pi it is (alpha / N) g."""

    def __init__(
        self, params: Mapping[str, Tensor], precondition: Weights | None, step_size: float
    ) -> None:
        self.params = params
        self.precondition = precondition
        self.step_size = step_size

    def reset(self) -> None:
        """Stateless."""

    @torch.no_grad()
    def step(self, gradients: Weights, sign: int) -> None:
        """One preconditioned step."""
        for name, p in self.params.items():
            direction = gradients[name]
            if self.precondition is not None:
                direction = direction * self.precondition[name].to(direction.dtype)
            p.add_(direction, alpha=sign * self.step_size)


class SignSGD:
    """theta <- theta + sigma * lr * sign(g)."""

    def __init__(self, params: Mapping[str, Tensor], lr: float) -> None:
        self.params = params
        self.step_size = lr

    def reset(self) -> None:
        """Stateless."""

    @torch.no_grad()
    def step(self, gradients: Weights, sign: int) -> None:
        """One sign step."""
        for name, p in self.params.items():
            p.add_(gradients[name].sign(), alpha=sign * self.step_size)


class EwcAdamW:
    """AdamW on the query's loss plus the Fisher-weighted distance to theta_0."""

    def __init__(
        self,
        params: Mapping[str, Tensor],
        base: Weights,
        fisher: Weights,
        settings: Perturbation,
        lr: float,
    ) -> None:
        self.params = params
        self.base = base
        self.fisher = fisher
        self.settings = settings
        self.step_size = lr
        self.reset()

    def reset(self) -> None:
        """A fresh optimizer."""
        self.optimizer = torch.optim.AdamW(
            list(self.params.values()), lr=self.step_size, weight_decay=self.settings.weight_decay
        )

    @torch.no_grad()
    def step(self, gradients: Weights, sign: int) -> None:
        """One AdamW step; `sign=+1` minimizes `-L_x`."""
        for name, p in self.params.items():
            pull = 2 * self.settings.ewc_weight * self.fisher[name] * (p - self.base[name])
            p.grad = (pull - sign * gradients[name]).to(p.dtype)
        if self.settings.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(list(self.params.values()), self.settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def make_rule(
    settings: Perturbation,
    params: Mapping[str, Tensor],
    base: Weights,
    precondition: Weights | None,
    fisher: FisherDiagonal | None,
    lr: float,
    size: int,
) -> Rule:
    """The rule that `settings.method` names.

    Raises:
        ConfigError: `ewc_adamw` without a Fisher.
    """
    if settings.method == "natural_gradient":
        return NaturalGradient(params, precondition, lr / size)
    if settings.method == "sgd":
        return NaturalGradient(params, None, lr)
    if settings.method == "sign_sgd":
        return SignSGD(params, lr)
    if fisher is None:
        raise ConfigError("method ewc_adamw needs a Fisher: choose a fisher kind")
    return EwcAdamW(params, base, fisher.aligned(params), settings, lr)


def predicted_rate(
    method: str, gradients: Weights, precondition: Weights | None, size: int
) -> float:
    """First-order change of the loss per step and unit lr: `g . update(g)`."""
    if method in ("sign_sgd", "ewc_adamw"):
        return sum(float(g.double().abs().sum()) for g in gradients.values())
    total = 0.0
    for name, g in gradients.items():
        squared = g.double().square()
        if method == "natural_gradient" and precondition is not None:
            squared = squared * precondition[name].double()
        total += float(squared.sum())
    return total / size if method == "natural_gradient" else total
