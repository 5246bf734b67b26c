"""What purification does to images: how far they end from where they were, and how it contracts.

All distances are ℓ2 norms of pixels in [0, 1], of one image, under draw 0 of the defence's noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from coup_fast.attacks.ball import l2_norms

LEAST_ERROR = 1e-12  # mean squared, so that PSNR ends at 120 dB
MEASURES = ("l2_to_clean", "l2_to_input", "psnr", "compression")


@torch.no_grad()
def fidelity(
    clean: Tensor, given: Tensor, purified: Tensor, purified_clean: Tensor
) -> dict[str, list[float | None]]:
    """Measures of each image, by name.

    l2_to_clean, l2_to_input: from the purified image to the clean one and to the one that was
    given. psnr: of the purified image against the clean one, in dB, at most 120. compression:
    distance of the two purified images over the distance of the two given ones, under the same
    noise; below 1 the defence draws an attacked image towards its clean one. None where they are
    the same image.

    Args:
        clean: [B, C, H, W] in [0, 1].
        given: attacked images like them, or the clean ones.
        purified: of the given ones.
        purified_clean: of the clean ones, under the same noise.
    """
    error = (purified.double() - clean.double()).flatten(1).square().mean(1)
    before = l2_norms(given.double() - clean.double())
    after = l2_norms(purified.double() - purified_clean.double())
    pairs = zip(after.tolist(), before.tolist(), strict=True)
    return {
        "l2_to_clean": l2_norms(purified.double() - clean.double()).tolist(),
        "l2_to_input": l2_norms(purified.double() - given.double()).tolist(),
        "psnr": (-10 * error.clamp_min(LEAST_ERROR).log10()).tolist(),
        "compression": [end / start if start > 0 else None for end, start in pairs],
    }


def means(batches: Sequence[Mapping[str, Any] | None]) -> dict[str, float | None] | None:
    """Of each measure over all images; None if a batch has none (a state of an older version)."""
    if not batches or any(batch is None for batch in batches):
        return None
    found: dict[str, float | None] = {}
    for name in MEASURES:
        values = [v for batch in batches if batch for v in batch[name] if v is not None]
        found[name] = sum(values) / len(values) if values else None
    return found


def rounded(images: Tensor) -> Tensor:
    """Images as a file of 8 bits keeps them: the nearest multiples of 1/255."""
    return (images * 255).round() / 255
