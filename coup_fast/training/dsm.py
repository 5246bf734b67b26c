"""Denoising score matching losses: VP noise (noise prediction) and NCSN noise levels (ADP).

Knows networks and images only; the loop, averaging and files are in trainer.py. Sources: Vincent
2011; Song et al. 2021 (VP, continuous time); Song and Ermon 2020 (NCSNv2, unconditional network);
Yoon et al. 2021 (ADP). Every random number comes from the generator passed in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class VPNoise:
    """The VP-SDE's marginals for training, and how often each time is trained on.

    alpha_bar(t) = exp(-(beta_max - beta_min) t^2 / 2 - beta_min t). Purification seldom visits late
    times, so most times are drawn from [t_min, t_focus], and the others from the whole interval, so
    that every time stays covered.

    Args:
        beta_min: β(0).
        beta_max: β(1).
        t_min: the earliest time.
        t_focus: end of the interval that most times are drawn from.
        t_last: the latest time.
        focus_share: share of the times that are drawn from [t_min, t_focus].
        time_scale: the network is called with t times this.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_focus: float = 0.6
    t_last: float = 1.0
    focus_share: float = 0.75
    time_scale: float = 999.0

    @property
    def t_max(self) -> float:
        """The latest time that is trained on."""
        return self.t_focus if self.focus_share == 1.0 else self.t_last

    def alpha_bar(self, t: Tensor) -> Tensor:
        """Squared signal scale at t, float64."""
        t = t.double()
        return torch.exp(-0.5 * (self.beta_max - self.beta_min) * t * t - self.beta_min * t)

    def sample_times(self, count: int, generator: torch.Generator) -> Tensor:
        """[count] float64 times, one from each of `count` equal shares of the density."""
        u = torch.rand(count, generator=generator, dtype=torch.float64)
        u = (torch.arange(count) + u) / count
        span = self.t_last - self.t_min
        focus = (self.t_focus - self.t_min) / span
        early = self.focus_share + (1.0 - self.focus_share) * focus  # share of times <= t_focus
        unit = torch.where(
            u < early, u * (focus / early), focus + (u - early) / (1.0 - self.focus_share)
        )
        return self.t_min + span * unit.clamp(0.0, 1.0)


@dataclass(frozen=True)
class NCSNNoise:
    """Geometric noise levels in pixel space; the defaults are NCSNv2's and ADP's for CIFAR-10.

    Args:
        sigma_max: the first level.
        sigma_min: the last level.
        num_levels: how many there are.
    """

    sigma_max: float = 50.0
    sigma_min: float = 0.01
    num_levels: int = 232

    def levels(self) -> Tensor:
        """[num_levels] float64, sigma_max first."""
        ends = torch.tensor([self.sigma_max, self.sigma_min], dtype=torch.float64).log()
        return torch.linspace(
            float(ends[0]), float(ends[1]), self.num_levels, dtype=torch.float64
        ).exp()


def vp_error(
    network: nn.Module, images: Tensor, t: Tensor, z: Tensor, noise: VPNoise, kind: str = "eps"
) -> Tensor:
    """Squared error of the predicted noise, one number per image.

    Args:
        network: called as network(x, t * time_scale), as `ScoreModel` does.
        images: [B, C, H, W] float32 pixels in [0, 1].
        t: [B] float64 times. z: standard normal of images' shape.
        kind: "eps", or "score" for a network that returns the score (energy models do); the
            predicted noise is then -sqrt(1 - alpha_bar) times its output.

    Returns:
        [B] float32: the mean over C, H, W of (z - predicted)^2.
    """
    alpha_bar = noise.alpha_bar(t)
    shape = (-1,) + (1,) * (images.ndim - 1)
    signal = alpha_bar.sqrt().float().view(shape)
    sigma = (1.0 - alpha_bar).sqrt().float().view(shape)
    out = network(signal * (2.0 * images - 1.0) + sigma * z, (t * noise.time_scale).float()).float()
    predicted = out if kind == "eps" else -sigma * out
    error: Tensor = (z - predicted).square().flatten(1).mean(dim=1)
    return error


def ncsn_error(network: nn.Module, images: Tensor, sigma: Tensor, z: Tensor) -> Tensor:
    """(h(x + sigma z) + z)^2, the mean over C, H, W for each image: [B] float32.

    NCSNv2's network h ignores the level, and the score at level sigma is s = h / sigma. The loss
    E ||sigma s + z||^2 / 2, which is the score's error weighted by sigma^2 (anneal power 2), is
    half of this. `images` [B, C, H, W] are pixels in [0, 1]; the network is called with t = 0.
    """
    scale = sigma.float().view((-1,) + (1,) * (images.ndim - 1))
    t = torch.zeros(len(images), device=images.device)
    h: Tensor = network(images + scale * z, t).float()
    return (h + z).square().flatten(1).mean(dim=1)


def vp_loss(
    network: nn.Module,
    images: Tensor,
    generator: torch.Generator,
    noise: VPNoise,
    kind: str = "eps",
    rows: slice = slice(None),
) -> Tensor:
    """Mean of `vp_error` at random times: the "simple" loss of DDPM in continuous time.

    rows: the images of the batch that count, as in `classifier_loss`.
    """
    t = noise.sample_times(len(images), generator)[rows]
    z = torch.randn(images.shape, generator=generator)[rows]
    device = images.device
    return vp_error(network, images[rows], t.to(device), z.to(device), noise, kind).mean()


def ncsn_loss(
    network: nn.Module,
    images: Tensor,
    generator: torch.Generator,
    noise: NCSNNoise,
    rows: slice = slice(None),
) -> Tensor:
    """ADP's objective: half the mean of `ncsn_error` at levels drawn uniformly.

    Pixels are dequantised as NCSNv2 does, (255 u + U) / 256 with U uniform in [0, 1); ADP's own
    pixel map (255/256) u + 1/512 is its mean. rows: as in `classifier_loss`.
    """
    index = torch.randint(noise.num_levels, (len(images),), generator=generator)[rows]
    uniform = torch.rand(images.shape, generator=generator)[rows]
    z = torch.randn(images.shape, generator=generator)[rows]
    device = images.device
    pixels = images[rows] * (255.0 / 256.0) + uniform.to(device) / 256.0
    return 0.5 * ncsn_error(network, pixels, noise.levels()[index].to(device), z.to(device)).mean()
