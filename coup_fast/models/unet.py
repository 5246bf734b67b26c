"""A small U-Net for score models of 28x28 and 32x32 images; needs torch alone.

Knows nothing of schedules or methods: it maps a noisy image and a time to an image. The parts are
the usual ones of diffusion models (Ho et al. 2020, Dhariwal & Nichol 2021): residual blocks of
GroupNorm, SiLU and 3x3 convolutions, the time entering each block as a scale and a shift.
Normalisation is per sample (GroupNorm), so an image's score does not depend on its batch.

Why a module of ours and not diffusers' UNet2DModel: loading the bundled weights must need nothing
beyond torch and safetensors, and at this size it is faster (measured in MODEL_CARD_mnist.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def time_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal features of a time in network units (Ho et al. 2020).

    Args:
        t: [B] float, 0 to 999 for the usual `time_scale`.
        dim: number of features, even.

    Returns:
        [B, dim] float32: cosines, then sines, of t at dim/2 geometric frequencies.
    """
    half = dim // 2
    exponent = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angle = t.float()[:, None] * torch.exp(-math.log(max_period) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`, past its slow path: a half-precision tensor in channels_last on a CPU.

    With fewer than 16 channels a group torch does not vectorise it, and takes 4.6 to 8.9 ns an
    element where a contiguous tensor takes 0.4 to 0.7 (`benchmarks/group_norm.py`, one AVX-512
    core). So a copy there and back is cheaper.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] with each group's mean 0 and variance 1, scaled and shifted."""
        narrow = self.num_channels < 16 * self.num_groups
        half = x.dtype in (torch.bfloat16, torch.float16)
        if not (narrow and half and x.device.type == "cpu") or x.is_contiguous():
            return super().forward(x)
        normed = super().forward(x.contiguous())
        return normed.contiguous(memory_format=torch.channels_last)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with at most 8 groups of at least 4 channels where the count allows it."""
    return GroupNorm(math.gcd(8, max(1, channels // 4)), channels)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm x))))), the time as scale and shift of the second norm."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * out_channels) if time_dim else None
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        self.skip = (
            nn.Conv2d(in_channels, out_channels, 1)
            if in_channels != out_channels
            else nn.Identity()
        )

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.time is not None and time is not None:
            scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
            h = torch.addcmul(shift, h, 1 + scale)
        out: Tensor = self.skip(x) + self.conv2(F.silu(h))
        return out


class UNet(nn.Module):
    """Noise, score or NCSN network: `network(x, t) -> Tensor` of x's shape.

    Args:
        in_channels: image channels C.
        out_channels: output channels; default C. 2C gives room for a learned variance.
        channels: width of each level; level i works at 1/2**i of the input's side.
        blocks: residual blocks per level on the way down (and as many on the way up).
        patch: side of the pixel squares folded into channels before the first level (and unfolded
            after the last): 2 does the work of a 28x28 image at 14x14, where a CPU is at home.
        time_conditioned: False builds a network that ignores t (an unconditional NCSNv2).

    Raises:
        ValueError: if the channels or the input's height or width do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int] = (32, 64, 64),
        *,
        out_channels: int | None = None,
        blocks: int = 1,
        patch: int = 1,
        time_conditioned: bool = True,
    ) -> None:
        super().__init__()
        if in_channels < 1 or not channels or min(channels) < 1 or min(blocks, patch) < 1:
            raise ValueError(
                f"UNet needs positive sizes, got in_channels={in_channels}, "
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
        self.time_features = 4 * width if time_conditioned else 0
        time_dim = 4 * width if time_conditioned else 0
        self.time_mlp = (
            nn.Sequential(nn.Linear(time_dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
            if time_conditioned
            else None
        )
        self.stem = nn.Conv2d(in_channels * patch**2, width, 3, padding=1)
        self.down = nn.ModuleList()
        self.downsample = nn.ModuleList()
        skips = [width]
        for level, out in enumerate(channels):
            row = nn.ModuleList()
            for _ in range(blocks):
                row.append(ResidualBlock(width, out, time_dim))
                width = out
                skips.append(width)
            self.down.append(row)
            if level < len(channels) - 1:
                self.downsample.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
        self.middle = ResidualBlock(width, width, time_dim)
        self.up = nn.ModuleList()
        self.upsample = nn.ModuleList()
        for level, out in reversed(list(enumerate(channels))):
            row = nn.ModuleList()
            for _ in range(blocks):
                row.append(ResidualBlock(width + skips.pop(), out, time_dim))
                width = out
            self.up.append(row)
            if level:
                self.upsample.append(nn.Conv2d(width, width, 3, padding=1))
        self.norm = group_norm(width + skips[-1])
        folded = (out_channels or in_channels) * patch**2
        self.head = nn.Conv2d(width + skips.pop(), folded, 3, padding=1)
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
        skips = [h]
        for level, row in enumerate(self.down):
            for block in row:  # type: ignore[attr-defined]
                h = block(h, time)
                skips.append(h)
            if level < len(self.downsample):
                h = self.downsample[level](h)
        h = self.middle(h, time)
        for level, row in enumerate(self.up):
            for block in row:  # type: ignore[attr-defined]
                h = block(torch.cat([h, skips.pop()], dim=1), time)
            if level < len(self.upsample):
                h = self.upsample[level](F.interpolate(h, scale_factor=2.0, mode="nearest"))
        h = torch.cat([h, skips.pop()], dim=1)
        folded: Tensor = self.head(F.silu(self.norm(h)))
        return torch.pixel_shuffle(folded, self.patch)


class EnergyUNet(nn.Module):
    """A scalar energy E(x, t) = g(t) ⟨x, f(x, t)⟩, where f is a `UNet`.

    -dE/dx has the U-Net's resolution. g(t) is exp of a learned function of t and follows the
    growth of a score as the noise level falls; without time conditioning it is left out.
    `EnergyModel` turns the energy into a score network.

    Args:
        in_channels: image channels C.
        channels: as for `UNet`.
        **arguments: the other arguments of `UNet`.
    """

    def __init__(self, in_channels: int, channels: Sequence[int] = (32, 64, 64), **arguments: Any):
        super().__init__()
        self.body = UNet(in_channels, channels, **arguments)
        nn.init.normal_(self.body.head.weight, std=1e-2)
        self.config = self.body.config
        features = self.body.time_features
        self.gain = (
            nn.Sequential(nn.Linear(features, 32), nn.SiLU(), nn.Linear(32, 1))
            if features
            else None
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: [B, C, H, W] float; t: [B] float in network units. Returns [B]."""
        energy: Tensor = (x * self.body(x, t)).flatten(1).sum(dim=1)
        if self.gain is not None:
            embedded = time_embedding(t, self.body.time_features).to(x.dtype)
            energy = energy * self.gain(embedded)[:, 0].exp()
        return energy
