"""Noise schedules against the numbers of the published configurations and each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coup_fast.schedules import DiscreteSchedule, EDMSchedule, VPSchedule, sigma

VP = VPSchedule()


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (0.150, "0.46096278"),
        (0.100, "0.32205254"),
        (0.075, "0.24798499"),
        (0.050, "0.17156093"),
        (0.001, "0.01048542"),
    ],
)
def test_vp_sigma(t: float, expected: str) -> None:
    assert f"{VP.sigma(t):.8f}" == expected
    assert VP.sigma(t) == pytest.approx(sigma(VP.alpha_bar(t)), rel=1e-10)


def test_vp_signal() -> None:
    assert f"{np.sqrt(VP.alpha_bar(0.15)):.8f}" == "0.88741947"
    assert f"{np.sqrt(VP.alpha_bar(0.10)):.8f}" == "0.94672180"


@pytest.mark.parametrize(
    ("steps", "signal", "noise"),
    [
        (75, "0.96908251", "0.24673690"),
        (100, "0.94711042", "0.32090786"),
        (125, "0.91988039", "0.39219901"),
        (150, "0.88787463", "0.46008548"),
    ],
)
def test_discrete_forward(steps: int, signal: str, noise: str) -> None:
    for schedule in (VP.discrete(), DiscreteSchedule()):
        assert f"{np.sqrt(schedule.alpha_bar(steps - 1)):.8f}" == signal
        assert f"{schedule.sigma(steps - 1):.8f}" == noise


def test_vp_alpha_bar_is_the_integral_of_beta() -> None:
    t = np.linspace(0, 1, 20001)
    integral = np.sum(0.5 * (VP.beta(t[1:]) + VP.beta(t[:-1])) * np.diff(t))
    assert VP.log_alpha_bar(1.0) == pytest.approx(-integral, rel=1e-12)
    assert VP.alpha_bar(0.0) == 1.0


@pytest.mark.parametrize("t", [1e-6, 0.001, 0.1, 0.7, 1.0])
def test_time_of_inverts_alpha_bar(t: float) -> None:
    assert VP.time_of(float(VP.alpha_bar(t))) == pytest.approx(t, rel=1e-9)
    constant = VPSchedule(2.0, 2.0)
    assert constant.time_of(float(constant.alpha_bar(t))) == pytest.approx(t, rel=1e-9)


def test_discrete_products_and_interpolation() -> None:
    schedule = DiscreteSchedule((0.1, 0.2, 0.5))
    np.testing.assert_allclose(schedule.alpha_bar([-1, 0, 1, 2]), [1, 0.9, 0.72, 0.36])
    np.testing.assert_allclose(schedule.alpha_bar(0.5), np.sqrt(0.9 * 0.72))
    np.testing.assert_allclose(schedule.beta([0, 2]), [0.1, 0.5])
    assert schedule.num_steps == 3


def test_ddpm_and_score_sde_discretisations_are_the_same() -> None:
    np.testing.assert_allclose(VP.discrete().betas, DiscreteSchedule.linear().betas, rtol=1e-12)
    assert DiscreteSchedule() == DiscreteSchedule.linear()
    back = DiscreteSchedule().continuous()
    assert (back.beta_min, back.beta_max) == pytest.approx((0.1, 20.0))
    assert VP.continuous() is VP


def test_the_discrete_chain_follows_the_continuous_one() -> None:
    index = np.arange(1000)
    discrete = VP.discrete().alpha_bar(index)
    np.testing.assert_allclose(discrete, VP.alpha_bar(VP.index_time(index)), rtol=0, atol=1.5e-3)


def test_cosine_schedule() -> None:
    schedule = DiscreteSchedule.cosine()
    assert max(schedule.betas) == 0.999
    level = np.cos((0.5 + 0.008) / 1.008 * np.pi / 2) ** 2
    assert schedule.alpha_bar(499) == pytest.approx(level / np.cos(0.008 / 1.008 * np.pi / 2) ** 2)
    with pytest.raises(ValueError, match="linear"):
        schedule.continuous()


def test_what_networks_are_told() -> None:
    grid = 0.15 - 1e-3 * np.arange(150)
    np.testing.assert_array_equal(VP.network_time(grid), grid)
    # guided-diffusion: long(1000 t), which is 150 … 1 on DiffPure's grid
    index = DiscreteSchedule().network_time(grid) * 1000
    np.testing.assert_allclose(index, np.arange(150, 0, -1), atol=1e-9)
    np.testing.assert_allclose(DiscreteSchedule().network_time(1.0), 0.999)
    np.testing.assert_allclose(DiscreteSchedule().index_time([0, 7]) * 1000, [0, 7])
    np.testing.assert_allclose(VP.index_time([0, 99, 999]), [0.001, 0.1, 1.0])
    assert EDMSchedule().network_time(0.5) * 80 == pytest.approx(0.5)


def test_bad_schedules() -> None:
    with pytest.raises(ValueError, match=r"beta_max must be a number in \[2, inf\), got 1"):
        VPSchedule(2.0, 1.0)
    with pytest.raises(ValueError, match=r"beta_min must be a number in \(0, inf\), got 0"):
        VPSchedule(0.0, 1.0)
    with pytest.raises(ValueError, match=r"each of betas must be a number in \(0, 1\), got 1"):
        DiscreteSchedule((0.1, 1.0))
    with pytest.raises(ValueError, match="betas must be a non-empty sequence"):
        DiscreteSchedule(())
    with pytest.raises(ValueError, match=r"sigma_max must be a number in \(0, inf\), got 0"):
        EDMSchedule(0.0)
    for wrong in ("1", None, True):
        with pytest.raises(TypeError, match=r"sigma_max must be a number in \(0, inf\), got"):
            EDMSchedule(wrong)


def test_betas_of_arrays_and_tensors_are_numbers() -> None:
    betas = (0.1, 0.2)
    for given in (np.array(betas), torch.tensor(betas, dtype=torch.float64), list(betas)):
        schedule = DiscreteSchedule(given)
        assert schedule == DiscreteSchedule(betas)
        assert {type(beta) for beta in schedule.betas} == {float}
