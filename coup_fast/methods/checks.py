"""Validation of method options: each function returns the value or raises a sentence."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..plan import DIFFUSION_KINDS
from ..reference import GUIDANCE_NORMS
from ..schedules import DiscreteSchedule, VPSchedule

VP = VPSchedule | DiscreteSchedule


def number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> float:
    """A real number in [low, high], or (low, high] with `above`; high may be inf (excluded)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    result = float(value)
    inside = (low < result if above else low <= result) and result <= high
    if not inside or not math.isfinite(result):
        left, right = "(" if above else "[", ")" if math.isinf(high) else "]"
        raise ValueError(f"{name} must be in {left}{low:g}, {high:g}{right}, got {value!r}")
    return result


def integer(name: str, value: Any, low: int, high: int) -> int:
    """An int in [low, high]."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {value!r}")
    result = operator.index(value)
    if not low <= result <= high:
        raise ValueError(f"{name} must be an int in [{low}, {high}], got {value!r}")
    return result


def integers(name: str, value: Any, low: int, high: int) -> tuple[int, ...]:
    """A non-empty sequence of ints in [low, high]."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) == 0:
        raise TypeError(f"{name} must be a non-empty sequence of ints, got {value!r}")
    return tuple(integer(f"each of {name}", item, low, high) for item in value)


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return str(value)


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


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
    """Checked guidance options; see `guidance`."""

    scale: float
    norm: str
    max_norm: float | None


def guidance(scale: Any, norm: Any, max_norm: Any) -> Guidance:
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
