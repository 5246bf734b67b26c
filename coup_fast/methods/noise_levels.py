"""Steps between noise levels that a method chooses freely, for every schedule.

A level is named by its noise-to-signal ratio r = σ/√ᾱ, the standard deviation of the noise on
x = 2u - 1. Rows are written for the variance-preserving state √ᾱ x + σ z. An `EDMSchedule` has the
state x + r z, which is that state divided by √ᾱ, so its rows follow by scaling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..plan import (
    C,
    D,
    P,
    Prediction,
    Rows,
    U,
    V,
    W,
    network_row,
    start_row,
)
from ..schedules import Array, DiscreteSchedule, EDMSchedule, FlowSchedule, Schedule
from .network_and_guidance import diffusion_model, eps_of


@dataclass(frozen=True)
class NoiseLevel:
    """ᾱ of the state, and the time that the network is told at it."""

    alpha_bar: float
    time: float

    @property
    def ratio(self) -> float:
        """r = σ/√ᾱ."""
        return float(np.sqrt((1 - self.alpha_bar) / self.alpha_bar))


def check_network(method: str, schedule: Schedule, kind: str) -> None:
    """Raise ValueError unless it is a diffusion network, or a denoiser of an `EDMSchedule`."""
    if not isinstance(schedule, EDMSchedule):
        diffusion_model(method, schedule, kind)
    elif kind != "x0":
        raise ValueError(f'an EDMSchedule needs a denoiser, kind "x0", got kind {kind!r}')


def level_of_sigma(schedule: Schedule, sigma: float) -> NoiseLevel:
    """The level whose noise on pixels is sigma; of a discrete chain the first with as much.

    Raises ValueError if the schedule has less noise.
    """
    ratio = 2 * sigma
    alpha_bar = 1 / (1 + ratio**2)
    if isinstance(schedule, EDMSchedule):
        time = float(schedule.network_time(ratio))
    elif isinstance(schedule, FlowSchedule):
        return NoiseLevel(alpha_bar, float(schedule.time_of_ratio(ratio)))
    elif isinstance(schedule, DiscreteSchedule):
        enough = schedule.alpha_bar(np.arange(schedule.num_steps)) <= alpha_bar
        if enough.any():
            return level_of_index(schedule, int(np.argmax(enough)))
        time = np.inf
    else:
        time = schedule.time_of(alpha_bar)
    if time > 1:
        raise ValueError(f"sigma={sigma:g} is more noise than this schedule has")
    return NoiseLevel(alpha_bar, time)


def level_of_index(schedule: DiscreteSchedule, index: int) -> NoiseLevel:
    """The level of index i of a discrete chain."""
    return NoiseLevel(float(schedule.alpha_bar(index)), float(schedule.index_time(index)))


def level_of_time(schedule: Schedule, t: float) -> NoiseLevel:
    """The level at time t in (0, 1] of the schedule's process."""
    if isinstance(schedule, EDMSchedule):
        return NoiseLevel(1 / (1 + (t * schedule.sigma_max) ** 2), t)
    if isinstance(schedule, DiscreteSchedule):
        return level_of_index(schedule, max(round(t * schedule.num_steps) - 1, 0))
    time = float(schedule.network_time(t))
    return NoiseLevel(float(schedule.continuous().alpha_bar(t)), time)


def level_steps(
    schedule: Schedule,
    kind: str,
    levels: Sequence[NoiseLevel],
    steps: Sequence[tuple[Prediction, float]],
    *,
    clip_denoised: bool,
    guidance_scale: float,
) -> tuple[Array, Rows]:
    """The start row, noised to the first level, and a row for each level's step to the next.

    Args:
        schedule: of the network; `check_network` has passed it.
        kind: what the network predicts.
        levels: one for each step. The last step leads to the clean image.
        steps: each with the standard deviation of its noise.
        clip_denoised: whether x̂0 is clamped to [-1, 1].
        guidance_scale: λ; guidance adds λ g to the score.
    """
    rows = []
    for level, (step, std) in zip(levels, steps, strict=True):
        noise_in = eps_of(schedule, kind, level.time)
        row = network_row(step, level.alpha_bar, kind, noise_in, clip_denoised=clip_denoised)
        row[[C, D]] = guidance_scale * step.score(level.alpha_bar), std
        rows.append(row)
    start = start_row(levels[0].alpha_bar)
    if isinstance(schedule, EDMSchedule):
        start[:3] = 2.0, -1.0, levels[0].ratio
        signals = [*(np.sqrt(level.alpha_bar) for level in levels), 1.0]
        for row, signal, following in zip(rows, signals[:-1], signals[1:], strict=True):
            row[[P, V]] *= signal
            row[[U, V, W, D]] /= following
            row[C] /= signal * following  # the score of y = x/√ᾱ is √ᾱ times that of x
    return start, Rows(np.stack(rows), np.array([level.time for level in levels]))
