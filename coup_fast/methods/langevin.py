"""Langevin dynamics of an energy model: long chains without a noise schedule."""

from __future__ import annotations

import math

import numpy as np

from .. import checks
from ..plan import C, D, Plan, Rows, V, W, blank_row, make_plan, start_row
from ..reference import GuidanceNorm
from ..schedules import Schedule
from .network_and_guidance import GuidanceSolver, guidance_options


def langevin(
    schedule: Schedule | None = None,
    kind: str = "score",
    *,
    num_steps: int = 1500,
    gradient_scale: float = 1.0,
    eta: float = 0.01,
    guidance_scale: float = 0.0,
    guidance_norm: GuidanceNorm = "none",
    guidance_max_norm: float | None = None,
    guidance_solver: GuidanceSolver = "explicit",
    clamp_output: bool = False,
) -> Plan:
    """Langevin dynamics of an energy U: x' = x - ∇U(x) + 0.01 z, in 1500 steps.

    The source is Hill et al., "Stochastic security: Adversarial defense using long-run dynamics of
    energy-based models" (ICLR 2021), as the released code runs it: x in [-1, 1], ∇U with weight 1,
    noise of 0.01 at every step, nothing clamped. This is one chain; the paper averages the logits
    of 150 (`PurifiedClassifier(num_draws=150)`).

    Args:
        schedule: not used.
        kind: "score", an energy's -∇U on x = 2u - 1: `ScoreModel(EnergyModel(U), "score")`. The
            network is told t = 0 at each step. A diffusion's score network has this kind too, but
            the chain has no meaning for it.
        num_steps: the length of the chain.
        gradient_scale: weight of ∇U in a step, > 0.
        eta: standard deviation of a step's noise, >= 0.
        guidance_scale: λ >= 0; guidance adds to the score -∇U.
        guidance_norm: as for `coup`.
        guidance_max_norm: as for `coup`.
        guidance_solver: as for `coup`.
        clamp_output: whether to clamp the result to valid pixels.

    Raises:
        TypeError: an option is of the wrong kind.
        ValueError: an option is out of range, or two contradict each other; the message names it,
            what was given and what is possible.
    """
    if kind != "score":
        raise ValueError(
            "langevin needs a network of kind score (an energy's -∇U on x = 2u - 1), "
            f"got kind {kind!r}"
        )
    num_steps = checks.integer("num_steps", num_steps, 1, 100_000)
    row = blank_row()
    row[V] = 1.0
    row[W] = checks.number("gradient_scale", gradient_scale, 0.0, math.inf, above=True)
    row[D] = checks.number("eta", eta, 0.0, math.inf)
    guidance = guidance_options(guidance_scale, guidance_norm, guidance_max_norm, guidance_solver)
    row[C] = guidance.scale * row[W]
    return make_plan(
        "langevin",
        start_row(),
        Rows(np.tile(row, (num_steps, 1)), np.zeros(num_steps)),
        clamp_output=checks.flag("clamp_output", clamp_output),
        guidance_norm=guidance.norm,
        guidance_max_norm=guidance.max_norm,
    )
