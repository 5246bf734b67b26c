"""DDPM's U-Net with the parameter names of its PyTorch releases.

Ho et al., "Denoising diffusion probabilistic models" (NeurIPS 2020), appendix B. The names are
those of pesser/pytorch_diffusion, which ermongroup/ddim and SDEdit (CelebA-HQ) have too. Knows
nothing of schedules, files or methods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coup_fast.models.guided_diffusion_net import Upsample


@dataclass(frozen=True)
class DDPMConfig:
    """The network's shape.

    Args:
        in_channels: image channels. out_channels: as many.
        channels: width of the first convolution. widths: of each level.
        num_blocks: residual blocks per level on the way down; one more on the way up.
        attention: for each level, whether its blocks attend.
        learned_resampling: whether levels are joined by convolutions, not means and copies.
    """

    in_channels: int = 3
    out_channels: int = 3
    channels: int = 128
    widths: tuple[int, ...] = (128, 256, 256, 256)
    num_blocks: int = 2
    attention: tuple[bool, ...] = (False, True, False, False)
    learned_resampling: bool = True


def time_features(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal features [B, dim] float32 of indices t [B]: sines, then cosines, then a 0 if odd.

    Rounded in the order of the released code.
    """
    half = dim // 2
    step = math.log(10000) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * -step)
    angle = t.float()[:, None] * frequencies
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, dim % 2))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """shortcut(x) + conv(silu(norm(conv(silu(norm x)) + time)))."""

    def __init__(self, channels: int, out_channels: int, time_dim: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.temb_proj = nn.Linear(time_dim, out_channels)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: [B, C, H, W]; time: [B, time_dim] after its SiLU."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.temb_proj(time)[:, :, None, None]
        out: Tensor = self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))
        return out


class Attention(nn.Module):
    """x plus self-attention of one head over positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # [B, 1, T, C]: the fused kernels want a dimension of heads.
        query, key, value = (
            part(h).flatten(2).transpose(1, 2).unsqueeze(1).contiguous()
            for part in (self.q, self.k, self.v)
        )
        h = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))
        return out


class Downsample(nn.Module):
    """Halving by a 3x3 convolution padded below and to the right, or by the mean of squares."""

    def __init__(self, channels: int, learned: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Level(nn.Module):
    """Blocks of one resolution, each with its attention, and the change to the next one."""

    downsample: nn.Module
    upsample: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.block, self.attn = nn.ModuleList(), nn.ModuleList()

    def add(self, channels: int, out_channels: int, time_dim: int, attention: bool) -> None:
        """Append a block, and its attention if the level attends."""
        self.block.append(ResBlock(channels, out_channels, time_dim))
        if attention:
            self.attn.append(Attention(out_channels))

    def step(self, number: int, x: Tensor, time: Tensor) -> Tensor:
        """Block `number` and its attention."""
        out: Tensor = self.block[number](x, time)
        return self.attn[number](out) if len(self.attn) else out


class DDPMUNet(nn.Module):
    """Noise network of DDPM: `network(x, t) -> [B, out_channels, H, W]`.

    Raises:
        ValueError: a width that 32 groups do not divide.
    """

    def __init__(self, config: DDPMConfig) -> None:
        super().__init__()
        widths, learned = config.widths, config.learned_resampling
        bad = [width for width in (config.channels, *widths) if width % 32]
        if bad:
            raise ValueError(f"every width must be a multiple of 32, got {bad[0]}")
        self.config = config
        self.in_channels, self.out_channels = config.in_channels, config.out_channels
        self.divisor = 2 ** (len(widths) - 1)
        time_dim = 4 * config.channels
        dense = [nn.Linear(config.channels, time_dim), nn.Linear(time_dim, time_dim)]
        self.temb = nn.ModuleDict({"dense": nn.ModuleList(dense)})
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        width, skips = config.channels, [config.channels]
        for number, (out, attention) in enumerate(zip(widths, config.attention, strict=True)):
            level = Level()
            for _ in range(config.num_blocks):
                level.add(width, out, time_dim, attention)
                width = out
                skips.append(width)
            if number < len(widths) - 1:
                level.downsample = Downsample(width, learned)
                skips.append(width)
            self.down.append(level)
        self.mid = nn.ModuleDict(
            {
                "block_1": ResBlock(width, width, time_dim),
                "attn_1": Attention(width),
                "block_2": ResBlock(width, width, time_dim),
            }
        )
        ups = []
        for number in reversed(range(len(widths))):
            level = Level()
            for _ in range(config.num_blocks + 1):
                level.add(width + skips.pop(), widths[number], time_dim, config.attention[number])
                width = widths[number]
            if number:
                level.upsample = Upsample(width, learned)
            ups.append(level)
        self.up = nn.ModuleList(reversed(ups))
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: [B, C, H, W] in [-1, 1] plus noise; t: [B], indices from 0.

        Returns [B, out_channels, H, W]. Raises ValueError for sizes that do not halve.
        """
        if x.shape[-1] % self.divisor or x.shape[-2] % self.divisor:
            raise ValueError(
                f"height and width must be divisible by {self.divisor}, got {list(x.shape)}"
            )
        dense: Any = self.temb["dense"]
        first, second = dense
        features = time_features(t, self.config.channels).to(first.weight.dtype)
        time = F.silu(second(F.silu(first(features))))  # every block begins with this SiLU
        skips = [self.conv_in(x)]
        downs: list[Any] = list(self.down)
        for number, level in enumerate(downs):
            for block in range(self.config.num_blocks):
                skips.append(level.step(block, skips[-1], time))
            if number < len(downs) - 1:
                skips.append(level.downsample(skips[-1]))
        h = self.mid["attn_1"](self.mid["block_1"](skips[-1], time))
        h = self.mid["block_2"](h, time)
        ups: list[Any] = list(self.up)
        for number, level in reversed(list(enumerate(ups))):
            for block in range(self.config.num_blocks + 1):
                h = level.step(block, torch.cat([h, skips.pop()], dim=1), time)
            if number:
                h = level.upsample(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out
