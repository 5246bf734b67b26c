"""A distribution whose score is known: mixtures of Gaussians, as score networks and classifiers.

For tests against exact answers, and for the picture of label shift. Everything is in diffusion
space x = 2u - 1; under variance-preserving noise √ᾱ x + √(1-ᾱ) z a component N(μ, s²) becomes
N(√ᾱ μ, ᾱ s² + 1 - ᾱ), so scores and posteriors stay exact at every noise level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coup_fast import checks
from coup_fast.schedules import DiscreteSchedule, VPSchedule


class GaussianMixture(nn.Module):
    """Mixture of K Gaussians with diagonal covariances over images [C, H, W].

    means: [K, C, H, W] in diffusion space. stds: broadcastable to means, > 0. weights: K positive
    numbers; default equal. All become buffers of the dtype of means; results have x's dtype.
    """

    means: Tensor
    stds: Tensor
    log_weights: Tensor

    def __init__(self, means: Tensor, stds: Tensor, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        weights = [1.0] * len(means) if weights is None else weights
        if len(weights) != len(means):
            raise ValueError(f"{len(means)} means need as many weights, got {len(weights)}")
        self.register_buffer("means", means.clone())
        self.register_buffer("stds", stds.to(means.dtype).expand_as(means).contiguous())
        log_weights = torch.tensor(weights, dtype=means.dtype).log()
        self.register_buffer("log_weights", log_weights.log_softmax(0))

    def _moments(self, x: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances of the components at noise level ᾱ [B]: [B, K, C, H, W] each."""
        level = alpha_bar.reshape(-1, *[1] * self.means.ndim)
        means = level.sqrt() * self.means
        variances = level * self.stds.square() + (1 - level)
        return means.to(x.dtype), variances.to(x.dtype)

    def log_joint(self, x: Tensor, alpha_bar: Tensor) -> Tensor:
        """log w_k N_k(x) at noise level ᾱ. x: [B, C, H, W]; alpha_bar: float64 [B]; -> [B, K]."""
        means, variances = self._moments(x, alpha_bar)
        terms = (x[:, None] - means).square() / variances + variances.log() + math.log(2 * math.pi)
        return self.log_weights.to(x.dtype) - 0.5 * terms.flatten(2).sum(2)

    def log_density(self, x: Tensor, alpha_bar: Tensor) -> Tensor:
        """log p(x) at noise level ᾱ, [B]."""
        return self.log_joint(x, alpha_bar).logsumexp(1)

    def score(self, x: Tensor, alpha_bar: Tensor) -> Tensor:
        """∇ₓ log p(x) at noise level ᾱ, shaped as x."""
        means, variances = self._moments(x, alpha_bar)
        posterior = self.log_joint(x, alpha_bar).softmax(1)
        pulls = (means - x[:, None]) / variances
        return (posterior.reshape(*posterior.shape, *[1] * (x.ndim - 1)) * pulls).sum(1)


class MixtureNetwork(nn.Module):
    """The network a perfectly trained score model would be: f(x, t), t [B] in [0, 1].

    kind: "eps", "score" or "x0". schedule: `VPSchedule` (t is time) or `DiscreteSchedule` (t is
    i / N). Use `ScoreModel(network, kind, schedule, time_scale=1.0)`.
    """

    def __init__(
        self,
        mixture: GaussianMixture,
        kind: str = "eps",
        schedule: VPSchedule | DiscreteSchedule | None = None,
    ) -> None:
        super().__init__()
        self.mixture = mixture
        self.kind = checks.choice("kind", kind, ("eps", "score", "x0"))
        self.schedule = VPSchedule() if schedule is None else schedule

    def alpha_bar(self, t: Tensor) -> Tensor:
        """ᾱ at network times t, float64 [B]."""
        t = t.to(torch.float64)
        if isinstance(self.schedule, VPSchedule):
            slope = self.schedule.beta_max - self.schedule.beta_min
            return torch.exp(-0.5 * slope * t * t - self.schedule.beta_min * t)
        table = torch.as_tensor(
            self.schedule.alpha_bar(range(self.schedule.num_steps)), device=t.device
        )
        return table[torch.round(t * self.schedule.num_steps).to(torch.int64)]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Noise, score or denoised image at x [B, C, H, W]."""
        alpha_bar = self.alpha_bar(t)
        score = self.mixture.score(x, alpha_bar)
        if self.kind == "score":
            return score
        level = alpha_bar.reshape(-1, *[1] * (x.ndim - 1))
        if self.kind == "eps":
            return -(1 - level).sqrt().to(x.dtype) * score
        return (x + (1 - level).to(x.dtype) * score) / level.sqrt().to(x.dtype)


class MixtureClassifier(nn.Module):
    """The Bayes classifier of a mixture's components: pixels [B, C, H, W] -> logits [B, K]."""

    def __init__(self, mixture: GaussianMixture) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, pixels: Tensor) -> Tensor:
        """log w_k N_k(2u - 1); softmax of it is the posterior of the clean data."""
        clean = torch.ones(len(pixels), dtype=torch.float64, device=pixels.device)
        return self.mixture.log_joint(2 * pixels - 1, clean)


def two_gaussians(
    mean: float = 0.5, std: float = 0.15, dtype: torch.dtype = torch.float32
) -> GaussianMixture:
    """The toy of the COUP paper: one Gaussian per class at ±mean, images of one pixel."""
    means = torch.tensor([-mean, mean], dtype=dtype).reshape(2, 1, 1, 1)
    return GaussianMixture(means, torch.tensor(std))
