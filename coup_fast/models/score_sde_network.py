"""DDPM++ and NCSN++, the networks of score_sde, with the released weights' names and shapes.

Song et al., "Score-based generative modeling through SDEs" (ICLR 2021), appendix H. One class
covers both: DDPM++ is the network without FIR filters and without an input pyramid. Its modules
stand in `all_modules` in the order in which the forward pass uses them, which is what the names
`all_modules.N` of the released state dicts count. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coup_fast import checks
from coup_fast.models.score_sde_layers import (
    AddProjected,
    AttentionBlock,
    FilteredDownConv,
    FourierEmbedding,
    ResidualBlock,
    downsample,
    group_norm,
    positional_embedding,
    upsample,
)

EMBEDDINGS = ("positional", "fourier")
INPUT_PYRAMIDS = ("none", "skip", "residual")
OUTPUT_PYRAMIDS = ("none", "skip")


@dataclass(frozen=True)
class NCSNppConfig:
    """The shape of a network; the defaults are `vp/cifar10_ddpmpp_continuous`.

    image_size: side of the images the network was trained on (it places the attention).
    image_channels: C. channels: width of the first level; channel_mult: the levels' multiples.
    num_blocks: residual blocks a level on the way down (one more on the way up).
    attention_sizes: sides of the feature maps that have attention. dropout: rate in training.
    fir: resample with the filter [1, 3, 3, 1]. embedding: "positional" (the network is told a
    label) or "fourier" (it is told σ). input_pyramid, output_pyramid: how smaller copies of the
    image join the encoder and the decoder. sigma_min, sigma_max, num_scales: the noise levels
    stored with the weights, on pixels in [0, 1]. pixels: the input is pixels in [0, 1], not
    [-1, 1]; scale_by_sigma: the output is divided by σ.
    """

    image_size: int = 32
    image_channels: int = 3
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    num_blocks: int = 4
    attention_sizes: tuple[int, ...] = (16,)
    dropout: float = 0.1
    fir: bool = False
    embedding: str = "positional"
    fourier_scale: float = 16.0
    input_pyramid: str = "none"
    output_pyramid: str = "none"
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    num_scales: int = 1000
    pixels: bool = False
    scale_by_sigma: bool = False

    def __post_init__(self) -> None:
        for name, choices in (
            ("embedding", EMBEDDINGS),
            ("input_pyramid", INPUT_PYRAMIDS),
            ("output_pyramid", OUTPUT_PYRAMIDS),
        ):
            checks.choice(name, getattr(self, name), choices)

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of the feature maps of each level."""
        return tuple(self.image_size >> level for level in range(len(self.channel_mult)))

    def sigmas(self) -> Tensor:
        """[num_scales] float64, geometric from sigma_max down to sigma_min."""
        ends = torch.tensor([self.sigma_max, self.sigma_min], dtype=torch.float64).log()
        steps = torch.linspace(0, 1, self.num_scales, dtype=torch.float64)
        return torch.exp(ends[0] + (ends[1] - ends[0]) * steps)


