"""Which images a step sees, and its random numbers: a function of seed, epoch and step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from coup_fast.training.trainer import TrainConfig


def generator_for(seed: int, stream: str, index: int) -> torch.Generator:
    """A CPU generator that is a function of its three arguments."""
    digest = hashlib.sha256(f"{seed}/{stream}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def as_pixels(images: Tensor) -> Tensor:
    """Images, uint8 or float, as float32 in [0, 1]."""
    return images.float() / 255.0 if images.dtype == torch.uint8 else images.float()


def batches(
    images: Tensor, labels: Tensor, config: TrainConfig, start: int
) -> Iterator[tuple[int, Tensor, Tensor, torch.Generator]]:
    """Steps `start` to `steps` - 1: (step, images [B, C, H, W] float32 in [0, 1], labels, rng).

    images: [N, C, H, W] uint8 or float. An epoch is a permutation of the N images, its remainder
    dropped.
    """
    per_epoch = len(images) // config.batch_size
    if per_epoch == 0:
        raise ValueError(f"{len(images)} images are fewer than one batch of {config.batch_size}.")
    epoch, order = -1, torch.empty(0, dtype=torch.int64)
    mirrored = torch.rand(len(images), generator=generator_for(config.seed, "mirror", 0)) < 0.5
    for step in range(start, config.steps):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = torch.randperm(
                len(images), generator=generator_for(config.seed, "order", epoch)
            )
        first = (step % per_epoch) * config.batch_size
        rows = order[first : first + config.batch_size]
        pixels = as_pixels(images[rows])
        if config.alternating_flip:
            turn = mirrored[rows] ^ (epoch % 2 == 1)
            pixels = torch.where(turn[:, None, None, None], pixels.flip(3), pixels)
        yield step, pixels, labels[rows], generator_for(config.seed, "noise", step)
