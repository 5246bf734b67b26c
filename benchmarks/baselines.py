"""The loops other people run, per step and without the network, beside the fused step.

The eager step and torch.compile of it are in `coup_fast.benchmarking.rivals` (the command line
uses them too); here are those that need the `bench` extra: torchsde integrating the reverse SDE
(methods of DiffPure, Nie et al. 2022, and COUP, arXiv 2408.05900) and diffusers' DDPM step. The
network's output and the guidance are constant tensors, so what is timed is the solver alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from coup_fast import methods, noise, ops
from coup_fast.plan import D, V, W, blank_row
from coup_fast.schedules import VPSchedule

T_STAR, T_END, STEP = 0.1, 1e-5, 1e-3
IMAGE = (3, 32, 32)


class ReverseSDE(torch.nn.Module):
    """Reverse VP-SDE in torchsde's form: time runs from 0 = 1 - t* up, states are flat [B, n].

    With s = 1 - t: drift ½ β x + β (score + guidance), diffusion √β, where the score is -eps/σ_t.
    """

    noise_type = "diagonal"
    sde_type = "ito"

    def __init__(self, eps: Tensor, guidance: Tensor | None) -> None:
        super().__init__()
        self.eps = eps.flatten(1)
        self.guidance = None if guidance is None else guidance.flatten(1)

    def f(self, s: Tensor, x: Tensor) -> Tensor:
        t = 1.0 - s
        beta = 0.1 + 19.9 * t
        sigma = torch.sqrt(1.0 - torch.exp(-9.95 * t**2 - 0.1 * t))
        score = -self.eps / sigma
        if self.guidance is not None:
            score = score + self.guidance
        return 0.5 * beta * x + beta * score

    def g(self, s: Tensor, x: Tensor) -> Tensor:
        return torch.sqrt(0.1 + 19.9 * (1.0 - s)) * torch.ones_like(x)


def torchsde_run(
    x: Tensor, eps: Tensor, guidance: Tensor | None = None
) -> tuple[Callable[[], Tensor], int]:
    """A function that integrates the reverse SDE with torchsde's Euler, and its number of steps."""
    import torchsde

    sde = ReverseSDE(eps, guidance)
    times = torch.tensor([1.0 - T_STAR, 1.0 - T_END])
    start = x.flatten(1)

    def run() -> Tensor:
        with torch.no_grad():
            path = torchsde.sdeint(sde, start, times, method="euler", dt=STEP)
        return path[-1].view_as(x)

    return run, 100


def fused_run(
    x: Tensor, eps: Tensor, guidance: Tensor | None = None
) -> tuple[Callable[[], Tensor], int]:
    """The same integration through the fused in-place step; keys and rows are made inside, once."""
    schedule = VPSchedule()
    name = "diffpure" if guidance is None else "coup"
    plan = methods.plan(name, schedule, "eps")
    rows = torch.from_numpy(plan.coeffs).float()
    numel = math.prod(x.shape[1:])

    def run() -> Tensor:
        keys = noise.step_keys(0, range(len(x)), 0, len(rows), numel)
        state = x.clone()
        for row, key in zip(rows, keys, strict=True):
            ops.reverse_step_(state, eps, row, key, guidance)
        return state

    return run, len(rows)


def diffusers_step(x: Tensor, eps: Tensor) -> Callable[[], Tensor]:
    """One ancestral step of diffusers' DDPMScheduler at t = 50, no clipping of x̂0."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(clip_sample=False)

    def run() -> Tensor:
        result: Tensor = scheduler.step(eps, 50, x).prev_sample
        return result

    return run


def fused_ddpm_step(x: Tensor, eps: Tensor) -> Callable[[], Tensor]:
    """The same step through `reverse_step`: a x + b eps + d z with the DDPM coefficients."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1.0 - beta, 0)
    ratio = float(beta[50] / torch.sqrt(1.0 - alpha_bar[50]))
    scale = float(1.0 / torch.sqrt(1.0 - beta[50]))
    variance = float(beta[50] * (1.0 - alpha_bar[49]) / (1.0 - alpha_bar[50]))
    numbers = blank_row()
    numbers[[V, W, D]] = scale, -scale * ratio, math.sqrt(variance)
    row = torch.from_numpy(numbers).float()
    keys = noise.step_keys(0, range(len(x)), 0, 1, math.prod(x.shape[1:]))[0]
    return lambda: ops.reverse_step(x, eps, row, keys)


def inputs(batch: int, count: int = 3) -> list[Tensor]:
    """`count` float32 tensors [batch, 3, 32, 32] of standard normals, always the same."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((batch, *IMAGE), generator=generator) for _ in range(count)]
