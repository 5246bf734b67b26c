"""The set of images an attack may return, exactly: an ℓ∞ or ℓ2 ball of pixels within [0, 1].

Rounding is on the safe side: what `project` returns is inside when measured in float64. Norms are
summed in one order whatever the batch, so that an image's attack does not depend on its neighbours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from coup_fast.noise import step_keys, uniform, words
from coup_fast.reference import normal

NORMS = ("linf", "l2")
_LAST_DIGITS = 4e-16  # of the difference of two pixels in float64


def ordered_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension, [..., n] -> [...]: a halving tree of elementwise additions."""
    while values.shape[-1] > 1:
        half = (values.shape[-1] + 1) // 2
        rest = values.shape[-1] - half
        sums = values[..., :half].clone()
        sums[..., :rest] += values[..., half:]
        values = sums
    return values.sum(-1)  # of one element, or of none


def _as_factors(rows: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1] in the dtype of `like`."""
    return rows.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def l2_norms(values: Tensor) -> Tensor:
    """ℓ2 norm of each sample, float64 [B]."""
    return ordered_sum(values.double().flatten(1).square()).sqrt()


def unit_norm(values: Tensor) -> Tensor:
    """Each sample divided by its ℓ2 norm; 0 stays 0."""
    norms = l2_norms(values)
    inverse = torch.where(norms > 0, 1 / norms.clamp_min(1e-300), 0)
    return (values.double() * _as_factors(inverse, values.double())).to(values.dtype)


def _next_towards(values: Tensor, exact: Tensor, inwards: float) -> Tensor:
    """`exact` (float64) in the dtype of values, on its `inwards` side (±inf) where it rounds."""
    rounded = exact.to(values.dtype)
    beyond = (rounded.double() - exact) * inwards < 0
    return torch.where(beyond, torch.nextafter(rounded, torch.full_like(rounded, inwards)), rounded)


class Ball:
    """Images within `eps` of `centre` in a norm, and within [0, 1].

    centre: [B, C, H, W] pixels in [0, 1], float32 or float64. norm: "linf" or "l2". eps: > 0, in
    pixels.
    """

    def __init__(self, centre: Tensor, norm: str, eps: float) -> None:
        self.centre = centre.detach()
        self.norm = norm
        self.eps = eps
        if norm == "linf":
            exact = self.centre.double()
            self._low = _next_towards(self.centre, (exact - eps).clamp_min(0), torch.inf)
            self._high = _next_towards(self.centre, (exact + eps).clamp_max(1), -torch.inf)
            return
        # Each element of centre + step is off by at most one rounding of a number below 1, and the
        # step by one of its own; together they move the norm by less than this.
        rounding = 1.5 * torch.finfo(centre.dtype).eps * math.sqrt(math.prod(centre.shape[1:]))
        self._radius = max(eps - rounding, 0.0)

    def project(self, images: Tensor) -> Tensor:
        """The nearest images inside (for ℓ2: of the ball, then clamped, which stays inside)."""
        if self.norm == "linf":
            return torch.minimum(torch.maximum(images, self._low), self._high)
        step = images - self.centre
        shrink = (self._radius / l2_norms(step).clamp_min(1e-300)).clamp_max(1)
        return (self.centre + step * _as_factors(shrink, step)).clamp(0, 1)

    def ascent(self, gradient: Tensor) -> Tensor:
        """The steepest direction of unit length in the norm: sign(g), or g / ‖g‖₂; 0 for g = 0."""
        return gradient.sign() if self.norm == "linf" else unit_norm(gradient)

    def random(self, seed: int, sample_ids: Tensor, draw: int) -> Tensor:
        """A random point of the ball for each image, from the counters of its sample id and draw.

        ℓ∞: uniform in the cube. ℓ2: a uniform direction at a uniform distance. Then clamped. The
        same bits in any batch and order, on any number of processes.
        """
        shape = self.centre.shape
        numel = math.prod(shape[1:])
        keys = step_keys(seed, sample_ids, draw, 2, numel)
        first = uniform(words(keys[0], numel)).reshape(shape).to(self.centre.dtype)
        if self.norm == "linf":
            return self.project(self.centre + self.eps * (2 * first - 1))
        direction = self.ascent(normal(keys[0], shape).to(self.centre.dtype))
        distance = self.eps * uniform(words(keys[1], 1))[:, 0]
        return self.project(self.centre + direction * _as_factors(distance, direction))

    def check(self, images: Tensor) -> None:
        """Raises RuntimeError if an image is outside; measured in float64, to its last digit."""
        step = (images.double() - self.centre.double()).flatten(1)
        size = step.abs().amax(1) if self.norm == "linf" else l2_norms(step)
        inside = (size <= self.eps + _LAST_DIGITS) & (images >= 0).flatten(1).all(1)
        inside &= (images <= 1).flatten(1).all(1)
        if not bool(inside.all()):
            worst = int((~inside).nonzero()[0])
            raise RuntimeError(
                f"image {worst} of the batch left the {self.norm} ball of {self.eps} or [0, 1] "
                f"(distance {float(size[worst])}); this is a defect of coup_fast"
            )
