"""A self-test of gradients of models that are not ours: against finite differences.

A foreign model may take its gradient in any way (an adjoint, BPDA, a custom backward pass, a part
that is cut off), and nothing but its values says whether it is right. So its derivative along a
direction d, which is <g, d>, is compared with (L(x + h d) - L(x - h d)) / 2h under the same draw.
Along random directions the root mean square of the differences, over that of the derivatives,
estimates the relative error of g itself; along g, an error of its length shows. Both are measured
at the images drawn a twentieth towards grey, so that no step leaves [0, 1].
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coup_fast import checks
from coup_fast._torch.modules import name_of
from coup_fast.attacks.ball import l2_norms
from coup_fast.attacks.foreign import Foreign
from coup_fast.attacks.losses import Loss
from coup_fast.gradient_check.row import GradientRow, compared
from coup_fast.noise import step_keys
from coup_fast.reference import normal
from coup_fast.run import validation

# Step lengths per pixel, in the root mean square: 1e-3 is a quarter of a grey level.
STEPS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
MARGIN = 0.05  # images keep this distance from 0 and 1, and no pixel is moved further
TOLERANCE = 0.05


@dataclass(frozen=True)
class ForeignGradientCheck:
    """What `check_gradient` found of a model that is not ours. `str()` prints it.

    Attributes:
        model: its name.
        batch: number of images.
        repeats: whether the same draw gave the same scores twice, bit for bit.
        seeding: what drove its noise.
        resolution: how far the finite differences agree among themselves, relative to their size;
            a smaller error than this cannot be seen.
        tolerance: what the errors may be.
        rows: "finite differences" (random directions), "along the gradient" and, if one was given,
            "reference".
    """

    model: str
    batch: int
    repeats: bool
    seeding: str
    resolution: float | None
    tolerance: float
    rows: tuple[GradientRow, ...]

    def __getitem__(self, name: str) -> GradientRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r}; there are {', '.join(row.name for row in self.rows)}")

    @property
    def passed(self) -> bool:
        """Whether every comparison was made and is within the tolerance."""
        return all(
            row.relative_error is not None and row.relative_error <= self.tolerance
            for row in self.rows
        )

    @property
    def verdict(self) -> str:
        """In words, what is known of the gradient."""
        errors = [row.relative_error for row in self.rows]
        if not self.repeats:
            return "the gradient COULD NOT BE CHECKED: the same draw gave other scores"
        if any(error is None for error in errors):
            return f"the gradient COULD NOT BE CHECKED: {self.rows[0].note}"
        worst = max(error for error in errors if error is not None)
        if self.passed:
            return f"the gradient agrees with finite differences (error {worst:.1e})"
        if self.resolution is not None and self.resolution > self.tolerance:
            return (
                f"the gradient COULD NOT BE CHECKED: finite differences disagree among themselves "
                f"by {self.resolution:.1e}"
            )
        return f"the gradient IS NOT that of the values (error {worst:.1e})"

    def __str__(self) -> str:
        lines = [
            f"gradients of {self.model}, {self.batch} images, noise driven by {self.seeding}",
            f"{'':22}{'error':>9}{'cosine':>9}{'seconds':>9}",
        ]
        for row in self.rows:
            numbers = ""
            if row.relative_error is not None:
                numbers = f"{row.relative_error:9.1e}{row.cosine:9.4f}{row.seconds:9.2f}  "
            lines.append(f"{row.name:22}{numbers}{row.note}".rstrip())
        lines.append(f"{self.verdict}; tolerance {self.tolerance:.0e}")
        return "\n".join(lines)


def check_foreign(
    model: Any,
    images: Tensor,
    labels: Tensor | None,
    loss: Loss,
    sample_ids: Any,
    draw: int,
    directions: int,
    reference: Callable[[Tensor], Tensor] | None,
    seed: int = 0,
) -> ForeignGradientCheck:
    """`check_gradient` of a model that is not ours."""
    validation.check_images(images)
    checks.integer("directions", directions, 1)
    checks.integer("draw", draw, 0)
    if len(images) == 0:
        raise ValueError("images must hold at least one image to check a gradient")
    ids = validation.sample_ids_of(images, sample_ids)
    foreign, x = Foreign(model, ids, seed), MARGIN + (1 - 2 * MARGIN) * images.detach()
    with torch.no_grad(), foreign.frozen():
        scores = foreign.scores(x, draw)
        repeats = torch.equal(scores, foreign.scores(x, draw))
    answers = scores.argmax(1) if labels is None else labels
    about = (name_of(model), len(x), repeats, foreign.seeding)
    if not repeats:
        note = "not run: the same draw gives other scores (noise that set_draw does not reach?)"
        names = ("finite differences", "along the gradient")
        none = tuple(GradientRow(name, note=note) for name in names)
        return ForeignGradientCheck(*about, None, TOLERANCE, none)
    started = time.perf_counter()
    gradient = foreign.gradient(x, answers, loss, draw)[0]
    seconds = time.perf_counter() - started

    def values(u: Tensor) -> Tensor:
        with torch.no_grad(), foreign.frozen():
            return loss(foreign.scores(u, draw), answers).double()

    rows: list[GradientRow] = []
    resolution = 0.0
    keys = step_keys(seed, ids, draw, directions, x[0].numel())
    spread = [normal(key, x.shape).to(x.dtype) for key in keys]
    for name, along in (("finite differences", spread), ("along the gradient", [gradient])):
        started = time.perf_counter()
        units = [d / _rows(l2_norms(d).clamp_min(1e-300), d) for d in along]
        predicted = torch.stack([(gradient * d).double().flatten(1).sum(1) for d in units])
        measured, doubt = _derivatives(values, x, units)
        resolution = max(resolution, doubt)
        took = time.perf_counter() - started
        rows.append(_row(name, predicted, measured, took))
    if reference is not None:
        other = Foreign(reference, ids, seed).gradient(x, answers, loss, draw)[0]
        rows.append(compared("reference", (gradient, seconds), (other, 0.0)))
    return ForeignGradientCheck(*about, resolution, TOLERANCE, tuple(rows))


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1).to(like.dtype)


def _derivatives(
    values: Callable[[Tensor], Tensor], x: Tensor, units: Sequence[Tensor]
) -> tuple[Tensor, float]:
    """Central differences along each direction, [directions, B], and their relative uncertainty.

    The step length is that of the pair of neighbours which agree best: above it the curvature
    shows, below it the rounding of the values. The gradient has no say in it.
    """
    scale = x[0].numel() ** 0.5
    tables = []
    for step in STEPS:
        rows = []
        for d in units:
            longest = MARGIN / STEPS[0] / d.abs().flatten(1).amax(1).clamp_min(1e-300)
            h = _rows(step * longest.clamp_max(scale), d)
            ahead, behind = x + h * d, x - h * d
            width = ((ahead - behind) * d).double().flatten(1).sum(1)  # 2h as it was rounded
            rows.append((values(ahead) - values(behind)) / width)
        tables.append(torch.stack(rows))
    best, doubt = tables[0], float("inf")
    for one, other in itertools.pairwise(tables):
        size = float(other.norm())
        gap = float((one - other).norm()) / size if size > 0 else 0.0
        if gap < doubt:
            best, doubt = other, gap
    return best, doubt


def _row(name: str, predicted: Tensor, measured: Tensor, seconds: float) -> GradientRow:
    size = measured.norm()
    if not bool(size > 0) and not bool(predicted.norm() > 0):
        note = "not run: the loss does not change along any of these directions"
        return GradientRow(name, note=note)
    error = (predicted - measured).norm() / size.clamp_min(1e-300)
    cosine = (predicted * measured).sum() / (predicted.norm() * size).clamp_min(1e-300)
    return GradientRow(name, float(error), float(cosine), None, seconds)
