"""What methods that share their steps do differently, and whose name an error gives."""

from __future__ import annotations

import inspect
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from coup_fast import Purifier, ScoreModel, methods
from coup_fast.plan import Plan
from coup_fast.schedules import DiscreteSchedule, EDMSchedule, VPSchedule

FREE_LEVELS = ["one-shot", "consistency", "flowpure"]  # which take an EDMSchedule as well
DIFFUSION = [n for n in methods.METHODS if n not in ("adp", "langevin", *FREE_LEVELS)]


@pytest.mark.parametrize("name", [*DIFFUSION, *FREE_LEVELS])
def test_an_error_about_the_network_gives_the_methods_own_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} needs a .*'ncsn'"):
        methods.plan(name, VPSchedule(), "ncsn")
    if name not in FREE_LEVELS:
        with pytest.raises(ValueError, match=f"^{name} needs a .*EDMSchedule"):
            methods.plan(name, EDMSchedule(), "eps")


@pytest.mark.parametrize("name", DIFFUSION)
def test_the_kind_has_its_default_in_every_method(name: str) -> None:
    assert inspect.signature(methods.METHODS[name]).parameters["kind"].default == "eps"
    made: Any = methods.METHODS[name](DiscreteSchedule())
    assert isinstance(made, Plan)
    assert made.method == name


def network(x: Tensor, t: Tensor) -> Tensor:
    """An ε that takes x̂0 far out of [-1, 1] in a part of the pixels only."""
    return -3.0 * x


@pytest.mark.parametrize("method", ["ddim", "vp-ode"])
def test_the_noise_beside_a_clamped_image(method: str) -> None:
    """DDIM keeps ε as predicted, the exponential solver takes the clamped image's; in float64."""
    if method == "ddim":
        schedule: Any = DiscreteSchedule((0.1, 0.3))
        options: dict[str, Any] = {"t_star": 1.0}
        levels = [*schedule.alpha_bar([1, 0]).tolist(), 1.0]
    else:
        schedule = VPSchedule()
        options = {"t_star": 0.5, "num_steps": 2, "solver": "exponential"}
        levels = schedule.alpha_bar([0.5, 0.25, 1e-5]).tolist()
    purifier = Purifier(
        ScoreModel(network, schedule=schedule),
        method=method,
        forward_noise=False,
        clip_denoised=True,
        **options,
    )
    pixels = torch.linspace(0, 1, 12, dtype=torch.float64).view(1, 3, 2, 2)
    x = 2 * pixels - 1
    for level, below in pairwise(levels):
        signal, sigma = math.sqrt(level), math.sqrt(1 - level)
        eps = network(x, x)
        denoised = (x - sigma * eps) / signal
        clamped = denoised.clamp(-1, 1)
        assert (clamped != denoised).any()
        if method == "vp-ode":
            eps = (x - signal * clamped) / sigma
        x = math.sqrt(below) * clamped + math.sqrt(1 - below) * eps
    torch.testing.assert_close(purifier(pixels), (x + 1) / 2, rtol=1e-10, atol=1e-10)
