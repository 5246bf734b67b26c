"""MNIST and Fashion-MNIST from their four standard idx files, checked by MD5 before use.

A folder may hold them plain or gzipped, as `train-images-idx3-ubyte`, `train-images.idx3-ubyte`
or with `.gz`, itself or in `MNIST/raw` or `FashionMNIST/raw` below it (where torchvision puts
them). The files of both sets have the same names, so only their content tells them apart.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coup_fast import checks
from coup_fast.files import reading

# MD5 of the uncompressed files.
_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
_FASHION_MD5 = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
_LARGEST = 16 + 60000 * 28 * 28  # bytes
_PREFIX = {"train": "train", "test": "t10k"}
_SETS = {  # name for people: checksums, folder of torchvision, name for commands
    "MNIST": (_MD5, "MNIST", "mnist"),
    "Fashion-MNIST": (_FASHION_MD5, "FashionMNIST", "fashion-mnist"),
}


def load_mnist(folder: str | Path, split: str = "train") -> tuple[Tensor, Tensor]:
    """Digits and labels of one split.

    Args:
        folder: where the idx files are; see the module's docstring.
        split: "train" (60,000) or "test" (10,000).

    Returns:
        images [N, 1, 28, 28] uint8 and labels [N] int64.

    Raises:
        ValueError: unknown split, or a file that is not the published one (damaged, another data
            set such as Fashion-MNIST).
        FileNotFoundError: if a file is missing.
    """
    return _load("MNIST", Path(folder), split)


def load_fashion_mnist(folder: str | Path, split: str = "train") -> tuple[Tensor, Tensor]:
    """Pieces of clothing and labels of one split of Fashion-MNIST (Xiao et al. 2017).

    Arguments, results and errors are those of `load_mnist`.
    """
    return _load("Fashion-MNIST", Path(folder), split)


def _load(name: str, folder: Path, split: str) -> tuple[Tensor, Tensor]:
    checks.choice("split", split, _PREFIX)
    images = _read(name, folder, f"{_PREFIX[split]}-images-idx3-ubyte")
    labels = _read(name, folder, f"{_PREFIX[split]}-labels-idx1-ubyte")
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    classes = np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)
    return torch.from_numpy(pixels.copy()), torch.from_numpy(classes)


def which_mnist(folder: Path) -> str | None:
    """Which of the two sets a folder holds, "mnist" or "fashion-mnist"; None if it has no files.

    Files that are neither's count as MNIST's, whose loader then says what is wrong with them.
    """
    found = None
    for name, (sums, _, command) in _SETS.items():
        for file in ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"):
            path = _find(name, folder, file)
            if path is not None:
                with suppress(OSError, EOFError, zlib.error):
                    if _digest(_content(path)) == sums[file]:
                        return command
                found = "mnist"
    return found


def _read(set_name: str, folder: Path, name: str) -> bytes:
    """Content of one file, uncompressed, its MD5 as published."""
    path = _find(set_name, folder, name)
    if path is None:
        raise FileNotFoundError(
            f"no {name} or {name}.gz in {folder}; give the folder of {set_name}'s files."
        )
    with reading(path, f"{set_name}'s {name}"):
        content = _content(path)
    digest = _digest(content)
    expected = _SETS[set_name][0][name]
    if digest != expected:
        others = [other for other, (sums, _, _) in _SETS.items() if sums[name] == digest]
        cure = f"it is {others[0]}'s: read it as that" if others else "download it again"
        raise ValueError(
            f"{path} is not {set_name}'s {name}: MD5 {digest}, expected {expected}; {cure}."
        )
    return content


def _content(path: Path) -> bytes:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        return file.read(_LARGEST + 1)


def _digest(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _find(set_name: str, folder: Path, name: str) -> Path | None:
    for place in (folder, folder / _SETS[set_name][1] / "raw"):
        for stem in (name, name.replace("-idx", ".idx")):
            for path in (place / stem, place / f"{stem}.gz"):
                if path.is_file():
                    return path
    return None
