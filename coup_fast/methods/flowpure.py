"""FlowPure: Euler steps along a straight path, from a noised or an attacked image."""

from __future__ import annotations

import math

import numpy as np

from .. import checks
from ..plan import Plan, Rows, V, W, blank_row, ddim, make_plan, start_row
from ..reference import GuidanceNorm
from ..schedules import Array, FlowSchedule, Schedule
from .network_and_guidance import Guidance, GuidanceSolver, guidance_options
from .noise_levels import check_network, level_of_sigma, level_steps


def flowpure(
    schedule: Schedule,
    kind: str = "eps",
    *,
    sigma: float | None = None,
    t_start: float | None = None,
    num_steps: int = 9,
    guidance_scale: float = 0.0,
    guidance_norm: GuidanceNorm = "none",
    guidance_max_norm: float | None = None,
    guidance_solver: GuidanceSolver = "explicit",
    clip_denoised: bool = False,
    clamp_output: bool = False,
) -> Plan:
    """FlowPure: noise, then Euler steps of equal length along the flow to the clean image.

    The source is Collaert et al., "FlowPure: Continuous normalizing flows for adversarial
    purification" (2025, arXiv 2505.13280), as its released code runs it: σ = 0.3 on pixels,
    t₀ = 1/2 (noise of 0.15) or 1/3 (0.2), a time grid of ten points and so nine steps, nothing
    clamped. Its Gaussian path is x_t = x + (1 - t) σ z, so its velocity is -σ ε: the flow is the
    probability-flow ODE of variance-exploding noise, which every network that knows ε can follow.

    With `FlowSchedule(source="attacked")` the velocity of the network is integrated as it is, from
    the attacked image (t₀ = 0) and without noise.

    Args:
        schedule: of the network. A network of a `DiscreteSchedule` is asked at the index with the
            next larger noise, and the steps are those between these levels.
        kind: what the network predicts: "eps", "score", "x0", "v" or "velocity".
        sigma: noise on pixels at t = 0; 0.3 by default, or 0 for a path from attacked images.
        t_start: t₀ in [0, 1), where to start: the image gets (1 - t₀) sigma of noise. Default 1/2,
            or 0 for a path from attacked images.
        num_steps: Euler steps of length (1 - t₀)/num_steps.
        guidance_scale: λ >= 0; guidance adds to the score. A path from attacked images takes none.
        guidance_norm: as for `coup`.
        guidance_max_norm: as for `coup`.
        guidance_solver: as for `coup`.
        clip_denoised: whether to clamp x̂0 to [-1, 1]; ε is left as predicted, as in `ddim`.
        clamp_output: whether to clamp the result to valid pixels.

    Raises:
        TypeError: an option is of the wrong kind.
        ValueError: an option is out of range, or two contradict each other; the message names it,
            what was given and what is possible.
    """
    from_attacked = isinstance(schedule, FlowSchedule) and schedule.source == "attacked"
    if t_start is None:
        t_start = 0.0 if from_attacked else 0.5
    if sigma is None:
        sigma = 0.0 if from_attacked else 0.3
    t_start = checks.number("t_start", t_start, 0.0, 1.0, below=True)
    sigma = checks.number("sigma", sigma, 0.0, math.inf, above=not from_attacked)
    num_steps = checks.integer("num_steps", num_steps, 1, 100_000)
    guidance = guidance_options(guidance_scale, guidance_norm, guidance_max_norm, guidance_solver)
    clip = checks.flag("clip_denoised", clip_denoised)
    progress = t_start + (1 - t_start) * np.arange(num_steps) / num_steps
    if isinstance(schedule, FlowSchedule) and from_attacked:
        start, rows = _along_velocity(schedule, kind, progress, sigma, guidance, clip)
    else:
        start, rows = _along_noise(schedule, kind, progress, sigma, guidance, clip)
    return make_plan(
        "flowpure",
        start,
        rows,
        clamp_output=checks.flag("clamp_output", clamp_output),
        guidance_norm=guidance.norm,
        guidance_max_norm=guidance.max_norm,
    )


def _along_noise(
    schedule: Schedule, kind: str, progress: Array, sigma: float, guidance: Guidance, clip: bool
) -> tuple[Array, Rows]:
    """Euler steps x + r ε → x + r' ε in the noise's standard deviation, which are those of DDIM."""
    check_network("flowpure", schedule, kind)
    levels = [level_of_sigma(schedule, sigma * (1 - t)) for t in progress.tolist()]
    if len({level.alpha_bar for level in levels}) < len(levels):
        raise ValueError(
            f"num_steps={len(levels)} asks for more noise levels below sigma={sigma:g} than this "
            "schedule has; use fewer steps"
        )
    alpha_bars = [level.alpha_bar for level in levels]
    steps = [ddim(a, b, 0.0) for a, b in zip(alpha_bars, [*alpha_bars[1:], 1.0], strict=True)]
    return level_steps(
        schedule, kind, levels, steps, clip_denoised=clip, guidance_scale=guidance.scale
    )


def _along_velocity(
    schedule: FlowSchedule,
    kind: str,
    progress: Array,
    sigma: float,
    guidance: Guidance,
    clip: bool,
) -> tuple[Array, Rows]:
    """x' = x + h v, on a path that knows no noise level, hence no x̂0 to clip and no score."""
    if kind != "velocity":
        raise ValueError(
            f'a path from attacked images needs a network of kind "velocity", got kind {kind!r}'
        )
    if guidance.scale or clip:
        given = f"guidance_scale={guidance.scale:g}" if guidance.scale else "clip_denoised=True"
        raise ValueError(
            f"{given} needs a network with noise levels; a path from attacked images has none"
        )
    row = blank_row()
    step = (1 - progress[0]) / len(progress)
    row[[V, W]] = 1.0, step if schedule.data_at == 1 else -step
    start = start_row()
    start[2] = 2 * sigma * (1 - progress[0])
    return start, Rows(np.tile(row, (len(progress), 1)), schedule.time(progress))
