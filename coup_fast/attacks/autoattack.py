"""AutoAttack itself (Croce & Hein, ICML 2020), by the package pyautoattack, as an attack of ours.

Each image is attacked by itself, so that its draws and AutoAttack's own random numbers belong to
its sample id. AutoAttack counts an image as broken once it was wrong under one of its draws, and as
safe once none of its components broke it: it returns the image that was wrong that once, or the one
that it was given. So under fresh draws a random defence can look stronger than under `APGD`, which
works on until its last step.

pyautoattack is an extra (`coup-fast[attacks]`) and is imported where it is used.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from coup_fast import checks
from coup_fast.attacks.attack import Attack, Rule, Task
from coup_fast.attacks.ball import Ball
from coup_fast.attacks.losses import LOSSES
from coup_fast.attacks.objective import Defended, Objective
from coup_fast.attacks.options import Keep, Version
from coup_fast.attacks.result import FIRST_ATTACK_DRAW, AttackResult, Progress
from coup_fast.run.warn import warn

VERSIONS = get_args(Version)
# Options of other attacks that AutoAttack decides by itself.
_DECIDED = (
    *("loss", "through_vote", "random_start", "restarts", "keep", "targeted"),
    *("normalise_draws", "draw_weights", "gradient_averaging", "low_frequency"),
    *("deviation", "stop_when_fooled"),
)


@dataclass(frozen=True, repr=False)
class AutoAttack(Attack):
    """AutoAttack's `rand` (APGD-CE, APGD-DLR) or `standard` (APGD-CE, APGD-T, FAB-T, Square).

    Targeted components try at most nine wrong classes. `Attack` explains the other options.

    Args:
        version: "rand" is for random defences, with `eot` draws for each gradient and
            noise="fresh". "standard" assumes that two calls agree. It needs noise="fixed", which
            attacks the defence as it is under draw 0, and eot=1.
        steps: those of APGD and FAB.
        queries: those of Square.
    """

    steps: int = 100
    keep: Keep = "best"
    version: Version = "rand"
    queries: int = 5000

    _decided = _DECIDED
    _refused = ("targets", "surrogate", "init")

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("version", self.version, VERSIONS)
        checks.integer("queries", self.queries, 1)
        noise = "fresh" if self.version == "rand" else "fixed"
        if self.noise != noise or (self.version == "standard" and self.eot != 1):
            raise ValueError(
                f'version {self.version!r} needs noise="{noise}"'
                f"{'' if self.version == 'rand' else ' and eot=1'}, got noise={self.noise!r}, "
                f"eot={self.eot}"
            )

    @property
    def kind(self) -> str:
        """ "AutoAttack-100 rand"."""
        return f"AutoAttack-{self.steps} {self.version}"

    def rule(self, ball: Ball) -> Rule:
        """It has none: its steps are those of the package."""
        raise TypeError("AutoAttack runs by itself; call it, or its `run`")

    def _search(self, task: Task) -> AttackResult:
        """`run`, of checked arguments; progress is called after each image.

        Zero gradients are not counted. Raises ImportError without pyautoattack, and ValueError if
        there are fewer classes than its losses need.
        """
        require_package()
        images, labels, progress = task.images, task.labels, task.progress
        ball = Ball(images, self.norm, self.eps)
        found = images.clone()
        loss = torch.zeros(len(images), dtype=torch.float64, device=images.device)
        fooled = torch.zeros_like(loss)
        runs = scored = classified = 0
        for i in range(len(images)):
            row = slice(i, i + 1)
            calls = _Calls(self, task.defended, labels[row], task.ids[row], task.memory_budget)
            with _quiet() as said, calls.objective.counted():
                attacked = calls.attack(images[row], labels[row])
            for message in said:
                warn(f"AutoAttack: {message}")
            found[row] = Ball(images[row], self.norm, self.eps).project(attacked)
            at_end = calls.objective.value(found[row], calls.first)
            loss[row], fooled[row] = at_end.loss, at_end.fooled
            runs += calls.differentiated
            scored += calls.objective.score_evaluations
            classified += calls.objective.classifier_evaluations
            if progress is not None:
                share = float(fooled[: i + 1].mean())
                progress(Progress(i + 1, len(images), float(loss[: i + 1].mean()), share))
        ball.check(found)
        return AttackResult(found, loss, fooled, 0, runs, scored, classified, self.eot)


def require_package() -> None:
    """Raises ImportError without pyautoattack, with what to install."""
    if importlib.util.find_spec("pyautoattack") is None:
        raise ImportError(
            "AutoAttack needs pyautoattack, which is not installed: "
            "pip install 'coup-fast[attacks]'"
        )


class _Calls(nn.Module):
    """One image's defence as AutoAttack calls it: every call under the next draw, or draw 0."""

    def __init__(
        self, attack: AutoAttack, defended: Defended, label: Tensor, sample_id: Tensor, budget: Any
    ) -> None:
        super().__init__()
        self.options = attack
        self.objective = Objective(
            defended, label, sample_id, LOSSES["ce"], attack.gradient, attack.eot, True, budget
        )
        self.fixed = attack.noise == "fixed"
        self.first = 0 if self.fixed else FIRST_ATTACK_DRAW * (1 + attack.seed)
        self.next = self.first
        self.differentiated = 0
        self.seed = (attack.seed * 1_000_003 + int(sample_id[0])) % 2**31

    def forward(self, images: Tensor) -> Tensor:
        scores = self.objective.scores(images, self.next)
        if not self.fixed:
            self.next += self.objective.stride
        self.differentiated += len(images) * (torch.is_grad_enabled() and images.requires_grad)
        return scores

    def attack(self, image: Tensor, label: Tensor) -> Tensor:
        """What AutoAttack makes of it."""
        import pyautoattack

        options = self.options
        least = 3 if options.version == "rand" else 4
        devices = [image.device] if image.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            with torch.no_grad():
                classes = self(image).shape[1]
            if classes < least:
                raise ValueError(
                    f"AutoAttack {options.version} needs at least {least} classes, got {classes}"
                )
            attack = pyautoattack.AutoAttack(
                self,
                norm="Linf" if options.norm == "linf" else "L2",
                eps=options.eps,
                version=options.version,
                seed=self.seed,
                device=image.device,
            )
            for part in (attack.apgd, attack.apgd_targeted):
                _set_steps(part, options.steps)
            attack.apgd.eot_iter = options.eot
            attack.fab.n_iter, attack.square.n_queries = options.steps, options.queries
            for part in (attack.apgd_targeted, attack.fab):
                part.n_target_classes = min(9, classes - 1)
            found: Tensor = attack.run_standard_evaluation(image, label, batch_size=1)[0]
        return found


def _set_steps(apgd: Any, steps: int) -> None:
    """The package computes these from its number of steps, once."""
    apgd.n_iter = apgd.n_iter_orig = steps
    apgd.n_iter_2 = max(int(0.22 * steps), 1)
    apgd.n_iter_min = max(int(0.06 * steps), 1)
    apgd.size_decr = max(int(0.03 * steps), 1)


@contextmanager
def _quiet() -> Iterator[set[str]]:
    """Collect what AutoAttack logs as warnings; not what it thinks of random or guided defences,
    which it takes for a fault."""
    said: set[str] = set()

    def collect(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        expected = ("randomized defense", "dynamic", "calls", "probability distribution")
        if record.levelno >= logging.WARNING and not any(word in text for word in expected):
            said.add(text)
        return False

    logger = logging.getLogger("auto-attack")
    logger.addFilter(collect)
    try:
        yield said
    finally:
        logger.removeFilter(collect)
