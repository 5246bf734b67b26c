"""The attack on guided defences: several gradients, the worst image by image, then a finish.

Guidance bends the loss within one step of an attack, so the exact gradient of a guided defence can
lead to a weaker attack than the gradient of a simpler run. No single gradient is trusted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coup_fast import checks
from coup_fast.attacks.attack import MAX_COUNT, Attack, Rule, Task
from coup_fast.attacks.ball import Ball
from coup_fast.attacks.foreign import Foreign
from coup_fast.attacks.losses import LOSSES
from coup_fast.attacks.objective import GRADIENTS, WEAK_GRADIENTS, Defended, Objective
from coup_fast.attacks.options import AttackGradient, AttackOptions, Keep
from coup_fast.attacks.pgd import PGD
from coup_fast.attacks.result import FIRST_ATTACK_DRAW, AttackResult, Progress
from coup_fast.purified_classifier import PurifiedClassifier
from coup_fast.purifier import Purifier

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Of the 2^32 draws of a seed: the parts take the first ones, the finish and the judge these.
_FIRST_OF_FINISH = 2**31
_FIRST_OF_JUDGE = 3 * 2**30
_JUDGED = 4  # times `eot` draws tell which result is the worst


@dataclass(frozen=True, repr=False)
class AdaptiveGuided(Attack):
    """PGD by each of several gradients, the worst result for each image, finished by margin steps.

    Each part is PGD with unit-norm draws, steps from eps/5 to eps/60 along a cosine, and its best
    iterate under the true defence. Of the parts, each image keeps the one that fooled most of
    4 · eot fresh draws of the defence, all parts under the same ones. From there `finish_steps`
    steps of the exact gradient of the margin (eps/10 to eps/60) follow, and their result is taken
    where it is worse for the defence under those fresh draws. On a defence without guidance the
    gradients "unguided", "stopped" and "exact" are one, and run once.

    The recipe is ours and not published. `Attack` explains the other options.

    Args:
        gradients: those of the parts, names of `GRADIENTS`.
        steps: those of each restart of each part.
        restarts: those of each part.
        finish_steps: those of the finish; 0 leaves it out.
        stop_when_fooled: besides what it says in `Attack`, a later part leaves out the images that
            an earlier one stopped at.
    """

    steps: int = 25
    eot: int = 4
    restarts: int = 2
    keep: Keep = "best"
    normalise_draws: bool = True
    gradients: Sequence[AttackGradient] = ("unguided", "stopped", "exact")
    finish_steps: int = 10

    _refused = ("targets", "surrogate")

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.gradients
        if isinstance(given, str) or not isinstance(given, list | tuple) or not given:
            raise TypeError(f"gradients must be a list of names, at least one, got {given!r}")
        for gradient in given:
            checks.choice("each of gradients", gradient, GRADIENTS)
        if len(set(given)) < len(given):
            raise ValueError(f"gradients must be different ones, got {given!r}")
        object.__setattr__(self, "gradients", tuple(given))
        finish_steps = checks.integer("finish_steps", self.finish_steps, 0, MAX_COUNT)
        object.__setattr__(self, "finish_steps", finish_steps)
        decided = {"gradient": "exact", "keep": "best", "targeted": False}
        for name, value in decided.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} of AdaptiveGuided is {value!r}, got {getattr(self, name)!r}; its "
                    "gradients are an option, and PGD takes the others"
                )

    @property
    def kind(self) -> str:
        """ "AdaptiveGuided-25+10 ce": the steps of a part and of the finish."""
        steps = f"{type(self).__name__}-{self.steps}"
        finish = f"+{self.finish_steps}" if self.finish_steps else ""
        return f"{steps}{finish}{super().kind.removeprefix(steps)}"

    @property
    def _how(self) -> str:
        selected = "EM-weighted " if self.draw_weights == "em" else ""
        return f"{selected}{'/'.join(self.gradients)}"

    @property
    def weakness(self) -> str | None:
        """None as long as one of the gradients is that of the run itself."""
        honest = any(gradient not in WEAK_GRADIENTS for gradient in self.gradients)
        return None if honest else WEAK_GRADIENTS[self.gradients[0]]

    def unguided(self) -> AdaptiveGuided:
        """The same attack on a defence without guidance, where several gradients are the same."""
        same = ("exact" if g in ("unguided", "stopped") else g for g in self.gradients)
        return self.replace(gradients=tuple(dict.fromkeys(same)))

    def part(self, gradient: AttackGradient) -> PGD:
        """The attack by one gradient."""
        return self._pgd(gradient=gradient, steps=self.steps, step_size=self.eps / 5)

    def finish(self) -> PGD:
        """The attack that goes on from the worst result of the parts."""
        return self._pgd(
            loss="margin",
            steps=self.finish_steps,
            step_size=self.eps / 10,
            restarts=1,
            random_start=False,
        )

    def _pgd(self, **changes: Unpack[AttackOptions]) -> PGD:
        shared: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Attack)}
        shared |= {"step_schedule": "cosine", "final_step_size": self.eps / 60}
        return PGD(**{**shared, **changes})

    def rule(self, ball: Ball) -> Rule:
        """It has none: its parts are attacks of their own rules."""
        raise TypeError("AdaptiveGuided runs several attacks; call it, or its `run`")

    def _search(self, task: Task) -> AttackResult:
        """`run`, of checked arguments.

        init is where the first restart of every part begins. `loss` and `fooled` of the result are
        those under the draws that the parts were compared by.
        """
        attack = self if _is_guided(task.defended) else self.unguided()
        run = _Run(attack, task)
        for gradient in attack.gradients:
            run.add(attack.part(gradient), task.init)
        if attack.finish_steps:
            run.add(attack.finish(), run.images, skip=_FIRST_OF_FINISH)
        return run.result()


class _Run:
    """The parts of one run, and for each image the worst of their results so far."""

    def __init__(self, attack: AdaptiveGuided, task: Task) -> None:
        self.attack, self.task = attack, task
        images, labels = task.images, task.labels
        fixed = attack.noise == "fixed"
        draws = attack.eot if fixed else _JUDGED * attack.eot
        loss = LOSSES[attack.loss]
        options = (draws, attack.through_vote, task.memory_budget)
        self.judge = Objective(task.defended, labels, task.ids, loss, "exact", *options)
        self.first = 0 if fixed else FIRST_ATTACK_DRAW * (1 + attack.seed) + _FIRST_OF_JUDGE
        if len(images):
            # Quietly: nobody asked for as many draws, and the parts warn of their own.
            self.judge.settle(images, self.first, fixed=fixed, quiet=True)
        self.images = images.clone()
        self.loss = torch.full_like(labels, -torch.inf, dtype=torch.float64)
        self.fooled = torch.zeros_like(self.loss)
        self.live = torch.ones_like(labels, dtype=torch.bool)
        self.results: list[AttackResult] = []
        self.done = 0
        parts = len(attack.gradients) * attack.restarts * (attack.steps + 1)
        self.total = parts + (attack.finish_steps + 1 if attack.finish_steps else 0)

    def add(self, part: PGD, init: Tensor | None, skip: int = 0) -> None:
        """Attack the images that are not stopped, and take what is worse for the defence."""
        rows = self.live.nonzero()[:, 0]
        if not len(rows):
            return
        before = self.done

        def tell(progress: Progress) -> None:
            self.done = before + progress.done
            if self.task.progress is not None:
                self.task.progress(replace(progress, done=self.done, total=self.total))

        found = part._search(replace(self.task.of(rows, init), progress=tell, skip=skip))
        self.results.append(found)
        with self.judge.only(rows):
            judged = self.judge.value(found.images, self.first)
        worse = judged.fooled > self.fooled[rows]
        worse |= (judged.fooled == self.fooled[rows]) & (judged.loss > self.loss[rows])
        taken = rows[worse]
        self.images[taken] = found.images[worse]
        self.loss[taken], self.fooled[taken] = judged.loss[worse], judged.fooled[worse]
        if part.stop_when_fooled:
            self.live[rows[found.fooled == 1]] = False

    def result(self) -> AttackResult:
        """What was found, with the work of all parts."""
        parts, judge = self.results, self.judge
        return AttackResult(
            self.images,
            self.loss,
            self.fooled,
            sum(part.zero_gradients for part in parts),
            sum(part.gradient_runs for part in parts),
            judge.score_evaluations + sum(part.score_evaluations for part in parts),
            judge.classifier_evaluations + sum(part.classifier_evaluations for part in parts),
            max((part.draws for part in parts), default=self.attack.eot),
            int((~self.live).sum()),
        )


def _is_guided(defended: Defended) -> bool:
    """Whether a purifier of ours in it is guided by a classifier."""
    if isinstance(defended, PurifiedClassifier):
        return defended.purifier.plan.needs_classifier
    found = Foreign(defended, torch.empty(0, dtype=torch.int64)).defences
    purifiers = [one if isinstance(one, Purifier) else one.purifier for one in found]
    return any(purifier.plan.needs_classifier for purifier in purifiers)
