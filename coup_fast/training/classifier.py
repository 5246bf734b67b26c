"""The classifier's objective and its accuracy; the loop is trainer.py's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def shifted(images: Tensor, generator: torch.Generator, reach: int, flip: bool) -> Tensor:
    """Each image moved by up to `reach` pixels both ways (zeros come in), mirrored if `flip`.

    images: [B, C, H, W] float. Returns the same shape.
    """
    count, _, height, width = images.shape
    dy, dx = torch.randint(0, 2 * reach + 1, (2, count), generator=generator)
    rows = dy[:, None] + torch.arange(height)
    cols = dx[:, None] + torch.arange(width)
    if flip:
        mirror = torch.rand(count, generator=generator) < 0.5
        cols = torch.where(mirror[:, None], cols.flip(1), cols)
    padded = F.pad(images, (reach,) * 4)
    index = torch.arange(count)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], cols[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


def classifier_loss(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    rows: slice = slice(None),
    *,
    reach: int = 2,
    flip: bool = False,
    smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy on randomly shifted images [B, C, H, W] in [0, 1], labels [B] int64.

    rows: the images of the batch that count, for a process that has a share of it. All have the
    random numbers that they have in the whole batch.
    """
    logits = network(shifted(images, generator, reach, flip)[rows])
    return F.cross_entropy(logits.float(), labels[rows], label_smoothing=smoothing)


@torch.no_grad()
def count_correct(network: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> int:
    """How many images (uint8 or float in [0, 1]) the network, in eval mode, gets right."""
    network.eval()
    right = 0
    for pixels, truth in zip(torch.split(images, batch), torch.split(labels, batch), strict=True):
        x = pixels.float() / 255.0 if pixels.dtype == torch.uint8 else pixels
        right += int((network(x).argmax(dim=1) == truth).sum())
    return right
