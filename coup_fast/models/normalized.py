"""Classifiers of normalised images as classifiers of pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coup_fast import checks
from coup_fast._torch.calls import logits_of
from coup_fast._torch.modules import dtype_of, first_parameter, mode_of

Numbers = float | Sequence[float] | Tensor


class Normalized(nn.Module):
    """`network((pixels - mean) / std)`: a classifier of normalised images as one of pixels.

    Args:
        network: module or callable, normalised images [B, C, H, W] -> logits [B, K], or an object
            with such `.logits`.
        mean: one number for each channel, or one for all of them; in [0, 1], as pixels are.
        std: goes with mean; each > 0.

    Mean and std are buffers: they move with the module and are saved with it. They start on the
    device and in the dtype of the network's parameters. Gradients go through, to pixels and, where
    they are trainable, to parameters.

    Raises:
        TypeError: network cannot be called, or mean or std is no number and no sequence of them.
        ValueError: they are out of range, or not equally many.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: Callable[[Tensor], Any], mean: Numbers, std: Numbers) -> None:
        super().__init__()
        if not callable(network):
            raise TypeError(f"network must be a module or a callable, got {type(network).__name__}")
        means = [_checked("mean", value) for value in numbers_of("mean", mean)]
        stds = [
            checks.number("each of std", value, 0, above=True) for value in numbers_of("std", std)
        ]
        if len(means) != len(stds):
            raise ValueError(
                f"mean and std must be equally many, one number per channel, got {len(means)} and "
                f"{len(stds)}"
            )
        self.training = mode_of(network)
        self.network = network
        self.in_channels = len(means) if not isinstance(mean, int | float) else None
        place = first_parameter(network)
        options: dict[str, Any] = {
            "dtype": dtype_of(network) or torch.float32,
            "device": None if place is None else place.device,
        }
        self.register_buffer("mean", torch.tensor(means, **options).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(stds, **options).reshape(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, C, H, W] in [0, 1]; returns logits [B, K]."""
        logits: Tensor = logits_of(self.network((images - self.mean) / self.std))
        return logits


def numbers_of(name: str, given: Any) -> list[Any]:
    """The numbers of an argument: of a sequence, of a tensor [C] or [C, 1, 1], or the one."""
    if isinstance(given, int | float):
        return [given]
    if hasattr(given, "tolist"):
        shape = tuple(given.shape)
        if sum(size != 1 for size in shape) <= 1:
            given = given.reshape(-1).tolist()
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) == 0:
        got = list(given.shape) if isinstance(given, Tensor) else repr(given)
        raise TypeError(f"{name} must be numbers, one per channel, got {got}")
    return list(given)


def _checked(name: str, value: Any) -> float:
    number = checks.number(f"each of {name}", value)
    if not 0 <= number <= 1:
        hint = "; divide those of 8-bit images by 255" if number > 1 else ""
        raise ValueError(f"each of {name} must be in [0, 1], as pixels are, got {number:g}{hint}")
    return number
