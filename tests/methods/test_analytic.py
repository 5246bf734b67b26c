"""Plans on data whose score is known: moments, orders of convergence, label shift."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coup_fast import Purifier, ScoreModel, methods
from coup_fast.methods.sde import T_END
from coup_fast.models.analytic import (
    GaussianMixture,
    MixtureClassifier,
    MixtureNetwork,
    two_gaussians,
)
from coup_fast.plan import C, D, E, Plan, V, W
from coup_fast.schedules import DiscreteSchedule, VPSchedule

VP = VPSchedule()
MEAN, STD, T_STAR = 0.4, 0.3, 0.1


def gaussian(std: float = STD, dtype=torch.float64) -> GaussianMixture:
    return GaussianMixture(
        torch.full((1, 1, 1, 1), MEAN, dtype=dtype), torch.tensor(std, dtype=dtype)
    )


def marginal(t: float) -> tuple[float, float]:
    """Mean and variance of the diffused data at time t."""
    level = float(VP.alpha_bar(t))
    return level**0.5 * MEAN, level * STD**2 + 1 - level


def affine_law(made: Plan, network, tilt=(0.0, 0.0)) -> tuple[float, float, float]:
    """(gain, offset, variance) of the state at the end given that at the start.

    For Gaussian data and no clamps every step is affine in x with Gaussian noise, so the law is
    exact: no sampling. tilt: guidance gradient as (slope, offset).
    """
    t = torch.as_tensor(made.times)
    at = [torch.full((len(t), 1, 1, 1), x, dtype=torch.float64) for x in (0.0, 1.0)]
    m0, m1 = (network(x, t).flatten().numpy() for x in at)
    v, w, c, d = made.coeffs[:, [V, W, C, D]].T
    gains, offsets = v + w * (m1 - m0) + c * tilt[0], w * m0 + c * tilt[1]
    gain, offset, variance = 1.0, 0.0, 0.0
    for a, b, std in zip(gains, offsets, d, strict=True):
        gain, offset, variance = a * gain, a * offset + b, a**2 * variance + std**2
    return gain, offset, variance


def bridge(start: float) -> tuple[float, float]:
    """Mean and variance at T_END of the reverse SDE from x at T_STAR: p(x_end | x_start)."""
    alpha = float(VP.alpha_bar(T_STAR) / VP.alpha_bar(T_END))
    mean, variance = marginal(T_END)
    gain = variance * alpha**0.5 / (alpha * variance + 1 - alpha)
    return mean + gain * (start - alpha**0.5 * mean), variance * (1 - gain * alpha**0.5)


def flow(start: float) -> float:
    """The probability flow from x at T_STAR to T_END: it keeps the standardised value."""
    (m0, v0), (m1, v1) = marginal(T_STAR), marginal(T_END)
    return m1 + (v1 / v0) ** 0.5 * (start - m0)


# --- the analytic model itself ----------------------------------------------------------------


def test_score_is_the_gradient_of_the_log_density() -> None:
    means = torch.randn(3, 2, 2, 2, dtype=torch.float64)
    mixture = GaussianMixture(means, 0.3 + torch.rand(3, 2, 2, 2).double(), weights=[1.0, 2.0, 3.0])
    x = torch.randn(4, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    level = torch.tensor([1.0, 0.9, 0.5, 0.1], dtype=torch.float64)
    (grad,) = torch.autograd.grad(mixture.log_density(x, level).sum(), x)
    torch.testing.assert_close(mixture.score(x, level), grad)


def test_density_integrates_to_one_at_every_noise_level() -> None:
    x = torch.linspace(-9, 9, 20001, dtype=torch.float64).reshape(-1, 1, 1, 1)
    for level in (1.0, 0.7, 1e-3):
        levels = torch.full((len(x),), level, dtype=torch.float64)
        total = torch.trapezoid(
            two_gaussians(dtype=torch.float64).log_density(x, levels).exp(), x.flatten()
        )
        assert float(total) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("schedule", [VP, DiscreteSchedule()])
def test_network_kinds_agree(schedule) -> None:
    mixture = two_gaussians(dtype=torch.float64)
    x = torch.randn(5, 1, 1, 1, dtype=torch.float64)
    t = torch.tensor([0.0, 0.001, 0.1, 0.5, 0.9], dtype=torch.float64)
    eps, score, x0 = (MixtureNetwork(mixture, k, schedule)(x, t) for k in ("eps", "score", "x0"))
    level = MixtureNetwork(mixture, schedule=schedule).alpha_bar(t).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(eps, -(1 - level).sqrt() * score)
    torch.testing.assert_close(level.sqrt() * x0 + (1 - level).sqrt() * eps, x)
    index = 1 if isinstance(schedule, DiscreteSchedule) else 0.001
    assert float(level[1]) == pytest.approx(float(schedule.alpha_bar(index)))


def test_classifier_is_the_posterior_of_the_clean_classes() -> None:
    u = torch.tensor([0.5, 0.75, 0.25]).reshape(3, 1, 1, 1).double()
    p = MixtureClassifier(two_gaussians(0.5, 0.5, torch.float64))(u).softmax(1)
    odds = 1 / (1 + np.exp(-2 * 0.5 * np.array([0.0, 0.5, -0.5]) / 0.25))
    np.testing.assert_allclose(p[:, 1], odds)


# --- moments and convergence ------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "exponential"])
def test_reverse_sde_reaches_the_right_law(solver: str) -> None:
    """From a fixed point, and from the diffused data, at first order in the step."""
    network = MixtureNetwork(gaussian())
    start_mean, start_variance = marginal(T_STAR)
    end_mean, end_variance = marginal(T_END)
    errors = []
    for steps in (200, 400, 800):
        made = methods.diffpure(VP, num_steps=steps, solver=solver)
        gain, offset, variance = affine_law(made, network)
        mean, want = bridge(-0.5)
        whole_mean = gain * start_mean + offset - end_mean
        whole_variance = gain**2 * start_variance + variance - end_variance
        errors.append([gain * -0.5 + offset - mean, variance - want, whole_mean, whole_variance])
    errors = np.abs(errors)
    assert errors[-1].max() < 1e-3
    shrinks = errors[1:] / np.maximum(errors[:-1], 1e-12)
    resolved = errors[1:] > 1e-9  # the exponential solver's means are exact
    assert resolved[:, 1].all()
    assert (np.abs(shrinks[resolved] - 0.5) < 0.05).all()


def test_exponential_means_are_exact_for_gaussian_data() -> None:
    """x̂0 is a martingale of the reverse SDE, and it is what the solver holds."""
    network = MixtureNetwork(gaussian())
    for steps in (1, 5, 20):
        made = methods.diffpure(VP, num_steps=steps, solver="exponential")
        gain, offset, _ = affine_law(made, network)
        assert gain * -0.5 + offset == pytest.approx(bridge(-0.5)[0], abs=1e-12)


@pytest.mark.parametrize("solver", ["euler", "exponential"])
def test_probability_flow_reaches_the_right_point(solver: str) -> None:
    network = MixtureNetwork(gaussian())
    errors = []
    for steps in (200, 400, 800):
        gain, offset, variance = affine_law(
            methods.vp_ode(VP, num_steps=steps, solver=solver), network
        )
        assert variance == 0
        errors.append(abs(gain * -0.5 + offset - flow(-0.5)))
    assert errors[-1] < 1e-3
    np.testing.assert_allclose(np.divide(errors[1:], errors[:-1]), 0.5, atol=0.05)


def test_the_published_grid_is_close() -> None:
    """DiffPure's own 100 steps, forward noise with its discrete ᾱ included."""
    made = methods.diffpure(VP)
    gain, offset, variance = affine_law(made, MixtureNetwork(gaussian()))
    signal, noise = made.start[0] / 2, made.start[2]
    end_mean, end_variance = marginal(T_END)
    mean = gain * signal * MEAN + offset
    assert mean == pytest.approx(end_mean, abs=2e-3)
    whole = gain**2 * (signal**2 * STD**2 + noise**2) + variance
    assert whole == pytest.approx(end_variance, rel=0.02)


