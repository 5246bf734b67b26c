"""What all attacks share: their options, draws, the loop over iterates, and the result.

An attack is a frozen dataclass of numbers; calling it runs it. One loop serves all of them: it
evaluates the loss and its gradient under fresh draws and asks the attack's rule for the next point.

Draws. A defence's draws below `FIRST_ATTACK_DRAW` are left to whoever measures it. An attack with
seed s works under draws from `FIRST_ATTACK_DRAW` · (1 + s), a new range for each iterate, and its
random starts are counters of their own at `FIRST_START_DRAW`, so no attack ever sees the noise that
it is judged under. `noise="fixed"` is the exception by intent: the white-box attack on the
deterministic defence whose noise is that of draw 0.

Why our own PGD and APGD, when libraries have them: here every random number belongs to an image's
sample id and not to its place in a batch, a generator's state, or a process, so an evaluation can
be batched, resumed and sharded without changing a result; all draws of an iterate run as one batch;
and the best iterate is judged over all its draws. Where none of that matters, use a library: they
run on a `PurifiedClassifier` as on any model (docs/attacks.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from inspect import signature
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor

from coup_fast import checks
from coup_fast.attacks import units
from coup_fast.attacks.ball import Ball
from coup_fast.attacks.losses import LOSSES, TARGETED, other_classes
from coup_fast.attacks.objective import (
    GRADIENTS,
    WEAK_GRADIENTS,
    Defended,
    Evaluation,
    Objective,
)
from coup_fast.attacks.options import AttackGradient, AttackOptions, Keep, LossName, NoiseName
from coup_fast.run import validation

if TYPE_CHECKING:
    from typing_extensions import Unpack

FIRST_ATTACK_DRAW = 2**32
"""Draws of a defence below this number are left to whoever measures it; attacks never use them."""
FIRST_START_DRAW = 2**62
MAX_SEED = 2**29 - 1
MAX_COUNT = 2**20 - 1
NOISES = get_args(NoiseName)
KEEPS = get_args(Keep)
_ALWAYS_SAID = ("norm", "eps", "steps", "eot", "gradient", "step_size", "version")

AttackType = TypeVar("AttackType", bound="Attack")
P = ParamSpec("P")


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        done: iterates that are finished.
        total: iterates of the whole run.
        loss: mean loss over the images at the present iterate.
        fooled: share of the draws that are misclassified there, in [0, 1].
    """

    done: int
    total: int
    loss: float
    fooled: float


@dataclass(frozen=True)
class AttackResult:
    """What an attack found.

    `loss` and `fooled` are averages over the attack's own draws. They say how the attack went, and
    they are no measure of robustness.

    Attributes:
        images: [B, C, H, W], inside the ball.
        loss: float64 [B], at the last iterate that was evaluated (keep="last") or at the one that
            is returned.
        fooled: float64 [B], share of draws that are misclassified there, in [0, 1].
        zero_gradients: how often an image's gradient was exactly 0, which is a sign of masked
            gradients.
        gradient_runs: images times draws that were differentiated.
        score_evaluations: images that passed through the score network in the forward passes of
            the attack. What a backward pass computes again and what is measured is not counted, so
            the number does not depend on the memory that there was.
        classifier_evaluations: the same of the classifier, guidance included; 0 for a classifier in
            which no module can be seen, behind a purifier. For a model that is not ours, its calls.
        draws: forwards of the defence behind each gradient: `eot`, or 1 where the defence is not
            random.
    """

    images: Tensor
    loss: Tensor
    fooled: Tensor
    zero_gradients: int
    gradient_runs: int
    score_evaluations: int
    classifier_evaluations: int
    draws: int


Rule = Callable[[Tensor, Evaluation], Tensor]


def _images_of(
    run: Callable[Concatenate[Any, P], AttackResult],
) -> Callable[Concatenate[Any, P], Tensor]:
    def call(attack: Attack, /, *args: P.args, **options: P.kwargs) -> Tensor:
        """The attacked images; takes and raises what `run` does."""
        return run(attack, *args, **options).images

    takes = signature(run).replace(return_annotation="Tensor")
    call.__signature__ = takes  # type: ignore[attr-defined]
    return call


