"""The U-Net of lucidrains/denoising-diffusion-pytorch (v2), with the names of its checkpoints.

Knows nothing of schedules, files or methods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class AttentionConfig:
    """One attention: over all positions ("full") or the linear kind; heads and their width."""

    full: bool
    heads: int
    head_dim: int
    memory: int = 4


@dataclass(frozen=True)
class LucidrainsConfig:
    """The network's shape.

    Args:
        in_channels: image channels C. out_channels: C, or 2C with the learned variance last.
        self_condition: the network was also trained on its own estimate of the image.
        channels: `dim` of the package. init_channels: of the first convolution.
        widths: of each level. down, up: the attention of each level on the way down, and on the
            way up in the order of the names. mid: the one between.
    """

    in_channels: int
    out_channels: int
    self_condition: bool
    channels: int
    init_channels: int
    widths: tuple[int, ...]
    down: tuple[AttentionConfig, ...]
    mid: AttentionConfig
    up: tuple[AttentionConfig, ...]


def time_features(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal features [B, dim] float32 of indices t [B]: sines, then cosines."""
    half = dim // 2
    step = math.log(10000) / (half - 1)
    frequencies = torch.exp(torch.arange(half, device=t.device) * -step)
    angle = t.float()[:, None] * frequencies
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class RMSNorm(nn.Module):
    """x over its length along the channels, times √C g."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.normalize(x, dim=1) * self.g * x.shape[1] ** 0.5
        return out


class Block(nn.Module):
    """silu(norm(conv x), scaled and shifted by the time)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm = RMSNorm(out_channels)

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        h: Tensor = self.norm(self.proj(x))
        if scale is not None and shift is not None:
            h = h * (scale + 1) + shift
        return F.silu(h)


class ResBlock(nn.Module):
    """res_conv(x) + block2(block1(x, time))."""

    def __init__(self, channels: int, out_channels: int, time_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, 2 * out_channels))
        self.block1 = Block(channels, out_channels)
        self.block2 = Block(out_channels, out_channels)
        self.res_conv = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: [B, C, H, W]; time: [B, time_dim]."""
        scale, shift = self.mlp(time)[:, :, None, None].chunk(2, dim=1)
        out: Tensor = self.block2(self.block1(x, scale, shift)) + self.res_conv(x)
        return out


class Attention(nn.Module):
    """x plus self-attention over its positions and a few learned ones, full or linear."""

    def __init__(self, channels: int, config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        inner, places = config.heads * config.head_dim, (config.memory, config.head_dim)
        self.norm = RMSNorm(channels)
        self.mem_kv = nn.Parameter(
            torch.randn(2, config.heads, *(places if config.full else places[::-1]))
        )
        self.to_qkv = nn.Conv2d(channels, 3 * inner, 1, bias=False)
        out = nn.Conv2d(inner, channels, 1)
        self.to_out: nn.Module = out if config.full else nn.Sequential(out, RMSNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        heads = (batch, self.config.heads, self.config.head_dim, height * width)
        query, key, value = (
            part.reshape(heads) for part in self.to_qkv(self.norm(x)).chunk(3, dim=1)
        )
        memory = self.mem_kv if not self.config.full else self.mem_kv.transpose(2, 3)
        more_keys, more_values = memory.expand(batch, *memory.shape).unbind(1)
        key, value = torch.cat([more_keys, key], -1), torch.cat([more_values, value], -1)
        if self.config.full:  # [B, heads, T, head_dim]
            query, key, value = (p.transpose(2, 3).contiguous() for p in (query, key, value))
            h = F.scaled_dot_product_attention(query, key, value).transpose(2, 3)
        else:
            query = query.softmax(dim=-2) * self.config.head_dim**-0.5
            context = key.softmax(dim=-1) @ value.transpose(2, 3)  # [B, heads, d, e]
            h = context.transpose(2, 3) @ query
        out: Tensor = x + self.to_out(h.reshape(batch, -1, height, width))
        return out


class Unshuffle(nn.Module):
    """[B, C, H, W] -> [B, 4C, H/2, W/2]: the four pixels of a square as channels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, 2)


class LucidrainsUNet(nn.Module):
    """`network(x, t) -> [B, out_channels, H, W]`.

    A network with self-conditioning is told that it has no estimate yet, as half of its training.
    """

    def __init__(self, config: LucidrainsConfig) -> None:
        super().__init__()
        self.config = config
        self.in_channels, self.out_channels = config.in_channels, config.out_channels
        self.divisor = 2 ** (len(config.widths) - 1)
        first, time_dim = config.init_channels, 4 * config.channels
        inputs = config.in_channels * (2 if config.self_condition else 1)
        self.init_conv = nn.Conv2d(inputs, first, 7, padding=3)
        self.time_mlp = nn.Sequential(
            nn.Identity(),
            nn.Linear(config.channels, time_dim),
            nn.GELU(),
            nn.Linear(time_dim, time_dim),
        )
        widths, last = (first, *config.widths), len(config.widths) - 1

        def block(channels: int, out: int) -> ResBlock:
            return ResBlock(channels, out, time_dim)

        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for level, attention in enumerate(config.down):
            width, out = widths[level], widths[level + 1]
            change: nn.Module = nn.Conv2d(width, out, 3, padding=1)
            if level < last:
                change = nn.Sequential(Unshuffle(), nn.Conv2d(4 * width, out, 1))
            self.downs.append(
                nn.ModuleList(
                    [block(width, width), block(width, width), Attention(width, attention), change]
                )
            )
        self.mid_block1 = block(widths[-1], widths[-1])
        self.mid_attn = Attention(widths[-1], config.mid)
        self.mid_block2 = block(widths[-1], widths[-1])
        for level, attention in zip(reversed(range(last + 1)), config.up, strict=True):
            out, width = widths[level], widths[level + 1]
            change = nn.Conv2d(width, out, 3, padding=1)
            if level:
                change = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), change)
            blocks = [block(width + out, width), block(width + out, width)]
            self.ups.append(nn.ModuleList([*blocks, Attention(width, attention), change]))
        self.final_res_block = block(2 * first, first)
        self.final_conv = nn.Conv2d(first, config.out_channels, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: [B, C, H, W] in [-1, 1] plus noise; t: [B], indices from 0.

        Returns [B, out_channels, H, W]. Raises ValueError for sizes that do not halve.
        """
        if x.shape[-1] % self.divisor or x.shape[-2] % self.divisor:
            raise ValueError(
                f"height and width must be divisible by {self.divisor}, got {list(x.shape)}"
            )
        if self.config.self_condition:
            x = torch.cat([torch.zeros_like(x), x], dim=1)
        h = first = self.init_conv(x)
        features = time_features(t, self.config.channels)
        time = self.time_mlp(features.to(first.dtype))
        skips = []
        downs: list[Any] = list(self.downs)
        for block1, block2, attention, change in downs:
            skips.append(block1(h, time))
            skips.append(attention(block2(skips[-1], time)))
            h = change(skips[-1])
        h = self.mid_block2(self.mid_attn(self.mid_block1(h, time)), time)
        ups: list[Any] = list(self.ups)
        for block1, block2, attention, change in ups:
            h = block1(torch.cat([h, skips.pop()], dim=1), time)
            h = attention(block2(torch.cat([h, skips.pop()], dim=1), time))
            h = change(h)
        out: Tensor = self.final_conv(self.final_res_block(torch.cat([h, first], dim=1), time))
        return out
