"""Bring pixels to the network's channels and size and back, only as far as the user allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coup_fast.cli.common import CommandError

if TYPE_CHECKING:
    from torch import Tensor

_COLOURS = {1: "grey", 3: "RGB"}


@dataclass(frozen=True)
class Fit:
    """What the network takes, and which conversions are allowed.

    channels, height, width: the network's input; height and width None: any size. convert_color:
    grey <-> RGB may be converted. resize: bilinear resizing to the network's size and back is
    allowed. hint: what else a user whose pictures have other channels could do.
    """

    channels: int
    height: int | None
    width: int | None
    convert_color: bool = False
    resize: bool = False
    hint: str = ""

    @property
    def accepted_channels(self) -> frozenset[int]:
        """Numbers of channels that can be brought to the network."""
        convertible = self.convert_color and self.channels in _COLOURS
        return frozenset(_COLOURS) if convertible else frozenset({self.channels})

    def check(self, shape: Sequence[int], name: str) -> None:
        """Raise a `CommandError` that names both shapes if `name` [C, H, W] does not fit."""
        channels, height, width = shape
        given = f"{name} is {channels}x{height}x{width} (channels x height x width)"
        size = "" if self.height is None else f"x{self.height}x{self.width}"
        any_size = f" channel{'s' * (self.channels != 1)} of any size"
        wanted = f"the network takes {self.channels}{size or any_size}"
        if channels not in self.accepted_channels:
            both = {channels, self.channels} <= set(_COLOURS)
            cure = ": --convert-color converts between RGB and grey and back" if both else ""
            raise CommandError(f"{given}, {wanted}{cure}{self.hint}")
        if self.height is None:
            if self.resize:
                raise CommandError(f"{wanted}; say with --size what to resize to")
        elif (height, width) != (self.height, self.width) and not self.resize:
            raise CommandError(f"{given}, {wanted}: --resize resizes to that size and back")

    def to_network(self, pixels: Tensor) -> Tensor:
        """[B, c, h, w] in [0, 1] -> [B, channels, height, width] in [0, 1], float32."""
        from coup_fast.integrations.pictures import with_channels, with_size

        pixels = with_channels(pixels.float(), self.channels)
        return with_size(pixels, self.height or pixels.shape[2], self.width or pixels.shape[3])

    def from_network(self, pixels: Tensor, shape: Sequence[int]) -> Tensor:
        """The way back: [B, channels, height, width] -> [B, *shape], shape = (c, h, w).

        A grey result is repeated in all three channels; an RGB result becomes its luminance.
        """
        from coup_fast.integrations.pictures import with_channels, with_size

        channels, height, width = shape
        return with_size(with_channels(pixels, channels), height, width)
