"""The U-Net of guided diffusion (ADM), with the parameter names of the released checkpoints.

Dhariwal & Nichol, "Diffusion models beat GANs on image synthesis" (NeurIPS 2021), section 3 and
appendix; the network of Nichol & Dhariwal, "Improved denoising diffusion probabilistic models"
(ICML 2021) is a case of it. Knows nothing of schedules, files or methods.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def time_features(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal features [B, dim] float32 of times t [B] in network units; dim even.

    Rounded in the order of the released code: a frequency that is one bit off turns into 1e-4 of
    phase at t = 1000.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(-math.log(10_000) * index / half)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class GroupNorm32(nn.GroupNorm):
    """GroupNorm of 32 groups that computes in its parameters' dtype and returns its input's."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, followed by a 3x3 convolution if `learned`."""

    def __init__(self, channels: int, learned: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if learned else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Downsample(nn.Module):
    """Halving by a 3x3 convolution of stride 2 if `learned`, else by the mean of 2x2 squares."""

    def __init__(self, channels: int, learned: bool) -> None:
        super().__init__()
        self.op: nn.Module = (
            nn.Conv2d(channels, channels, 3, stride=2, padding=1) if learned else nn.AvgPool2d(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.op(x)
        return out


class ResBlock(nn.Module):
    """skip(x) + conv(silu(norm(conv(silu(norm x))))), the time as scale and shift (or sum).

    resample: halves ("down") or doubles ("up") both paths after the first SiLU.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        time_dim: int,
        *,
        dropout: float,
        scale_shift: bool,
        resample: str = "",
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(
            GroupNorm32(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.resample: nn.Module = (
            {"up": Upsample, "down": Downsample}[resample](channels, learned=False)
            if resample
            else nn.Identity()
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(time_dim, out_channels * (2 if scale_shift else 1))
        )
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = (
            nn.Identity() if out_channels == channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = conv(self.resample(activation(norm(x))))
        time = self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + time)
        out: Tensor = self.skip_connection(self.resample(x)) + h
        return out


class AttentionBlock(nn.Module):
    """x plus self-attention over positions.

    new_order: the qkv channels are [3, heads, ...] rather than [heads, 3, ...].
    """

    def __init__(self, channels: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = GroupNorm32(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)  # [B, C, T]
        batch, channels, length = flat.shape
        qkv = self.qkv(self.norm(flat))
        if self.new_order:
            parts = qkv.view(batch, 3, self.heads, channels // self.heads, length).unbind(1)
        else:
            parts = qkv.view(batch, self.heads, 3, channels // self.heads, length).unbind(2)
        # [B, heads, T, C / heads]; strided ones would miss the fused kernels.
        query, key, value = (part.transpose(2, 3).contiguous() for part in parts)
        h = F.scaled_dot_product_attention(query, key, value)
        h = self.proj_out(h.transpose(2, 3).reshape(batch, channels, length))
        out: Tensor = (flat + h).view_as(x)
        return out


class Stage(nn.Sequential):
    """Layers one after another; the time goes to those that take it."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class GuidedDiffusionUNet(nn.Module):
    """Noise network of guided diffusion: `network(x, t) -> [B, out_channels, H, W]`.

    Args:
        in_channels: image channels C. out_channels: C, or 2C with the learned variance last.
        model_channels: width of the first level. channel_mult: of each level, in these units.
        num_res_blocks: blocks per level on the way down; one more on the way up.
        attention_levels: downsampling factors (1, 2, 4, ...) at which blocks attend.
        num_heads: heads of each attention, or, if num_head_channels > 0, as many as give heads of
            that width. num_heads_upsample: on the way up; default num_heads.
        scale_shift: the time enters as scale and shift rather than as a sum.
        resblock_updown: residual blocks change the resolution rather than plain convolutions.
        new_attention_order: see `AttentionBlock`. dropout: rate, in training mode only.

    Raises:
        ValueError: widths that 32 groups or the heads do not divide.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int = 6,
        model_channels: int = 256,
        channel_mult: Sequence[float] = (1, 1, 2, 2, 4, 4),
        num_res_blocks: int = 2,
        attention_levels: Collection[int] = (8, 16, 32),
        num_heads: int = 4,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        scale_shift: bool = True,
        resblock_updown: bool = False,
        new_attention_order: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.divisor = 2 ** (len(channel_mult) - 1)
        self.model_channels = model_channels
        time_dim = 4 * model_channels
        widths = [int(mult * model_channels) for mult in channel_mult]
        bad = [width for width in widths if width % 32]
        if bad:
            raise ValueError(f"every width must be a multiple of 32, got {bad[0]}")

        def block(width: int, out: int, resample: str = "") -> ResBlock:
            return ResBlock(
                width, out, time_dim, dropout=dropout, scale_shift=scale_shift, resample=resample
            )

        def attention(width: int, heads: int) -> AttentionBlock:
            heads = heads if num_head_channels < 1 else width // num_head_channels
            if width % max(heads, 1) or heads < 1 or 0 < num_head_channels * heads != width:
                raise ValueError(
                    f"a width of {width} does not divide into heads "
                    f"(num_heads={heads}, num_head_channels={num_head_channels})"
                )
            return AttentionBlock(width, heads, new_attention_order)

        def change(width: int, way: str) -> nn.Module:
            if resblock_updown:
                return block(width, width, way)
            return (Downsample if way == "down" else Upsample)(width, learned=True)

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
        )
        width = widths[0]
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(in_channels, width, 3, padding=1))])
        skips = [width]
        for level, out in enumerate(widths):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [block(width, out)]
                if 2**level in attention_levels:
                    layers.append(attention(out, num_heads))
                self.input_blocks.append(Stage(*layers))
                width = out
                skips.append(width)
            if level < len(widths) - 1:
                self.input_blocks.append(Stage(change(width, "down")))
                skips.append(width)
        self.middle_block = Stage(
            block(width, width), attention(width, num_heads), block(width, width)
        )
        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.output_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                layers = [block(width + skips.pop(), out)]
                width = out
                if 2**level in attention_levels:
                    layers.append(attention(width, heads_up))
                if level and i == num_res_blocks:
                    layers.append(change(width, "up"))
                self.output_blocks.append(Stage(*layers))
        self.out = nn.Sequential(
            GroupNorm32(width), nn.SiLU(), nn.Conv2d(width, out_channels, 3, padding=1)
        )

    def convert_torso(self, dtype: torch.dtype) -> GuidedDiffusionUNet:
        """Itself, with the convolutions between the first and `out` in dtype; the rest stays.

        The released networks were trained and are run with a float16 torso (`use_fp16`).
        """
        for part in (self.input_blocks, self.middle_block, self.output_blocks):
            for module in part.modules():
                if isinstance(module, nn.Conv1d | nn.Conv2d):
                    module.to(dtype)
        return self

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: [B, C, H, W] in [-1, 1] plus noise; t: [B] in network units, 0 to 1000.

        Returns [B, out_channels, H, W] in x's dtype. Raises ValueError for sizes that do not halve.
        """
        if x.shape[-1] % self.divisor or x.shape[-2] % self.divisor:
            raise ValueError(
                f"height and width must be divisible by {self.divisor}, got {list(x.shape)}"
            )
        features = time_features(t, self.model_channels)
        emb = self.time_embed(features.to(next(self.time_embed.parameters()).dtype))
        h = x.to(next(self.input_blocks.parameters()).dtype)
        skips = []
        for stage in self.input_blocks:
            h = stage(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb)
        out: Tensor = self.out(h.to(x.dtype))
        return out
