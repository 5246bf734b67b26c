"""A score network without attention or activation functions, faster on a CPU than the U-Net.

NAFNet of Chen et al. 2022, "Simple baselines for image restoration" (arXiv 2204.04676): each block
is a depthwise convolution between two 1x1 convolutions, then two more 1x1 convolutions; products of
halves of the channels take the place of activation functions, and the skips between the two ways
are added and not concatenated. Two things are ours: pixels are folded into channels first, as in
`UNet`, and the time enters each block as a scale and a shift of its first norm (Dhariwal and Nichol
2021). Normalisation is per pixel, and the only mean over pixels is an image's own, so a score does
not depend on the batch.

Knows nothing of schedules or methods; needs torch alone. Every part can be differentiated twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coup_fast.models.unet import time_embedding


class PixelNorm(nn.Module):
    """LayerNorm over the channels of each pixel of [B, C, H, W]; returns channels_last."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        normed = F.layer_norm(rows, rows.shape[-1:], self.weight, self.bias)
        return normed.permute(0, 3, 1, 2)


def gate(x: Tensor) -> Tensor:
    """The product of the two halves of the channels: [B, 2C, H, W] to [B, C, H, W]."""
    first, second = x.chunk(2, dim=1)
    return first * second


class NAFBlock(nn.Module):
    """Spatial mixing, then channel mixing, each added to x by a learned weight per channel.

    The weights start at zero, so that a new block is the identity.
    """

    def __init__(self, channels: int, time_dim: int) -> None:
        super().__init__()
        self.time = nn.Linear(time_dim, 2 * channels) if time_dim else None
        self.norm1 = PixelNorm(channels)
        self.expand1 = nn.Conv2d(channels, 2 * channels, 1)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.attention = nn.Conv2d(channels, channels, 1)
        self.project1 = nn.Conv2d(channels, channels, 1)
        self.norm2 = PixelNorm(channels)
        self.expand2 = nn.Conv2d(channels, 2 * channels, 1)
        self.project2 = nn.Conv2d(channels, channels, 1)
        self.weight1 = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.weight2 = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        h = self.norm1(x)
        if self.time is not None and time is not None:
            scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
            h = torch.addcmul(shift, h, 1 + scale)
        h = gate(self.depthwise(self.expand1(h)))
        h = h * self.attention(h.mean(dim=(2, 3), keepdim=True))
        x = torch.addcmul(x, self.project1(h), self.weight1)
        h = gate(self.expand2(self.norm2(x)))
        return torch.addcmul(x, self.project2(h), self.weight2)


class NAFNet(nn.Module):
    """Noise, score or NCSN network: `network(x, t) -> Tensor` of x's shape.

    Args:
        in_channels: image channels C.
        channels: width of each level; level i works at 1/2**i of the input's side.
        out_channels: output channels; default C. 2C gives room for a learned variance.
        blocks: blocks per level on the way down, and as many on the way up. The last level has
            no way up: its blocks stand between the two.
        patch: side of the pixel squares folded into channels before the first level (and unfolded
            after the last).
        time_conditioned: False builds a network that ignores t (an unconditional NCSNv2).

    Raises:
        ValueError: if the channels or the input's height or width do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int] = (64, 128, 192),
        *,
        out_channels: int | None = None,
        blocks: int = 2,
        patch: int = 2,
        time_conditioned: bool = True,
    ) -> None:
        super().__init__()
        if in_channels < 1 or not channels or min(channels) < 1 or min(blocks, patch) < 1:
            raise ValueError(
                f"NAFNet needs positive sizes, got in_channels={in_channels}, "
                f"channels={tuple(channels)}, blocks={blocks}, patch={patch}."
            )
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "channels": list(channels),
            "out_channels": out_channels or in_channels,
            "blocks": blocks,
            "patch": patch,
            "time_conditioned": time_conditioned,
        }
        width = channels[0]
        self.patch = patch
        self.divisor = patch * 2 ** (len(channels) - 1)
        time_dim = 2 * width if time_conditioned else 0
        self.time_features = time_dim
        self.time_mlp = (
            nn.Sequential(nn.Linear(time_dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
            if time_conditioned
            else None
        )
        self.stem = nn.Conv2d(in_channels * patch**2, width, 3, padding=1)
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level, size in enumerate(channels):
            self.down.append(nn.ModuleList(NAFBlock(size, time_dim) for _ in range(blocks)))
            if level < len(channels) - 1:
                below = channels[level + 1]
                self.downsample.append(nn.Conv2d(size, below, 2, stride=2))
                self.upsample.append(nn.Conv2d(below, 4 * size, 1))
                self.up.append(nn.ModuleList(NAFBlock(size, time_dim) for _ in range(blocks)))
        self.norm = PixelNorm(width)
        self.head = nn.Conv2d(width, (out_channels or in_channels) * patch**2, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """x: [B, C, H, W] float; t: [B] float in network units, unused without conditioning."""
        if x.shape[-1] % self.divisor or x.shape[-2] % self.divisor:
            raise ValueError(
                f"height and width must be divisible by {self.divisor}, got {tuple(x.shape)}."
            )
        time: Tensor | None = None
        if self.time_mlp is not None:
            if t is None:
                raise ValueError("this network is conditioned on time: call network(x, t).")
            time = F.silu(self.time_mlp(time_embedding(t, self.time_features).to(x.dtype)))
        h = self.stem(torch.pixel_unshuffle(x, self.patch))
        skips = []
        for level, row in enumerate(self.down):
            for block in row:  # type: ignore[attr-defined]
                h = block(h, time)
            if level < len(self.downsample):
                skips.append(h)
                h = self.downsample[level](h)
        for row, upsample in zip(reversed(self.up), reversed(self.upsample), strict=True):
            h = skips.pop() + torch.pixel_shuffle(upsample(h), 2)
            for block in row:  # type: ignore[attr-defined]
                h = block(h, time)
        folded: Tensor = self.head(self.norm(h))
        return torch.pixel_shuffle(folded, self.patch)
