"""Noise schedules: pure functions of time in float64.

A schedule says on which noise a network was trained. Signal and noise are `√ᾱ x + σ z` with
σ² = 1 - ᾱ (variance preserving), or `x + σ z` (variance exploding, EDM). Time runs from 0 (clean)
to 1. Index i of a discrete schedule of N steps is the noise level at time (i + 1) / N.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coup_fast import checks

Array = NDArray[np.float64]


def sigma(alpha_bar: ArrayLike) -> Array:
    """Noise standard deviation √(1 - ᾱ) of a variance-preserving process."""
    return np.sqrt(1.0 - np.asarray(alpha_bar, dtype=np.float64))


@dataclass(frozen=True)
class VPSchedule:
    """Continuous variance-preserving SDE, β(t) = beta_min + (beta_max - beta_min) t, t in [0, 1].

    The source is appendix B of Song et al., "Score-based generative modeling through SDEs" (ICLR
    2021). The published networks are called with 999 t (`ScoreModel(time_scale=999)`).

    Args:
        beta_min: β(0) > 0.
        beta_max: β(1) >= beta_min.

    Raises:
        ValueError: the numbers are out of range.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        low = checks.number("beta_min", self.beta_min, 0, above=True)
        object.__setattr__(self, "beta_min", low)
        object.__setattr__(self, "beta_max", checks.number("beta_max", self.beta_max, low))

    def beta(self, t: ArrayLike) -> Array:
        """β(t)."""
        return self.beta_min + (self.beta_max - self.beta_min) * np.asarray(t, dtype=np.float64)

    def log_alpha_bar(self, t: ArrayLike) -> Array:
        """log ᾱ(t) = -∫₀ᵗ β."""
        t = np.asarray(t, dtype=np.float64)
        return -0.5 * (self.beta_max - self.beta_min) * t**2 - self.beta_min * t

    def alpha_bar(self, t: ArrayLike) -> Array:
        """ᾱ(t) = exp(-½ (beta_max - beta_min) t² - beta_min t)."""
        return np.exp(self.log_alpha_bar(t))

    def sigma(self, t: ArrayLike) -> Array:
        """σ_t = √(1 - ᾱ(t)), accurate at small t."""
        return np.sqrt(-np.expm1(self.log_alpha_bar(t)))

    def time_of(self, alpha_bar: float) -> float:
        """The t at which ᾱ(t) is this; alpha_bar in (0, 1)."""
        slope, level = self.beta_max - self.beta_min, -np.log(alpha_bar)
        return float(2 * level / (self.beta_min + np.sqrt(self.beta_min**2 + 2 * slope * level)))

    def continuous(self) -> VPSchedule:
        """Itself."""
        return self

    def discrete(self, num_steps: int = 1000) -> DiscreteSchedule:
        """The same process in num_steps steps, β_i linear from beta_min/N to beta_max/N.

        The score-SDE code does the same. With the default β the result is DDPM's schedule
        (docs/methods.md, Notation).
        """
        return DiscreteSchedule.linear(
            self.beta_min / num_steps, self.beta_max / num_steps, num_steps
        )

    def network_time(self, t: ArrayLike) -> Array:
        """The time a network trained on this schedule is told at time t: t itself."""
        return np.asarray(t, dtype=np.float64)

    def index_time(self, index: ArrayLike) -> Array:
        """The time a network is told at index i of `discrete()`: (i + 1) / 1000.

        That is the time of the same noise level. Some released code feeds a continuous network
        the bare index; describe the network with a DiscreteSchedule to do the same.
        """
        return (np.asarray(index, dtype=np.float64) + 1) / 1000


