"""Bring pixels to the network's channels and size and back, only as far as the user allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coup_fast.cli.common import CommandError

if TYPE_CHECKING:
    from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as pillow's convert("L")
_COLOURS = {1: "grey", 3: "RGB"}


@dataclass(frozen=True)
class Fit:
    """What the network takes, and which conversions are allowed.

    channels, height, width: the network's input. convert_color: grey <-> RGB may be converted.
    resize: bilinear resizing to the network's size and back is allowed.
    """

    channels: int
    height: int
    width: int
    convert_color: bool = False
    resize: bool = False

    @property
    def accepted_channels(self) -> frozenset[int]:
        """Numbers of channels that can be brought to the network."""
        convertible = self.convert_color and self.channels in _COLOURS
        return frozenset(_COLOURS) if convertible else frozenset({self.channels})

    def check(self, shape: Sequence[int], name: str) -> None:
        """Raise a `CommandError` that names both shapes if `name` [C, H, W] does not fit."""
        channels, height, width = shape
        given = f"{name} is {channels}x{height}x{width} (channels x height x width)"
        wanted = f"the network takes {self.channels}x{self.height}x{self.width}"
        if channels not in self.accepted_channels:
            both = {channels, self.channels} <= set(_COLOURS)
            cure = ": --convert-color converts between RGB and grey and back" if both else ""
            raise CommandError(f"{given}, {wanted}{cure}")
        if (height, width) != (self.height, self.width) and not self.resize:
            raise CommandError(f"{given}, {wanted}: --resize resizes to that size and back")

    def to_network(self, pixels: Tensor) -> Tensor:
        """[B, c, h, w] in [0, 1] -> [B, channels, height, width] in [0, 1], float32."""
        pixels = _with_channels(pixels.float(), self.channels)
        return _with_size(pixels, self.height, self.width)

    def from_network(self, pixels: Tensor, shape: Sequence[int]) -> Tensor:
        """The way back: [B, channels, height, width] -> [B, *shape], shape = (c, h, w).

        A grey result is repeated in all three channels; an RGB result becomes its luminance.
        """
        channels, height, width = shape
        return _with_size(_with_channels(pixels, channels), height, width)


def _with_channels(pixels: Tensor, channels: int) -> Tensor:
    if pixels.shape[1] == channels:
        return pixels
    if channels == 3:
        return pixels.expand(-1, 3, -1, -1)
    weights = pixels.new_tensor(_LUMA)[:, None, None]
    return (pixels * weights).sum(dim=1, keepdim=True)


def _with_size(pixels: Tensor, height: int, width: int) -> Tensor:
    if tuple(pixels.shape[2:]) == (height, width):
        return pixels.contiguous()
    from torch.nn.functional import interpolate

    return interpolate(
        pixels, (height, width), mode="bilinear", align_corners=False, antialias=True
    ).contiguous()
