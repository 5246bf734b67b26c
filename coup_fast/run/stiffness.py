"""Where an explicit step of guidance overshoots: the coefficient of a step against a classifier.

Guidance moves a state by c ∇ₓ log p, p the largest softmax. With m the margin, the top logit less
log-sum-exp of the others, log p = -log(1 + e^-m), whose curvature along ∇m reaches a²/4 with
a = ‖∇m‖. Gradient ascent with step c overshoots for certain where c a²/4 > 2 (docs/guidance.md).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from coup_fast.plan import LOG_VAR_HI, C, Plan
from coup_fast.run.guidance import guidance_of
from coup_fast.run.loop import states
from coup_fast.run.steps import Run, State
from coup_fast.schedules import Array

BOUND = 2.0  # of c a²/4


def coefficients(plan: Plan) -> Array:
    """c of each guided row, λ included; with a learned variance, the largest that it can be."""
    rows = plan.coeffs[plan.guided]
    c: Array = rows[:, C]
    if plan.learned_variance:
        c = c * np.exp(rows[:, LOG_VAR_HI])
    return c


def norms(gradient: Tensor) -> Tensor:
    """a of each sample, float64 [B]."""
    flat = gradient.detach().to(torch.float64).flatten(1)
    lengths: Tensor = torch.linalg.vector_norm(flat, dim=1)
    return lengths


def is_stiff(coefficient: Array | Tensor, steepness: Tensor) -> Tensor:
    """c a²/4 > 2."""
    c = torch.as_tensor(coefficient, dtype=steepness.dtype, device=steepness.device)
    return c * steepness.square() / 4 > BOUND


def steepness_along(run: Run, images: Tensor) -> Tensor:
    """a at each guided state of a run, float64 [guided steps, B]; takes the run once more."""
    found: list[Tensor] = []

    def watched(k: int, state: State, attacked: Tensor | None) -> State:
        evaluated = run.evaluate(k, state[0])
        if run.guided[k]:
            gradient = evaluated[1]
            if run.plan.guidance_norm != "stable":
                gradient, _ = guidance_of(run.calls.classify, state[0], run.ops, "margin")
            assert gradient is not None
            found.append(norms(gradient))
        return run.advance(k, state, evaluated, attacked)

    for _ in states(run, images, watched):
        pass
    return torch.stack(found)
