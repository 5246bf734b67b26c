"""The published algorithms transcribed in float64, run beside their plans with the same noise."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from helpers import interpreter
from helpers.tiny import SHORT, TinyClassifier, TinyNetwork, images

import coup_fast
from coup_fast import Purifier, ScoreModel, _extension, methods
from coup_fast.models.analytic import GaussianMixture, MixtureClassifier, MixtureNetwork
from coup_fast.noise import step_keys
from coup_fast.plan import X_VAR, Z_VAR, D, V
from coup_fast.schedules import DiscreteSchedule, EDMSchedule, VPSchedule

VP = VPSchedule()
needs_compiled = pytest.mark.skipif(not _extension.available(), reason="needs the extension")
BACKENDS = ["reference", pytest.param("compiled", marks=needs_compiled)]


def noises(count: int, shape, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator)


def linear_gaussian():
    """Gaussian data of two classes with equal covariances: the classifier's logits are linear."""
    generator = torch.Generator().manual_seed(0)
    means = 0.08 * torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    return GaussianMixture(means, torch.full((3, 4, 4), 0.3, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_coup_is_its_algorithm(backend: str, scale: float) -> None:
    """docs/methods.md, COUP, in float64 on a linear-Gaussian problem, with the same noise."""
    mixture = linear_gaussian()
    u = images(4, 3, 4)
    z = noises(100, u.shape)
    mu = mixture.means
    # log p(1|x) - log p(0|x) = <w, x> + b
    w = (mu[1] - mu[0]) / 0.09
    b = -0.5 * ((mu[1] ** 2).sum() - (mu[0] ** 2).sum()) / 0.09

    x, t = 2 * u.double() - 1, 0.1
    for k in range(100):
        h = 0.001 if k < 99 else 0.00099
        alpha_bar, beta = math.exp(-9.95 * t**2 - 0.1 * t), 0.1 + 19.9 * t
        variance = alpha_bar * 0.09 + 1 - alpha_bar
        distances = ((x[:, None] - alpha_bar**0.5 * mu) ** 2).flatten(2).sum(2)
        weights = (-0.5 * distances / variance).softmax(1)[:, :, None, None, None]
        score = ((alpha_bar**0.5 * mu * weights).sum(1) - x) / variance
        logit = (x * w).flatten(1).sum(1) + b
        # d/dx log max(σ(l), σ(-l)) = ±(1 - max p) w
        side = torch.sign(logit) * torch.sigmoid(-logit.abs())
        g = side[:, None, None, None] * w
        x = (
            x
            + h * (0.5 * beta * x + beta * (score + scale * g))
            + (beta * h) ** 0.5 * z[k].double()
        )
        t -= 0.001
    expected = (x.clamp(-1, 1) + 1) / 2

    def run(model: GaussianMixture, scale: float, u, z):
        network = ScoreModel(MixtureNetwork(model), time_scale=1.0)
        options = {"guidance_scale": scale, "backend": backend}
        return Purifier(network, MixtureClassifier(model), method="coup", **options)(u, noise=z)

    single = copy.deepcopy(mixture).float()
    torch.testing.assert_close(run(single, scale, u, z).double(), expected, rtol=0, atol=1e-5)
    if scale > 0:
        assert float((run(single, 0.0, u, z).double() - expected).abs().max()) > 1e-2
    if backend == "reference":
        result = run(mixture, scale, u.double(), z.double())
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in methods.METHODS if n != "adp"])
@pytest.mark.parametrize("guided", [False, True])
def test_purifier_is_the_interpreter(name: str, guided: bool) -> None:
    """Every plan in float64: the library's loop and reference against the formulas of the step."""
    kind, short = SHORT[name]
    network, classifier = TinyNetwork().double(), TinyClassifier().double()
    options = short | {"guidance_scale": 1.5 if guided else 0.0}
    clean = Purifier(ScoreModel(network, kind), classifier, method=name, **options)
    u = images(2, dtype=torch.float64)
    keys = step_keys(0, range(2), 0, clean.num_noise, u[0].numel())
    z = [coup_fast.reference.normal(k, u.shape).double() for k in keys]
    with torch.no_grad():
        result = clean(u)
    expected = interpreter.states(clean.plan, u, network, z, classifier, time_scale=999.0)[-1]
    torch.testing.assert_close(result, expected.detach(), rtol=1e-11, atol=1e-11)


