"""Defences that are not ours, for the evaluation to load by name. Not a test."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from helpers import tiny


class Hooked(nn.Module):
    """Adds noise that is a function of sample ids and draw, one image at a time, and classifies."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.classifier, self.scale = tiny.PerSample(tiny.TinyClassifier()), scale
        self.draws: list[int] = []

    def set_draw(self, draw: int, sample_ids: Tensor) -> None:
        self.draws.append(draw)
        self.sample_ids = sample_ids

    def forward(self, u: Tensor) -> Tensor:
        rows = []
        for row, name in zip(u, self.sample_ids.tolist(), strict=True):
            generator = torch.Generator().manual_seed((self.draws[-1] * 1000 + name) % 2**31)
            rows.append(row + self.scale * torch.randn(row.shape, generator=generator))
        return self.classifier(torch.stack(rows))


def hooked(scale: float = 0.2) -> nn.Module:
    return Hooked(scale)


def lying(scale: float = 0.2) -> Callable[[Tensor], Tensor]:
    """Its noise comes from torch's generator, and its gradient is a third of the right one."""
    classifier = tiny.TinyClassifier()

    def forward(u: Tensor) -> Tensor:
        u = u + scale * torch.randn_like(u)
        return classifier(u / 3 + 2 * u.detach() / 3)

    return forward


def unrepeatable() -> Callable[[Tensor], Tensor]:
    classifier, generator = tiny.TinyClassifier(), torch.Generator().manual_seed(3)
    return lambda u: classifier(u + 0.2 * torch.randn(u.shape, generator=generator))


def cut() -> Callable[[Tensor], Tensor]:
    classifier = tiny.TinyClassifier()
    return lambda u: classifier(u.detach())


def nothing() -> None:
    return None
