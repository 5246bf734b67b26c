"""Networks trained on other Gaussian noise, asked at the times of a variance-preserving schedule.

A VP state x = √ᾱ x₀ + σ z holds the same x₀ and z as y = x/√ᾱ = x₀ + r z with r = σ/√ᾱ. So a
network that knows x₀ or z at (y, r), which is what variance-exploding and EDM networks know, is a
network of the VP process after a division of its input: exact, whatever either was trained on
(Karras et al., "Elucidating the design space of diffusion models", NeurIPS 2022, appendix B).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from coup_fast._torch.calls import output_of
from coup_fast._torch.modules import declared_channels, mode_of
from coup_fast.schedules import VPSchedule


class AtVPTimes(nn.Module):
    """A denoiser D(y, r), told its noise level, as f(x, t) of a VP process.

        ScoreModel(AtVPTimes(denoiser), "x0")

    Args:
        network: module or callable, called with y = x/√ᾱ(t) [B, C, ...], which is an image in
            [-1, 1] with noise of standard deviation r, and with r = σ/√ᾱ [B], both in the dtype of
            the x and t it is given. It returns what the ScoreModel's kind says ("eps": the noise of
            standard deviation 1; "x0": the clean image), or an object with such a `.sample`.
        schedule: the VP process, default `VPSchedule()`. The ScoreModel takes it from here, with
            `time_scale=1`, and refuses another.

    Raises:
        TypeError: network cannot be called, or schedule is no VPSchedule.
    """

    def __init__(self, network: Callable[..., Any], schedule: VPSchedule | None = None) -> None:
        super().__init__()
        if not callable(network):
            raise TypeError(
                f"network must be a module or a callable D(y, r), got {type(network).__name__}"
            )
        if not isinstance(schedule, VPSchedule | None):
            raise TypeError(f"schedule must be a VPSchedule, got {type(schedule).__name__}")
        self.training = mode_of(network)
        self.network = network
        self.schedule = schedule or VPSchedule()

    @property
    def asked_at(self) -> VPSchedule:
        """The schedule at whose times in [0, 1] it is called; `ScoreModel` reads it."""
        return self.schedule

    @property
    def in_channels(self) -> int | None:
        """Image channels the network declares, or None."""
        return declared_channels(self.network)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: [B, C, ...], the VP state; t: [B] in [0, 1]. Returns the network's output."""
        time = t.to(torch.float64)
        schedule = self.schedule
        level = 0.5 * (schedule.beta_max - schedule.beta_min) * time**2 + schedule.beta_min * time
        signal = torch.exp(-0.5 * level).to(x.dtype)
        ratio = torch.expm1(level).sqrt().to(t.dtype)  # level = -log ᾱ, so σ/√ᾱ = √(1/ᾱ - 1)
        y = x / signal.reshape(-1, *(1,) * (x.ndim - 1))
        return output_of(self.network(y, ratio), y)
