"""Images and labels as arrays: what does not fit is said with what to write instead."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coup_fast.files import FileError, read_arrays


def check_shapes(where: str, images: Any, labels: Any) -> None:
    """That images are [N, C, H, W] and labels [N], tensors or arrays both.

    where: names them in the error. Raises ValueError.
    """
    shape, count = list(images.shape), list(labels.shape)
    cure = ""
    if len(shape) == 3:
        cure = "; for grey images [N, H, W] write images[:, None]"
    elif len(shape) == 4 and shape[1] not in (1, 3) and shape[3] in (1, 3):
        order = "permute" if isinstance(images, Tensor) else "transpose"
        cure = f"; for channels last write images.{order}(0, 3, 1, 2)"
    elif len(shape) == 4 and count == [shape[0], 1]:
        cure = "; for labels [N, 1] write labels[:, 0]"
    elif len(shape) == 4 and len(count) == 2 and count[0] == shape[0]:
        cure = "; for one-hot labels write labels.argmax(1)"
    elif len(shape) == 4 and count == shape[:1]:
        return
    raise ValueError(
        f"{where}: images must be [N, C, H, W] and labels [N], got {shape} and {count}{cure}"
    )


def load_npz(path: Path) -> tuple[Tensor, Tensor]:
    """The arrays `images` and `labels` of a .npz file.

    Returns:
        images [N, C, H, W], uint8 or floats in [0, 1], and labels [N], whole numbers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or an array is missing or has another shape or range.
        TypeError: an array is of another dtype.
    """
    import numpy as np

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    found = read_arrays(path)
    if not isinstance(found, Mapping):
        raise FileError(f"{path} cannot be read as a .npz file: it is a .npy file")
    if not {"images", "labels"} <= set(found):
        raise ValueError(f"{path} needs the arrays images and labels; it has {list(found)}")
    images, labels = found["images"], found["labels"]
    check_shapes(str(path), images, labels)
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise TypeError(f"{path}: images must be uint8 or floats in [0, 1], got {images.dtype}")
    if labels.dtype.kind not in "iu":
        raise TypeError(f"{path}: labels must be whole numbers, got {labels.dtype}")
    if len(labels) == 0 or int(labels.min()) < 0:
        held = "none" if len(labels) == 0 else f"a label {labels.min()}"
        raise ValueError(f"{path}: labels must be whole numbers from 0; it has {held}")
    if images.dtype != np.uint8 and not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(f"{path}: images have values outside [0, 1] (or NaN); scale them first")
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