@dataclass(frozen=True)
class DiscreteSchedule:
    """Discrete variance-preserving chain, q(x_i | x_{i-1}) = N(√(1-β_i) x_{i-1}, β_i).

    The source is Ho et al., "Denoising diffusion probabilistic models" (NeurIPS 2020). A network
    trained on it is told the index: use `ScoreModel(time_scale=N)`, so that the times i / N given
    by `index_time` become i.

    Args:
        betas: β_0 … β_{N-1}, each in (0, 1).
        exact_index: what methods that integrate an SDE tell the network at time t. False:
            floor(N t), DiffPure's convention, which is one index above the noise level of t. True:
            N t - 1, the index of that level. It is a whole number where N t is; between the
            indices, the network is asked between them.

    Raises:
        ValueError: there are no betas, or one of them is out of range.
    """

    betas: tuple[float, ...] = tuple(np.linspace(1e-4, 0.02, 1000).tolist())
    exact_index: bool = False

    def __post_init__(self) -> None:
        numbers = [getattr(beta, "item", lambda beta=beta: beta)() for beta in self.betas]
        betas = [checks.number("each of betas", b, 0, 1, above=True, below=True) for b in numbers]
        if not betas:
            raise ValueError("betas must be a non-empty sequence of numbers in (0, 1), got none")
        object.__setattr__(self, "betas", tuple(betas))
        checks.flag("exact_index", self.exact_index)

    def __repr__(self) -> str:
        first, last, count = self.betas[0], self.betas[-1], self.num_steps
        exact = ", exact_index=True" if self.exact_index else ""
        if self.betas == DiscreteSchedule.linear(first, last, count).betas:
            return f"DiscreteSchedule.linear({first!r}, {last!r}, {count}{exact})"
        return f"DiscreteSchedule(<{count} betas, {first:.4g} to {last:.4g}>{exact})"

    @classmethod
    def linear(
        cls,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        num_steps: int = 1000,
        *,
        exact_index: bool = False,
    ) -> DiscreteSchedule:
        """DDPM's linear schedule (Ho et al. 2020)."""
        return cls(tuple(np.linspace(beta_start, beta_end, num_steps).tolist()), exact_index)

    @classmethod
    def cosine(cls, num_steps: int = 1000, offset: float = 0.008) -> DiscreteSchedule:
        """Cosine schedule, β at most 0.999 (Nichol and Dhariwal, ICML 2021, eq. 17)."""
        t = np.linspace(0, 1, num_steps + 1)
        level = np.cos((t + offset) / (1 + offset) * np.pi / 2) ** 2
        return cls(tuple(np.minimum(1 - level[1:] / level[:-1], 0.999).tolist()))

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.betas)

    def beta(self, index: ArrayLike) -> Array:
        """β_i."""
        return np.take(np.asarray(self.betas, dtype=np.float64), np.asarray(index))

    def alpha_bar(self, index: ArrayLike) -> Array:
        """ᾱ_i = ∏_{j<=i} (1 - β_j); 1 at index -1. Between indices, log ᾱ is linear."""
        log_alpha_bar = np.concatenate(([0.0], np.cumsum(np.log1p(-np.asarray(self.betas)))))
        levels = np.arange(-1, self.num_steps)
        return np.exp(np.interp(np.asarray(index, dtype=np.float64), levels, log_alpha_bar))

    def sigma(self, index: ArrayLike) -> Array:
        """√(1 - ᾱ_i)."""
        return sigma(self.alpha_bar(index))

    def continuous(self) -> VPSchedule:
        """The VP SDE this chain discretises: β(t) from N β_0 to N β_{N-1}.

        Raises ValueError unless β is linear in the index.
        """
        betas = np.asarray(self.betas)
        straight = np.linspace(betas[0], betas[-1], self.num_steps)
        if self.num_steps < 2 or not np.allclose(betas, straight, rtol=1e-6, atol=0):
            raise ValueError(
                "this discrete schedule is not linear in β, so it has no continuous VP form; "
                "use a discrete method: ddpm, ddim, gdmp, gradual or one-shot"
            )
        return VPSchedule(self.num_steps * self.betas[0], self.num_steps * self.betas[-1])

    def discrete(self) -> DiscreteSchedule:
        """Itself."""
        return self

    def network_time(self, t: ArrayLike) -> Array:
        """The time a network is told at continuous time t: floor(N t) / N.

        This is DiffPure's convention for guided-diffusion networks. Rounding errors of the grid
        must not change the floor, hence the small allowance. With `exact_index` it is (N t - 1)/N,
        and 0 below the first level.
        """
        level = self.num_steps * np.asarray(t, dtype=np.float64)
        if self.exact_index:
            return np.clip(level - 1, 0, self.num_steps - 1) / self.num_steps
        index = np.floor(level + 1e-6)
        return np.minimum(index, self.num_steps - 1) / self.num_steps

    def index_time(self, index: ArrayLike) -> Array:
        """The time a network is told at index i: i / N."""
        return np.asarray(index, dtype=np.float64) / self.num_steps


@dataclass(frozen=True)
class EDMSchedule:
    """Variance-exploding noise x + σ z with σ up to sigma_max, for denoisers D(x, σ).

    The source is Karras et al., "Elucidating the design space of diffusion models" (NeurIPS 2022).
    Time is σ / sigma_max, so `ScoreModel(kind="x0", time_scale=sigma_max)` tells the network σ.

    Args:
        sigma_max: the largest σ, > 0.

    Raises:
        ValueError: sigma_max is not positive.
    """

    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        sigma_max = checks.number("sigma_max", self.sigma_max, 0, above=True)
        object.__setattr__(self, "sigma_max", sigma_max)

    def network_time(self, sigma: ArrayLike) -> Array:
        """σ / sigma_max."""
        return np.asarray(sigma, dtype=np.float64) / self.sigma_max


Schedule = VPSchedule | DiscreteSchedule | EDMSchedule
