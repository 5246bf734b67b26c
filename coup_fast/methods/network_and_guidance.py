"""What methods of diffusion networks share: the network they need, and the options of guidance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..checks import choice, number
from ..plan import DIFFUSION_KINDS
from ..reference import GUIDANCE_NORMS
from ..schedules import DiscreteSchedule, FlowSchedule, Schedule, VPSchedule, check_pair

VP = VPSchedule | DiscreteSchedule | FlowSchedule
GuidanceSolver = Literal["explicit", "stable"]
GUIDANCE_SOLVERS = get_args(GuidanceSolver)


def diffusion_model(method: str, schedule: Any, kind: Any) -> VP:
    """The schedule of a network that a variance-preserving process can ask; a kind it predicts."""
    if kind not in DIFFUSION_KINDS:
        raise ValueError(
            f"{method} needs a diffusion network of kind {', '.join(DIFFUSION_KINDS)}, "
            f"got kind {kind!r}"
        )
    if not isinstance(schedule, VP):
        raise ValueError(
            f"{method} needs a VPSchedule, a DiscreteSchedule or a FlowSchedule, "
            f"got {type(schedule).__name__}"
        )
    check_pair(kind, schedule)
    if isinstance(schedule, FlowSchedule) and schedule.source == "attacked":
        raise ValueError(
            f"{method} needs a path with noise levels, and FlowSchedule(source='attacked') has "
            "none; only flowpure runs it"
        )
    return schedule


def eps_of(schedule: Schedule, kind: str, time: float) -> tuple[float, float] | None:
    """(A, B) of `network_row` for a velocity, whose noise is ε = A x + B m; None for other kinds.

    A velocity holds the noise level that the network was trained on at the time it is told, so that
    level counts and not the step's, where they differ (`DiscreteSchedule.network_time`).
    """
    if kind == "v":  # of Salimans and Ho, "Progressive distillation" (ICLR 2022): √ᾱ ε - σ x₀
        assert isinstance(schedule, VP)
        alpha_bar = float(schedule.alpha_bar_told(time))
        return math.sqrt(1 - alpha_bar), math.sqrt(alpha_bar)
    if kind == "velocity":
        assert isinstance(schedule, FlowSchedule)
        return schedule.eps_of_velocity(time)
    return None


@dataclass(frozen=True)
class Guidance:
    """Checked options of guidance; see `guidance_options`."""

    scale: float
    norm: str
    max_norm: float | None


def guidance_options(
    scale: Any, norm: Any, max_norm: Any, solver: Any, variance: str = "fixed"
) -> Guidance:
    """guidance_scale λ >= 0, guidance_norm, and guidance_max_norm exactly if norm is "clipped".

    guidance_solver "stable" becomes the norm of that name. It takes the gradient as it is, with one
    coefficient for each sample, which a learned variance does not have.
    """
    choice("guidance_solver", solver, GUIDANCE_SOLVERS)
    norm = choice("guidance_norm", norm, GUIDANCE_NORMS)
    if (norm == "clipped") != (max_norm is not None):
        raise ValueError(
            'guidance_norm="clipped" and guidance_max_norm go together, '
            f"got guidance_norm={norm!r} and guidance_max_norm={max_norm!r}"
        )
    if solver == "stable" and norm != "none":
        raise ValueError(
            'guidance_solver="stable" takes the gradient as it is and needs guidance_norm="none", '
            f"got guidance_norm={norm!r}"
        )
    if solver == "stable" and variance == "learned":
        raise ValueError(
            'guidance_solver="stable" needs one coefficient for all pixels of a sample, and '
            'variance="learned" gives each pixel its own; use a fixed variance, or '
            'guidance_solver="explicit"'
        )
    if solver == "stable":
        norm = "stable"
    if max_norm is not None:
        max_norm = number("guidance_max_norm", max_norm, 0.0, math.inf, above=True)
    return Guidance(number("guidance_scale", scale, 0.0, math.inf), norm, max_norm)
