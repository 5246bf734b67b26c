"""Denoising in one call, or in several with fresh noise between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from .. import checks
from ..plan import Plan, Prediction, make_plan
from ..reference import GuidanceNorm
from ..schedules import Schedule
from .network_and_guidance import Guidance, GuidanceSolver, guidance_options
from .noise_levels import (
    NoiseLevel,
    check_network,
    level_of_sigma,
    level_of_time,
    level_steps,
)


def one_shot(
    schedule: Schedule,
    kind: str = "eps",
    *,
    sigma: float | None = None,
    t_star: float | None = None,
    guidance_scale: float = 0.0,
    guidance_norm: GuidanceNorm = "none",
    guidance_max_norm: float | None = None,
    guidance_solver: GuidanceSolver = "explicit",
    clip_denoised: bool = True,
) -> Plan:
    """Noise of a given level, then one call of the denoiser, x̂0.

    The source is algorithm 1 of Carlini et al., "(Certified!!) adversarial robustness for free!"
    (ICLR 2023), with σ = 0.25 on pixels: the noise level at which √((1-ᾱ)/ᾱ) = 2σ. x̂0 is clipped.
    For EDM networks this is the Euler step to t' = 0 (Karras et al. 2022).

    Args:
        schedule: `VPSchedule`, `DiscreteSchedule` (the first index with at least that much noise),
            `FlowSchedule`, or `EDMSchedule` (kind "x0").
        kind: what the network predicts: "eps", "score", "x0", "v" or "velocity".
        sigma: the noise on pixels, > 0; default 0.25.
        t_star: the time to noise to, in (0, 1], in place of sigma. For an EDMSchedule it is σ in
            diffusion space over sigma_max.
        guidance_scale: λ >= 0; guidance adds to the score.
        guidance_norm: as for `coup`.
        guidance_max_norm: as for `coup`.
        guidance_solver: as for `coup`.
        clip_denoised: whether to clamp x̂0 to [-1, 1].

    Raises:
        TypeError: an option is of the wrong kind.
        ValueError: an option is out of range, or two contradict each other; the message names it,
            what was given and what is possible.
    """
    if sigma is not None and t_star is not None:
        raise ValueError(f"give sigma or t_star, not both: got {sigma!r} and {t_star!r}")
    sigma = checks.number("sigma", 0.25 if sigma is None else sigma, 0.0, math.inf, above=True)
    if t_star is not None:
        t_star = checks.number("t_star", t_star, 0.0, 1.0, above=True)
    check_network("one-shot", schedule, kind)
    level = level_of_sigma(schedule, sigma) if t_star is None else level_of_time(schedule, t_star)
    return _denoised(
        "one-shot",
        schedule,
        kind,
        [level],
        guidance_options(guidance_scale, guidance_norm, guidance_max_norm, guidance_solver),
        clip_denoised,
    )


def consistency(
    schedule: Schedule,
    kind: str = "eps",
    *,
    sigmas: Sequence[float] = (0.25, 0.1),
    guidance_scale: float = 0.0,
    guidance_norm: GuidanceNorm = "none",
    guidance_max_norm: float | None = None,
    guidance_solver: GuidanceSolver = "explicit",
    clip_denoised: bool = True,
) -> Plan:
    """Noise and denoise over a list of levels: x' = x̂0 + σ_{k+1} z, and x̂0 at the end.

    The source is algorithm 1 of Song et al., "Consistency models" (ICML 2023), whose network maps
    the noised image at each level to the clean one. Any network that knows x̂0 takes it. `one-shot`
    is the run with one level. The default levels are ours: those of `one-shot`, then 0.1.

    Args:
        schedule: as for `one_shot`.
        kind: as for `one_shot`.
        sigmas: the noise on pixels before each call, > 0, each smaller than the one before.
        guidance_scale: λ >= 0; guidance adds to the score.
        guidance_norm: as for `coup`.
        guidance_max_norm: as for `coup`.
        guidance_solver: as for `coup`.
        clip_denoised: whether to clamp x̂0 to [-1, 1] at each step.

    Raises:
        TypeError: an option is of the wrong kind.
        ValueError: an option is out of range, or two contradict each other; the message names it,
            what was given and what is possible.
    """
    sigmas = checks.numbers("sigmas", sigmas, 0.0, math.inf, above=True)
    if any(after >= before for before, after in pairwise(sigmas)):
        raise ValueError(f"sigmas must fall from each to the next, got {list(sigmas)}")
    check_network("consistency", schedule, kind)
    return _denoised(
        "consistency",
        schedule,
        kind,
        [level_of_sigma(schedule, sigma) for sigma in sigmas],
        guidance_options(guidance_scale, guidance_norm, guidance_max_norm, guidance_solver),
        clip_denoised,
    )


def _denoised(
    method: str,
    schedule: Schedule,
    kind: str,
    levels: Sequence[NoiseLevel],
    guidance: Guidance,
    clip_denoised: bool,
) -> Plan:
    clip = checks.flag("clip_denoised", clip_denoised)
    alpha_bars = [*(level.alpha_bar for level in levels[1:]), 1.0]  # after each step
    steps = [(Prediction(x0=math.sqrt(a)), math.sqrt(1 - a)) for a in alpha_bars]
    start, rows = level_steps(
        schedule, kind, levels, steps, clip_denoised=clip, guidance_scale=guidance.scale
    )
    return make_plan(
        method,
        start,
        rows,
        clamp_output=clip,
        guidance_norm=guidance.norm,
        guidance_max_norm=guidance.max_norm,
    )