def test_guided_solvers_agree_in_the_limit() -> None:
    """With a guidance gradient affine in x: Euler and exponential, both of first order."""

    network = MixtureNetwork(gaussian())

    def law(steps: int, solver: str) -> np.ndarray:
        made = methods.coup(VP, num_steps=steps, solver=solver)
        gain, offset, variance = affine_law(made, network, (-3.0, 1.5))
        return np.array([gain * -0.5 + offset, variance])

    truth = 2 * law(1600, "euler") - law(800, "euler")
    unguided = affine_law(methods.diffpure(VP, num_steps=800), network)
    assert abs(truth[0] - (unguided[0] * -0.5 + unguided[1])) > 0.1
    for solver in ("euler", "exponential"):
        errors = np.abs([law(steps, solver) - truth for steps in (200, 400)])
        assert errors[1].max() < 1.5e-3
        assert (np.abs(errors[1] / errors[0] - 0.5) < 0.06).all()


def test_few_exponential_steps_leave_no_noise_in_the_image() -> None:
    """10 steps on sharp data. Euler's last noise stays in the image; the exponential solver's
    error is the other way, towards the mean, and its mean is exact."""
    network, variance = MixtureNetwork(gaussian(0.05)), 0.05**2
    off_mean, excess = {}, {}
    for solver in ("euler", "exponential"):
        made = methods.diffpure(VP, num_steps=10, solver=solver)
        gain, offset, noise = affine_law(made, network)
        signal, std = made.start[0] / 2, made.start[2]
        off_mean[solver] = abs(gain * signal * MEAN + offset - MEAN)
        excess[solver] = gain**2 * (signal**2 * variance + std**2) + noise - variance
    assert off_mean["exponential"] < 1e-4 < off_mean["euler"]
    assert excess["exponential"] < 0 < 0.4 * variance < excess["euler"]


