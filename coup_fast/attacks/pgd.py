"""Projected gradient descent: Madry et al., arXiv 1706.06083, averaged over draws (EOT)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from coup_fast import checks
from coup_fast.attacks import units
from coup_fast.attacks.attack import Attack, Rule
from coup_fast.attacks.ball import Ball
from coup_fast.attacks.objective import Evaluation
from coup_fast.attacks.options import StepSchedule

STEP_SCHEDULES = get_args(StepSchedule)


@dataclass(frozen=True, repr=False)
class PGD(Attack):
    """x ← P(x + step_size · d), where d = sign(g) for ℓ∞ and g / ‖g‖₂ for ℓ2.

    The defaults are the field's strong attack on purification: 200 steps of 0.007 with 20 draws in
    an ℓ∞ ball of 8/255 (Lee and Kim, ICCV 2023). `Attack` explains the other options.

    Args:
        step_size: length of a step in pixels of [0, 1], a number or a text as for `eps`.
        step_schedule: "constant", or "cosine": step k of N has the length
            b + (a - b) (1 + cos(πk / (N - 1))) / 2, from a = step_size down (or up) to b.
        final_step_size: b, the length of the last step; by default a twelfth of step_size. Only
            "cosine" takes one.
    """

    step_size: float = 0.007
    step_schedule: StepSchedule = "constant"
    final_step_size: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        step_size = units.length("step_size", self.step_size, self.norm)
        object.__setattr__(self, "step_size", step_size)
        checks.choice("step_schedule", self.step_schedule, STEP_SCHEDULES)
        if self.final_step_size is None:
            return
        if self.step_schedule != "cosine":
            raise ValueError(
                "final_step_size is for step_schedule='cosine', got "
                f"step_schedule={self.step_schedule!r}"
            )
        final = units.length("final_step_size", self.final_step_size, self.norm)
        object.__setattr__(self, "final_step_size", final)

    def step_sizes(self) -> list[float]:
        """The length of each step, in order."""
        if self.step_schedule == "constant":
            return [self.step_size] * self.steps
        a, last = self.step_size, max(self.steps - 1, 1)
        b = a / 12 if self.final_step_size is None else self.final_step_size
        return [b + (a - b) * (1 + math.cos(math.pi * k / last)) / 2 for k in range(self.steps)]

    def rule(self, ball: Ball) -> Rule:
        """A step of the length that is next."""
        lengths = iter(self.step_sizes())

        def step(x: Tensor, at_x: Evaluation) -> Tensor:
            return x + next(lengths) * ball.ascent(at_x.gradient)

        return step