class NCSNpp(nn.Module):
    """A noise or score network f(x, t) of an image's shape.

    t is what `embedding` says: a label (999 times the time of a continuous VP network, the index of
    a discrete one) or the noise level σ on pixels.
    """

    sigmas: Tensor

    def __init__(self, config: NCSNppConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or NCSNppConfig()
        self.in_channels = config.image_channels
        self.register_buffer("sigmas", config.sigmas())
        self.all_modules = nn.ModuleList([*self._embedding(), *self._unet()])

    def _embedding(self) -> Iterator[nn.Module]:
        config, features = self.config, self.config.channels
        if config.embedding == "fourier":
            yield FourierEmbedding(config.channels, config.fourier_scale)
            features *= 2
        yield nn.Linear(features, 4 * config.channels)
        yield nn.Linear(4 * config.channels, 4 * config.channels)

    def _block(self, in_channels: int, out_channels: int, resample: str = "none") -> nn.Module:
        config = self.config
        return ResidualBlock(
            in_channels,
            out_channels,
            4 * config.channels,
            resample=resample,
            fir=config.fir,
            dropout=config.dropout,
        )

    def _unet(self) -> Iterator[nn.Module]:
        """The modules of the encoder, the middle and the decoder, as `forward` uses them."""
        config = self.config
        widths = [config.channels * multiple for multiple in config.channel_mult]
        last = len(widths) - 1
        image = pyramid = config.image_channels
        width = config.channels
        yield nn.Conv2d(image, width, 3, padding=1)
        skips = [width]
        for level, side in enumerate(config.sides):
            for _ in range(config.num_blocks):
                yield self._block(width, widths[level])
                width = widths[level]
                if side in config.attention_sizes:
                    yield AttentionBlock(width)
                skips.append(width)
            if level < last:
                yield self._block(width, width, "down")
                if config.input_pyramid == "skip":
                    yield AddProjected(image, width)
                elif config.input_pyramid == "residual":
                    yield FilteredDownConv(pyramid, width)
                    pyramid = width
                skips.append(width)

        yield self._block(width, width)
        yield AttentionBlock(width)
        yield self._block(width, width)

        for level in range(last, -1, -1):
            for _ in range(config.num_blocks + 1):
                yield self._block(width + skips.pop(), widths[level])
                width = widths[level]
            if config.sides[level] in config.attention_sizes:
                yield AttentionBlock(width)
            if config.output_pyramid == "skip" or level == 0:
                yield group_norm(width)
                yield nn.Conv2d(width, image, 3, padding=1)
            if level:
                yield self._block(width, width, "up")

    def _time(self, t: Tensor, modules: Iterator[Any], dtype: torch.dtype) -> Tensor:
        """silu of the time vector, [B, 4 channels]; every block begins with that activation."""
        if self.config.embedding == "fourier":
            features = next(modules)(t)
        else:
            features = positional_embedding(t, self.config.channels)
        hidden = next(modules)(features.to(dtype))
        time: Tensor = next(modules)(F.silu(hidden))
        return F.silu(time)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: [B, C, H, W] in [-1, 1], or pixels in [0, 1] (`config.pixels`), plus noise; t: [B].

        Raises ValueError if the height or the width cannot be halved once a level.
        """
        config = self.config
        divisor = 2 ** (len(config.channel_mult) - 1)
        if x.shape[-1] % divisor or x.shape[-2] % divisor:
            raise ValueError(
                f"height and width must be divisible by {divisor}, got {tuple(x.shape)}."
            )
        modules: Iterator[Any] = iter(self.all_modules)
        time = self._time(t, modules, x.dtype)
        skips = self._encode(2 * x - 1 if config.pixels else x, time, modules)
        h = self._decode(skips, time, modules)
        if config.scale_by_sigma:
            sigma = t if config.embedding == "fourier" else self.sigmas[t.long()]
            h = h / sigma.to(h.dtype)[:, None, None, None]
        return h

    def _encode(self, x: Tensor, time: Tensor, modules: Iterator[Any]) -> list[Tensor]:
        """The feature maps that the decoder takes up, last first."""
        config, pyramid = self.config, x
        skips = [next(modules)(x)]
        for level, side in enumerate(config.sides):
            for _ in range(config.num_blocks):
                h = next(modules)(skips[-1], time)
                if side in config.attention_sizes:
                    h = next(modules)(h)
                skips.append(h)
            if level == len(config.sides) - 1:
                break
            h = next(modules)(skips[-1], time)
            if config.input_pyramid == "skip":
                pyramid = downsample(pyramid, config.fir)
                h = next(modules)(pyramid, h)
            elif config.input_pyramid == "residual":
                h = pyramid = (next(modules)(pyramid) + h) * 0.5**0.5
            skips.append(h)
        return skips

    def _decode(self, skips: list[Tensor], time: Tensor, modules: Iterator[Any]) -> Tensor:
        config = self.config
        h = next(modules)(skips[-1], time)
        h = next(modules)(h)
        h = next(modules)(h, time)
        out: Tensor = h  # replaced on the way: by the output pyramid, or once, at the first level
        first = len(config.sides) - 1 if config.output_pyramid == "skip" else 0
        for level in range(len(config.sides) - 1, -1, -1):
            for _ in range(config.num_blocks + 1):
                h = next(modules)(torch.cat([h, skips.pop()], dim=1), time)
            if config.sides[level] in config.attention_sizes:
                h = next(modules)(h)
            if level <= first:
                image: Tensor = next(modules)(h)
                image = next(modules)(F.silu(image))
                out = image if level == first else upsample(out, config.fir) + image
            if level:
                h = next(modules)(h, time)
        return out