@dataclass(frozen=True, repr=False)
class Attack(ABC):
    """Options of every attack; `attack(defended, images, labels, sample_ids=ids)` runs it.

    Args:
        norm: "linf" or "l2", also written "Linf", "inf", math.inf or "L2".
        eps: the radius in pixels of [0, 1], a number or a text such as "8/255"; at most 1 for ℓ∞.
        steps: the number of iterates.
        eot: the draws behind each gradient (expectation over transformation).
        loss: "ce", "dlr" or "margin".
        gradient: "exact" takes the gradient of the run as it was, and "autograd" the same from a
            whole graph. Three others are weak and exist for comparison: "stopped" holds guidance
            constant, as the released COUP attack does; "bpda" takes the purifier's Jacobian as the
            identity; "classifier" leaves the purifier out.
        noise: "fresh" takes new draws at every iterate. "fixed" takes draw 0 (to eot - 1)
            throughout, which with eot=1 is the white-box attack on the defence as a deterministic
            function.
        through_vote: True takes the loss of the combined scores of the defence's `num_draws`, so
            that the attack knows of the vote and costs eot · num_draws runs. False takes the mean
            of the losses of the draws.
        random_start: whether to begin at a random point of the ball.
        restarts: how often to begin; the best result is kept.
        keep: "last" returns the last iterate; "best" returns the one that fooled most draws, and
            among equals the one of highest loss.
        seed: of starts and draws, in [0, 2^29).
        targeted: whether to aim at a wrong class. The class follows from the image's label, its
            sample id and the number of the restart, and as many restarts as there are wrong classes
            try all.

    Raises:
        TypeError: an option is of the wrong kind.
        ValueError: an option is out of range; the message names it and what is possible.
    """

    norm: str = "linf"
    eps: float = 8 / 255
    steps: int = 200
    eot: int = 20
    loss: LossName = "ce"
    gradient: AttackGradient = "exact"
    noise: NoiseName = "fresh"
    through_vote: bool = True
    random_start: bool = True
    restarts: int = 1
    keep: Keep = "last"
    seed: int = 0
    targeted: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", units.norm(self.norm))
        checks.choice("loss", self.loss, LOSSES)
        checks.choice("gradient", self.gradient, GRADIENTS)
        checks.choice("noise", self.noise, NOISES)
        checks.choice("keep", self.keep, KEEPS)
        for name in ("through_vote", "random_start", "targeted"):
            checks.flag(name, getattr(self, name))
        object.__setattr__(self, "eps", units.length("eps", self.eps, self.norm))
        for name, low, high in (
            ("steps", 1, MAX_COUNT),
            ("eot", 1, MAX_COUNT),
            ("restarts", 1, MAX_COUNT),
            ("seed", 0, MAX_SEED),
        ):
            value = checks.integer(name, getattr(self, name), low, high)
            object.__setattr__(self, name, value)  # for JSON, which knows no NumPy

    def __repr__(self) -> str:
        """As it could be written: what is not said has its default."""
        said = [
            f"{f.name}={_length(value) if f.name in ('eps', 'step_size') else repr(value)}"
            for f in fields(self)
            if (value := getattr(self, f.name)) != f.default or f.name in _ALWAYS_SAID
        ]
        return f"{type(self).__name__}({', '.join(said)})"

    @property
    def name(self) -> str:
        """In words, for tables: "PGD-200 ce, EOT 20, exact gradient"."""
        noise = f"EOT {self.eot}" if self.noise == "fresh" else "fixed noise"
        through = "" if self.through_vote else ", blind to the vote"
        kind = self.kind
        if self.gradient == "classifier":
            return f"{kind}, bare classifier"
        return f"{kind}, {noise}, {self.gradient} gradient{through}"

    @property
    def kind(self) -> str:
        """The name without what concerns the defence: "PGD-200 ce"."""
        aim = " targeted" if self.targeted else ""
        return f"{type(self).__name__}-{self.steps} {self.loss}{aim}"

    @property
    def weakness(self) -> str | None:
        """Why this attack says little about robustness; None for an attack that is not weak."""
        return WEAK_GRADIENTS.get(self.gradient)

    def as_dict(self) -> dict[str, Any]:
        """Every option, the name and the weakness, for JSON."""
        kind = {"attack": type(self).__name__, "name": self.name, "weakness": self.weakness}
        return kind | asdict(self)

    def replace(self: AttackType, **changes: Unpack[AttackOptions]) -> AttackType:
        """The same attack with other options."""
        options: Mapping[str, Any] = changes
        return replace(self, **options)

    @abstractmethod
    def rule(self, ball: Ball) -> Rule:
        """A new rule for one restart: (iterate, its evaluation) -> the next iterate, in order."""

    def run(
        self,
        defended: Defended,
        images: Tensor,
        labels: Tensor,
        *,
        sample_ids: Any = None,
        targets: Tensor | None = None,
        progress: Callable[[Progress], None] | None = None,
        memory_budget: int | None = None,
    ) -> AttackResult:
        """Run the attack.

        Args:
            defended: a `PurifiedClassifier` (not modified, and its `next_draw` stays), or any
                module or callable from pixels to scores [B, K]. A random one is also run under
                `eot` draws, as `coup_fast.attacks.foreign` describes. A purifier of this package
                that it holds is found, and gets this attack's draws and gradient.
            images: [B, C, H, W] in [0, 1], float32 or float64.
            labels: int64 [B].
            sample_ids: integers [B] that name the images to all randomness; default 0 … B-1.
            targets: int64 [B], the classes that a targeted attack aims at, in place of those that
                it would choose.
            progress: called after every iterate.
            memory_budget: as for `coup_fast.eot_gradient`.

        An image's result depends on the image, its label and sample id, the attack and the
        defence; not on its batch or order, as far as that is true of the networks.

        Raises:
            TypeError: an argument is of the wrong kind.
            ValueError: an argument is out of range or does not fit the others.
            FloatingPointError: a loss or gradient is not finite; the message names the image.
        """
        ids = check_inputs(images, labels, sample_ids)
        if targets is not None:
            _check_targets(self, targets, labels)
        units.check_radius(self.eps, self.norm, images[:1].numel())
        objective = Objective(
            defended,
            labels,
            ids,
            (TARGETED if self.targeted else LOSSES)[self.loss],
            self.gradient,
            self.eot,
            self.through_vote,
            memory_budget,
        )
        search = _Search(self, objective, Ball(images, self.norm, self.eps), progress)
        if len(images) > 0:
            objective.settle(images, search.draw(0), fixed=self.noise == "fixed")
            if self.targeted:
                search.choose_targets(targets)
            for restart in range(self.restarts):
                search.restart(restart)
        return search.result()

    __call__ = _images_of(run)


