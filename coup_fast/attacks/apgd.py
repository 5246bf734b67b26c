"""Auto-PGD: Croce & Hein, "Reliable evaluation of adversarial robustness" (ICML 2020), section 3.

Its steps have momentum. The step length starts at 2·eps. Where a window of iterates made too little
progress, it is halved and the attack returns to the best point so far. Windows and inequalities are
those of the released code: each window is 3 % of the steps shorter than the one before, from 22 %
down to 6 %. (The released code compares the first iterate with 0; the paper and this class compare
it with the loss at the start.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coup_fast import checks
from coup_fast.attacks.attack import Attack, Rule
from coup_fast.attacks.ball import Ball
from coup_fast.attacks.objective import Evaluation
from coup_fast.attacks.options import Keep


@dataclass(frozen=True, repr=False)
class APGD(Attack):
    """z ← P(x + η d), x ← P(x + α (z - x) + (1 - α) (x - x_before)).

    The defaults are those of AutoAttack's `rand` version: 100 steps and 20 draws. `keep` is "best",
    because the algorithm returns that. `Attack` explains the other options.

    Args:
        rho: the step is halved if a smaller share of a window's iterates raised the loss; in
            (0, 1].
        momentum: α, in (0, 1]; it is 1 in the first step.
    """

    steps: int = 100
    keep: Keep = "best"
    rho: float = 0.75
    momentum: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rho", "momentum"):
            checks.number(name, getattr(self, name), 0, 1, above=True)

    def rule(self, ball: Ball) -> Rule:
        """A step with momentum, of a length that follows the progress of the loss."""
        return _Rule(self, ball)


def window_ends(steps: int) -> set[int]:
    """The numbers of steps after which the progress is judged."""
    length, least = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1)
    shorter = max(int(0.03 * steps), 1)
    ends, end = set(), length
    while end <= steps:
        ends.add(end)
        length = max(length - shorter, least)
        end += length
    return ends


class _Rule:
    """The state of one restart; all tensors hold one entry per image."""

    def __init__(self, attack: APGD, ball: Ball) -> None:
        self.attack, self.ball = attack, ball
        self.ends = window_ends(attack.steps)
        self.taken = 0  # steps
        self.start = 0  # of the window, in steps
        batch = len(ball.centre)
        device = ball.centre.device
        self.step_size = torch.full((batch,), 2.0 * attack.eps, dtype=torch.float64, device=device)
        self.raised = torch.zeros(batch, dtype=torch.int64, device=device)
        self.halved_before = torch.ones(batch, dtype=torch.bool, device=device)
        self.before: Tensor | None = None  # the iterate before this one
        self.last_loss = torch.empty(0)
        self.best_at_start = torch.empty(0)  # best loss at the start of the window
        self.best_loss = torch.empty(0)
        self.best = ball.centre
        self.best_gradient = ball.centre

    def __call__(self, x: Tensor, at_x: Evaluation) -> Tensor:
        gradient = at_x.gradient
        if self.before is None:
            self.best, self.best_gradient, self.best_loss = x, gradient, at_x.loss
            self.best_at_start = at_x.loss
            before = x
        else:
            before = self.before
            self._note(x, at_x)
            if self.taken in self.ends:
                back = self._judge()[:, None, None, None]
                x, gradient = (
                    torch.where(back, self.best, x),
                    torch.where(back, self.best_gradient, gradient),
                )
        alpha = self.attack.momentum if self.taken else 1.0
        step_size = self.step_size.to(x.dtype)[:, None, None, None]
        ahead = self.ball.project(x + step_size * self.ball.ascent(gradient))
        self.before, self.last_loss = x, at_x.loss
        self.taken += 1
        return x + alpha * (ahead - x) + (1 - alpha) * (x - before)

    def _note(self, x: Tensor, at_x: Evaluation) -> None:
        self.raised += at_x.loss > self.last_loss
        better = at_x.loss > self.best_loss
        where = better[:, None, None, None]
        self.best = torch.where(where, x, self.best)
        self.best_gradient = torch.where(where, at_x.gradient, self.best_gradient)
        self.best_loss = torch.where(better, at_x.loss, self.best_loss)

    def _judge(self) -> Tensor:
        """At the end of a window: halve where it went badly; bool [B], who goes back to the best.

        Badly: too few iterates raised the loss, or the best loss is the one from the window's
        start although the step was not halved there.
        """
        too_few = self.raised <= self.attack.rho * (self.taken - self.start)
        stuck = ~self.halved_before & (self.best_at_start >= self.best_loss)
        halve = too_few | stuck
        self.step_size = torch.where(halve, self.step_size / 2, self.step_size)
        self.halved_before = halve
        self.best_at_start = self.best_loss
        self.raised = torch.zeros_like(self.raised)
        self.start = self.taken
        return halve
