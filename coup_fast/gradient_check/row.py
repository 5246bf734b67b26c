"""One gradient beside another: the row of a table that both checks print."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Timed = tuple[Tensor, float]


@dataclass(frozen=True)
class GradientRow:
    """One way to differentiate, against plain autograd.

    Attributes:
        name: of this way.
        relative_error: ‖g - g*‖ / ‖g*‖ over the batch, with g* the gradient of plain autograd.
        cosine: mean over images of the cosine between g and g*.
        sign_agreement: share of pixels where the signs are equal, which is what a signed attack
            step uses.
        seconds: of forward and backward.
        note: why it was not run (the numbers are None then), or what to know about it.
    """

    name: str
    relative_error: float | None = None
    cosine: float | None = None
    sign_agreement: float | None = None
    seconds: float | None = None
    note: str = ""


def compared(name: str, timed: Timed, measure: Timed, note: str = "") -> GradientRow:
    """A gradient and its seconds beside the one that it is measured by."""
    gradient, seconds = timed
    g, truth = gradient.double().flatten(1), measure[0].double().flatten(1)
    error = (g - truth).norm() / truth.norm().clamp_min(1e-300)
    cosine = torch.nn.functional.cosine_similarity(g, truth, dim=1, eps=1e-300).mean()
    signs = (g.sign() == truth.sign()).double().mean()
    return GradientRow(name, float(error), float(cosine), float(signs), seconds, note)
