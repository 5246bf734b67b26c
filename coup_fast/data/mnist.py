"""MNIST from its four standard idx files, checked by MD5 before use.

A folder may hold them plain or gzipped, as `train-images-idx3-ubyte`, `train-images.idx3-ubyte`
or with `.gz`, itself or in `MNIST/raw` below it (where torchvision puts them).
"""

from __future__ import annotations

import gzip
import hashlib
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
_LARGEST = 16 + 60000 * 28 * 28  # bytes
_PREFIX = {"train": "train", "test": "t10k"}


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
    checks.choice("split", split, _PREFIX)
    images = _read(Path(folder), f"{_PREFIX[split]}-images-idx3-ubyte")
    labels = _read(Path(folder), f"{_PREFIX[split]}-labels-idx1-ubyte")
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    classes = np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)
    return torch.from_numpy(pixels.copy()), torch.from_numpy(classes)


def _read(folder: Path, name: str) -> bytes:
    """Content of one file, uncompressed, its MD5 as published."""
    path = _find(folder, name)
    opened = gzip.open if path.suffix == ".gz" else open
    with reading(path, "MNIST's " + name), opened(path, "rb") as file:
        content = file.read(_LARGEST + 1)
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if digest != _MD5[name]:
        raise ValueError(
            f"{path} is not MNIST's {name}: MD5 {digest}, expected {_MD5[name]}; download it again."
        )
    return content


def _find(folder: Path, name: str) -> Path:
    for place in (folder, folder / "MNIST" / "raw"):
        for stem in (name, name.replace("-idx", ".idx")):
            for path in (place / stem, place / f"{stem}.gz"):
                if path.is_file():
                    return path
    raise FileNotFoundError(
        f"no {name} or {name}.gz in {folder}; give the folder of MNIST's files."
    )
