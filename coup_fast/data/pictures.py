"""Pictures of any number as one batch of bytes: one size, one number of channels; needs Pillow."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coup_fast.files import FileError, memory, reading

if TYPE_CHECKING:
    from PIL import Image

COLOURS = {"grey": 1, "rgb": 3}


@dataclass(frozen=True)
class Look:
    """What all images are brought to.

    Args:
        size: (height, width); None: they must have one size, which is kept.
        color: "grey", "rgb", or "": they must have the same channels, which are kept.
    """

    size: tuple[int, int] | None = None
    color: str = ""

    def of(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] with this look: bytes stay bytes, floats stay floats.

        Raises ValueError for channels that no colour can be made of.
        """
        from coup_fast.integrations.pictures import to_whole_numbers, with_channels, with_size

        channels = COLOURS.get(self.color, images.shape[1])
        if channels != images.shape[1] and images.shape[1] not in COLOURS.values():
            raise ValueError(
                f"color {self.color!r} needs images of 1 or 3 channels, got {images.shape[1]}"
            )
        size = self.size or tuple(images.shape[2:])
        if (channels, *size) == tuple(images.shape[1:]):
            return images
        parts = []
        for part in torch.split(images, 1000):
            pixels = part.float() / 255 if part.dtype == torch.uint8 else part
            pixels = with_size(with_channels(pixels, channels), *size)
            parts.append(to_whole_numbers(pixels)[0] if part.dtype == torch.uint8 else pixels)
        return torch.cat(parts)


def stack(
    pictures: Iterable[tuple[str, Image.Image]], count: int, look: Look, *, progress: bool = False
) -> Tensor:
    """Pictures as uint8 [count, C, H, W].

    Args:
        pictures: (name for errors, open picture) of each.
        count: how many there are, at least one.
        look: what they are brought to.
        progress: show a bar on a terminal.

    Raises:
        ValueError: pictures of several sizes or colours without a `look` that says one, a picture
            with an alpha channel or 16 bits, or more pictures than memory holds.
        FileError: a picture that cannot be read; this is a ValueError.
    """
    from tqdm import tqdm

    images, first = torch.empty(0), ""
    shown = progress and sys.stderr.isatty()
    with tqdm(total=count, desc="reading", unit="picture", leave=False, disable=not shown) as bar:
        for i, (name, picture) in enumerate(pictures):
            pixels = _pixels(name, picture, look)
            if not first:
                if count * pixels.numel() > memory():
                    raise ValueError(
                        f"{count} pictures of {_text(pixels)} take "
                        f"{count * pixels.numel() / 2**30:.0f} GiB, more than the memory of this "
                        "machine; give a smaller size (--size 32)"
                    )
                images, first = torch.empty((count, *pixels.shape), dtype=torch.uint8), name
            if pixels.shape != images.shape[1:]:
                cure = "color='rgb' or 'grey' (--color)"
                if pixels.shape[0] == images.shape[1]:
                    cure = "one size for all, such as size=32 (--size 32)"
                raise ValueError(
                    f"{name} is {_text(pixels)} and {first} is {_text(images[0])} (channels x "
                    f"height x width); give {cure}"
                )
            images[i] = pixels
            bar.update()
    return images


def _text(image: Tensor) -> str:
    return "x".join(str(side) for side in image.shape)


def _pixels(name: str, image: Image.Image, look: Look) -> Tensor:
    """[C, H, W] uint8 of one picture, upright."""
    from coup_fast.integrations.pictures import read_upright

    with reading(name, "an image"):
        picture = read_upright(image, name)
    if picture.bits == 16:
        raise FileError(f"{name} has 16 bits a channel; convert it to 8")
    if picture.alpha is not None and not look.color:
        raise FileError(
            f"{name} has an alpha channel; color='rgb' or 'grey' (--color) leaves it out"
        )
    pixels = (picture.pixels * 255).round().to(torch.uint8)
    return look.of(pixels[None])[0]
