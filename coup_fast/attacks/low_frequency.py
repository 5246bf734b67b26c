"""A ball of smooth perturbations: those of the lowest frequencies of the discrete cosine transform.

Pixel-wise steps change each pixel against its neighbours, which the noise of a random defence
covers most easily, and their gradient is the noisiest part of the gradient. Low frequencies are
less noisy and survive denoising better. Kassis, Hengartner and Yu attack diffusion-based
purification so ("DiffBreak: is diffusion-based purification robust?", arXiv 2411.16598, section 5).
Their attack LF is another one: it optimises a filter for each pixel under a perceptual distance and
knows no norm. What stands here is the older, norm-bounded form of the idea: the subspace of Guo,
Frank and Weinberger ("Low frequency adversarial perturbation", arXiv 1809.08758), and for ℓ∞ the
sign of the gradient within it, as in Sharma, Ding and Brubaker ("On the effectiveness of low
frequency perturbations", arXiv 1903.00073).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from coup_fast.attacks.ball import Ball


def low_pass(values: Tensor, share: float) -> Tensor:
    """The part of [B, C, H, W] in the lowest frequencies: an orthogonal projection.

    share: in (0, 1]. Of the coefficients of the cosine transform (DCT-II) of each channel, the
    first ceil(share · H) and ceil(share · W) stay along height and width. Computed in float64 and
    image by image, so that an image's result does not depend on its neighbours.
    """
    if share == 1 or values.numel() == 0:
        return values
    rows, columns = (_projection(size, share, values.device) for size in values.shape[2:])
    smooth = [rows @ image @ columns for image in values.double()]
    return torch.stack(smooth).to(values.dtype)


def _projection(size: int, share: float, device: torch.device) -> Tensor:
    """float64 [size, size]: onto the first frequencies of the cosine transform."""
    kept = math.ceil(share * size - 1e-9)
    frequency = torch.arange(kept, dtype=torch.float64, device=device)[:, None]
    place = torch.arange(size, dtype=torch.float64, device=device) + 0.5
    waves = torch.cos(torch.pi / size * frequency * place)
    waves = waves / waves.square().sum(1, keepdim=True).sqrt()
    return waves.T @ waves


class LowFrequencyBall(Ball):
    """The images of a ball whose difference from its centre is smooth, before it is clamped.

    `project` takes the low frequencies of the difference and then moves the image into the ball;
    what clamping to the ball and to [0, 1] cuts off is the only part outside of them. share: as for
    `low_pass`; 1 gives the ball itself.
    """

    def __init__(self, centre: Tensor, norm: str, eps: float, share: float) -> None:
        super().__init__(centre, norm, eps)
        self.share = share

    def project(self, images: Tensor) -> Tensor:
        """The low frequencies of the difference, inside the ball."""
        if self.share == 1:
            return super().project(images)
        return super().project(self.centre + low_pass(images - self.centre, self.share))

    def ascent(self, gradient: Tensor) -> Tensor:
        """`Ball.ascent` of the low frequencies of the gradient."""
        return super().ascent(low_pass(gradient, self.share))
