"""A method's run as tables: `Plan`, and ADP's `AdaptivePlan`."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from .. import checks
from ..schedules import Array
from .columns import (
    ADAPTIVE_COLUMNS,
    OUT_BIAS,
    OUT_HI,
    OUT_LO,
    OUT_SCALE,
    ROW_COLUMNS,
    START_COLUMNS,
    C,
    V,
    W,
    blank_row,
)
from .text import describe, html, summary


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

    columns: ClassVar[tuple[str, ...]] = ROW_COLUMNS  # of `coeffs`
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
        return f"<{type(self).__name__} {summary(self)}>"

    def _repr_html_(self) -> str:
        return html(self)

    def table(self) -> str:
        """The plan as text: one line per row, with the coefficients that do something."""
        lines = [f"{self.method}: {self.num_steps} rows, {self.num_noise} noise tensors"]
        lines.append("start  " + describe(START_COLUMNS, self.start))
        for k, row in enumerate(self.coeffs):
            time = "no network" if np.isnan(self.times[k]) else f"t={self.times[k]:.6g}"
            lines.append(f"{k:5d}  {time}  {describe(ROW_COLUMNS, row)}")
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

    columns: ClassVar[tuple[str, ...]] = ADAPTIVE_COLUMNS  # of `coeffs`
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
        return f"<{type(self).__name__} {summary(self)}>"

    def _repr_html_(self) -> str:
        return html(self)

    def table(self) -> str:
        """The plan as text."""
        lines = [f"{self.method}: {self.num_steps} steps, delta={self.delta:.6g}"]
        lines.append("start  " + describe(START_COLUMNS, self.start))
        lines += [f"{k:5d}  {describe(ADAPTIVE_COLUMNS, row)}" for k, row in enumerate(self.coeffs)]
        return "\n".join(lines)


AnyPlan = Plan | AdaptivePlan
"""A plan of either kind."""


def _digest(*tables: Array, how: str) -> str:
    """SHA-256; `how` is empty for what is usual, so that digests in older reports stay."""
    numbers = b"".join(table.tobytes() for table in tables)
    return hashlib.sha256(numbers + how.encode()).hexdigest()
