"""What methods of diffusion networks share: the network they need, and the options of guidance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..checks import choice, number
from ..plan import DIFFUSION_KINDS
from ..reference import GUIDANCE_NORMS
from ..schedules import DiscreteSchedule, VPSchedule

VP = VPSchedule | DiscreteSchedule


def diffusion_model(method: str, schedule: Any, kind: Any) -> VP:
    """The schedule of a variance-preserving diffusion network; kind eps, score or x0."""
    if kind not in DIFFUSION_KINDS:
        raise ValueError(
            f"{method} needs a diffusion network of kind {', '.join(DIFFUSION_KINDS)}, "
            f"got kind {kind!r}"
        )
    if not isinstance(schedule, VPSchedule | DiscreteSchedule):
        raise ValueError(
            f"{method} needs a VPSchedule or a DiscreteSchedule, got {type(schedule).__name__}"
        )
    return schedule


@dataclass(frozen=True)
class Guidance:
    """Checked options of guidance; see `guidance_options`."""

    scale: float
    norm: str
    max_norm: float | None


def guidance_options(scale: Any, norm: Any, max_norm: Any) -> Guidance:
    """guidance_scale λ >= 0, guidance_norm, and guidance_max_norm exactly if norm is "clipped"."""
    norm = choice("guidance_norm", norm, GUIDANCE_NORMS)
    if (norm == "clipped") != (max_norm is not None):
        raise ValueError(
            'guidance_norm="clipped" and guidance_max_norm go together, '
            f"got guidance_norm={norm!r} and guidance_max_norm={max_norm!r}"
        )
    if max_norm is not None:
        max_norm = number("guidance_max_norm", max_norm, 0.0, math.inf, above=True)
    return Guidance(number("guidance_scale", scale, 0.0, math.inf), norm, max_norm)
