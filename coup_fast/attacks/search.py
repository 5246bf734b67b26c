"""The loop over iterates that all gradient attacks share, and what it has found.

Two objectives take part. One is differentiated. The other is judged: it says which images fool the
defence. They are the same object unless the attack differentiates a run in place of the defence's
own (`surrogate`, gradient="unguided"). An iterate was chosen before its draws are taken, so the
judge's draws are always fresh ones to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coup_fast.attacks.ball import Ball
from coup_fast.attacks.losses import other_classes
from coup_fast.attacks.objective import Evaluation, Objective
from coup_fast.attacks.result import FIRST_ATTACK_DRAW, FIRST_START_DRAW, AttackResult, Progress

if TYPE_CHECKING:
    from coup_fast.attacks.attack import Attack


class Search:
    """One run of an attack.

    objective: what is differentiated. judge: what is to be fooled. init: where the first restart
    begins, inside the ball. skip: how many of the seed's draws are left to somebody else.
    """

    def __init__(
        self,
        attack: Attack,
        objective: Objective,
        judge: Objective,
        ball: Ball,
        init: Tensor | None = None,
        progress: Callable[[Progress], None] | None = None,
        skip: int = 0,
    ) -> None:
        self.attack, self.objective, self.judge = attack, objective, judge
        self.ball, self.init, self.progress, self.skip = ball, init, progress, skip
        self.images = ball.centre.clone()
        self.loss = torch.full_like(objective.labels, -torch.inf, dtype=torch.float64)
        self.fooled = torch.zeros_like(self.loss)
        self.live = torch.ones_like(objective.labels, dtype=torch.bool)  # not stopped
        self.done = self.zero_gradients = self.gradient_runs = 0
        self.compares = attack.keep == "best" or attack.restarts > 1
        # The last iterate is evaluated where it has rivals, and where the gradient before it is of
        # another run than the defence's, whose loss says nothing about the defence.
        self.judges_last = self.compares or judge is not objective
        self.total = attack.restarts * (attack.steps + self.judges_last)
        self.labels, self.classes, self.given = objective.labels, 0, False

    @property
    def objectives(self) -> list[Objective]:
        """Without repetition."""
        return [self.judge] if self.judge is self.objective else [self.objective, self.judge]

    def run(self, targets: Tensor | None) -> AttackResult:
        """All restarts. targets: as for `Attack.run`."""
        if len(self.images) > 0:
            for objective in self.objectives:
                objective.settle(self.ball.centre, self.draw(0), fixed=self.attack.noise == "fixed")
            if self.attack.targeted:
                self.choose_targets(targets)
            for restart in range(self.attack.restarts):
                if bool(self.live.any()):
                    self.restart(restart)
            self.ball.check(self.images)
        return AttackResult(
            self.images,
            self.loss,
            self.fooled,
            self.zero_gradients,
            self.gradient_runs,
            sum(objective.score_evaluations for objective in self.objectives),
            sum(objective.classifier_evaluations for objective in self.objectives),
            self.objective.draws,
            int((~self.live).sum()),
        )

    def draw(self, iterate: int) -> int:
        """The first draw of an iterate."""
        if self.attack.noise == "fixed":
            return 0
        used = max(objective.draws_used for objective in self.objectives)
        return FIRST_ATTACK_DRAW * (1 + self.attack.seed) + self.skip + iterate * used

    def choose_targets(self, given: Tensor | None) -> None:
        """Aim at these classes, or let each restart choose. Raises ValueError for no class."""
        self.classes = self.judge.classes(self.ball.centre, self.draw(0))
        self.given = given is not None
        if given is None:
            return
        if not bool(((given >= 0) & (given < self.classes)).all()):
            raise ValueError(
                f"targets must be classes, 0 to {self.classes - 1}, got {int(given.min())} to "
                f"{int(given.max())}"
            )
        self._aim(given)

    def _aim(self, targets: Tensor) -> None:
        for objective in self.objectives:
            objective.aim(targets)

    def start(self, number: int) -> Tensor:
        """Where a restart begins."""
        if self.init is not None and number == 0:
            return self.init
        if not self.attack.random_start:
            return self.ball.centre
        ids = self.objective.sample_ids
        return self.ball.random(self.attack.seed, ids, FIRST_START_DRAW + number)

    def restart(self, number: int) -> None:
        """Run the loop once from a new start, and keep what is better than before."""
        attack, ball = self.attack, self.ball
        if attack.targeted and not self.given:
            ids = self.objective.sample_ids
            self._aim(other_classes(self.labels, ids, number, self.classes))
        x = self.start(number)
        rule = attack.rule(ball)
        followed = torch.zeros_like(x)  # by the iterate before
        for step in range(1, attack.steps + 1):
            at_x = self._gradient(x)
            judged = at_x
            if self.judge is not self.objective and (
                attack.keep == "best" or attack.stop_when_fooled
            ):
                judged = self._evaluate(self.judge, x)
            self._report(judged)
            if attack.keep == "best":
                self._keep_better(x, judged)
            if attack.stop_when_fooled:
                self._stop(x, judged)
                if not bool(self.live.any()):
                    return
            own = step**-attack.gradient_averaging
            followed = at_x.gradient if own == 1 else own * at_x.gradient + (1 - own) * followed
            ahead = ball.project(rule(x, replace(at_x, gradient=followed)))
            x = torch.where(_rows(self.live), ahead, x)
        if self.judges_last:
            at_x = self._evaluate(self.judge, x)
            self._report(at_x)
        if not self.compares:
            self._keep(self.live, x, at_x)
            return
        self._keep_better(x, at_x)
        if attack.stop_when_fooled:
            self._stop(x, at_x)

    def _gradient(self, x: Tensor) -> Evaluation:
        at_x = self._evaluate(self.objective, x, differentiate=True)
        zero = (at_x.gradient == 0).flatten(1).all(1)
        self.zero_gradients += int((zero & self.live).sum())
        self.gradient_runs += int(self.live.sum()) * self.objective.draws_used
        return at_x

    def _evaluate(
        self, objective: Objective, x: Tensor, *, differentiate: bool = False
    ) -> Evaluation:
        """An objective at x. Stopped images keep what they had, and their gradient is 0."""
        run = objective.gradient if differentiate else objective.value
        draw = self.draw(self.done)
        if bool(self.live.all()):
            return run(x, draw)
        rows = self.live.nonzero()[:, 0]
        with objective.only(rows):
            part = run(x[rows], draw)
        whole = Evaluation(self.loss.clone(), self.fooled.clone(), torch.zeros_like(x))
        whole.loss[rows], whole.fooled[rows] = part.loss, part.fooled
        whole.gradient[rows] = part.gradient
        return whole

    def _report(self, at_x: Evaluation) -> None:
        self.done += 1
        if self.progress is not None:
            loss, fooled = float(at_x.loss.mean()), float(at_x.fooled.mean())
            self.progress(Progress(self.done, self.total, loss, fooled))

    def _keep_better(self, x: Tensor, at_x: Evaluation) -> None:
        more = at_x.fooled > self.fooled
        better = more | ((at_x.fooled == self.fooled) & (at_x.loss > self.loss))
        self._keep(better & self.live, x, at_x)

    def _keep(self, where: Tensor, x: Tensor, at_x: Evaluation) -> None:
        self.images = torch.where(_rows(where), x, self.images)
        self.loss = torch.where(where, at_x.loss, self.loss)
        self.fooled = torch.where(where, at_x.fooled, self.fooled)

    def _stop(self, x: Tensor, at_x: Evaluation) -> None:
        """Let images rest that are misclassified under every draw of this iterate."""
        done = self.live & (at_x.fooled == 1)
        self._keep(done, x, at_x)
        self.live = self.live & ~done


def _rows(where: Tensor) -> Tensor:
    """bool [B] -> [B, 1, 1, 1]."""
    return where[:, None, None, None]
