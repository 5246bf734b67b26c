"""Weights by formula, so that known answers of other code can be stored. Not a test."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def scatter(*shape: int, salt: int = 0) -> Tensor:
    """A tensor of that shape with values in [-1, 1) that look uniform and independent."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    values = 43758.5453 * torch.sin(12.9898 * index + 78.233 * salt + 1.0)
    return (2 * (values - values.floor()) - 1).float().reshape(shape)


def fill(module: nn.Module) -> nn.Module:
    """`module` in eval mode, every parameter set by formula, none zero, about unit gain a layer."""
    with torch.no_grad():
        for salt, (name, parameter) in enumerate(sorted(module.named_parameters())):
            values = scatter(*parameter.shape, salt=salt)
            if parameter.ndim > 1:
                parameter.copy_(values * (3.0 / parameter[0].numel()) ** 0.5)
            else:
                unit = name.endswith(("weight", "gamma"))
                parameter.copy_(0.1 * values + (1.0 if unit else 0.0))
    return module.eval()


def sample(out: Tensor) -> list[float]:
    """Nine values of a tensor, spread over it, to compare with stored ones."""
    flat = out.detach().double().flatten()
    return flat[torch.linspace(0, len(flat) - 1, 9).long()].tolist()
