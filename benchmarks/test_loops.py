"""Solver loops without their network: torchsde's Euler and diffusers' DDPM step against the fused.

The numbers of torchsde and fused are of whole runs of 100 steps; divide by `extra_info.steps`.
"""

from __future__ import annotations

from typing import Any

import baselines
import pytest
import torch

BATCHES = (1, 64)


@pytest.mark.parametrize("guided", [False, True], ids=["diffpure", "coup"])
@pytest.mark.parametrize("images", BATCHES)
@pytest.mark.parametrize("solver", ["fused", "torchsde"])
def test_hundred_steps(benchmark: Any, solver: str, images: int, guided: bool) -> None:
    x, eps, guidance = baselines.inputs(images)
    make = baselines.fused_run if solver == "fused" else baselines.torchsde_run
    run, steps = make(x, eps, guidance if guided else None)
    _check_moments(make, guided)
    benchmark.group = f"{'coup' if guided else 'diffpure'}, 100 steps, {images} images, no network"
    benchmark.extra_info["steps"] = steps
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


def _check_moments(make: Any, guided: bool) -> None:
    """Both solvers integrate the same SDE: from zeros, eps = 0, its variance is known.

    dx = ½βx dt + √β dw has variance e^B - 1 with B the integral of β, 0.1095 here. Euler's bias is
    below one per cent of it.
    """
    zeros = torch.zeros(64, *baselines.IMAGE)
    run, _ = make(zeros, zeros, zeros if guided else None)
    torch.manual_seed(0)
    end = run()
    if make is baselines.fused_run:
        end = 2.0 * end - 1.0  # a plan's last row maps back to pixels
    exponent = 9.95 * 0.1**2 + 0.1 * 0.1
    variance = torch.tensor(exponent).expm1()
    assert abs(float(end.mean())) < 0.01
    assert float(end.var() / variance) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("solver", ["fused", "diffusers"])
@pytest.mark.parametrize("images", BATCHES)
def test_ddpm_step(benchmark: Any, solver: str, images: int) -> None:
    x, eps = baselines.inputs(images, 2)
    make = baselines.fused_ddpm_step if solver == "fused" else baselines.diffusers_step
    for other in (baselines.fused_ddpm_step, baselines.diffusers_step):
        mean = torch.stack([other(x, eps)() for _ in range(20)]).mean(0)
        _same_mean(mean, baselines.fused_ddpm_step(x, eps)())
    benchmark.group = f"DDPM step, {images} images"
    benchmark(make(x, eps))


def _same_mean(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the step's noise, whose standard deviation is below 0.04 at t = 50."""
    assert float((actual - expected).std()) < 0.1
    assert abs(float((actual - expected).mean())) < 0.01
