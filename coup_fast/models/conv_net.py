"""A classifier for 32x32 colour images that trains in minutes on a processor; needs torch alone.

The shape is that of the fast CIFAR-10 networks (Jordan 2024, arXiv 2404.00498): a fixed 2x2
convolution that whitens patches, then groups of convolution, max pooling, batch normalisation and
GELU. GELU keeps the Hessian of the confidence, which an exact gradient through guided purification
needs, different from zero. It takes pixels in [0, 1]; in eval mode an image's logits do not depend
on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Pixels [B, C, 32, 32] in [0, 1] -> logits [B, num_classes].

    Args:
        in_channels: image channels C.
        num_classes: number of classes K.
        widths: channels of each group; every group halves the resolution.
        gain: what the last linear layer's output is multiplied by.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        *,
        widths: Sequence[int] = (64, 128, 256),
        gain: float = 0.125,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "num_classes": num_classes,
            "widths": list(widths),
            "gain": gain,
        }
        self.gain = gain
        patch = 4 * in_channels
        self.whiten = nn.Conv2d(in_channels, 2 * patch, 2)
        self.whiten.requires_grad_(False)  # set by `whiten_patches`, not trained
        layers: list[nn.Module] = [nn.GELU()]
        width = 2 * patch
        for out in widths:
            layers += [_conv(width, out), nn.MaxPool2d(2), _norm(out), nn.GELU()]
            layers += [_conv(out, out), _norm(out), nn.GELU()]
            width = out
        self.groups = nn.Sequential(*layers)
        self.head = nn.Linear(width, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, C, H, W] float in [0, 1]; returns logits [B, K]."""
        features = self.groups(self.whiten(images)).amax(dim=(2, 3))
        logits: Tensor = self.head(features) * self.gain
        return logits

    @torch.no_grad()
    def whiten_patches(self, images: Tensor, eps: float = 5e-4) -> None:
        """Set the first convolution from images [N, C, H, W] in [0, 1].

        Its filters are the principal directions of 2x2 patches, each over the square root of its
        variance plus eps, and their negatives; its bias centres them.
        """
        patches = nn.functional.unfold(images, 2).transpose(1, 2).flatten(0, 1).double()
        values, directions = torch.linalg.eigh(torch.cov(patches.T))
        filters = directions.T / (values + eps).sqrt()[:, None]
        shape = self.whiten.weight[: len(filters)].shape
        self.whiten.weight.copy_(torch.cat([filters, -filters]).float().view(-1, *shape[1:]))
        assert self.whiten.bias is not None
        shift = filters @ patches.mean(0)
        self.whiten.bias.copy_(torch.cat([-shift, shift]).float())


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    """3x3, no bias; its first filters start as the identity, so that signals pass at the start."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight[:in_channels])
    return conv


def _norm(channels: int) -> nn.BatchNorm2d:
    """Batch normalisation with a bias and no scale: the next convolution has the scale."""
    norm = nn.BatchNorm2d(channels, eps=1e-5)
    norm.weight.requires_grad_(False)
    return norm