def test_langevin_follows_its_own_law() -> None:
    """LDSDE on Gaussian data is an Ornstein-Uhlenbeck process about the attacked image."""
    network = MixtureNetwork(gaussian())
    rate, sigma2, eta = 1e-2, 1e-3, 5.0
    mean, variance = marginal(0.01)
    x = 0.2  # start and reference
    pull = 0.5 * rate * (1 / sigma2 + 1 / variance)
    centre = 0.5 * rate * (x / sigma2 + mean / variance) / pull
    time = 0.1 - T_END
    want = centre + (x - centre) * np.exp(-pull * time)
    want_variance = eta**2 * rate * (1 - np.exp(-2 * pull * time)) / (2 * pull)
    errors = []
    for steps in (100, 200, 400):
        made = methods.ldsde(VP, num_steps=steps)
        gain, offset, noise = affine_law(made, network)  # reference absent: r = 0
        tie = sum(
            row[E] * np.prod([1 - pull * h for h in [time / steps] * (steps - 1 - k)])
            for k, row in enumerate(made.coeffs)
        )
        errors.append([gain * x + offset + tie * x - want, noise - want_variance])
    errors = np.abs(errors)
    assert errors[-1].max() < 2e-4
    np.testing.assert_allclose(errors[1:, 1] / errors[:-1, 1], 0.5, atol=0.05)


@pytest.mark.parametrize("kind", ["eps", "score", "x0"])
@pytest.mark.parametrize("schedule", [VP, DiscreteSchedule()])
def test_discrete_chains_reach_the_right_law(kind: str, schedule) -> None:
    network = MixtureNetwork(gaussian(), kind, schedule)
    level = float(VP.discrete().alpha_bar(99))
    start = level**0.5 * MEAN, level * STD**2 + 1 - level
    made = methods.ddpm(schedule, kind, t_star=0.1)
    gain, offset, variance = affine_law(made, network)
    # A VP network is told the time of nearly the same noise level, hence the tolerance.
    assert gain * start[0] + offset == pytest.approx(MEAN, abs=1e-3)
    assert gain**2 * start[1] + variance == pytest.approx(STD**2, rel=0.05)
    made = methods.ddim(schedule, kind, eta=0.0)
    gain, offset, variance = affine_law(made, network)
    assert variance == 0
    assert gain * start[0] + offset == pytest.approx(MEAN, abs=1e-3)
    assert gain**2 * start[1] == pytest.approx(STD**2, rel=0.05)


def test_moments_through_the_purifier() -> None:
    """Sampled, through the whole library, in float32: DiffPure's output has the data's law."""
    model = ScoreModel(MixtureNetwork(gaussian(dtype=torch.float32)), time_scale=1.0)
    generator = torch.Generator().manual_seed(0)
    x = MEAN + STD * torch.randn(500, 1, 8, 8, generator=generator)
    x = 2 * Purifier(model, method="diffpure", check_values=False)((x + 1) / 2) - 1
    assert float(x.mean()) == pytest.approx(MEAN, abs=4 * STD / x.numel() ** 0.5 + 2e-3)
    assert float(x.var()) == pytest.approx(STD**2, rel=4 * (2 / x.numel()) ** 0.5 + 0.02)


# --- the toy of the COUP paper ----------------------------------------------------------------


def test_guidance_holds_back_label_shift() -> None:
    """Score flow alone carries points near the boundary across it; confidence pushes them back."""
    mixture = two_gaussians(mean=0.5, std=0.2)
    model = ScoreModel(MixtureNetwork(mixture), time_scale=1.0)
    start = torch.linspace(0.1, 0.3, 2000).reshape(-1, 1, 1, 1)  # class 1, off its mode at 0.5
    shifted = []
    for scale in (0.0, 1.0, 4.0):
        clean = Purifier(
            model, MixtureClassifier(mixture), method="coup", guidance_scale=scale, num_steps=50
        )
        end = 2 * clean((start + 1) / 2) - 1
        shifted.append(float((end < 0).float().mean()))
        stayed = end[end > 0]  # whoever stays is drawn to the mode
        assert float((stayed - 0.5).abs().mean()) < float((start - 0.5).abs().mean())
    assert shifted[0] > 0.15
    assert shifted[1] < 0.85 * shifted[0]
    assert shifted[2] < 0.3 * shifted[0]
