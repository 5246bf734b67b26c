"""ADP: a few deterministic steps along an energy model's score, with adaptive step sizes."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np

from .. import checks
from ..plan import AdaptivePlan
from ..schedules import Schedule

NoiseVariant = Literal["gaussian", "binary"]
NOISE_VARIANTS = get_args(NoiseVariant)


def adp(
    schedule: Schedule | None = None,
    kind: str = "ncsn",
    *,
    sigma: float = 0.25,
    noise_variant: NoiseVariant = "gaussian",
    num_steps: int = 10,
    step_lambda: float = 0.05,
    delta: float = 1e-3,
    tau: float = 1e-3,
    alpha_min: float = 1e-5,
    alpha_max: float = 1e-1,
    pixel_map_every_step: bool = True,
) -> AdaptivePlan:
    """ADP: noise injection, then score steps whose length adapts to the score's change.

    The source is algorithm 1 of Yoon, Hwang, Lee, "Adversarial purification with score-based
    generative models" (ICML 2021, arXiv 2106.06041), with the released constants: noise of σ = 0.25
    on pixels, clamped; 10 steps, λ = 0.05, δ = 1e-3, α clipped to [1e-5, 0.1]. A sample stops for
    good once α <= 1e-3. This is one run; the paper averages the logits of ten
    (`PurifiedClassifier(num_draws=10)`).

    The network is called with t = 0, and pixels are mapped by T(u) = (255/256) u + 1/512 for it.

    Args:
        schedule: not used.
        kind: "ncsn", the unscaled output of an NCSN or an energy's -∇E.
        sigma: the noise level in pixels, >= 0.
        noise_variant: "gaussian", or "binary" for ±σ√(2/π).
        num_steps: the steps of a run, at least 1.
        step_lambda: λ > 0, from which the step size follows.
        delta: δ > 0, how far ahead the second score is taken.
        tau: τ >= 0; a sample stops once its step size is at most τ.
        alpha_min: smallest step size, >= 0.
        alpha_max: largest step size, >= alpha_min.
        pixel_map_every_step: True applies T⁻¹ at every step, as the released code does, although
            the state is in pixel space after the first; this stretches contrast a little each
            time. False applies T⁻¹ once, at the first step.

    Raises:
        TypeError: an option is of the wrong kind.
        ValueError: an option is out of range, or two contradict each other; the message names it,
            what was given and what is possible.
    """
    if kind != "ncsn":
        raise ValueError(
            f"adp needs a network of kind ncsn (the unscaled score of an NCSN or an energy model "
            f"in pixel space), got kind {kind!r}"
        )
    sigma = checks.number("sigma", sigma, 0.0, math.inf)
    checks.choice("noise_variant", noise_variant, NOISE_VARIANTS)
    num_steps = checks.integer("num_steps", num_steps, 1, 100_000)
    step_lambda = checks.number("step_lambda", step_lambda, 0.0, math.inf, above=True)
    delta = checks.number("delta", delta, 0.0, math.inf, above=True)
    tau = checks.number("tau", tau, 0.0, math.inf)
    alpha_min = checks.number("alpha_min", alpha_min, 0.0, math.inf)
    alpha_max = checks.number("alpha_max", alpha_max, alpha_min, math.inf)

    binary = noise_variant == "binary"
    std, sign_std = (0.0, sigma * math.sqrt(2 / math.pi)) if binary else (sigma, 0.0)
    start = np.array([1.0, 0.0, std, sign_std, 0.0, 1.0, 255 / 256, 1 / 512])
    row = np.array([step_lambda * delta, alpha_min, alpha_max, tau, 256 / 255, -1 / 510, 0.0, 1.0])
    coeffs = np.tile(row, (num_steps, 1))
    if not checks.flag("pixel_map_every_step", pixel_map_every_step):
        coeffs[1:, 4:6] = 1.0, 0.0
    return AdaptivePlan("adp", start, sigma > 0, coeffs, delta)
