"""`flowpure`, `consistency` and `langevin` against their algorithms written out in float64.

FlowPure's loop is that of its released code (DistriNet/FlowPure, e5c2129, `defense/flowpure.py`):
pixels, a grid of points from t₀ to 1, and Euler steps between them. Where torchcfm and diffusers
are installed, their own paths and steps are compared with as well.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import TinyNetwork, images
from torch import Tensor

from coup_fast import EnergyModel, Purifier, ScoreModel, methods
from coup_fast.models.at_vp_times import AtVPTimes
from coup_fast.plan import C, D, U, V, W
from coup_fast.schedules import DiscreteSchedule, EDMSchedule, FlowSchedule, VPSchedule

VP = VPSchedule()
NETWORK = TinyNetwork().double()


def images_and_noise(count: int) -> tuple[Tensor, Tensor]:
    u = images(2).double()
    generator = torch.Generator().manual_seed(5)
    return u, torch.randn(count, *u.shape, generator=generator, dtype=torch.float64)


def times(value: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), value, dtype=x.dtype)


# --- FlowPure ---------------------------------------------------------------------------------


def released(u: Tensor, z: Tensor, velocity, sigma: float, t_start: float, points: int) -> Tensor:
    """The loop of the released code on pixels; velocity(x, t)."""
    noised = u + z * sigma
    x = t_start * u + (1 - t_start) * noised
    grid = torch.linspace(t_start, 1, points, dtype=torch.float64).tolist()
    for now, after in pairwise(grid):
        x = x + (after - now) * velocity(x, times(now, x))
    return x


@pytest.mark.parametrize("t_start", [1 / 2, 1 / 3])
@pytest.mark.parametrize("data_at", [1, 0])
def test_flowpure_on_its_own_network(t_start: float, data_at: int) -> None:
    """A network of pixels that was trained on x + (1 - t) 0.3 z, as theirs is."""
    u, z = images_and_noise(1)
    expected = released(u, z[0], lambda x, t: NETWORK(x, 999 * t), 0.3, t_start, 10)
    sign = 1 if data_at == 1 else -1

    def on_pixels(x: Tensor, t: Tensor) -> Tensor:
        return sign * 2 * NETWORK((x + 1) / 2, 999 * (t if data_at == 1 else 1 - t))

    model = ScoreModel(on_pixels, "velocity", FlowSchedule("noised", data_at))
    with torch.no_grad():
        got = Purifier(model, method="flowpure", t_start=t_start)(u, noise=z)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("t_start", [1 / 2, 1 / 3])
def test_flowpure_on_a_noise_network(t_start: float) -> None:
    """The released loop with velocity -0.3 ε, where ε is asked at noise (1 - t) 0.3 on pixels."""

    def eps(y: Tensor, r: Tensor) -> Tensor:  # of y = x + r z in [-1, 1]
        return NETWORK(y, 999 * r)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return -0.3 * eps(2 * x - 1, 0.6 * (1 - t))

    u, z = images_and_noise(1)
    expected = released(u, z[0], velocity, 0.3, t_start, 10)
    model = ScoreModel(AtVPTimes(eps), "eps", time_scale=1.0)
    with torch.no_grad():
        got = Purifier(model, method="flowpure", t_start=t_start)(u, noise=z)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("data_at", [1, 0])
def test_flowpure_from_attacked_images(data_at: int) -> None:
    """Euler steps along the velocity as it is, from the image as it is; then with noise."""
    sign = 1 if data_at == 1 else -1

    def on_pixels(x: Tensor, t: Tensor) -> Tensor:
        return sign * 2 * NETWORK((x + 1) / 2, 999 * (t if data_at == 1 else 1 - t))

    u, z = images_and_noise(1)
    model = ScoreModel(on_pixels, "velocity", FlowSchedule("attacked", data_at))
    for options in ({}, {"sigma": 0.2, "t_start": 0.25}):
        sigma, t_start = options.get("sigma", 0.0), options.get("t_start", 0.0)
        expected = released(u, z[0], lambda x, t: NETWORK(x, 999 * t), sigma, t_start, 10)
        purifier = Purifier(model, method="flowpure", **options)
        with torch.no_grad():
            got = purifier(u, noise=z if sigma else z[:0])
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_flowpure_on_edm_and_discrete_networks() -> None:
    """EDM: the same run in its own state. Discrete: each level is that of the index asked for."""
    u, z = images_and_noise(1)

    def denoise(y: Tensor, r: Tensor) -> Tensor:
        return NETWORK(y, 999 * r)

    exploding = ScoreModel(denoise, "x0", EDMSchedule(), time_scale=80.0)
    preserving = ScoreModel(AtVPTimes(denoise), "x0", time_scale=1.0)
    with torch.no_grad():
        for options in ({}, {"clip_denoised": True}, {"t_start": 0.0}):
            got, expected = (
                Purifier(model, method="flowpure", **options)(u, noise=z)
                for model in (exploding, preserving)
            )
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    chain = DiscreteSchedule()
    made = methods.plan("flowpure", chain, "eps")
    ratios = np.sqrt(1 / chain.alpha_bar(1000 * made.times) - 1)
    wanted = 0.3 * np.arange(9, 0, -1) / 9
    assert ((ratios >= wanted) & (ratios < 1.1 * wanted + 0.01)).all()
    assert made.start[2] / (made.start[0] / 2) == pytest.approx(ratios[0], rel=1e-9)
    ends = np.append(chain.alpha_bar(1000 * made.times[1:]), 1.0)
    np.testing.assert_allclose(
        made.coeffs[:, V], np.sqrt(ends / chain.alpha_bar(1000 * made.times)), rtol=1e-9
    )
    with pytest.raises(ValueError, match="num_steps=500 asks for more noise levels"):
        methods.plan("flowpure", chain, "eps", num_steps=500)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("velocity", {"guidance_scale": 1.0}, "guidance_scale=1 "),
        ("velocity", {"clip_denoised": True}, "clip_denoised=True"),
        ("eps", {}, "velocity\", got kind 'eps'"),
    ],
)
def test_what_a_path_from_attacked_images_lacks(kind: str, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        methods.plan("flowpure", FlowSchedule("attacked"), kind, **options)


# --- consistency ------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [True, False])
def test_consistency(clip: bool) -> None:
    """x̂0 at each level, then noise of the next one: on x in [-1, 1], for a denoiser D(x, σ)."""
    u, z = images_and_noise(3)

    def denoise(y: Tensor, r: Tensor) -> Tensor:
        return 2 * NETWORK(y, 999 * r)

    x = 2 * u - 1
    for sigma, noise in zip((0.6, 0.4, 0.1), z, strict=True):
        x = denoise(x + sigma * noise, times(sigma, x))
        x = x.clamp(-1, 1) if clip else x
    assert (x.abs() > 1).any() != clip
    for model in (
        ScoreModel(denoise, "x0", EDMSchedule(), time_scale=80.0),
        ScoreModel(AtVPTimes(denoise), "x0", time_scale=1.0),
    ):
        options = {"sigmas": (0.3, 0.2, 0.05), "clip_denoised": clip}
        with torch.no_grad():
            got = Purifier(model, method="consistency", **options)(u, noise=z)
        torch.testing.assert_close(2 * got - 1, x, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("schedule", "kind"), [(VP, "eps"), (DiscreteSchedule(), "x0"), (EDMSchedule(), "x0")]
)
def test_one_shot_is_the_first_step_of_consistency(schedule: Any, kind: str) -> None:
    one = methods.plan("one-shot", schedule, kind, sigma=0.2)
    same = methods.plan("consistency", schedule, kind, sigmas=(0.2,))
    assert one.digest == same.digest
    more = methods.plan("consistency", schedule, kind, sigmas=(0.2, 0.1))
    np.testing.assert_array_equal(more.start, one.start)
    assert more.times[0] == one.times[0]


def test_guidance_of_an_exploding_state_moves_the_same_image() -> None:
    """λ g joins the score of y = x/√ᾱ, so x̂0 moves by r² λ g there."""
    made = methods.plan("consistency", EDMSchedule(), "x0", sigmas=(0.3, 0.1), guidance_scale=2.0)
    np.testing.assert_allclose(made.coeffs[:, C], [2 * 0.6**2, 2 * 0.2**2], rtol=1e-12)
    np.testing.assert_allclose(made.coeffs[:, [U, D]], [[1.0, 0.2], [1.0, 0.0]], rtol=1e-12)


# --- langevin ---------------------------------------------------------------------------------


def test_langevin() -> None:
    """The loop of the released code (point0bar1/ebm-defense, `purify`), on x in [-1, 1]."""

    def energy(x: Tensor, t: Tensor) -> Tensor:
        assert (t == 0).all()
        return (0.02 * (x - 0.3).square() + 0.01 * x**4).flatten(1).sum(1)

    u, z = images_and_noise(30)
    x = 2 * u - 1
    for noise in z:
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(leaf, times(0.0, x)).sum(), leaf)
        x = x - gradient + 0.01 * noise
    model = ScoreModel(EnergyModel(energy), "score")
    got = Purifier(model, method="langevin", num_steps=30)(u, noise=z)
    torch.testing.assert_close(2 * got - 1, x, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"langevin .*score .*got kind 'eps'"):
        methods.plan("langevin", VP, "eps")


def test_guidance_of_langevin_joins_the_score() -> None:
    row = methods.plan("langevin", VP, "score", gradient_scale=0.5, guidance_scale=3.0).coeffs[0]
    assert row[[V, W, C, D]].tolist() == [1.0, 0.5, 1.5, 0.01]


# --- the packages -----------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["noise", "noised"])
def test_torchcfm_has_the_same_paths(source: Any) -> None:
    cfm = pytest.importorskip("torchcfm.conditional_flow_matching", reason="torchcfm is missing")
    x0, z = torch.randn(2, 4, 1, 3, 3, dtype=torch.float64)
    start = z if source == "noise" else x0 + 0.6 * z
    matcher = cfm.ConditionalFlowMatcher(sigma=0.0)
    t, x_t, velocity = matcher.sample_location_and_conditional_flow(start, x0)
    t = t.double()
    flow = FlowSchedule(source)
    a, b = (torch.as_tensor(part).reshape(-1, 1, 1, 1) for part in flow.signal_and_noise(t.numpy()))
    torch.testing.assert_close(x_t, a * x0 + b * z)
    state = x_t / (a**2 + b**2).sqrt()
    for i, time in enumerate(t.tolist()):
        of_state, of_velocity = flow.eps_of_velocity(time)
        torch.testing.assert_close(of_state * state[i] + of_velocity * velocity[i], z[i])


def test_diffusers_takes_the_same_steps() -> None:
    """DDIM along the flow is the Euler step of diffusers' flow-match scheduler, at equal levels."""
    diffusers = pytest.importorskip("diffusers")
    flow = FlowSchedule(data_at=0)
    model = ScoreModel(lambda x, t: NETWORK(x, 999 * t), "velocity", flow)
    u, z = images_and_noise(1)
    purifier = Purifier(model, method="ddim", num_steps=10)
    with torch.no_grad():
        got = purifier(u, noise=z)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=purifier.plan.times.tolist())
    sigmas = torch.as_tensor(purifier.plan.times)
    torch.testing.assert_close(scheduler.sigmas[:-1].double(), sigmas, rtol=1e-6, atol=0)
    x = sigmas[0] * z[0] + (1 - sigmas[0]) * (2 * u - 1)
    for t in scheduler.timesteps:
        out = NETWORK(x, 999 * times(float(t) / 1000, x))
        x = scheduler.step(out.detach(), t, x, return_dict=False)[0].double()
    torch.testing.assert_close(got, (x + 1) / 2, rtol=0, atol=1e-5)
    assert math.isclose(float(scheduler.sigmas[-1]), 0.0)
