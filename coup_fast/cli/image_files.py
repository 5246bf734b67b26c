"""Image files and .npy / .npz batches as pixel tensors, and back in the same format.

An `ImageFile` is one picture, an `ArrayFile` one batch of them.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from coup_fast.cli.common import CommandError, say
from coup_fast.cli.fitting import Fit
from coup_fast.files import IMAGE_SUFFIXES, FileError, read_arrays, whole_file

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from coup_fast.cli.folders import Record
    from coup_fast.integrations.pictures import Picture

ARRAY_SUFFIXES = (".npy", ".npz")
_JPEG = (".jpg", ".jpeg")
_NO_ALPHA = (*_JPEG, ".bmp", ".pgm", ".ppm")
_DEEP = (".png", ".tif", ".tiff")
Layout = Literal["auto", "nchw", "nhwc"]


@dataclass
class ImageFile:
    """One picture: where it comes from, where it goes, and what it holds."""

    source: Path
    target: Path
    picture: Picture
    record: Record | None = None  # of the folder that it goes to

    @property
    def pixels(self) -> Tensor:
        """[C, H, W] in [0, 1]."""
        return self.picture.pixels

    def write(self, purified: Tensor) -> int:
        """Save purified pixels [C, H, W]; returns the number of clipped values."""
        from PIL import Image

        image, clipped = self.picture.image(purified)
        options: dict[str, Any] = dict(self.picture.keep)
        suffix = self.target.suffix.lower()
        if suffix in _JPEG:
            options |= {"quality": 95, "subsampling": 0}
        elif suffix == ".webp":
            options |= {"lossless": True, "exact": True}
        encoded = io.BytesIO()
        image.save(encoded, format=Image.registered_extensions()[suffix], **options)
        if self.record is not None:
            self.record.write(self.target, encoded.getvalue())
        else:
            with whole_file(self.target) as file:
                file.write(encoded.getvalue())
        return clipped


def read_image(path: Path, target: Path, alpha: str | None, *, quiet: bool = False) -> ImageFile:
    """Read one picture. alpha: "keep", "drop" or None (a picture with alpha is then an error).

    quiet: say no remarks, which have been said.

    Raises FileError for a file that cannot be read, CommandError for one that needs an option.
    """
    from coup_fast.integrations.pictures import open_picture, read_picture

    with open_picture(path) as image:
        picture = read_picture(image, str(path))
    for remark in () if quiet else picture.remarks:
        say(remark)
    suffix = target.suffix.lower()
    if picture.alpha is not None and alpha is None:
        raise CommandError(
            f"{path} has an alpha channel: give --alpha keep (it is copied unchanged) or "
            "--alpha drop (it is left out)"
        )
    if alpha == "drop":
        picture.alpha = None
    elif picture.alpha is not None and suffix in _NO_ALPHA:
        raise CommandError(f"{target.suffix} files hold no alpha channel: use .png")
    if picture.bits == 16 and suffix not in _DEEP:
        raise CommandError(
            f"{path} has 16 bits and {target.suffix} files hold 8: use {' or '.join(_DEEP)}"
        )
    if suffix == ".pgm" != path.suffix.lower() and picture.pixels.shape[0] == 3:
        raise CommandError(f"{path} is RGB and .pgm files hold grey: use .ppm or .png")
    return ImageFile(path, target, picture)


def image_target(source: Path, target: Path) -> Path:
    """Where the result of one picture goes: `target`, or a file of the same name in that folder."""
    if target.is_dir():
        target = target / source.name
    if target.suffix.lower() not in IMAGE_SUFFIXES:
        raise CommandError(
            f"{target} needs the ending of an image file ({' '.join(IMAGE_SUFFIXES)})"
        )
    return target


@dataclass
class ArrayFile:
    """A batch from a .npy file or one array of a .npz file, as pixels [B, C, H, W] float32."""

    pixels: Tensor
    layout: Layout
    dtype: np.dtype[Any]
    key: str | None
    others: dict[str, np.ndarray] = field(default_factory=dict)

    def write(self, target: Path, purified: Tensor) -> int:
        """Save purified pixels [B, C, H, W] as they came; returns the number of clipped values."""
        import numpy as np

        from coup_fast.integrations.pictures import to_whole_numbers

        clipped = 0
        if self.dtype == np.uint8:
            purified, clipped = to_whole_numbers(purified)
        if self.layout == "nhwc":
            purified = purified.permute(0, 2, 3, 1)
        array = np.ascontiguousarray(purified.numpy().astype(self.dtype))
        with whole_file(target) as file:
            if self.key is None:
                np.save(file, array)
            else:
                arrays: dict[str, Any] = {**self.others, self.key: array}
                np.savez_compressed(file, **arrays)
        return clipped


def choose_layout(shape: tuple[int, ...], fit: Fit, layout: Layout, name: str) -> Layout:
    """nchw or nhwc: the one of axes 1 and 3 whose length is a number of channels the network takes.

    Raises a `CommandError` if both or neither are; `layout` other than "auto" decides by itself.
    """
    if layout != "auto":
        return layout
    accepted = fit.accepted_channels
    first, last = shape[1] in accepted, shape[3] in accepted
    if first == last:
        words = " or ".join(str(number) for number in sorted(accepted))
        problem = "both axes 1 and 3" if first else "neither axis 1 nor axis 3"
        cure = ": say which with --layout nchw or --layout nhwc" if first else ""
        raise CommandError(
            f"{name} is {list(shape)}; the network takes {words} "
            f"channel{'s' * (words != '1')}, which fits {problem}{cure}"
        )
    return "nchw" if first else "nhwc"


def read_array(path: Path, fit: Fit, layout: Layout, key: str | None) -> ArrayFile:
    """Read a batch; the rules are those of `coup-fast purify --help`."""
    import numpy as np
    import torch

    loaded = read_arrays(path)
    others: dict[str, np.ndarray] = {}
    if isinstance(loaded, Mapping) != (path.suffix.lower() == ".npz"):
        kind = ".npy" if path.suffix.lower() == ".npz" else ".npz"
        raise FileError(f"{path} is a {kind} file by its content: rename it")
    if isinstance(loaded, Mapping):
        others = dict(loaded)
        batches = [name for name, value in others.items() if value.ndim == 4]
        if key is None and len(batches) != 1:
            found = ", ".join(f"{name} {list(value.shape)}" for name, value in others.items())
            raise CommandError(
                f"{path} holds {len(batches)} arrays of four dimensions ({found}): "
                "name the images with --key"
            )
        key = batches[0] if key is None else key
        if key not in others:
            raise CommandError(f"{path} has no array {key!r}; it has {', '.join(others)}")
        array = others.pop(key)
        name = f"{path}[{key}]"
    elif key is not None:
        raise CommandError(f"--key is for .npz files; {path} is a single array")
    else:
        array, name = loaded, str(path)
    if array.ndim != 4 or array.size == 0:
        raise CommandError(f"{name} is {list(array.shape)}; a batch has four dimensions, none zero")
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise CommandError(f"{name} has dtype {array.dtype}; uint8 or a float in [0, 1] is needed")
    chosen = choose_layout(array.shape, fit, layout, name)
    pixels = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if array.dtype == np.uint8:
        pixels = pixels / 255
    elif not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise CommandError(f"{name} has values outside [0, 1] (or NaN); scale it first")
    if chosen == "nhwc":
        pixels = pixels.permute(0, 3, 1, 2)
    say(f"{name}: {array.dtype} {list(array.shape)}, read as {chosen.upper()}")
    return ArrayFile(pixels.contiguous(), chosen, array.dtype, key, others)


def warn_of_loss(targets: Sequence[Path]) -> None:
    """Say that JPEG files differ from the pixels, if there are some among the targets."""
    if any(target.suffix.lower() in (".jpg", ".jpeg") for target in targets):
        say("JPEG is lossy: the files differ a little from the purified pixels")
