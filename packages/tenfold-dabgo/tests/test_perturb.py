"""The perturbation engine against closed forms; it takes any parameters and loss."""

from __future__ import annotations

import math

import pytest
import torch
from tenfold.errors import ConfigError, RunFailed
from tenfold_dabgo.fisher import FisherDiagonal, FisherFacts, identity_fisher
from tenfold_dabgo.perturb import Perturbation, perturb_both


def fisher_of(values):
    return FisherDiagonal(values, FisherFacts("file", 1, 1))


def quadratic(seed=0, size=6):
    """L = (a . theta - b)^2 / 2 with a given positive diagonal F."""
    generator = torch.Generator().manual_seed(seed)
    a, start = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
    f = torch.rand(size, generator=generator, dtype=torch.float64) + 0.1
    theta = start.clone().requires_grad_(True)
    return a, start, f, theta, lambda: 0.5 * (a @ theta - 1.5) ** 2


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_quadratic_closed_form(steps):
    """theta_+- = theta_0 +- Pi a r0 ((1 +- eta c)^K - 1) / c, c = a^T Pi a."""
    a, start, f, theta, loss = quadratic()
    settings = Perturbation(steps=steps, lr=0.4, damping=0.05, dataset_size=10)
    got = perturb_both({"w": theta}, loss, settings, fisher_of({"w": f}), 99)
    pi, eta = 1 / (f + 0.05), 0.04
    c, r0 = a @ (pi * a), a @ start - 1.5
    up = start + pi * a * r0 * ((1 + eta * c) ** steps - 1) / c
    down = start - pi * a * r0 * (1 - (1 - eta * c) ** steps) / c
    torch.testing.assert_close(got.ascent["w"], up, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.descent["w"], down, rtol=1e-12, atol=1e-12)
    assert torch.equal(theta.detach(), start)
    assert [s.step for s in got.ascent_trace] == list(range(steps + 1))
    assert got.ascent_trace[-1].distance == pytest.approx(float((up - start).norm()))


def test_descent_diverges_above_two_and_says_what_to_change():
    """eta c > 2: descent overshoots; many steps end in a non-finite loss."""
    a, start, f, theta, loss = quadratic()
    c = float(a @ (a / f))
    settings = Perturbation(steps=2000, lr=40.0 / c, damping=0.0, dataset_size=1)
    with pytest.raises(RunFailed, match=r"step \d+ of ascent") as caught:
        perturb_both({"w": theta}, loss, settings, fisher_of({"w": f}), 1)
    assert "smaller lr" in str(caught.value)
    assert torch.equal(theta.detach(), start)
    settings = Perturbation(steps=3, lr=2.5 / c, damping=0.0, dataset_size=1)
    got = perturb_both({"w": theta}, loss, settings, fisher_of({"w": f}), 1)
    assert got.descent_trace[-1].loss > got.descent_trace[0].loss
    assert any("descent did not lower" in w for w in got.warnings)


def test_automatic_step_predicts_the_first_order_change():
    """eta K g^T Pi g = Delta."""
    a, start, f, theta, loss = quadratic()
    settings = Perturbation(steps=10, lr="auto:0.001", damping=0.0)
    got = perturb_both({"w": theta}, loss, settings, fisher_of({"w": f}), 123)
    r0 = float(a @ start - 1.5)
    g = a * r0
    assert got.step_size * 10 * float(g @ (g / f)) == pytest.approx(1e-3)
    assert got.ascent_trace[-1].loss - got.base_loss == pytest.approx(1e-3, rel=0.05)


def test_automatic_step_shrinks_until_both_directions_stay_in_range():
    """exp grows faster than its first-order prediction: the step has to be halved."""
    theta = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    settings = Perturbation(steps=10, lr="auto:15", damping=0.0)
    got = perturb_both(
        {"w": theta}, lambda: torch.exp(theta).sum(), settings, identity_fisher({"w": theta}), 1
    )
    assert got.backtracks > 0
    assert abs(got.ascent_trace[-1].loss - got.base_loss) <= 8 * 15
    assert got.descent_trace[-1].loss < got.base_loss


def test_constant_fisher_without_damping_is_sgd():
    """F = const, epsilon = 0: SGD with learning rate alpha / (N const)."""
    _, _, f, theta, loss = quadratic()
    const = fisher_of({"w": torch.full_like(f, 0.25)})
    natural = perturb_both(
        {"w": theta}, loss, Perturbation(lr=0.1, damping=0.0, dataset_size=8), const, 1
    )
    sgd = perturb_both({"w": theta}, loss, Perturbation(method="sgd", lr=0.1 / (8 * 0.25)), None, 1)
    torch.testing.assert_close(natural.ascent["w"], sgd.ascent["w"], rtol=1e-13, atol=0)
    torch.testing.assert_close(natural.descent["w"], sgd.descent["w"], rtol=1e-13, atol=0)


def test_corpus_size_scales_as_the_inverse_of_alpha():
    _, _, f, theta, loss = quadratic()
    runs = [
        perturb_both({"w": theta}, loss, Perturbation(lr=lr, damping=0.0), fisher_of({"w": f}), n)
        for lr, n in ((0.1, 50), (0.2, 100))
    ]
    torch.testing.assert_close(runs[0].ascent["w"], runs[1].ascent["w"], rtol=1e-13, atol=0)


def test_no_steps_change_nothing():
    _, start, f, theta, loss = quadratic()
    got = perturb_both({"w": theta}, loss, Perturbation(steps=0, lr=0.1), fisher_of({"w": f}), 5)
    assert torch.equal(got.ascent["w"], start)
    assert torch.equal(got.descent["w"], start)