def _length(value: float) -> str:
    """8/255 rather than 0.03137254901960784."""
    levels = round(value * 255)
    return f"{levels}/255" if levels / 255 == value != 1 else repr(value)


def check_inputs(images: Tensor, labels: Tensor, sample_ids: Any) -> Tensor:
    """Raises for what `Attack.run` does not take; the sample ids."""
    validation.check_images(images)
    if images.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"images must be float32 or float64 to be attacked, got {images.dtype}")
    ids = validation.sample_ids_of(images, sample_ids)
    validation.check_labels(labels, images)
    validation.check_values(images)
    if images.numel() and bool(((images < 0) | (images > 1)).any()):
        raise ValueError("images leave [0, 1] by a rounding error; clamp them to [0, 1] first")
    return ids


def _check_targets(attack: Attack, targets: Any, labels: Tensor) -> None:
    if not attack.targeted:
        raise ValueError("targets were given to an attack with targeted=False")
    if not isinstance(targets, Tensor) or targets.dtype != labels.dtype:
        raise TypeError(f"targets must be an int64 tensor [{len(labels)}], got {targets!r}")
    if targets.shape != labels.shape or targets.device != labels.device:
        got = f"{list(targets.shape)} on {targets.device}"
        raise ValueError(f"targets must be [{len(labels)}] on {labels.device}, got {got}")
    if bool((targets == labels).any()):
        same = int((targets == labels).nonzero()[0])
        raise ValueError(f"targets must be wrong classes; that of image {same} is its label")


