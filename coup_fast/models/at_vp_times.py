"""Networks trained on other Gaussian noise, asked at the times of a variance-preserving schedule.

A VP state x = √ᾱ x₀ + σ z holds the same x₀ and z as y = x/√ᾱ = x₀ + r z with r = σ/√ᾱ. So a
network that knows x₀ or z at (y, r), which is what variance-exploding and EDM networks know, is a
network of the VP process after a division of its input: exact, whatever either was trained on
(Karras et al., "Elucidating the design space of diffusion models", NeurIPS 2022, appendix B).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from coup_fast.schedules import VPSchedule


class AtVPTimes(nn.Module):
    """`network(y, r)` as `f(x, t)` of a VP process, for `ScoreModel(time_scale=1)`.

    Args:
        network: called with y = x/√ᾱ(t) [B, C, ...] and r = σ/√ᾱ [B], both in the dtype of x and t
            it is given; returns what the ScoreModel's kind says ("eps": z; "x0": x₀).
        schedule: the VP process.
    """

    def __init__(self, network: nn.Module, schedule: VPSchedule | None = None) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule or VPSchedule()
        self.in_channels: Any = getattr(network, "in_channels", None)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: [B, C, ...], the VP state; t: [B] in [0, 1]. Returns the network's output."""
        time = t.to(torch.float64)
        schedule = self.schedule
        level = 0.5 * (schedule.beta_max - schedule.beta_min) * time**2 + schedule.beta_min * time
        signal = torch.exp(-0.5 * level).to(x.dtype)
        ratio = torch.expm1(level).sqrt().to(t.dtype)  # level = -log ᾱ, so σ/√ᾱ = √(1/ᾱ - 1)
        out: Tensor = self.network(x / signal.reshape(-1, *(1,) * (x.ndim - 1)), ratio)
        return out
