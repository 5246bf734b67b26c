"""The parts of EDM's networks; attribute names are those of the released weights.

Karras et al., "Elucidating the design space of diffusion-based generative models" (NeurIPS 2022),
appendix F: one residual block, with optional resampling and attention, serves DDPM++, NCSN++ and
ADM; `BlockStyle` says in what they differ. Knows nothing of levels or noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def positional_features(labels: Tensor, features: int, *, endpoint: bool) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, features/2] of labels [B] at frequencies from 1 to 1/10,000.

    endpoint: the last frequency is 1/10,000 itself (Song et al.), not one before it (ADM).
    """
    half = features // 2
    steps = torch.arange(half, dtype=torch.float32, device=labels.device)
    angle = labels.float()[:, None] * (1 / 10_000) ** (steps / (half - int(endpoint)))
    return angle.cos(), angle.sin()


class FourierFrequencies(nn.Module):
    """The random frequencies of NCSN++'s embedding, stored with the weights."""

    freqs: Tensor

    def __init__(self, features: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", scale * torch.randn(features // 2))

    def forward(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, features/2] of labels [B]."""
        angle = labels.float()[:, None] * (2 * math.pi * self.freqs.float())
        return angle.cos(), angle.sin()


class Conv(nn.Module):
    """A convolution after a resampling by 2, or either alone.

    Args:
        in_channels, out_channels: of the convolution.
        kernel: its side, odd; 0 for no convolution.
        resample: "none", "up" or "down", by the filter taps ⊗ taps, zeros outside.
        padded_once: pad for the filter and the convolution together and let the convolution do
            the stride; "down" only.
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        resample: str = "none",
        taps: tuple[int, ...] = (1, 1),
        padded_once: bool = False,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.padded_once = padded_once
        self.out_channels = out_channels
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if kernel:
            weight = torch.empty(out_channels, in_channels, kernel, kernel)
            self.weight = nn.Parameter(nn.init.xavier_uniform_(weight))
            self.bias = nn.Parameter(torch.zeros(out_channels))
        if resample != "none":
            line = torch.tensor(taps, dtype=torch.float32) / sum(taps)
            self.register_buffer("resample_filter", torch.outer(line, line)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        stride, reach = 1, self.weight.shape[-1] // 2 if self.weight is not None else 0
        if self.resample != "none":
            channels = x.shape[1]
            taps = self.resample_filter.to(x.dtype).expand(channels, 1, -1, -1)
            around = (taps.shape[-1] - 1) // 2
            if self.resample == "up":
                x = F.conv_transpose2d(x, 4 * taps, stride=2, padding=around, groups=channels)
            elif self.padded_once:
                x = F.conv2d(x, taps, padding=around + reach, groups=channels)
                stride, reach = 2, 0
            else:
                x = F.conv2d(x, taps, stride=2, padding=around, groups=channels)
        if self.weight is None:
            return x
        return F.conv2d(x, self.weight, self.bias, stride=stride, padding=reach)


@dataclass(frozen=True)
class BlockStyle:
    """What distinguishes the architectures' blocks.

    scale: of a sum of two branches. eps: of GroupNorm. adaptive: the embedding scales and shifts
    the second normalisation (ADM), or is added before it. head_channels: width of an attention
    head, 0 for one head. project: a resampled skip is convolved even at equal width. taps: the
    resampling filter. features: width of the embedding.
    """

    scale: float
    eps: float
    adaptive: bool
    head_channels: int
    project: bool
    taps: tuple[int, ...]
    features: int
    dropout: float

    def norm(self, channels: int) -> nn.GroupNorm:
        """GroupNorm with at most 32 groups of at least 4 channels."""
        return nn.GroupNorm(min(32, channels // 4), channels, eps=self.eps)


class Block(nn.Module):
    """Residual block with optional resampling and attention (figure of appendix F)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: BlockStyle,
        *,
        resample: str = "none",
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.style = in_channels, out_channels, style
        how: dict[str, Any] = {"resample": resample, "taps": style.taps}
        self.norm0 = style.norm(in_channels)
        self.conv0 = Conv(in_channels, out_channels, 3, **how)
        self.affine = nn.Linear(style.features, out_channels * (1 + style.adaptive))
        self.norm1 = style.norm(out_channels)
        self.conv1 = Conv(out_channels, out_channels, 3)
        self.skip: Conv | None = None
        if in_channels != out_channels or resample != "none":
            kernel = int(style.project or in_channels != out_channels)
            self.skip = Conv(in_channels, out_channels, kernel, **how)
        self.heads = 0
        if attention:
            self.heads = out_channels // style.head_channels if style.head_channels else 1
            self.norm2 = style.norm(out_channels)
            self.qkv = Conv(out_channels, 3 * out_channels, 1)
            self.proj = Conv(out_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x: [B, C, H, W]. embedding: [B, features]."""
        h = self.conv0(F.silu(self.norm0(x)))
        added = self.affine(embedding)[:, :, None, None]
        if self.style.adaptive:
            scale, shift = added.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(h + added)
        h = self.conv1(F.dropout(F.silu(h), self.style.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.style.scale
        return (self._attend(x) + x) * self.style.scale if self.heads else x

    def _attend(self, x: Tensor) -> Tensor:
        """Attention over pixels; a head's query, key and value channels alternate in qkv."""
        packed = self.qkv(self.norm2(x)).reshape(
            x.shape[0] * self.heads, x.shape[1] // self.heads, 3, -1
        )
        query, key, value = packed.unbind(2)
        logits = torch.bmm(query.transpose(1, 2), key / math.sqrt(key.shape[1]))
        mixed = torch.bmm(value, logits.softmax(dim=-1).transpose(1, 2))
        out: Tensor = self.proj(mixed.reshape(x.shape))
        return out
