"""guidance_solver="stable" against fine integrations of toys whose margins are known."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import interpreter
from helpers.sampling import step_row
from helpers.tiny import SHORT, images, short_purifier
from torch import Tensor

from coup_fast import Purifier, ScoreModel, VPSchedule, reference
from coup_fast.models.analytic import (
    GaussianMixture,
    MixtureClassifier,
    MixtureNetwork,
    two_gaussians,
)
from coup_fast.run.guidance import guidance_of

STATES = torch.tensor([-0.7, 0.02, 0.3, 1.1], dtype=torch.float64).reshape(4, 1, 1, 1)


def guided(classifier, x: Tensor, c: float, steps: int, solver: str) -> Tensor:
    """Guidance of total strength c on its own, in equal steps."""
    row = step_row(v=1.0, c=c / steps).double()
    for _ in range(steps):
        stable = solver == "stable"
        quantity = "margin" if stable else "log_confidence"
        gradient, margin = guidance_of(classifier, x, reference, quantity)
        norm = "stable" if stable else "none"
        x = reference.reverse_step(x, None, row, None, gradient, None, None, norm, margin)
    return x


def flow(classifier, x: Tensor, c: float, steps: int = 300) -> Tensor:
    """The same in the limit of small steps: dx = ∇ₓ log p dτ over c, by Runge and Kutta."""
    h = c / steps
    for _ in range(steps):
        first = interpreter.gradient(classifier, x)
        second = interpreter.gradient(classifier, x + 0.5 * h * first)
        third = interpreter.gradient(classifier, x + 0.5 * h * second)
        fourth = interpreter.gradient(classifier, x + h * third)
        x = x + h / 6 * (first + 2 * second + 2 * third + fourth)
    return x


@pytest.mark.parametrize("c", [1e-3, 0.1, 3.0])
def test_one_step_is_exact_where_the_margin_is_linear(c: float) -> None:
    """Two Gaussians of one width: the margin's gradient is constant, and nothing is left out."""
    classifier = MixtureClassifier(two_gaussians(std=0.3, dtype=torch.float64))
    once = guided(classifier, STATES, c, 1, "stable")
    assert float((once - STATES).abs().max()) > 1e-3
    torch.testing.assert_close(once, flow(classifier, STATES, c), rtol=0, atol=1e-7)


def curved() -> MixtureClassifier:
    """Three Gaussians of three widths: the margin's gradient changes along the way."""
    means = torch.tensor([-0.6, 0.1, 0.8], dtype=torch.float64).reshape(3, 1, 1, 1)
    widths = torch.tensor([0.3, 0.5, 0.25], dtype=torch.float64).reshape(3, 1, 1, 1)
    return MixtureClassifier(GaussianMixture(means, widths))


@pytest.mark.parametrize("solver", ["stable", "explicit"])
def test_both_solvers_are_of_first_order(solver: str) -> None:
    fine = flow(curved(), STATES, 0.05)
    errors = [
        float((guided(curved(), STATES, 0.05, steps, solver) - fine).norm())
        for steps in (16, 32, 64)
    ]
    assert errors[0] > 1e-6
    assert 1.7 < errors[0] / errors[1] < 2.3
    assert 1.7 < errors[1] / errors[2] < 2.3


def test_the_limit_of_small_steps_is_the_explicit_one() -> None:
    """They differ by a term in c²: a tenth of c leaves a hundredth of the difference."""
    differences = [
        float(
            (
                guided(curved(), STATES, c, 1, "stable")
                - guided(curved(), STATES, c, 1, "explicit")
            ).norm()
        )
        for c in (1e-3, 1e-4, 1e-5)
    ]
    assert 80 < differences[0] / differences[1] < 120
    assert 80 < differences[1] / differences[2] < 120


def test_nothing_overshoots_at_a_scale_of_1000() -> None:
    """The probability flow of two Gaussians under λ = 1000: few stable steps are near the limit."""
    mixture = two_gaussians(std=0.5, dtype=torch.float64)
    model = ScoreModel(MixtureNetwork(mixture), "eps", VPSchedule(), time_scale=1.0)
    classifier = MixtureClassifier(mixture)
    u = torch.tensor([0.35, 0.48, 0.52, 0.7], dtype=torch.float64).reshape(4, 1, 1, 1)

    def purified(steps: int, solver: str) -> Tensor:
        clean = Purifier(
            model,
            classifier,
            method="vp-ode",
            forward_noise=False,
            guidance_scale=1000.0,
            guidance_solver=solver,
            num_steps=steps,
            check_values=False,
        )
        return clean(u)

    limit = purified(400, "stable")
    torch.testing.assert_close(purified(400, "explicit"), limit, rtol=0, atol=1e-2)  # c a²/4 <= 1
    errors = [float((purified(n, "stable") - limit).abs().max()) for n in (5, 20, 80)]
    assert errors[0] < 0.1 * float((limit - u).abs().max())
    assert errors[2] < errors[1] < errors[0]
    assert float((purified(5, "explicit") - limit).abs().max()) > 10


@pytest.mark.parametrize("name", [name for name in SHORT if name != "adp"])
def test_a_run_is_its_formula_in_float64(name: str) -> None:
    """Every guided method, against a loop and a bisection that know nothing of the kernels."""
    clean = short_purifier(
        name, double=True, guidance_scale=300.0, guidance_solver="stable", check_values=False
    )
    u = images(2, dtype=torch.float64)
    noise = torch.randn(clean.num_noise, *u.shape, dtype=torch.float64)
    model = clean.score_model
    states = interpreter.states(
        clean.plan, u, model.network, noise, clean.classifier, model.time_scale
    )
    torch.testing.assert_close(clean(u, noise=noise), states[-1], rtol=1e-9, atol=1e-9)
    explicit = clean.with_options(guidance_solver="explicit")
    assert float((explicit(u, noise=noise) - states[-1]).detach().abs().max()) > 1e-3


def test_one_step_moves_the_margin_no_further_than_the_flow() -> None:
    """m₁ + e^m₁ = m + e^m + c q, whatever c."""
    classifier = MixtureClassifier(two_gaussians(dtype=torch.float64))
    for c in (1.0, 1e3, 1e6):
        _, before = guidance_of(classifier, STATES, reference, "margin")
        gradient, after = guidance_of(
            classifier, guided(classifier, STATES, c, 1, "stable"), reference, "margin"
        )
        q = gradient.flatten(1).square().sum(1)
        assert before is not None
        assert after is not None
        torch.testing.assert_close(after + after.exp(), before + before.exp() + c * q)
        assert float(after.max()) < math.log(c * float(q.max()) + float(before.exp().max())) + 1e-9
