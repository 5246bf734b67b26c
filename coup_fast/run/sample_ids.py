"""Which image is which to the noise, and which draw is fresh.

Ids by content are a hash of an image's pixels, so the image has its noise in any batch and at any
position. Ids by position are what an image gets that comes without any; whoever purifies batch
after batch so gives the same noise to other images, which is said once.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from typing import Any

import torch
from torch import Tensor

from coup_fast.run.warn import warn

_ANOTHER_IMAGE = 0.5  # a pixel differs by this; attacks within a small ball stay below
_calls = itertools.count()  # of `fresh_draw`
_ROWS = 4  # images that are compared


def content_ids(images: Tensor) -> Tensor:
    """A hash of each image [B, ...], int64 [B] on the images' device; waits for the device once.

    BLAKE2b with 8 bytes, over the image's shape and its pixels as little-endian float32 in
    row-major order, -0 as 0: the same for all memory formats, and for dtypes with the same values.
    """
    pixels = images.detach().to("cpu", torch.float32) + 0.0
    rows = pixels.contiguous().numpy().astype("<f4", copy=False)
    head = repr(tuple(images.shape[1:])).encode()
    digests = [hashlib.blake2b(head + row.tobytes(), digest_size=8).digest() for row in rows]
    ids = [int.from_bytes(digest, "little", signed=True) for digest in digests]
    return torch.tensor(ids, dtype=torch.int64, device=images.device)


def fresh_draw() -> int:
    """A draw to begin at that no other object, process or rank begins at; in [0, 2^60).

    It follows from torch's seed, the rank and the number of calls so far in this process: a program
    that sets `torch.manual_seed` repeats itself, and without it torch's seed is another each time.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else os.environ.get("RANK", "0")
    text = f"{torch.initial_seed()} {rank} {next(_calls)}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 4


class Positions:
    """The images that a purifier saw without ids, to notice others at their positions."""

    def __init__(self) -> None:
        self._first: dict[Any, Tensor] = {}
        self._said = False

    def __reduce__(self) -> tuple[type[Positions], tuple[()]]:
        return type(self), ()  # copies and pickles start without images

    def notice(self, images: Tensor, draw: Any) -> None:
        """Warn, once, if the same positions and draw have had other images before.

        Waits for the device once in a call; images within a small ball are the same image.
        """
        if self._said or len(images) == 0 or isinstance(draw, Tensor):
            return
        kind = (draw, images.shape[1:], images.device)
        known = self._first.get(kind)
        if known is None:
            if len(self._first) < _ROWS:
                self._first[kind] = images.detach()[:_ROWS].clone()
            return
        count = min(len(known), len(images))
        gap = (images.detach()[:count] - known[:count]).abs().amax()
        if bool(gap > _ANOTHER_IMAGE):
            self._said = True
            warn(
                "several calls without sample_ids gave the same noise to different images, because "
                "noise goes by position in the batch then: pass sample_ids (numbers that name the "
                'images), or sample_ids="content", or another draw for each call'
            )