class _Search:
    """One run: the loop over iterates, and what it has found."""

    def __init__(
        self,
        attack: Attack,
        objective: Objective,
        ball: Ball,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.attack, self.objective, self.ball, self.progress = attack, objective, ball, progress
        self.images = ball.centre.clone()
        self.loss = torch.full_like(objective.labels, -torch.inf, dtype=torch.float64)
        self.fooled = torch.zeros_like(self.loss)
        self.done = self.zero_gradients = self.gradient_runs = 0
        # The last iterate is evaluated where it has rivals.
        self.compares = attack.keep == "best" or attack.restarts > 1
        self.total = attack.restarts * (attack.steps + self.compares)
        self.labels, self.classes, self.given = objective.labels, 0, False

    def draw(self, iterate: int) -> int:
        """The first draw of an iterate."""
        if self.attack.noise == "fixed":
            return 0
        return FIRST_ATTACK_DRAW * (1 + self.attack.seed) + iterate * self.objective.draws_used

    def choose_targets(self, given: Tensor | None) -> None:
        """Aim at these classes, or let each restart choose. Raises ValueError for no class."""
        self.classes = self.objective.classes(self.ball.centre, self.draw(0))
        self.given = given is not None
        if given is None:
            return
        if not bool(((given >= 0) & (given < self.classes)).all()):
            raise ValueError(
                f"targets must be classes, 0 to {self.classes - 1}, got {int(given.min())} to "
                f"{int(given.max())}"
            )
        self.objective.aim(given)

    def restart(self, number: int) -> None:
        """Run the loop once from a new start, and keep what is better than before."""
        attack, ball = self.attack, self.ball
        if attack.targeted and not self.given:
            ids = self.objective.sample_ids
            self.objective.aim(other_classes(self.labels, ids, number, self.classes))
        x = ball.centre
        if attack.random_start:
            x = ball.random(attack.seed, self.objective.sample_ids, FIRST_START_DRAW + number)
        rule = attack.rule(ball)
        for _ in range(attack.steps):
            at_x = self.objective.gradient(x, self.draw(self.done))
            self._count(at_x)
            if attack.keep == "best":
                self._keep_better(x, at_x)
            x = ball.project(rule(x, at_x))
        if not self.compares:
            self.images, self.loss, self.fooled = x, at_x.loss, at_x.fooled
            return
        at_x = self.objective.value(x, self.draw(self.done))
        self._report(at_x)
        self._keep_better(x, at_x)

    def _count(self, at_x: Evaluation) -> None:
        self.gradient_runs += len(at_x.loss) * self.objective.draws_used
        self.zero_gradients += int((at_x.gradient == 0).flatten(1).all(1).sum())
        self._report(at_x)

    def _report(self, at_x: Evaluation) -> None:
        self.done += 1
        if self.progress is not None:
            loss, fooled = float(at_x.loss.mean()), float(at_x.fooled.mean())
            self.progress(Progress(self.done, self.total, loss, fooled))

    def _keep_better(self, x: Tensor, at_x: Evaluation) -> None:
        more = at_x.fooled > self.fooled
        better = more | ((at_x.fooled == self.fooled) & (at_x.loss > self.loss))
        self.images = torch.where(better[:, None, None, None], x, self.images)
        self.loss = torch.where(better, at_x.loss, self.loss)
        self.fooled = torch.where(better, at_x.fooled, self.fooled)

    def result(self) -> AttackResult:
        """What was found, checked against the ball."""
        if len(self.images):
            self.ball.check(self.images)
        return AttackResult(
            self.images,
            self.loss,
            self.fooled,
            self.zero_gradients,
            self.gradient_runs,
            self.objective.score_evaluations,
            self.objective.classifier_evaluations,
            self.objective.draws,
        )
