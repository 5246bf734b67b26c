"""The networks of EDM, with the released weights' names and shapes: DDPM++, NCSN++ and ADM.

Karras et al., "Elucidating the design space of diffusion-based generative models" (NeurIPS 2022),
appendix F; DDPM++ and NCSN++ are Song et al.'s (ICLR 2021), ADM is Dhariwal and Nichol's (NeurIPS
2021), all as one kind of U-Net. Knows nothing of files, noise levels or preconditioning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coup_fast import checks
from coup_fast.models.edm_layers import (
    Block,
    BlockStyle,
    Conv,
    FourierFrequencies,
    positional_features,
)

ARCHITECTURES = ("ddpmpp", "ncsnpp", "adm")


@dataclass(frozen=True)
class EDMNetworkConfig:
    """The shape of a network; the defaults are the CIFAR-10 networks of EDM.

    architecture: "ddpmpp", "ncsnpp" or "adm". image_size: side of the training images (it places
    the attention and names the modules). image_channels: C. channels: base width; channel_mult:
    the levels' multiples. num_blocks: residual blocks a level on the way down. attention_sizes:
    sides of the feature maps that have attention. dropout: rate in training mode.
    label_dim, augment_dim: classes and augmentation parameters it was conditioned on, 0 for none.
    """

    architecture: str = "ddpmpp"
    image_size: int = 32
    image_channels: int = 3
    channels: int = 128
    channel_mult: tuple[int, ...] = (2, 2, 2)
    num_blocks: int = 4
    attention_sizes: tuple[int, ...] = (16,)
    dropout: float = 0.13
    label_dim: int = 0
    augment_dim: int = 0

    def __post_init__(self) -> None:
        checks.choice("architecture", self.architecture, ARCHITECTURES)

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of the feature maps of each level."""
        return tuple(self.image_size >> level for level in range(len(self.channel_mult)))


class EDMNetwork(nn.Module):
    """The raw network F(x, c): [B, C, H, W] and noise labels [B] to [B, C, H, W].

    Of a class-conditional network the class is left out: its label vector is zero.
    """

    def __init__(self, config: EDMNetworkConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or EDMNetworkConfig()
        self.in_channels = config.image_channels
        self.adm = config.architecture == "adm"
        fourier = config.architecture == "ncsnpp"
        self.noise_features = config.channels * (1 + fourier)
        features = 4 * config.channels
        self.style = BlockStyle(
            scale=1.0 if self.adm else math.sqrt(0.5),
            eps=1e-5 if self.adm else 1e-6,
            adaptive=self.adm,
            head_channels=64 if self.adm else 0,
            project=not self.adm,
            taps=(1, 3, 3, 1) if fourier else (1, 1),
            features=features,
            dropout=config.dropout,
        )
        self.map_noise = FourierFrequencies(self.noise_features) if fourier else None
        labelled = features if self.adm else self.noise_features
        self.map_label = (
            nn.Linear(config.label_dim, labelled, bias=not self.adm) if config.label_dim else None
        )
        self.map_augment = (
            nn.Linear(config.augment_dim, self.noise_features, bias=False)
            if config.augment_dim
            else None
        )
        self.map_layer0 = nn.Linear(self.noise_features, features)
        self.map_layer1 = nn.Linear(features, features)
        self.enc = nn.ModuleDict()
        self.dec = nn.ModuleDict()
        width = self._build_decoder(*self._build_encoder())
        if self.adm:
            self.out_norm = self.style.norm(width)
            self.out_conv = Conv(width, config.image_channels, 3)

    def _build_encoder(self) -> tuple[list[int], int]:
        """Fills `enc`; the widths of the feature maps for the decoder, and the last one."""
        config = self.config
        image = pyramid = config.image_channels
        width = config.channels * (config.channel_mult[0] if self.adm else 1)
        self.enc[f"{config.image_size}x{config.image_size}_conv"] = Conv(image, width, 3)
        skips = [width]
        for level, (side, multiple) in enumerate(
            zip(config.sides, config.channel_mult, strict=True)
        ):
            name = f"{side}x{side}"
            if level:
                self.enc[f"{name}_down"] = Block(width, width, self.style, resample="down")
                if config.architecture == "ncsnpp":
                    self.enc[f"{name}_aux_residual"] = Conv(
                        pyramid, width, 3, resample="down", taps=self.style.taps, padded_once=True
                    )
                    pyramid = width
                skips.append(width)
            attention = side in config.attention_sizes
            for block in range(config.num_blocks):
                out = config.channels * multiple
                self.enc[f"{name}_block{block}"] = Block(
                    width, out, self.style, attention=attention
                )
                width = out
                skips.append(width)
        return skips, width

    def _build_decoder(self, skips: list[int], width: int) -> int:
        config = self.config
        for level in range(len(config.sides) - 1, -1, -1):
            side = config.sides[level]
            name = f"{side}x{side}"
            if level == len(config.sides) - 1:
                self.dec[f"{name}_in0"] = Block(width, width, self.style, attention=True)
                self.dec[f"{name}_in1"] = Block(width, width, self.style)
            else:
                self.dec[f"{name}_up"] = Block(width, width, self.style, resample="up")
            for block in range(config.num_blocks + 1):
                out = config.channels * config.channel_mult[level]
                attention = side in config.attention_sizes
                attention &= self.adm or block == config.num_blocks
                self.dec[f"{name}_block{block}"] = Block(
                    width + skips.pop(), out, self.style, attention=attention
                )
                width = out
        if not self.adm:
            self.dec[f"{name}_aux_norm"] = self.style.norm(width)
            self.dec[f"{name}_aux_conv"] = Conv(width, config.image_channels, 3)
        return width

    def _embed(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        if self.map_noise is not None:
            cosines, sines = self.map_noise(labels)
        else:
            cosines, sines = positional_features(labels, self.noise_features, endpoint=not self.adm)
        ordered = (cosines, sines) if self.adm else (sines, cosines)
        embedding = torch.cat(ordered, dim=1).to(dtype)
        if self.map_label is not None and self.map_label.bias is not None:
            embedding = embedding + self.map_label.bias
        embedding = self.map_layer1(F.silu(self.map_layer0(embedding)))
        return F.silu(embedding)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """x: [B, C, H, W], scaled by c_in; labels: [B], c_noise.

        Raises ValueError if the height or the width cannot be halved once a level.
        """
        divisor = 2 ** (len(self.config.channel_mult) - 1)
        if x.shape[-1] % divisor or x.shape[-2] % divisor:
            raise ValueError(
                f"height and width must be divisible by {divisor}, got {tuple(x.shape)}."
            )
        embedding = self._embed(labels, x.dtype)
        h = pyramid = x
        skips: list[Tensor] = []
        for name, layer in self.enc.items():
            if name.endswith("_aux_residual"):
                h = skips[-1] = pyramid = (h + layer(pyramid)) * math.sqrt(0.5)
                continue
            h = layer(h, embedding) if isinstance(layer, Block) else layer(h)
            skips.append(h)
        for name, layer in self.dec.items():
            if isinstance(layer, Block):
                wanted = layer.in_channels != h.shape[1]
                h = layer(torch.cat([h, skips.pop()], dim=1) if wanted else h, embedding)
            else:
                h = layer(F.silu(h) if name.endswith("_aux_conv") else h)
        return self.out_conv(F.silu(self.out_norm(h))) if self.adm else h
