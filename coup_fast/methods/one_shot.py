"""One-shot denoising: noise, then the network's estimate of the clean image."""

from __future__ import annotations

import math

import numpy as np

from .. import checks
from ..plan import (
    X0_HI,
    X0_LO,
    C,
    Plan,
    Prediction,
    Q,
    Rows,
    U,
    W,
    blank_row,
    make_plan,
    network_row,
    start_row,
)
from ..reference import GuidanceNorm
from ..schedules import DiscreteSchedule, EDMSchedule, Schedule
from .network_and_guidance import GuidanceSolver, diffusion_model, guidance_options


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
        schedule: `VPSchedule`, `DiscreteSchedule` (the first index with at least that much noise)
            or `EDMSchedule` (kind "x0").
        kind: what the network predicts: "eps", "score" or "x0".
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
    ratio = 2 * checks.number("sigma", 0.25 if sigma is None else sigma, 0.0, math.inf, above=True)
    if t_star is not None:
        t_star = checks.number("t_star", t_star, 0.0, 1.0, above=True)
    guidance = guidance_options(guidance_scale, guidance_norm, guidance_max_norm, guidance_solver)
    clip = checks.flag("clip_denoised", clip_denoised)
    if isinstance(schedule, EDMSchedule):
        start, row, time = _edm(schedule, kind, ratio, t_star, clip, guidance.scale)
    else:
        start, row, time = _vp(schedule, kind, ratio, t_star, clip, guidance.scale)
    return make_plan(
        "one-shot",
        start,
        Rows(row[None], np.array([time])),
        clamp_output=clip,
        guidance_norm=guidance.norm,
        guidance_max_norm=guidance.max_norm,
    )


def _vp(
    schedule: Schedule, kind: str, ratio: float, t_star: float | None, clip: bool, scale: float
) -> tuple[np.ndarray, np.ndarray, float]:
    model = diffusion_model("one-shot", schedule, kind)
    alpha_bar = 1 / (1 + ratio**2)
    if isinstance(model, DiscreteSchedule):
        alpha_bars = model.alpha_bar(np.arange(model.num_steps))
        if t_star is not None:
            index = max(round(t_star * model.num_steps) - 1, 0)
        elif alpha_bars[-1] > alpha_bar:
            raise ValueError(f"sigma={ratio / 2:g} is more noise than this schedule has")
        else:
            index = int(np.argmax(alpha_bars <= alpha_bar))
        alpha_bar, time = float(alpha_bars[index]), float(model.index_time(index))
    else:
        time = model.time_of(alpha_bar) if t_star is None else t_star
        if time > 1:
            raise ValueError(f"sigma={ratio / 2:g} is more noise than this schedule has")
        alpha_bar = float(model.alpha_bar(time))
    step = Prediction(x0=1.0)
    row = network_row(step, alpha_bar, kind, clip_denoised=clip)
    row[C] = scale * step.score(alpha_bar)
    return start_row(alpha_bar), row, time


def _edm(
    schedule: EDMSchedule, kind: str, ratio: float, t_star: float | None, clip: bool, scale: float
) -> tuple[np.ndarray, np.ndarray, float]:
    if kind != "x0":
        raise ValueError(f'an EDMSchedule needs a denoiser, kind "x0", got kind {kind!r}')
    noise = ratio if t_star is None else t_star * schedule.sigma_max
    if noise > schedule.sigma_max:
        raise ValueError(f"sigma={ratio / 2:g} is more noise than this schedule has")
    start = start_row()
    start[2] = noise
    row = blank_row()
    if clip:
        row[[Q, U, X0_LO, X0_HI]] = 1.0, 1.0, -1.0, 1.0
    else:
        row[W] = 1.0
    row[C] = scale * noise**2
    return start, row, float(schedule.network_time(noise))
