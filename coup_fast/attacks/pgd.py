"""Projected gradient descent: Madry et al., arXiv 1706.06083, averaged over draws (EOT)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from coup_fast import checks
from coup_fast.attacks.attack import Attack, Rule
from coup_fast.attacks.ball import Ball
from coup_fast.attacks.objective import Evaluation


@dataclass(frozen=True)
class PGD(Attack):
    """x ← P(x + step_size · d), d = sign(g) for ℓ∞ and g / ‖g‖₂ for ℓ2.

    The defaults are the field's strong attack on purification: 200 steps of 0.007 with 20 draws in
    an ℓ∞ ball of 8/255. step_size: in pixels. The rest as for `Attack`.
    """

    step_size: float = 0.007

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("step_size", self.step_size, 0, math.inf, above=True)

    def rule(self, ball: Ball) -> Rule:
        """A step of fixed length."""

        def step(x: Tensor, at_x: Evaluation) -> Tensor:
            return x + self.step_size * ball.ascent(at_x.gradient)

        return step
