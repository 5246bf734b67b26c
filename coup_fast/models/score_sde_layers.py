"""The parts of the DDPM++ and NCSN++ networks; attribute names are those of the released weights.

Song et al., "Score-based generative modeling through SDEs" (ICLR 2021), appendix H: BigGAN residual
blocks that resample inside, sums of two branches divided by √2, one-head attention, and, for
NCSN++, anti-aliased resampling with the filter [1, 3, 3, 1] (StyleGAN2). Everything is plain
PyTorch: resampling is one grouped convolution. Knows nothing of noise schedules.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SQRT_HALF = math.sqrt(0.5)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with at most 32 groups of at least 4 channels, ε = 1e-6."""
    return nn.GroupNorm(min(channels // 4, 32), channels, eps=1e-6)


def positional_embedding(labels: Tensor, features: int) -> Tensor:
    """DDPM's features of a time label: [B] -> [B, features] float32, sines, then cosines.

    Frequencies are geometric from 1 to 1/10,000, both included.
    """
    half = features // 2
    steps = torch.arange(half, dtype=torch.float32, device=labels.device)
    angle = labels.float()[:, None] * torch.exp(steps * (-math.log(10_000) / (half - 1)))
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class FourierEmbedding(nn.Module):
    """Random Fourier features of log σ: [B] -> [B, 2 features], sines, then cosines.

    The frequencies are a parameter that was never trained (so the EMA does not hold it).
    """

    def __init__(self, features: int, scale: float) -> None:
        super().__init__()
        self.W = nn.Parameter(scale * torch.randn(features), requires_grad=False)

    def forward(self, sigma: Tensor) -> Tensor:
        angle = sigma.float().log()[:, None] * self.W.float() * (2 * math.pi)
        return torch.cat([angle.sin(), angle.cos()], dim=1)


def _fir(x: Tensor) -> Tensor:
    """The 4x4 low-pass filter [1, 3, 3, 1] ⊗ [1, 3, 3, 1] / 64, once per channel of x."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device)
    return (torch.outer(taps, taps) / 64).expand(x.shape[1], 1, 4, 4)


def upsample(x: Tensor, fir: bool) -> Tensor:
    """Twice the height and width: by the FIR filter, zeros outside, or by repetition."""
    if not fir:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.conv_transpose2d(x, 4 * _fir(x), stride=2, padding=1, groups=x.shape[1])


def downsample(x: Tensor, fir: bool) -> Tensor:
    """Half the height and width: by the FIR filter, zeros outside, or by means of 2x2 pixels."""
    if not fir:
        return F.avg_pool2d(x, 2)
    return F.conv2d(x, _fir(x), stride=2, padding=1, groups=x.shape[1])


class FilteredDownConv(nn.Module):
    """FIR filter, then a 3x3 convolution of stride 2: [B, C, H, W] -> [B, K, H/2, W/2]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.Conv2d_0 = nn.Conv2d(in_channels, out_channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        smooth = F.conv2d(x, _fir(x), padding=2, groups=x.shape[1])
        out: Tensor = self.Conv2d_0(smooth)
        return out


class AddProjected(nn.Module):
    """h + conv1x1(image): how a downsampled input image joins the encoder."""

    def __init__(self, image_channels: int, channels: int) -> None:
        super().__init__()
        self.Conv_0 = nn.Conv2d(image_channels, channels, 1)

    def forward(self, image: Tensor, h: Tensor) -> Tensor:
        out: Tensor = self.Conv_0(image) + h
        return out


class PixelLinear(nn.Module):
    """A linear map of the channels of each pixel, W [in, out] and b [out]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.W = nn.Parameter(nn.init.xavier_uniform_(torch.empty(in_channels, out_channels)))
        self.b = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.W.t()[:, :, None, None], self.b)


class AttentionBlock(nn.Module):
    """(x + attention(norm x))/√2, one head over the pixels of an image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.GroupNorm_0 = group_norm(channels)
        self.NIN_0 = PixelLinear(channels, channels)
        self.NIN_1 = PixelLinear(channels, channels)
        self.NIN_2 = PixelLinear(channels, channels)
        self.NIN_3 = PixelLinear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.GroupNorm_0(x)
        query, key, value = (layer(h).flatten(2) for layer in (self.NIN_0, self.NIN_1, self.NIN_2))
        logits = torch.bmm(query.transpose(1, 2), key) * x.shape[1] ** -0.5
        mixed = torch.bmm(value, logits.softmax(dim=-1).transpose(1, 2)).reshape(x.shape)
        out: Tensor = (x + self.NIN_3(mixed)) * _SQRT_HALF
        return out


class ResidualBlock(nn.Module):
    """(skip(x) + conv(silu(norm(conv(resample(silu(norm x))) + time))))/√2.

    Args:
        in_channels, out_channels: of x and of the result.
        time_features: width of the time vector.
        resample: "none", "up" or "down", by 2, of both branches.
        fir: resample with the FIR filter. dropout: rate, in training mode.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_features: int,
        *,
        resample: str = "none",
        fir: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.fir = fir
        self.GroupNorm_0 = group_norm(in_channels)
        self.Conv_0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.Dense_0 = nn.Linear(time_features, out_channels)
        self.GroupNorm_1 = group_norm(out_channels)
        self.Dropout_0 = nn.Dropout(dropout)
        self.Conv_1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels and resample == "none"
        self.Conv_2 = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: [B, C, H, W]. time: [B, time_features], through its activation already."""
        h = F.silu(self.GroupNorm_0(x))
        if self.resample == "up":
            h, x = upsample(h, self.fir), upsample(x, self.fir)
        elif self.resample == "down":
            h, x = downsample(h, self.fir), downsample(x, self.fir)
        h = self.Conv_0(h) + self.Dense_0(time)[:, :, None, None]
        h = self.Conv_1(self.Dropout_0(F.silu(self.GroupNorm_1(h))))
        out: Tensor = (self.Conv_2(x) + h) * _SQRT_HALF
        return out
