"""One's own pictures: Pillow images as pixels and back, and purifying one; needs Pillow.

    from coup_fast.integrations.pictures import purify_image
    purify_image("in.png", purifier).save("out.png")

A picture keeps its size, mode and format.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from coup_fast import checks
from coup_fast._torch.modules import first_parameter
from coup_fast.files import FileError, reading
from coup_fast.purifier import Purifier

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as pillow's convert("L")
_ORIENTATION = 0x0112  # EXIF
_DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N")


def to_whole_numbers(pixels: Tensor, bits: int = 8) -> tuple[Tensor, int]:
    """Pixels in [0, 1] as uint8 (or uint16), rounded; and how many values had to be clipped."""
    outside = int(((pixels < 0) | (pixels > 1)).sum())
    values = (pixels.clamp(0, 1) * (2**bits - 1)).round()
    return values.to(torch.uint8 if bits == 8 else torch.uint16), outside


def with_channels(pixels: Tensor, channels: int) -> Tensor:
    """[B, c, H, W] with 1 or 3 channels: grey is repeated, RGB becomes its luminance."""
    if pixels.shape[1] == channels:
        return pixels
    if channels == 3:
        return pixels.expand(-1, 3, -1, -1)
    weights = pixels.new_tensor(_LUMA)[:, None, None]
    return (pixels * weights).sum(dim=1, keepdim=True)


def with_size(pixels: Tensor, height: int, width: int) -> Tensor:
    """[B, C, height, width], bilinear with antialiasing; contiguous."""
    if tuple(pixels.shape[2:]) == (height, width):
        return pixels.contiguous()
    return interpolate(
        pixels, (height, width), mode="bilinear", align_corners=False, antialias=True
    ).contiguous()


def picture_id(name: str) -> int:
    """The sample id of a picture in a folder: 63 bits of the SHA-256 of its name there.

    So its noise is its own, whatever other pictures there are.

    Args:
        name: "a.png", or "sub/a.png".
    """
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass
class Picture:
    """A picture as pixels, with what is needed to write it back in the same form.

    Args:
        pixels: [1 or 3, H, W] float32 in [0, 1].
        alpha: [H, W] uint8, put back unchanged, or None.
        bits: 8, or 16 (grey only).
        keep: options for pillow's `save`: EXIF and colour profile.
        remarks: what was not read as it is, for the user.
    """

    pixels: Tensor
    alpha: np.ndarray | None = None
    bits: int = 8
    keep: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def image(self, pixels: Tensor) -> tuple[Image.Image, int]:
        """The picture with other pixels [C, H, W], and the number of values that were clipped."""
        values, clipped = to_whole_numbers(pixels, self.bits)
        array = values.permute(1, 2, 0).numpy()
        if self.alpha is not None:
            array = np.concatenate([array, self.alpha[:, :, None]], axis=2)
        image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
        image.info.update(self.keep)
        return image, clipped


@contextmanager
def open_picture(path: str | Path) -> Iterator[Image.Image]:
    """A picture's file, open; whatever its decoder raises meanwhile becomes a `FileError`.

    Pictures of more pixels than pillow lets pass (`Image.MAX_IMAGE_PIXELS`, twice) are among that.
    """
    with reading(path, "an image"):
        try:
            image = Image.open(path)
        except UnidentifiedImageError:
            raise FileError(f"{path} is not an image that pillow can read") from None
        with image:
            yield image


def read_picture(image: Image.Image, name: str = "the picture") -> Picture:
    """The pixels of a pillow image: grey, RGB, with alpha or a palette; 8 bits, or 16 bits grey.

    Raises FileError, a ValueError that begins with `name`, for other modes and for animations.
    """
    remarks = []
    deep = [str(tile[3]) for tile in getattr(image, "tile", []) if ";16" in str(tile[3])]
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise FileError(f"{name} holds {frames} frames; give single pictures")
    if frames > 1:
        remarks.append(f"{name} holds {frames} pictures; the first is used")
    image.load()
    info = image.info
    if image.mode == "1":
        remarks.append(f"{name} is black and white; it is read and written as grey")
        image = image.convert("L")
    elif image.mode in ("P", "PA"):
        mode = "RGBA" if image.mode == "PA" or "transparency" in info else "RGB"
        remarks.append(f"{name} has a palette; it is read and written as {mode}")
        image = image.convert(mode)
    bits = 16 if image.mode in _DEEP_GREY else 8
    if image.mode == "CMYK":
        raise FileError(
            f"{name} is CMYK, and its RGB depends on the inks: convert it to RGB with its colour "
            "profile first"
        )
    if image.mode not in ("L", "LA", "RGB", "RGBA", *_DEEP_GREY):
        raise FileError(
            f"{name} has pillow mode {image.mode}; grey (8 or 16 bits), RGB and RGBA are supported"
        )
    if deep and bits == 8:
        remarks.append(f"{name} has 16 bits a channel; 8 of them are read and written")
    array = np.asarray(image)
    array = array[:, :, None] if array.ndim == 2 else array
    alpha = None
    if array.shape[2] in (2, 4):
        array, alpha = array[:, :, :-1], array[:, :, -1].copy()
    scaled = array.astype(np.float32) / (2**bits - 1)
    pixels = torch.from_numpy(scaled).permute(2, 0, 1).contiguous()
    keep = {key: info[key] for key in ("exif", "icc_profile") if info.get(key)}
    return Picture(pixels, alpha, bits, keep, remarks)


def read_upright(image: Image.Image, name: str = "the picture") -> Picture:
    """`read_picture` of a picture that is set upright if EXIF says it is stored on its side."""
    turned = image.getexif().get(_ORIENTATION, 1) != 1
    return read_picture(ImageOps.exif_transpose(image) if turned else image, name)


def purify_image(
    image: Image.Image | str | Path,
    purifier: Purifier,
    *,
    resize: int | Sequence[int] | None = None,
    convert_color: bool = False,
    sample_id: int = 0,
    draw: int = 0,
) -> Image.Image:
    """A purified picture, of the size and mode of the given one (palettes become RGB).

    A picture that is stored on its side, as EXIF says, comes back upright.

    Args:
        image: a pillow image or a file. An alpha channel is copied unchanged.
        purifier: the `Purifier`; its device is used.
        resize: (height, width) that the network is to see, one number for a square; the result is
            resized back. Default: the network sees the picture's own size.
        convert_color: allow a grey picture for an RGB network, and the reverse, and back.
        sample_id: names the picture to the noise.
        draw: which of its independent noises.

    Raises:
        TypeError: image is no picture, such as a tensor.
        ValueError: the picture is of a kind that cannot be read, has channels that the network does
            not take, or a size at which it fails. Other errors are those of `Purifier`.
    """
    if not isinstance(image, Image.Image | str | Path):
        raise TypeError(
            f"image must be a pillow image or a file, got {type(image).__name__}; pixels "
            "[B, C, H, W] in [0, 1] go to the purifier itself, purifier(pixels), and an array "
            "[H, W, C] of bytes is a picture by PIL.Image.fromarray(array)"
        )
    size = None if resize is None else _size(resize)
    name = str(image) if isinstance(image, str | Path) else "the picture"
    with open_picture(image) if isinstance(image, str | Path) else image.copy() as opened:
        picture = read_upright(opened, name)
    channels, height, width = picture.pixels.shape
    wanted = purifier.score_model.in_channels or channels
    if wanted != channels and not (convert_color and wanted in (1, 3)):
        raise ValueError(
            f"{name} has {channels} colour channels and the network takes {wanted}"
            + ("; convert_color=True converts there and back" if wanted in (1, 3) else "")
        )
    pixels = with_size(with_channels(picture.pixels[None], wanted), *(size or (height, width)))
    parameter = first_parameter(purifier.score_model)
    device = "cpu" if parameter is None else parameter.device
    try:
        with torch.no_grad():
            clean = purifier(pixels.to(device), sample_ids=[sample_id], draw=draw).float().cpu()
    except (RuntimeError, AssertionError) as error:
        if size is not None or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{name} could not be purified at its own size, {height} x {width} "
            f"({' '.join(str(error).split())}); where the models take one size only, write "
            "resize=32, or what theirs is"
        ) from error
    clean = with_size(with_channels(clean, channels), height, width)
    return picture.image(clean[0])[0]


def _size(resize: Any) -> tuple[int, int]:
    """(height, width) of a number or a pair."""
    if isinstance(resize, int | np.integer) and not isinstance(resize, bool):
        resize = (resize, resize)
    expected = "resize must be (height, width), or one number for a square"
    if isinstance(resize, str) or not isinstance(resize, Sequence) or len(resize) != 2:
        raise TypeError(f"{expected}, got {resize!r}")
    height, width = (checks.integer("each of resize", side, 1) for side in resize)
    return height, width
