"""Networks trained on other pixels than [-1, 1], as networks of those.

Pixels y = a u + b of a network and u in [-1, 1] of the process differ by a scale and an offset. A
VP state √ᾱ u + σ z, divided by √ᾱ, is u + r z with r = σ/√ᾱ, and a (u + r z) + b = y + (a r) z: the
network's own image with the same noise z, at its own level a r. So it is asked there, and what it
says of z or y is exact for the process, whatever the schedule it was trained on.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from coup_fast import checks
from coup_fast._torch.modules import mode_of
from coup_fast.models.at_vp_times import AtVPTimes
from coup_fast.models.normalized import Numbers, numbers_of
from coup_fast.plan import DIFFUSION_KINDS
from coup_fast.schedules import DiscreteSchedule, EDMSchedule, FlowSchedule, VPSchedule
from coup_fast.score_model import ScoreModel


def with_data_range(score_model: ScoreModel, low: Numbers, high: Numbers) -> ScoreModel:
    """A network trained on pixels in [low, high] as one of `VPSchedule()` on [-1, 1]; exact.

    Args:
        score_model: the network as it was trained, with its own kind (any but "ncsn"), schedule
            and time. It is kept, and becomes a part of the result.
        low: what the network was shown for a pixel of 0: -0.5, or one number per channel (a
            sequence, an array or a tensor). For images standardised by mean and std it is
            -mean/std.
        high: what it was shown for a pixel of 1; (1 - mean)/std. high - low must be the same for
            all channels, because an image has one noise level.

    Returns:
        A ScoreModel of kind "x0", or else "eps". Variance channels are left out. Noise levels
        below the network's first are asked at the first, and `t_max` says where they end.

    Raises:
        TypeError: score_model is no ScoreModel, or a bound is no number.
        ValueError: the kind, path or time dtype cannot be asked at a noise level, or the bounds
            are not increasing or not equally far apart.
    """
    if not isinstance(score_model, ScoreModel):
        raise TypeError(
            "score_model must be a coup_fast.ScoreModel, which says what the network was trained "
            f"on, got {type(score_model).__name__}"
        )
    checks.choice("the score model's kind", score_model.kind, DIFFUSION_KINDS)
    schedule = score_model.schedule
    if isinstance(schedule, FlowSchedule) and schedule.source == "attacked":
        raise ValueError(
            "a network in another range is asked at its noise levels, and "
            "FlowSchedule(source='attacked') has none; change the range inside of the network"
        )
    if score_model.time_dtype is not None and not score_model.time_dtype.is_floating_point:
        raise ValueError(
            f"a network in another range is asked between its times, and time_dtype="
            f"{score_model.time_dtype} takes whole numbers; leave it out if the network can be "
            "told others"
        )
    lows, highs = _bounds("low", low), _bounds("high", high)
    widths = {round(b - a, 6) for a, b in zip(lows, highs, strict=len(lows) == len(highs))}
    if len(lows) != len(highs) or len(widths) != 1 or min(widths) <= 0:
        raise ValueError(
            f"low and high must be equally many, low < high, and high - low the same for every "
            f"channel, because an image has one noise level; got {low} and {high}"
        )
    levels = _Levels(score_model, lows, highs)
    process = VPSchedule()
    last = levels.last / levels.scale
    t_max = 1.0 if math.isinf(last) else min(process.time_of(1 / (1 + last**2)), 1.0)
    kind = "x0" if score_model.kind == "x0" else "eps"
    return ScoreModel(AtVPTimes(levels, process), kind, process, time_scale=1.0, t_max=t_max)


def _bounds(name: str, given: Numbers) -> tuple[float, ...]:
    return tuple(checks.number(f"each of {name}", value) for value in numbers_of(name, given))


class _Levels(nn.Module):
    """A ScoreModel of other pixels as f(u + r z, r), of the noise or of u.

    lows, highs: its pixels for 0 and 1, for each channel or for all.
    """

    def __init__(
        self, score_model: ScoreModel, lows: tuple[float, ...], highs: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.training = mode_of(score_model)
        self.score_model = score_model
        self.scale = (highs[0] - lows[0]) / 2
        self.offsets = tuple((low + high) / 2 for low, high in zip(lows, highs, strict=True))
        self._tables: dict[tuple[str, torch.device], Tensor] = {}
        schedule, latest = score_model.schedule, score_model.t_max or 1.0
        if isinstance(schedule, EDMSchedule):
            self.last = schedule.sigma_max * latest
            return
        if isinstance(schedule, FlowSchedule):
            self.last = math.inf if schedule.source == "noise" else schedule.noise_std
            return
        if isinstance(schedule, DiscreteSchedule):
            index = np.arange(-1, schedule.num_steps)
            self.table = tuple((-np.log(schedule.alpha_bar(index))).tolist())
            latest = min(latest * schedule.num_steps, schedule.num_steps - 1)
        self.last = math.sqrt(float(1 / schedule.alpha_bar(latest)) - 1)

    @property
    def in_channels(self) -> int | None:
        """Image channels: those that the offsets are of, or that the network declares, or None."""
        return len(self.offsets) if len(self.offsets) > 1 else self.score_model.in_channels

    def forward(self, y: Tensor, ratio: Tensor) -> Tensor:
        """y: u + r z, [B, C, ...]; ratio: r, [B]. Returns z or u, [B, C, ...]."""
        offset = self._on("offsets", y.device).to(y.dtype).reshape(-1, *(1,) * (y.ndim - 2))
        own = self.scale * y + offset
        level = self.scale * ratio.to(torch.float64)
        time, (of_state, of_output) = self._asked(level)
        if not isinstance(self.score_model.schedule, EDMSchedule):
            own = own * _shaped((1 + level**2).rsqrt(), y)
        out: Tensor = self.score_model(own, time)
        out = out[:, : y.shape[1]]
        if self.score_model.kind == "x0":
            return (out - offset) / self.scale
        if self.score_model.kind == "eps":
            return out
        return _shaped(of_state, y) * own + _shaped(of_output, y) * out

    def _asked(self, level: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The network's time in [0, 1] at noise levels a r, float64 [B], and A, B [B] there.

        The network's noise is z = A s + B m, of its state s and its output m, as in
        `methods.network_and_guidance.eps_of`; A and B count for scores and velocities.
        """
        schedule, kind = self.score_model.schedule, self.score_model.kind
        nothing = torch.zeros_like(level)
        if isinstance(schedule, FlowSchedule):
            direction = 1.0 if schedule.data_at == 1 else -1.0
            if schedule.source == "noise":
                progress = 1 / (1 + level)
                factors = torch.hypot(progress, 1 - progress), -direction * progress
            else:
                progress = (1 - level / schedule.noise_std).clamp(min=0.0)
                factors = nothing, torch.full_like(level, -direction / schedule.noise_std)
            return (progress if schedule.data_at == 1 else 1 - progress), factors
        if isinstance(schedule, EDMSchedule):
            return level / schedule.sigma_max, (nothing, -level)
        lost = torch.log1p(level**2)  # -log ᾱ
        noise = level * (1 + level**2).rsqrt()
        if isinstance(schedule, VPSchedule):
            slope, low = schedule.beta_max - schedule.beta_min, schedule.beta_min
            time = 2 * lost / (low + (low**2 + 2 * slope * lost).sqrt())
        else:
            table = self._on("table", lost.device)
            above = torch.searchsorted(table, lost).clamp(1, len(table) - 1)
            left, right = table[above - 1], table[above]
            index = above - 2 + (lost - left) / (right - left)  # the table begins at index -1
            time = index.clamp(0, schedule.num_steps - 1) / schedule.num_steps
            lost = torch.minimum(torch.maximum(lost, table[1]), table[-1])  # of the time told
        if kind == "v":
            return time, ((-torch.expm1(-lost)).sqrt(), torch.exp(-0.5 * lost))
        return time, (nothing, -noise)

    def _on(self, name: str, device: torch.device) -> Tensor:
        """These numbers in float64 on a device, moved there once: a buffer would be rounded."""
        if (name, device) not in self._tables:
            with torch.inference_mode(False):
                numbers = torch.tensor(getattr(self, name), dtype=torch.float64, device=device)
            self._tables[name, device] = numbers
        return self._tables[name, device]


def _shaped(values: Tensor, x: Tensor) -> Tensor:
    """[B] as a factor of x [B, C, ...], in its dtype."""
    return values.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
