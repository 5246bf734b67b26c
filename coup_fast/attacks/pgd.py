"""Projected gradient descent: Madry et al., arXiv 1706.06083, averaged over draws (EOT)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from coup_fast.attacks import units
from coup_fast.attacks.attack import Attack, Rule
from coup_fast.attacks.ball import Ball
from coup_fast.attacks.objective import Evaluation


@dataclass(frozen=True, repr=False)
class PGD(Attack):
    """x ← P(x + step_size · d), where d = sign(g) for ℓ∞ and g / ‖g‖₂ for ℓ2.

    The defaults are the field's strong attack on purification: 200 steps of 0.007 with 20 draws in
    an ℓ∞ ball of 8/255 (Lee and Kim, ICCV 2023). `Attack` explains the other options.

    Args:
        step_size: length of a step in pixels of [0, 1], a number or a text as for `eps`.
    """

    step_size: float = 0.007

    def __post_init__(self) -> None:
        super().__post_init__()
        step_size = units.length("step_size", self.step_size, self.norm)
        object.__setattr__(self, "step_size", step_size)

    def rule(self, ball: Ball) -> Rule:
        """A step of fixed length."""

        def step(x: Tensor, at_x: Evaluation) -> Tensor:
            return x + self.step_size * ball.ascent(at_x.gradient)

        return step
