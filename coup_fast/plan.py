"""Plans: what a method is, as rows of coefficients. All algebra is float64 NumPy.

A method builds a `Plan`; the purifier rounds its rows to float32 once, moves them to the device and
runs them. Column numbers here and in csrc are the same table.

`Prediction` is how a row is written: what the step does with the state, the predicted noise ε and
the predicted clean image x̂0. `network_row` turns that into coefficients of the raw network output,
for networks that predict noise, the score, or the clean image.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from . import checks
from .schedules import Array

# Columns of a reverse_step row:
#   x̂0 = clamp(p x + q m, lo, hi)
#   x' = out_scale * clamp(u x̂0 + v x + w m + c_i G + e r + d z, out_lo, out_hi) + out_bias
P, Q, X0_LO, X0_HI, U, V, W, C, E, D = range(10)
OUT_LO, OUT_HI, OUT_SCALE, OUT_BIAS, G_MAX, LOG_VAR_LO, LOG_VAR_HI, X_VAR, Z_VAR = range(10, 19)
ROW_COLUMNS = (
    *("p", "q", "x0_lo", "x0_hi", "u", "v", "w", "c", "e", "d"),
    *("out_lo", "out_hi", "out_scale", "out_bias", "g_max"),
    *("log_var_lo", "log_var_hi", "x_var", "z_var"),
)
NUM_COLUMNS = len(ROW_COLUMNS)

# Columns of a perturb row and of an adaptive_step row.
START_COLUMNS = ("scale", "bias", "std", "sign_std", "lo", "hi", "out_scale", "out_bias")
ADAPTIVE_COLUMNS = ("numerator", "alpha_min", "alpha_max", "tau", "scale", "bias", "lo", "hi")

# Of `ScoreModel.kind`, those that `network_row` takes.
DIFFUSION_KINDS = ("eps", "score", "x0", "v", "velocity")


@dataclass(frozen=True, eq=False)
class Plan:
    """A purification run: a start row, then N rows of `reverse_step`.

    Args:
        method: its name.
        start: [8], the row of `perturb` from pixels to the state.
        start_noisy: whether the start draws noise.
        coeffs: [N, 19], the rows of `reverse_step`.
        times: [N], the network's time in [0, 1], NaN where a row calls no network.
        guided: bool [N], which rows read the guidance gradient.
        noisy: bool [N], which rows draw noise.
        uses_attacked: whether rows read r, the attacked image in the state's space.
        guidance_norm: as in `reverse_step`, "stable" included.
        learned_variance: whether rows read the second half of a 2C-channel output, which is
            otherwise cut off.
    """

    method: str
    start: Array
    start_noisy: bool
    coeffs: Array
    times: Array
    guided: np.ndarray
    noisy: np.ndarray
    uses_attacked: bool
    guidance_norm: str = "none"
    learned_variance: bool = False

    look_ahead: ClassVar[Array | None] = None  # of an `AdaptivePlan`

    @property
    def num_steps(self) -> int:
        """N, rows that call no network included."""
        return len(self.coeffs)

    @property
    def needs_classifier(self) -> bool:
        """Whether any row reads the guidance gradient."""
        return bool(self.guided.any())

    @property
    def num_noise(self) -> int:
        """Noise tensors a run needs, in order of need."""
        return int(self.start_noisy) + int(self.noisy.sum())

    @property
    def num_network_calls(self) -> int:
        """Evaluations of the score network in a run."""
        return int(np.isfinite(self.times).sum())

    @property
    def noise_index(self) -> tuple[int | None, ...]:
        """The number of each row's noise tensor; None for a row that draws none."""
        numbers = itertools.count(int(self.start_noisy))
        return tuple(next(numbers) if noisy else None for noisy in self.noisy.tolist())

    @property
    def digest(self) -> str:
        """SHA-256 of every coefficient and time and of what the steps do with them, in hex."""
        usual = self.guidance_norm == "none" and not self.learned_variance
        how = "" if usual else f"{self.guidance_norm} {self.learned_variance}"
        return _digest(self.start, self.coeffs, self.times, how=how)

    def in_pixels(self, k: int) -> bool:
        """Whether the state after k steps is an image; before the last step it is 2u - 1."""
        return k == self.num_steps

    def first(self, steps: int) -> Plan:
        """The first `steps` rows (all, if there are fewer), then the way back to pixels."""
        steps = checks.integer("steps", steps, 1)
        coeffs = self.coeffs[:steps].copy()
        way_back = [OUT_LO, OUT_HI, OUT_SCALE, OUT_BIAS]
        coeffs[-1, way_back] = self.coeffs[-1, way_back]
        return replace(
            self,
            coeffs=coeffs,
            times=self.times[:steps],
            guided=self.guided[:steps],
            noisy=self.noisy[:steps],
        )

    def without_guidance(self) -> Plan:
        """The same run, its noise included, with λ = 0."""
        coeffs = self.coeffs.copy()
        coeffs[:, C] = 0
        unguided = np.zeros_like(self.guided)
        return replace(self, coeffs=coeffs, guided=unguided, guidance_norm="none")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {_summary(self)}>"

    def _repr_html_(self) -> str:
        return _html(self)

    def table(self) -> str:
        """The plan as text: one line per row, with the coefficients that do something."""
        lines = [f"{self.method}: {self.num_steps} rows, {self.num_noise} noise tensors"]
        lines.append("start  " + _describe(START_COLUMNS, self.start))
        for k, row in enumerate(self.coeffs):
            time = "no network" if np.isnan(self.times[k]) else f"t={self.times[k]:.6g}"
            lines.append(f"{k:5d}  {time}  {_describe(ROW_COLUMNS, row)}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class AdaptivePlan:
    """A run of ADP: a start row, then num_steps rows of `adaptive_step`.

    The state is an image at every step, and nothing but the start draws noise. What a `Plan` says
    beyond that is said here as well, so that a run of either kind is prepared in the same way.

    Args:
        method: its name.
        start: [8], the row of `perturb` that injects the noise.
        start_noisy: whether the start draws noise.
        coeffs: [num_steps, 8], the rows of `adaptive_step`.
        delta: how far ahead the second score is taken, S(x + δ S(x)).
    """

    method: str
    start: Array
    start_noisy: bool
    coeffs: Array
    delta: float

    needs_classifier: ClassVar[bool] = False
    uses_attacked: ClassVar[bool] = False
    learned_variance: ClassVar[bool] = False
    guidance_norm: ClassVar[str] = "none"

    @property
    def num_steps(self) -> int:
        """Steps of a run, two network calls each."""
        return len(self.coeffs)

    @property
    def times(self) -> Array:
        """[num_steps]: the network is told t = 0 at each call."""
        return np.zeros(self.num_steps)

    @property
    def guided(self) -> np.ndarray:
        """bool [num_steps]: no step."""
        return np.zeros(self.num_steps, dtype=bool)

    @property
    def noise_index(self) -> tuple[int | None, ...]:
        """No step draws noise."""
        return (None,) * self.num_steps

    @property
    def look_ahead(self) -> Array:
        """[19]: the reverse_step row x + δ m, the second point of a step."""
        row = blank_row()
        row[[V, W]] = 1.0, self.delta
        return row

    @property
    def num_noise(self) -> int:
        """Noise tensors a run needs: the injection."""
        return int(self.start_noisy)

    @property
    def num_network_calls(self) -> int:
        """Evaluations of the score network in a run."""
        return 2 * self.num_steps

    @property
    def digest(self) -> str:
        """SHA-256 of every coefficient and δ, in hexadecimal."""
        how = "" if self.delta == 1e-3 else f"{self.delta!r}"
        return _digest(self.start, self.coeffs, how=how)

    def in_pixels(self, k: int) -> bool:
        """Whether the state after k steps is an image: always."""
        return True

    def first(self, steps: int) -> AdaptivePlan:
        """The first `steps` steps (all, if there are fewer)."""
        return replace(self, coeffs=self.coeffs[: checks.integer("steps", steps, 1)])

    def without_guidance(self) -> AdaptivePlan:
        """The same plan, which has no guidance."""
        return self

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {_summary(self)}>"

    def _repr_html_(self) -> str:
        return _html(self)

    def table(self) -> str:
        """The plan as text."""
        lines = [f"{self.method}: {self.num_steps} steps, delta={self.delta:.6g}"]
        lines.append("start  " + _describe(START_COLUMNS, self.start))
        lines += [
            f"{k:5d}  {_describe(ADAPTIVE_COLUMNS, row)}" for k, row in enumerate(self.coeffs)
        ]
        return "\n".join(lines)


AnyPlan = Plan | AdaptivePlan


def _digest(*tables: Array, how: str) -> str:
    """SHA-256; `how` is empty for what is usual, so that digests in older reports stay."""
    numbers = b"".join(table.tobytes() for table in tables)
    return hashlib.sha256(numbers + how.encode()).hexdigest()


def _summary(plan: AnyPlan) -> str:
    """A plan in a few words."""
    steps, calls, noises = plan.num_steps, plan.num_network_calls, plan.num_noise
    words = [f"{steps} step{'s' * (steps != 1)}"]
    if calls != steps:
        words.append(f"{calls} network call{'s' * (calls != 1)}")
    if calls:
        low, high = (f"{time:.4g}" for time in (np.nanmin(plan.times), np.nanmax(plan.times)))
        words.append(f"t = {high}" if low == high else f"t in [{low}, {high}]")
    words.append(f"{noises} noise tensor{'s' * (noises != 1)}")
    words += ["guided by the classifier"] if plan.needs_classifier else []
    return f"{plan.method!r}: {', '.join(words)}"


def _html(plan: AnyPlan) -> str:
    """A plan as a table for notebooks; long plans without the rows in their middle."""
    from html import escape  # here, because few need it and it takes a millisecond

    columns = ROW_COLUMNS if isinstance(plan, Plan) else ADAPTIVE_COLUMNS
    noisy, guided, times = plan.noise_index, plan.guided, plan.times
    first = "yes" if plan.start_noisy else ""
    rows = [["start", "", first, "", _describe(START_COLUMNS, plan.start)]]
    shown = 5  # at either end
    middle = range(shown, plan.num_steps - shown) if plan.num_steps > 3 * shown else range(0)
    for k in range(plan.num_steps):
        if k in middle:
            if k == middle.start:
                rows.append(["…", "", "", "", f"{len(middle)} more rows"])
            continue
        time = "no network" if np.isnan(times[k]) else f"{times[k]:.6g}"
        flags = ["yes" if flag else "" for flag in (noisy[k] is not None, guided[k])]
        rows.append([str(k), time, *flags, _describe(columns, plan.coeffs[k])])
    head = "".join(f"<th>{name}</th>" for name in ("row", "t", "noisy", "guided", "coefficients"))
    cell = '<td style="text-align: left">{}</td>'
    body = [f"<tr>{''.join(cell.format(escape(text)) for text in row)}</tr>" for row in rows]
    return (
        f"<table><caption>{escape(_summary(plan))}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _describe(names: tuple[str, ...], row: Array) -> str:
    neutral = {"out_scale": 1.0}
    shown = [
        f"{name}={value:.8g}"
        for name, value in zip(names, row, strict=True)
        if np.isfinite(value) and value != neutral.get(name, 0.0)
    ]
    return " ".join(shown) or "nothing"


def blank_row() -> Array:
    """A row that returns 0: no terms, no clamps, no output map."""
    row = np.zeros(NUM_COLUMNS)
    row[[X0_LO, OUT_LO]] = -np.inf
    row[[X0_HI, OUT_HI, G_MAX]] = np.inf
    row[OUT_SCALE] = 1.0
    return row


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