def ncsn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A score with curvature: h = -(x - μ)/σ̂ - (x - μ)³, different for each pixel."""
    assert (t == 0).all()
    ramp = torch.linspace(0.2, 0.8, x[0].numel(), dtype=torch.float64)
    difference = x - ramp.to(x.dtype).reshape(x.shape[1:])
    return -difference / 0.4 - difference**3


@pytest.mark.parametrize("noise_variant", ["gaussian", "binary"])
@pytest.mark.parametrize("every", [True, False])
def test_adp_is_its_algorithm(noise_variant: str, every: bool) -> None:
    """docs/methods.md, ADP: a run in float64, step by step."""
    u, z = images(5, dtype=torch.float64), noises(1, (5, 3, 8, 8)).double()
    sigma = 0.25
    noise = sigma * z[0]
    if noise_variant == "binary":
        noise = sigma * math.sqrt(2 / math.pi) * torch.where(z[0] >= 0, 1.0, -1.0).double()
    x = (u + noise).clamp(0, 1) * 255 / 256 + 1 / 512
    states, alive = [x], [True] * 5
    for k in range(10):
        h = ncsn(x, torch.zeros(5))
        ahead = ncsn(x + 1e-3 * h, torch.zeros(5))
        new = x.clone()
        for i in range(5):
            gamma = (h[i] * ahead[i]).sum() / (h[i] * h[i]).sum()
            alpha = min(max(0.05 * 1e-3 / float(1 - gamma), 1e-5), 1e-1)
            alive[i] = alive[i] and alpha > 1e-3
            if alive[i]:
                moved = x[i] + alpha * h[i]
                if every or k == 0:
                    moved = moved * 256 / 255 - 1 / 510
                new[i] = moved.clamp(0, 1)
        x = new
        states.append(x)
    clean = Purifier(
        ScoreModel(ncsn, kind="ncsn"),
        method="adp",
        noise_variant=noise_variant,
        pixel_map_every_step=every,
    )
    given = list(clean.trajectory(u, noise=z))
    assert [k for k, _ in given] == list(range(11))
    for (_, state), expected in zip(given, states, strict=True):
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-10)
    for a, b in zip(interpreter.adaptive_states(clean.plan, u, ncsn, z[0]), states, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_adp_step_size_is_lambda_sigma_for_a_gaussian() -> None:
    mu, sigma = 0.5, 0.4

    def network(x, t):
        return -(x - mu) / sigma

    made = methods.adp(sigma=0.0)
    x = torch.rand(2, 1, 3, 3, dtype=torch.float64)
    h = network(x, None)
    alive = torch.ones(2, dtype=torch.bool)
    ahead = network(x + made.delta * h, None)
    alpha = coup_fast.reference.adaptive_step(x, h, ahead, alive, torch.tensor(made.coeffs[0]))[2]
    torch.testing.assert_close(alpha, torch.full_like(alpha, 0.05 * sigma), rtol=1e-9, atol=0)


@pytest.mark.parametrize("variance", ["fixed-small", "fixed-large", "learned"])
def test_gdmp_rows_are_the_guided_steps(variance: str) -> None:
    """docs/methods.md, GDMP: the MSE's gradient by autograd on a batch of 100, at each index."""
    made = methods.gdmp(DiscreteSchedule(), variance=variance)
    schedule = DiscreteSchedule()
    shape = (100, 3, 32, 32)
    x, r, eps, s, z1, z2 = (noises(6, shape) * 0.5).double()
    out = torch.cat((eps, s), dim=1) if variance == "learned" else eps
    beta_tilde = [
        schedule.betas[i] * (1 - float(schedule.alpha_bar(i - 1)))
        / (1 - float(schedule.alpha_bar(i))) for i in range(36)
    ]  # fmt: skip
    for k, i in ((0, 35), (20, 15), (35, 0)):
        alpha_bar, previous = (float(schedule.alpha_bar(j)) for j in (i, i - 1))
        beta = schedule.betas[i]
        x0 = ((x - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5).clamp(-1, 1)
        c1 = previous**0.5 * beta / (1 - alpha_bar)
        c2 = (1 - beta) ** 0.5 * (1 - previous) / (1 - alpha_bar)
        if variance == "learned":
            low = math.log(beta_tilde[max(i, 1)])
            log_var = 0.5 * (s + 1) * math.log(beta) + 0.5 * (1 - s) * low
            var = torch.exp(log_var.clamp(low, math.log(beta)))
        elif variance == "fixed-small":
            var = torch.tensor(beta_tilde[i], dtype=torch.float64)
        else:
            var = torch.tensor(beta if i else beta_tilde[1], dtype=torch.float64)

        def guided(z1, z2, i=i, alpha_bar=alpha_bar, x0=x0, c1=c1, c2=c2, var=var):
            variable = x.clone().requires_grad_()
            target = alpha_bar**0.5 * r + (1 - alpha_bar) ** 0.5 * z2
            loss = torch.nn.functional.mse_loss(variable, target)
            (g,) = torch.autograd.grad(loss, variable)
            scale = 3 * 60000 * 255 / (2 * 8) * (1 - alpha_bar) ** 0.5 / alpha_bar**0.5
            mean = c1 * x0 + c2 * x - var * scale * g
            return mean + (var.sqrt() * z1 if i > 0 else 0.0)

        row, zero = made.coeffs[k], torch.zeros_like(x)
        mean = guided(zero, zero)
        torch.testing.assert_close(interpreter.step(row, x, out, r=r), mean, rtol=1e-8, atol=1e-10)
        # one noise in law: its variance is the sum of both noises' variances
        parts = (guided(z1 * 0 + 1, zero) - mean) ** 2 + (guided(zero, z2 * 0 + 1) - mean) ** 2
        one = interpreter.step(row, x, out, r=r, z=torch.ones_like(x)) - mean
        torch.testing.assert_close(one**2, parts, rtol=1e-6, atol=1e-15)
    columns = [X_VAR, Z_VAR]
    assert (made.coeffs[0, columns] != 0).all() == (variance == "learned")
    assert made.learned_variance == (variance == "learned")


def test_gdmp_runs_forward_to_index_36() -> None:
    made = methods.gdmp(DiscreteSchedule())
    signal, noise = (
        DiscreteSchedule().alpha_bar(36) ** 0.5,
        float(DiscreteSchedule().sigma(36)),
    )
    np.testing.assert_allclose(made.start[[0, 2]], [2 * signal, noise])
    between = np.flatnonzero(np.isnan(made.times))
    assert between.tolist() == [36, 73, 110]
    np.testing.assert_allclose(made.coeffs[between][:, [V, D]], [[signal, noise]] * 3)
    np.testing.assert_allclose(made.times[:36] * 1000, np.arange(35, -1, -1))


def test_gradual_is_its_algorithm() -> None:
    rounds = (3, 3, 5)
    network, u = TinyNetwork().double(), images(2, dtype=torch.float64)
    schedule = DiscreteSchedule()
    alpha_bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    made = methods.gradual(schedule, rounds=rounds)
    z = noises(made.num_noise, u.shape).double()
    given, x = iter(z), 2 * u - 1
    for steps in rounds:
        a = alpha_bars[steps - 1]
        x = a**0.5 * x + (1 - a) ** 0.5 * next(given)
        for i in reversed(range(steps)):
            a, previous = alpha_bars[i], alpha_bars[i - 1] if i else 1.0
            eps = network(x, torch.full((2,), float(i), dtype=torch.float64))
            x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
            c1 = math.sqrt((1 - a / previous) * (1 - previous) / (1 - a))
            c2 = math.sqrt(1 - previous - c1**2)
            x = previous**0.5 * x0 + c2 * eps + (c1 * next(given) if i else 0.0)
    clean = Purifier(
        ScoreModel(network, schedule=schedule, time_scale=1000.0), method="gradual", rounds=rounds
    )
    with torch.no_grad():
        result = clean(u, noise=z)
    torch.testing.assert_close(result, (x.detach() + 1) / 2, rtol=0, atol=1e-10)
    assert next(given, None) is None


@pytest.mark.parametrize("kind", ["eps", "score", "x0"])
def test_one_shot_is_the_posterior_mean(kind: str) -> None:
    mixture = linear_gaussian()
    u = images(3, 3, 4, dtype=torch.float64)
    for schedule in (VP, DiscreteSchedule()):
        model = ScoreModel(MixtureNetwork(mixture, kind, schedule), kind, schedule, time_scale=1.0)
        clean = Purifier(model, method="one-shot", clip_denoised=False)
        z = noises(1, u.shape).double()
        scale, _, std = clean.plan.start[:3]
        assert 2 * std / scale == pytest.approx(0.5, abs=5e-3)  # twice σ = 0.25
        x = scale / 2 * (2 * u - 1) + std * z[0]
        level = torch.full((3,), (scale / 2) ** 2, dtype=torch.float64)
        denoised = (x + std**2 * mixture.score(x, level)) * 2 / scale
        torch.testing.assert_close(clean(u, noise=z), (denoised + 1) / 2, rtol=0, atol=1e-9)


def test_one_shot_for_edm_networks() -> None:
    calls = []

    def denoiser(x, sigma):
        calls.append(sigma)
        return 0.5 * x

    model = ScoreModel(denoiser, "x0", EDMSchedule(), time_scale=80.0)
    u, z = images(3, dtype=torch.float64), noises(1, (3, 3, 8, 8)).double()
    result = Purifier(model, method="one-shot", sigma=0.5)(u, noise=z)
    torch.testing.assert_close(calls[0], torch.full((3,), 1.0).double())
    expected = (0.5 * (2 * u - 1 + z[0])).clamp(-1, 1)
    torch.testing.assert_close(result, (expected + 1) / 2)


def test_imagenet_setting_for_guided_diffusion_networks() -> None:
    """Time floor(1000 t), the variance channels of a 2C network cut off."""
    times = []

    class Network(TinyNetwork):
        def forward(self, x, t):
            times.append(float(t[0]))
            return super().forward(x, t)

    model = ScoreModel(Network(out=6), schedule=DiscreteSchedule(), time_scale=1000.0)
    clean = Purifier(model, method="diffpure-imagenet", check_values=False)
    assert clean(images(1)).shape == (1, 3, 8, 8)
    np.testing.assert_allclose(times, np.arange(150, 0, -1), atol=1e-9)
