"""What all attacks share: their options, their draws, and how they are called.

An attack is a frozen dataclass of numbers; calling it runs it. One loop (`Search`) serves those
that follow a gradient: it evaluates the loss and its gradient under fresh draws and asks the
attack's rule for the next point.

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

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor

from coup_fast import checks
from coup_fast.attacks import units
from coup_fast.attacks.ball import Ball
from coup_fast.attacks.draw_weights import EmWeights
from coup_fast.attacks.losses import LOSSES, TARGETED
from coup_fast.attacks.low_frequency import LowFrequencyBall
from coup_fast.attacks.objective import (
    GRADIENTS,
    WEAK_GRADIENTS,
    Defended,
    Evaluation,
    Objective,
)
from coup_fast.attacks.options import (
    AttackGradient,
    AttackOptions,
    DrawWeighting,
    Keep,
    LossName,
    NoiseName,
)
from coup_fast.attacks.result import AttackResult, Progress
from coup_fast.attacks.search import Search
from coup_fast.run import validation

if TYPE_CHECKING:
    from typing_extensions import Unpack

MAX_SEED = 2**29 - 1
MAX_COUNT = 2**20 - 1
_FLAGS = ("through_vote", "random_start", "targeted", "normalise_draws", "stop_when_fooled")
NOISES = get_args(NoiseName)
KEEPS = get_args(Keep)
DRAW_WEIGHTS = get_args(DrawWeighting)
_ALWAYS_SAID = ("norm", "eps", "steps", "eot", "gradient", "step_size", "version")
_LENGTHS = ("eps", "step_size", "final_step_size")

AttackType = TypeVar("AttackType", bound="Attack")
P = ParamSpec("P")


Rule = Callable[[Tensor, Evaluation], Tensor]


@dataclass(frozen=True)
class Task:
    """What one run is about: the checked arguments of `Attack.run`.

    ids: the sample ids, int64 [B]. skip: as for `Search`.
    """

    defended: Defended
    images: Tensor
    labels: Tensor
    ids: Tensor
    targets: Tensor | None = None
    surrogate: Defended | None = None
    init: Tensor | None = None
    progress: Callable[[Progress], None] | None = None
    memory_budget: int | None = None
    skip: int = 0

    def of(self, rows: Tensor, init: Tensor | None) -> Task:
        """The same about these rows of the batch, int64 [b], beginning at the rows of init."""
        return replace(
            self,
            images=self.images[rows],
            labels=self.labels[rows],
            ids=self.ids[rows],
            init=None if init is None else init[rows],
        )


def _images_of(
    run: Callable[Concatenate[Any, P], AttackResult],
) -> Callable[Concatenate[Any, P], Tensor]:
    def call(attack: Attack, /, *args: P.args, **options: P.kwargs) -> Tensor:
        """The attacked images; takes and raises what `run` does."""
        own: Callable[P, AttackResult] = getattr(attack, run.__name__)  # that of its class
        return own(*args, **options).images

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
            whole graph. Four others are not of the run itself: "stopped" holds guidance
            constant, as the released COUP attack does; "unguided" takes the gradient of the run
            without guidance, under the same noise; "bpda" takes the purifier's Jacobian as the
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
            among equals the one of highest loss. That is judged under draws of the defence that
            the iterate was not chosen by; with gradient="classifier" it is the bare classifier.
        seed: of starts and draws, in [0, 2^29).
        targeted: whether to aim at a wrong class. The class follows from the image's label, its
            sample id and the number of the restart, and as many restarts as there are wrong classes
            try all.
        normalise_draws: whether each draw's gradient is divided by its ℓ2 norm before the mean.
            Otherwise the few draws that are near the boundary decide, since the gradients of the
            others are tiny.
        draw_weights: "uniform", or "em" for DiffHammer's selection of the draws that share a
            weakness (`coup_fast.attacks.draw_weights`), which needs eot >= 2.
        gradient_averaging: α in [0, 1]. Iterate number t of a restart follows t^-α of its own
            gradient and 1 - t^-α of what the iterate before followed (stepwise EM; DiffHammer
            takes 0.5). 0 leaves each iterate its own.
        low_frequency: the share of the lowest frequencies along height and width that the
            perturbation consists of, in (0, 1]; see `coup_fast.attacks.low_frequency`. 1 leaves it
            as it is.
        deviation: λ >= 0, what DiffAttack's deviated-reconstruction loss of the purifier's states
            counts beside `loss` (`coup_fast.attacks.deviation`). It needs a `PurifiedClassifier`
            and a gradient that goes through its chain. What is reported and compared is `loss`.
        stop_when_fooled: whether an image takes no further iterate, and no restart, once all `eot`
            draws of one iterate are misclassified. It saves time and can raise the numbers that
            count draws (average, final iterate, majority). It raises "worst of k" only by an image
            that is then right under all k of the judge's draws, which eot=1 makes likely. Where
            the judge takes the same draw (noise="fixed"), a stopped image stays misclassified.

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
    normalise_draws: bool = False
    draw_weights: DrawWeighting = "uniform"
    gradient_averaging: float = 0.0
    low_frequency: float = 1.0
    deviation: float = 0.0
    stop_when_fooled: bool = False

    _decided: ClassVar[tuple[str, ...]] = ()  # options that a subclass decides
    _refused: ClassVar[tuple[str, ...]] = ()  # arguments of `run` that it does not take

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", units.norm(self.norm))
        checks.choice("loss", self.loss, LOSSES)
        checks.choice("gradient", self.gradient, GRADIENTS)
        checks.choice("noise", self.noise, NOISES)
        checks.choice("keep", self.keep, KEEPS)
        checks.choice("draw_weights", self.draw_weights, DRAW_WEIGHTS)
        for name in _FLAGS:
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
        for name, above in (("gradient_averaging", False), ("low_frequency", True)):
            share = checks.number(name, getattr(self, name), 0, 1, above=above)
            object.__setattr__(self, name, share)
        object.__setattr__(
            self, "deviation", checks.number("deviation", self.deviation, 0, math.inf)
        )
        if self.deviation and self.gradient in ("bpda", "classifier"):
            raise ValueError(
                "deviation is a loss of the chain's states, through which "
                f"gradient={self.gradient!r} does not go"
            )
        if self.draw_weights == "em" and self.eot == 1:
            raise ValueError("draw_weights='em' selects among the draws of a gradient, got eot=1")
        own = {f.name: f.default for f in fields(self)}
        for name in self._decided:
            if getattr(self, name) != own[name]:
                kind = type(self).__name__
                raise ValueError(f"{name} is decided by {kind}; leave it as {own[name]!r}")

    def __repr__(self) -> str:
        """As it could be written: what is not said has its default."""
        said = [
            f"{f.name}={_length(value) if f.name in _LENGTHS else repr(value)}"
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
            return f"{kind}, bare classifier{self._stops}"
        return f"{kind}, {noise}, {self._how} gradient{through}{self._stops}"

    @property
    def _how(self) -> str:
        """The gradient, in words: "unit-norm exact"."""
        unit = "unit-norm " if self.normalise_draws else ""
        selected = "EM-weighted " if self.draw_weights == "em" else ""
        return f"{selected}{unit}{self.gradient}"

    @property
    def _stops(self) -> str:
        return ", stopped when fooled" if self.stop_when_fooled else ""

    @property
    def kind(self) -> str:
        """The name without what concerns the defence: "PGD-200 ce"."""
        aim = " targeted" if self.targeted else ""
        smooth = " low-frequency" if self.low_frequency < 1 else ""
        deviated = " + deviation" if self.deviation else ""
        return f"{type(self).__name__}-{self.steps} {self.loss}{deviated}{aim}{smooth}"

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
        surrogate: Defended | None = None,
        init: Tensor | None = None,
        progress: Callable[[Progress], None] | None = None,
        memory_budget: int | None = None,
    ) -> AttackResult:
        """Run the attack.

        Args:
            defended: a `PurifiedClassifier` (not modified, and its `next_draw` stays), or any
                module or callable from pixels to scores [B, K]. A random one is also run under
                `eot` draws, as `coup_fast.attacks.foreign` describes, with the seed of a `Foreign`
                if that is given. A purifier of this package that it holds is found, and gets this
                attack's draws and gradient.
            images: [B, C, H, W] in [0, 1], float32 or float64.
            labels: int64 [B].
            sample_ids: integers [B] that name the images to all randomness; default 0 … B-1.
            targets: int64 [B], the classes that a targeted attack aims at, in place of those that
                it would choose.
            surrogate: a defence to differentiate in place of `defended`, such as one with fewer
                steps or another method. Which images are kept is still judged by `defended`.
            init: [B, C, H, W], like images: where the first restart begins, in place of a random
                point. Moved into the ball where it is outside.
            progress: called after every iterate.
            memory_budget: as for `coup_fast.eot_gradient`.

        An image's result depends on the image, its label and sample id, the attack and the
        defence; not on its batch or order, as far as that is true of the networks.

        Raises:
            TypeError: an argument is of the wrong kind.
            ValueError: an argument is out of range or does not fit the others.
            FloatingPointError: a loss or gradient is not finite; the message names the image.
        """
        for name, given in (("targets", targets), ("surrogate", surrogate), ("init", init)):
            if given is not None and name in self._refused:
                raise ValueError(f"{type(self).__name__} takes no {name}; PGD does")
        ids = _checked_ids(images, labels, sample_ids)
        if targets is not None:
            _check_targets(self, targets, labels)
        _check_init(init, images)
        units.check_radius(self.eps, self.norm, images[:1].numel())
        rest = (targets, surrogate, init, progress, memory_budget)
        return self._search(Task(defended, images, labels, ids, *rest))

    def _search(self, task: Task) -> AttackResult:
        """`run`, of checked arguments."""

        def objective(model: Defended, gradient: AttackGradient, deviation: float) -> Objective:
            loss = (TARGETED if self.targeted else LOSSES)[self.loss]
            weights = EmWeights(self.norm, self.eps) if self.draw_weights == "em" else None
            options = (self.eot, self.through_vote, task.memory_budget)
            how = (self.normalise_draws, weights, deviation)
            return Objective(model, task.labels, task.ids, loss, gradient, *options, *how)

        differentiated = objective(
            task.defended if task.surrogate is None else task.surrogate,
            self.gradient,
            self.deviation,
        )
        judge = differentiated
        if task.surrogate is not None or self.gradient == "unguided":
            judge = objective(task.defended, "exact", 0.0)
        ball = LowFrequencyBall(task.images, self.norm, self.eps, self.low_frequency)
        start = None if task.init is None else ball.project(task.init)
        search = Search(self, differentiated, judge, ball, start, task.progress, task.skip)
        return search.run(task.targets)

    __call__ = _images_of(run)


def _length(value: float) -> str:
    """8/255 rather than 0.03137254901960784."""
    levels = round(value * 255)
    return f"{levels}/255" if levels / 255 == value != 1 else repr(value)


def _checked_ids(images: Tensor, labels: Tensor, sample_ids: Any) -> Tensor:
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


def _check_init(init: Any, images: Tensor) -> None:
    """Raises TypeError or ValueError for starts that do not fit the images."""
    if init is None:
        return
    if not isinstance(init, Tensor) or init.dtype != images.dtype:
        given = init.dtype if isinstance(init, Tensor) else type(init).__name__
        raise TypeError(f"init must be a tensor of {images.dtype}, as images are, got {given}")
    if init.shape != images.shape or init.device != images.device:
        got = f"{list(init.shape)} on {init.device}"
        raise ValueError(f"init must be {list(images.shape)} on {images.device}, got {got}")
    if not bool(((init >= 0) & (init <= 1)).all()):
        raise ValueError(
            f"init must be in [0, 1], got {float(init.min()):g} to {float(init.max()):g}"
        )


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
