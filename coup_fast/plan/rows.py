"""How a method writes its rows, and makes a `Plan` of them.

`Prediction` is how a row is written: what the step does with the state, the predicted noise ε and
the predicted clean image x̂0. `network_row` turns that into coefficients of the raw network output,
for networks that predict noise, the score, the clean image, or a velocity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..schedules import Array
from .columns import (
    G_MAX,
    OUT_BIAS,
    OUT_HI,
    OUT_LO,
    OUT_SCALE,
    X0_HI,
    X0_LO,
    Z_VAR,
    C,
    D,
    E,
    P,
    Q,
    U,
    V,
    W,
    blank_row,
)
from .plans import Plan

# Of `ScoreModel.kind`, those that `network_row` takes.
DIFFUSION_KINDS = ("eps", "score", "x0", "v", "velocity")


@dataclass(frozen=True)
class Prediction:
    """A step in terms of what the network predicts: x' = x0·x̂0 + x·x + eps·ε + …

    With x = √ᾱ x̂0 + σ ε, any two of the three say it all; which are used matters only when x̂0 is
    clipped.
    """

    x0: float = 0.0
    x: float = 0.0
    eps: float = 0.0

    def unclipped_eps(self, alpha_bar: float) -> float:
        """Coefficient of ε once x̂0 is replaced by (x - σ ε)/√ᾱ."""
        return float(self.eps - self.x0 * np.sqrt((1 - alpha_bar) / alpha_bar))

    def score(self, alpha_bar: float) -> float:
        """Coefficient of the score in the step, -σ times that of ε.

        Guidance adds λ g to the score, so λ times this is its coefficient.
        """
        return float(-np.sqrt(1 - alpha_bar) * self.unclipped_eps(alpha_bar))


def network_row(
    prediction: Prediction,
    alpha_bar: float,
    kind: str,
    eps_of: tuple[float, float] | None = None,
    *,
    clip_denoised: bool = False,
) -> Array:
    """The row whose m is the raw output of a network at noise level ᾱ.

    Args:
        prediction: the step.
        alpha_bar: ᾱ before the step.
        kind: "eps" (m = ε), "score" (m = -ε/σ), "x0" (m = x̂0), or a velocity, "v" or "velocity".
        eps_of: (A, B) of a velocity, whose noise is ε = A x + B m.
        clip_denoised: whether to clamp x̂0 to [-1, 1] before it is used; then the step must use x̂0
            (prediction.x0 is not 0).

    Raises:
        ValueError: clip_denoised is set and the step does not use x̂0, or eps_of is missing.
    """
    signal, noise = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    row = blank_row()
    if clip_denoised:
        if prediction.x0 == 0:
            raise ValueError("clip_denoised needs a step that uses the denoised image")
        row[[U, V]] = prediction.x0, prediction.x
        row[[X0_LO, X0_HI]] = -1.0, 1.0
        row[[P, Q]] = (0.0, 1.0) if kind == "x0" else (1 / signal, -noise / signal)
        eps, x0 = prediction.eps, 0.0
    else:
        row[V] = prediction.x
        eps, x0 = prediction.eps, prediction.x0
    if kind == "x0":  # ε = (x - √ᾱ m)/σ
        row[V] += eps / noise
        row[W] = x0 - eps * signal / noise
        return row
    row[V] += x0 / signal
    row[W] = eps - x0 * noise / signal
    if kind == "score":  # ε = -σ m
        row[[Q, W]] *= -noise
    elif kind != "eps":
        if eps_of is None:
            raise ValueError(f"a network of kind {kind!r} needs eps_of")
        row[[P, V]] += eps_of[0] * row[[Q, W]]
        row[[Q, W]] *= eps_of[1]
    return row


def posterior(alpha_bar: float, alpha_bar_next: float) -> tuple[Prediction, float]:
    """Mean and variance of q(x' | x, x̂0), from noise level ᾱ to the lower ᾱ' (Ho et al., eq. 7)."""
    alpha = alpha_bar / alpha_bar_next
    x0 = np.sqrt(alpha_bar_next) * (1 - alpha) / (1 - alpha_bar)
    x = np.sqrt(alpha) * (1 - alpha_bar_next) / (1 - alpha_bar)
    variance = (1 - alpha) * (1 - alpha_bar_next) / (1 - alpha_bar)
    return Prediction(x0=float(x0), x=float(x)), float(variance)


def ddim(alpha_bar: float, alpha_bar_next: float, eta: float) -> tuple[Prediction, float]:
    """DDIM-η from ᾱ to ᾱ' (Song et al., ICLR 2021, eq. 12): prediction and noise's std."""
    std = eta * np.sqrt(posterior(alpha_bar, alpha_bar_next)[1])
    eps = np.sqrt(max(1 - alpha_bar_next - std**2, 0.0))
    return Prediction(x0=float(np.sqrt(alpha_bar_next)), eps=float(eps)), float(std)


def diffusion_row(alpha_bar: float) -> Array:
    """Forward diffusion of the state, √ᾱ x + √(1-ᾱ) z. Calls no network."""
    row = blank_row()
    row[[V, D]] = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    return row


def start_row(alpha_bar: float | None = None, *, clamp: bool = False) -> Array:
    """Pixels u to the state 2u - 1, then diffused to ᾱ where given: √ᾱ (2u - 1) + √(1-ᾱ) z.

    Args:
        alpha_bar: the noise level, or None for no noise.
        clamp: whether to clamp to [-1, 1], where there is no noise; pixels are in [0, 1] already.
    """
    bound = 1.0 if clamp and alpha_bar is None else np.inf
    if alpha_bar is None:
        return np.array([2.0, -1.0, 0.0, 0.0, -bound, bound, 1.0, 0.0])
    signal, noise = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    return np.array([2.0 * signal, -signal, noise, 0.0, -bound, bound, 1.0, 0.0])


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows [N, 19] and the network times [N] that go with them."""

    coeffs: Array
    times: Array


def joined(parts: Sequence[Rows]) -> Rows:
    """Rounds, one after the other."""
    coeffs = np.concatenate([part.coeffs for part in parts])
    return Rows(coeffs, np.concatenate([part.times for part in parts]))


def make_plan(
    method: str,
    start: Array,
    rows: Rows,
    *,
    clamp_output: bool,
    guidance_norm: str = "none",
    guidance_max_norm: float | None = None,
    learned_variance: bool = False,
) -> Plan:
    """Finish a plan: the last row maps the state back to pixels, (x + 1)/2, after its clamp.

    Args:
        method: the plan's name.
        start: the row from pixels to the state, as `start_row` makes it.
        rows: the steps.
        clamp_output: whether the last row clamps the state to [-1, 1].
        guidance_norm: as in `reverse_step`.
        guidance_max_norm: the bound of "clipped".
        learned_variance: whether rows read the variance channels.
    """
    coeffs = rows.coeffs.copy()
    coeffs[-1, [OUT_SCALE, OUT_BIAS]] = 0.5
    if clamp_output:
        coeffs[-1, [OUT_LO, OUT_HI]] = -1.0, 1.0
    if guidance_max_norm is not None:
        coeffs[:, G_MAX] = guidance_max_norm
    return Plan(
        method=method,
        start=start,
        start_noisy=bool(np.any(start[2:4] != 0)),
        coeffs=coeffs,
        times=rows.times,
        guided=coeffs[:, C] != 0,
        noisy=(coeffs[:, D] != 0) | (coeffs[:, Z_VAR] != 0),
        uses_attacked=bool(np.any(coeffs[:, E] != 0)),
        guidance_norm=guidance_norm,
        learned_variance=learned_variance,
    )


def named(plan: Plan, method: str) -> Plan:
    """The same plan under another method's name."""
    return replace(plan, method=method)
