"""Images and labels that are given to `evaluate`: what does not fit is said with its cure."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from coup_fast.data.arrays import check_shapes


def checked_data(data: Any, count: int) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] in [0, 1] and labels [N] that are given to `evaluate`, `count` at least.

    Returns the first `count` as float32 images and int64 labels. Raises TypeError or ValueError.
    """
    if not (isinstance(data, tuple | list) and len(data) == 2):
        raise TypeError(f"data must be (images, labels), got {type(data).__name__}")
    images, labels = (
        torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in data
    )
    for name, part in (("images", images), ("labels", labels)):
        if not isinstance(part, Tensor):
            raise TypeError(f"{name} of data must be a tensor or array, got {type(part).__name__}")
    check_shapes("data", images, labels)
    if not images.is_floating_point():
        cure = "; write images.float() / 255" if images.dtype == torch.uint8 else ""
        raise TypeError(f"images of data must be floats in [0, 1], got {images.dtype}{cure}")
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(
            "images of data must be in [0, 1], got values outside or NaN; for 0 to 255 write "
            "images / 255, for -1 to 1 (images + 1) / 2"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels of data must be whole numbers, got {labels.dtype}")
    if len(images) < count:
        raise ValueError(f"data has {len(images)} images, images of [data] asks for {count}")
    return images[:count].float(), labels[:count].long()
