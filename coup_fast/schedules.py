"""Noise schedules: pure functions of time in float64.

A schedule says on which noise a network was trained. Signal and noise are `√ᾱ x + σ z` with
σ² = 1 - ᾱ (variance preserving), or `x + σ z` (variance exploding, EDM). Time runs from 0 (clean)
to 1. Index i of a discrete schedule of N steps is the noise level at time (i + 1) / N.

A flow-matching network was trained on `a x + b z`, a straight path. Such a state holds the same x
and z as the variance-preserving state with the same noise-to-signal ratio b/a = σ/√ᾱ, times
√(a² + b²). So a `FlowSchedule` is a VP schedule whose network is asked at that ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coup_fast import checks

Array = NDArray[np.float64]
FlowSource = Literal["noise", "noised", "attacked"]
FLOW_SOURCES = get_args(FlowSource)
FLOW_KINDS = ("velocity", "eps", "x0")  # of `ScoreModel.kind`, those of a `FlowSchedule`


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

    @property
    def usual_time_scale(self) -> float:
        """What published networks of the schedule are told is t times this."""
        return 999.0

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

    def alpha_bar_told(self, time: ArrayLike) -> Array:
        """ᾱ of the noise level that a network expects when it is told this time."""
        return self.alpha_bar(time)

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
    trained on it is told the index: `ScoreModel` takes N as its time scale by default, so that the
    times i / N given by `index_time` become i.

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

    @property
    def usual_time_scale(self) -> float:
        """N, with which the times i/N become the index."""
        return float(self.num_steps)

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
                "use a discrete method (ddpm, ddim, gdmp, gradual, one-shot, consistency or "
                "flowpure), or coup_fast.models.with_data_range(score_model, -1, 1), which asks "
                "the network between its indices"
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

    def alpha_bar_told(self, time: ArrayLike) -> Array:
        """ᾱ of the noise level that a network expects when it is told this time, index / N."""
        return self.alpha_bar(self.num_steps * np.asarray(time, dtype=np.float64))

    def index_time(self, index: ArrayLike) -> Array:
        """The time a network is told at index i: i / N."""
        return np.asarray(index, dtype=np.float64) / self.num_steps


@dataclass(frozen=True)
class EDMSchedule:
    """Variance-exploding noise x + σ z with σ up to sigma_max, for denoisers D(x, σ).

    The source is Karras et al., "Elucidating the design space of diffusion models" (NeurIPS 2022).
    Time is σ / sigma_max, and `ScoreModel` takes sigma_max as its time scale by default, so that
    the network is told σ.

    Args:
        sigma_max: the largest σ, > 0.

    Raises:
        ValueError: sigma_max is not positive.
    """

    sigma_max: float = 80.0

    @property
    def usual_time_scale(self) -> float:
        """sigma_max, with which the times become σ."""
        return self.sigma_max

    def __post_init__(self) -> None:
        sigma_max = checks.number("sigma_max", self.sigma_max, 0, above=True)
        object.__setattr__(self, "sigma_max", sigma_max)

    def network_time(self, sigma: ArrayLike) -> Array:
        """σ / sigma_max."""
        return np.asarray(sigma, dtype=np.float64) / self.sigma_max


@dataclass(frozen=True)
class FlowSchedule:
    """Straight paths between a source and the data, for networks that predict a velocity.

    The source is Lipman et al., "Flow matching for generative modeling" (ICLR 2023), and Liu et
    al., "Flow straight and fast" (ICLR 2023). The purification runs along `process`, and the
    network is asked at the time of the path with the same noise-to-signal ratio. That is exact,
    because both states hold the same image and the same noise.

    Args:
        source: where the path of an image x starts. "noise": x_t = t x + (1 - t) z. "noised":
            x_t = x + (1 - t) noise_std z, as FlowPure (Collaert et al., arXiv 2505.13280) trains on
            Gaussian noise. "attacked": x_t = t x + (1 - t) x_adv, as FlowPure trains on attacks;
            such a path has no noise level, and only the method `flowpure` runs it.
        data_at: the time at which the path reaches the data: 1, as above (torchcfm, FlowPure), or
            0, with t and 1 - t exchanged (diffusers, Stable Diffusion 3). The velocity is dx_t/dt
            in either direction.
        noise_std: of "noised", > 0, in the network's space. FlowPure's 0.3 on pixels is 0.6 in
            [-1, 1].

    Raises:
        ValueError: an argument is out of range.
    """

    source: FlowSource = "noise"
    data_at: int = 1
    noise_std: float = 0.6

    process: ClassVar[VPSchedule] = VPSchedule()

    @property
    def usual_time_scale(self) -> float:
        """1: the time itself."""
        return 1.0

    def __post_init__(self) -> None:
        checks.choice("source", self.source, FLOW_SOURCES)
        object.__setattr__(self, "data_at", checks.integer("data_at", self.data_at, 0, 1))
        noise_std = checks.number("noise_std", self.noise_std, 0, above=True)
        object.__setattr__(self, "noise_std", noise_std)

    def continuous(self) -> VPSchedule:
        """The VP SDE along which the purification runs."""
        return self.process

    def discrete(self) -> DiscreteSchedule:
        """Its discrete chain."""
        return self.process.discrete()

    def network_time(self, t: ArrayLike) -> Array:
        """The path's time at the noise level of the process's time t."""
        return self.time_of_ratio(np.sqrt(np.expm1(-self.process.log_alpha_bar(t))))

    def index_time(self, index: ArrayLike) -> Array:
        """The path's time at the noise level of index i of `discrete()`."""
        return self.time_of_ratio(np.sqrt(1 / self.discrete().alpha_bar(index) - 1))

    def time_of_ratio(self, ratio: ArrayLike) -> Array:
        """The path's time at which noise and signal have this ratio σ/√ᾱ.

        Raises ValueError if the path never has as much noise, or has none ("attacked").
        """
        ratio = np.asarray(ratio, dtype=np.float64)
        if self.source == "attacked":
            raise ValueError(
                'the path of FlowSchedule(source="attacked") has no noise level; '
                "only the method flowpure runs it"
            )
        if self.source == "noise":
            progress = 1 / (1 + ratio)
        else:
            progress = 1 - ratio / self.noise_std
            if np.any(progress < -1e-12):
                raise ValueError(
                    f"the run starts at {ratio.max():.4g} of noise to signal, and the flow's path "
                    f"has at most noise_std={self.noise_std:g}: use a smaller t_star or sigma"
                )
        return self.time(np.maximum(progress, 0.0))

    def time(self, progress: ArrayLike) -> Array:
        """The time after this share of the path from source to data: itself, or 1 minus it."""
        progress = np.asarray(progress, dtype=np.float64)
        return progress if self.data_at == 1 else 1 - progress

    def signal_and_noise(self, time: ArrayLike) -> tuple[Array, Array]:
        """(a, b) of the path's state a x + b z at its time."""
        progress = self.time(time)  # its own inverse
        if self.source == "noise":
            return progress, 1 - progress
        return np.ones_like(progress), self.noise_std * (1 - progress)

    def alpha_bar_told(self, time: ArrayLike) -> Array:
        """ᾱ of the VP state with the noise level of the path at its time."""
        signal, noise = self.signal_and_noise(time)
        return signal**2 / (signal**2 + noise**2)

    def eps_of_velocity(self, time: float) -> tuple[float, float]:
        """(A, B) with which ε = A x + B v, for the VP state x and the velocity v at a path's time.

        The path's state y = a x₀ + b ε is √(a² + b²) x, and v = ±(a' x₀ + b' ε), where ' is the
        change along the path from source to data. Both together give ε.
        """
        signal, noise = (float(part) for part in self.signal_and_noise(time))
        direction = 1.0 if self.data_at == 1 else -1.0
        if self.source == "noise":  # a' = 1, b' = -1
            return float(np.hypot(signal, noise)), -signal * direction
        return 0.0, -direction / self.noise_std  # a' = 0, b' = -noise_std


Schedule = VPSchedule | DiscreteSchedule | EDMSchedule | FlowSchedule


def check_pair(kind: str, schedule: Schedule) -> None:
    """Raise ValueError if a network of this schedule cannot predict this kind."""
    flow = isinstance(schedule, FlowSchedule)
    if kind == "velocity" and not flow:
        raise ValueError(
            f'kind "velocity" needs a FlowSchedule, got {type(schedule).__name__}; '
            'the v of Salimans and Ho is kind "v"'
        )
    if kind == "v" and isinstance(schedule, EDMSchedule):
        raise ValueError(
            'kind "v" mixes image and noise of a VPSchedule or a DiscreteSchedule, got '
            'EDMSchedule; a denoiser is kind "x0"'
        )
    if flow and kind not in FLOW_KINDS:
        raise ValueError(
            f"a network of a FlowSchedule predicts {', '.join(FLOW_KINDS)}, got kind {kind!r}"
        )