def test_first_adamw_step_is_a_sign_step_whatever_lambda_and_fisher():
    """Adam's first update is lr g / (|g| + 1e-8); the EWC gradient is zero at theta_0."""
    _, start, f, theta, loss = quadratic()
    loss().backward()
    sign, theta.grad = theta.grad.sign(), None
    for weight, scale, clip in ((0.0, 1.0, None), (1e4, 1.0, None), (50.0, 1e3, 1e-2)):
        settings = Perturbation(
            method="ewc_adamw", steps=1, lr=1e-3, ewc_weight=weight, grad_clip=clip
        )
        got = perturb_both({"w": theta}, loss, settings, fisher_of({"w": f * scale}), 1)
        torch.testing.assert_close(got.ascent["w"], start + 1e-3 * sign, rtol=0, atol=1e-7)
        torch.testing.assert_close(got.descent["w"], start - 1e-3 * sign, rtol=0, atol=1e-7)
    plain = perturb_both(
        {"w": theta}, loss, Perturbation(method="sign_sgd", steps=1, lr=1e-3), None, 1
    )
    torch.testing.assert_close(plain.ascent["w"], start + 1e-3 * sign, rtol=0, atol=1e-12)


def test_ewc_pulls_back_in_both_directions():
    """A larger lambda keeps the weights closer to theta_0, in ascent as in descent."""
    _, _, f, theta, loss = quadratic()
    distances = []
    for weight in (0.0, 1e3):
        settings = Perturbation(method="ewc_adamw", steps=30, lr=1e-2, ewc_weight=weight)
        got = perturb_both({"w": theta}, loss, settings, fisher_of({"w": f}), 1)
        distances.append((got.ascent_trace[-1].distance, got.descent_trace[-1].distance))
    assert distances[1][0] < 0.5 * distances[0][0]
    assert distances[1][1] < 0.5 * distances[0][1]


def test_both_directions_see_the_same_noise():
    """Dropout, when wanted, is seeded: ascent and descent draw the same masks."""
    theta = torch.ones(4, dtype=torch.float64, requires_grad=True)
    seen = []

    def loss():
        seen.append(torch.rand(4))
        return (theta * seen[-1]).sum()

    perturb_both({"w": theta}, loss, Perturbation(method="sgd", steps=2, lr=0.1, seed=5), None, 1)
    assert torch.equal(torch.stack(seen[:3]), torch.stack(seen[3:]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "newton"}, "known: natural_gradient"),
        ({"steps": -1}, "steps is -1"),
        ({"lr": 0.0}, "more than 0"),
        ({"lr": -1.0}, "more than 0"),
        ({"lr": "auto:0"}, "more than 0"),
        ({"lr": "fast"}, "number or 'auto:<number>'"),
        ({"lr": math.inf}, "more than 0"),
        ({"damping": -1e-6}, "0 or more"),
        ({"dataset_size": 0}, "at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Perturbation(**changes)


def test_a_loss_without_gradient_is_refused():
    theta = torch.ones(2, requires_grad=True)
    with pytest.raises(RunFailed, match="does not depend on the selected weights"):
        perturb_both(
            {"w": theta}, lambda: torch.ones(2).sum(), Perturbation(method="sgd", lr=1.0), None, 1
        )
    with pytest.raises(RunFailed, match="no step can change it"):
        perturb_both({"w": theta}, lambda: (theta * 0).sum(), Perturbation(method="sgd"), None, 1)
    with pytest.raises(ConfigError, match="needs a Fisher"):
        perturb_both({"w": theta}, theta.sum, Perturbation(method="ewc_adamw", lr=1.0), None, 1)


def test_scores_of_a_ridge_regression_give_the_exact_leave_one_out_change():
    """Diagonal H = sum a a^T + lambda I as the Fisher: s / (2 eta K) -> g_x^T H^-1 g_i, and
    score / (1 - h_i) is the first-order change of the query loss when i is left out."""
    generator = torch.Generator().manual_seed(1)
    features = torch.diag(torch.rand(5, generator=generator, dtype=torch.float64) + 0.5)
    targets = torch.randn(5, generator=generator, dtype=torch.float64)
    h_diagonal = features.square().sum(0) + 0.3
    solution = (features.T @ targets) / h_diagonal
    theta = solution.clone().requires_grad_(True)
    query_a, query_b = torch.randn(5, generator=generator, dtype=torch.float64), 0.7
    settings = Perturbation(steps=4, lr=1e-6, damping=0.0, dataset_size=1)
    moved = perturb_both(
        {"w": theta},
        lambda: 0.5 * (query_a @ theta - query_b) ** 2,
        settings,
        fisher_of({"w": h_diagonal}),
        1,
    )

    def losses(weights):
        return 0.5 * (features @ weights - targets) ** 2

    score = (losses(moved.ascent["w"]) - losses(moved.descent["w"])) / (2 * moved.step_size * 4)
    residuals = features @ solution - targets
    g_x = query_a * (query_a @ solution - query_b)
    for i in range(5):
        keep = [j for j in range(5) if j != i]
        without = (features[keep].T @ targets[keep]) / (h_diagonal - features[i].square())
        g_i = features[i] * residuals[i]
        leverage = features[i] @ (features[i] / h_diagonal)
        torch.testing.assert_close(without - solution, g_i / h_diagonal / (1 - leverage))
        change = g_x @ (without - solution)
        torch.testing.assert_close(score[i] / (1 - leverage), change, rtol=1e-8, atol=1e-10)
