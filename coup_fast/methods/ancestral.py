"""The discrete chain: its levels, its posterior steps, and forward diffusion between rounds.

Index i is the noise level after i + 1 forward steps. A run from t* = T/N goes down from index
T - 1. With fewer steps than indices the chain is respaced: every T/num_steps-th index, counted
from T - 1, with the posterior of the longer jumps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from .. import checks
from ..plan import (
    LOG_VAR_HI,
    LOG_VAR_LO,
    C,
    D,
    Rows,
    diffusion_row,
    network_row,
    posterior,
    start_row,
)
from ..schedules import Array, DiscreteSchedule

Variance = Literal["fixed-small", "fixed-large", "learned"]
VARIANCES = get_args(Variance)


@dataclass(frozen=True)
class Level:
    """A step down the chain: from index i (ᾱ) to the next used one (ᾱ'; 1 at the end)."""

    index: int
    alpha_bar: float
    alpha_bar_next: float

    @property
    def last(self) -> bool:
        """Whether the step ends at the clean image."""
        return self.alpha_bar_next == 1.0

    @property
    def beta(self) -> float:
        """Variance of the forward jump, 1 - ᾱ/ᾱ'."""
        return 1 - self.alpha_bar / self.alpha_bar_next

    @property
    def beta_tilde(self) -> float:
        """Variance of the posterior, 0 at the last step."""
        return posterior(self.alpha_bar, self.alpha_bar_next)[1]


def levels(schedule: DiscreteSchedule, count: int, num_steps: int) -> list[Level]:
    """num_steps steps down from index count - 1 to the clean image."""
    used = [round(count * (k + 1) / num_steps) - 1 for k in range(num_steps)]
    alpha_bars = [1.0, *schedule.alpha_bar(used).tolist()]
    below_first = list(zip(used, alpha_bars[1:], alpha_bars[:-1], strict=True))
    return [Level(*level) for level in reversed(below_first)]


def count_of(schedule: DiscreteSchedule, t_star: float) -> int:
    """Indices in [0, t*): T = t* N."""
    low = 1 / schedule.num_steps
    return round(checks.number("t_star", t_star, low, 1.0) * schedule.num_steps)


def start_at(schedule: DiscreteSchedule, count: int, forward_noise: bool) -> Array:
    """Pixels to the state, diffused to index count - 1 if forward_noise."""
    noised = float(schedule.alpha_bar(count - 1))
    return start_row(noised if checks.flag("forward_noise", forward_noise) else None)


def ancestral_row(
    level: Level,
    floor: float,
    kind: str,
    variance: Variance,
    clip_denoised: bool,
    guidance_scale: float,
    eps_of: tuple[float, float] | None = None,
) -> Array:
    """x' = posterior mean + λ Var g + √Var z·[not last] (Ho et al. 2020; Dhariwal and Nichol 2021).

    floor: see `floor_of`. eps_of: see `network_row`.
    """
    mean, _ = posterior(level.alpha_bar, level.alpha_bar_next)
    row = network_row(mean, level.alpha_bar, kind, eps_of, clip_denoised=clip_denoised)
    if variance == "learned":
        low = floor if level.last else level.beta_tilde
        row[[LOG_VAR_LO, LOG_VAR_HI]] = math.log(low), math.log(level.beta)
        row[[C, D]] = guidance_scale, float(not level.last)
    else:
        var = fixed_variance(level, floor, variance)
        row[[C, D]] = guidance_scale * var, math.sqrt(var) * (not level.last)
    return row


def fixed_variance(level: Level, floor: float, variance: Variance) -> float:
    """Var of a step: the posterior's, or the forward jump's (then the last step has the floor)."""
    if variance == "fixed-small":
        return level.beta_tilde
    return floor if level.last else level.beta


def floor_of(steps: Sequence[Level], schedule: DiscreteSchedule) -> float:
    """The last but one step's posterior variance; it stands in for the last step's, which is 0.

    Index 0 alone has that of index 1 all the same, as in released code. Where one jump from
    further up is the only step there is no other, and its own β stands in.
    """
    if len(steps) > 1:
        return steps[-2].beta_tilde
    if steps[0].index == 0 and schedule.num_steps > 1:
        return posterior(float(schedule.alpha_bar(1)), steps[0].alpha_bar)[1]
    return steps[0].beta


def forward_rows(schedule: DiscreteSchedule, index: int) -> Rows:
    """Forward diffusion between rounds: a row that calls no network."""
    return Rows(diffusion_row(float(schedule.alpha_bar(index)))[None], np.array([np.nan]))
