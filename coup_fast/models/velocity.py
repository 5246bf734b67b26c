"""Networks that predict v as noise networks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coup_fast._torch.calls import output_of
from coup_fast.schedules import DiscreteSchedule


class NoiseOfVelocity(nn.Module):
    """A network that predicts v = √ᾱ ε - σ x₀ as one that predicts ε = √ᾱ v + σ x.

    Salimans & Ho, "Progressive distillation" (ICLR 2022), appendix D. Channels behind those of x
    (a learned variance) pass through.

    Args:
        network: called with x and the index. schedule: of N steps, whose index t is.
        in_channels: of its images, or None.
    """

    levels: Tensor

    def __init__(
        self, network: nn.Module, schedule: DiscreteSchedule, in_channels: int | None
    ) -> None:
        super().__init__()
        self.network = network
        self.in_channels: Any = in_channels
        alpha_bar = schedule.alpha_bar(np.arange(schedule.num_steps))
        levels = torch.from_numpy(np.stack([np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)]))
        self.register_buffer("levels", levels, persistent=False)  # [2, N]: √ᾱ, σ

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: [B, C, H, W]; t: [B], indices. Returns ε, shaped as the network's output."""
        out = output_of(self.network(x, t), x)
        velocity, rest = out[:, : x.shape[1]], out[:, x.shape[1] :]
        levels = self.levels[:, t.round().long()].to(out.dtype)
        signal, noise = levels.reshape(2, -1, 1, 1, 1)
        return torch.cat([signal * velocity + noise * x, rest], dim=1)
