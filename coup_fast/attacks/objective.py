"""The attacked quantity: loss, success and gradient of images against a defence, over draws.

Knows the defence and how its gradient is to be taken; knows no attack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coup_fast._torch.calls import logits_of
from coup_fast._torch.modules import in_dtype_of, name_of
from coup_fast._torch.reachable import modules_behind
from coup_fast.attacks.ball import ordered_sum
from coup_fast.attacks.deviation import DeviatedPurifier
from coup_fast.attacks.draw_weights import DrawWeights
from coup_fast.attacks.eot import default_budget, eot_gradient
from coup_fast.attacks.foreign import Defence, Foreign
from coup_fast.attacks.losses import Loss
from coup_fast.attacks.options import AttackGradient
from coup_fast.options import PurifierOptions
from coup_fast.purified_classifier import PurifiedClassifier, combine_votes
from coup_fast.purifier import Purifier
from coup_fast.run.aside import counts

Defended = PurifiedClassifier | Foreign | Callable[[Tensor], Tensor]

GRADIENTS: dict[AttackGradient, PurifierOptions] = {
    "exact": {"gradient": "exact", "guidance_gradient": "full"},
    "autograd": {"gradient": "autograd", "guidance_gradient": "full"},
    "stopped": {"gradient": "exact", "guidance_gradient": "stopped"},
    "unguided": {"gradient": "exact", "guidance_gradient": "full"},
    "bpda": {"gradient": "bpda"},
    "classifier": {},
}
"""How an attack takes its gradient, and the purifier's options that do it. "classifier" does
without the purifier, and "unguided" differentiates the run with λ = 0."""

WEAK_GRADIENTS: dict[AttackGradient, str] = {
    "stopped": "treats the guidance as a constant",
    "unguided": "leaves the guidance out of the run that it differentiates",
    "bpda": "takes the purifier's Jacobian as the identity",
    "classifier": "attacks the bare classifier and ignores the purifier",
}
"""Why a gradient makes an attack weak, in words for tables. The other gradients are those of the
run itself."""


@dataclass(frozen=True)
class Evaluation:
    """loss [B]: mean over draws; of a majority vote that of the mean softmax, since counts are flat
    almost everywhere. fooled [B]: share of draws that were misclassified by the defence's own vote
    (for an attack that is targeted: as it wants), in [0, 1]. gradient [B, C, H, W]: of the loss;
    zeros where none was asked for."""

    loss: Tensor
    fooled: Tensor
    gradient: Tensor


class Objective:
    """One defence under one way to differentiate it.

    Args:
        defended: a `PurifiedClassifier`, or any module or callable, pixels -> scores [B, K], or a
            `Foreign` around it, whose seed its noise gets. What it holds of ours is differentiated
            by `gradient`, and all else as it is.
        labels, sample_ids: int64 [B].
        through_vote: the loss is taken of the combined vote over `num_draws`; False: of each draw.
        draws: repetitions over which the loss is averaged, after `settle` those that it takes.
        normalise_draws, draw_weights: as for `eot_gradient`.
        deviation: what the deviation of the purifier's states counts in the gradient.

    Raises ValueError for a gradient that this model cannot be asked for.
    """

    def __init__(
        self,
        defended: Defended,
        labels: Tensor,
        sample_ids: Tensor,
        loss: Loss,
        gradient: AttackGradient,
        draws: int,
        through_vote: bool,
        memory_budget: int | None,
        normalise_draws: bool = False,
        draw_weights: DrawWeights | None = None,
        deviation: float = 0.0,
    ) -> None:
        self.normalise_draws, self.draw_weights = normalise_draws, draw_weights
        self.labels, self.sample_ids, self.loss = labels, sample_ids, loss
        self.targeted = False
        self.memory_budget = memory_budget
        self.draws = draws
        self.repeats = False  # whether each forward was seen to give the same; see `settle`
        self.score_evaluations = 0
        self.classifier_evaluations = 0
        self.model: PurifiedClassifier | Foreign
        self.counting: Foreign | None = None  # the model, where its majority votes have a stand-in
        if isinstance(defended, PurifiedClassifier):
            bare = gradient == "classifier"
            self.model = (
                Foreign(defended.classifier, sample_ids)
                if bare
                else _variant(defended, gradient, through_vote, deviation)
            )
            return
        self.model = foreign = Foreign(defended, sample_ids)
        if deviation:
            raise ValueError(
                "deviation is of the states of a purifier, so it needs a PurifiedClassifier, got "
                f"{name_of(foreign.model)}"
            )
        if gradient not in ("exact", "autograd") and not foreign.defences:
            raise ValueError(
                f"gradient={gradient!r} is for a PurifiedClassifier, or a model that holds one: "
                f"nobody knows what is a purifier in {name_of(foreign.model)}; it can be attacked "
                'with gradient="exact", as it is differentiated'
            )
        for defence in foreign.defences:
            foreign.variants[defence] = _stand_in(defence, gradient, through_vote)
        own = foreign.variants
        foreign.variants = {defence: _with_slope(variant) for defence, variant in own.items()}
        if any(getattr(v, "vote", "") == "majority" and v.num_draws > 1 for v in own.values()):
            self.counting = Foreign(defended, sample_ids)
            self.counting.variants = own

    def settle(
        self, images: Tensor, draw: int, *, fixed: bool, quiet: bool = False, asks: bool = False
    ) -> None:
        """Find out whether one forward is enough for an evaluation, where that is up to the model.

        fixed: draws will be repeated. asks: `repeats` will be asked for, also if draws is 1. Warns
        if one is enough and more were asked for, unless quiet; raises ValueError for a model whose
        noise cannot be fixed.
        """
        model = self.model
        if isinstance(model, Foreign) and (self.draws > 1 or fixed or model.defences or asks):
            with self.counted():
                self.repeats = model.repeats(images, draw, self.draws, fixed=fixed, quiet=quiet)
            self.draws = 1 if self.repeats else self.draws

    def classes(self, images: Tensor, draw: int) -> int:
        """How many classes the scores have. Costs one forward."""
        with self.counted(), torch.no_grad():
            return self.scores(images, draw).shape[1]

    def aim(self, targets: Tensor) -> None:
        """From now on the labels are these, int64 [B], and an image is fooled if it gets its own.

        The loss has to be one of `TARGETED`.
        """
        self.labels, self.targeted = targets, True

    @contextmanager
    def only(self, rows: Tensor) -> Iterator[None]:
        """Within this context it is about these rows of the batch, int64 [b], in place of all."""
        labels, ids = self.labels, self.sample_ids
        self._be_about(labels[rows], ids[rows])
        try:
            yield
        finally:
            self._be_about(labels, ids)

    def _be_about(self, labels: Tensor, sample_ids: Tensor) -> None:
        self.labels, self.sample_ids = labels, sample_ids
        if isinstance(self.model, Foreign):
            self.model.call_with(sample_ids)
        if self.counting is not None:
            self.counting.call_with(sample_ids)

    def scores(self, images: Tensor, first: int) -> Tensor:
        """Scores [B, K] that the loss is taken of, of one forward under draws from `first` on."""
        if isinstance(self.model, PurifiedClassifier):
            logits = self.model.draw_logits(images, self.sample_ids, first)
            return combine_votes(logits, _loss_vote(self.model))
        with self.model.frozen():
            return self.model.scores(images, first)

    def _scores_and_votes(self, images: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """`scores`, and those of the defence's own vote."""
        if isinstance(self.model, PurifiedClassifier):
            logits = self.model.draw_logits(images, self.sample_ids, first)
            own = combine_votes(logits, self.model.vote)
            return combine_votes(logits, _loss_vote(self.model)), own
        scores = self.scores(images, first)
        return scores, scores if self.counting is None else _counted(self.counting, images, first)

    def _firsts(self, draw: int) -> list[int]:
        """The first draw of each forward of an evaluation."""
        return [draw + repetition * self.stride for repetition in range(self.draws)]

    @property
    def draws_used(self) -> int:
        """Consecutive draws that one evaluation takes."""
        return self.draws * self.stride

    @property
    def stride(self) -> int:
        """Consecutive draws that one forward takes."""
        return self.model.stride if isinstance(self.model, Foreign) else self.model.num_draws

    def gradient(self, images: Tensor, draw: int) -> Evaluation:
        """Loss and gradient at images [B, C, H, W], under the draws from `draw` on.

        Raises FloatingPointError for a loss or gradient that is not finite, naming the image.
        """
        if self.memory_budget is None:  # once: what is free changes, and the cutting with it
            self.memory_budget = default_budget(images.device)
        vote = None if isinstance(self.model, Foreign) else _loss_vote(self.model)
        with self.counted():
            found = eot_gradient(
                self.model,
                images,
                self.labels,
                self.loss,
                self.draws,
                sample_ids=self.sample_ids,
                draw=draw,
                memory_budget=self.memory_budget,
                normalise_draws=self.normalise_draws,
                draw_weights=self.draw_weights,
                loss_vote=vote,
            )
            votes = found.scores.detach()
            if self.counting is not None:
                own = [_counted(self.counting, images, first) for first in self._firsts(draw)]
                votes = torch.stack(own)
        gradient = found.gradient
        evaluation = self._evaluation(found.losses.detach(), votes, gradient)
        finite = evaluation.loss.isfinite() & gradient.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            bad = int((~finite).nonzero()[0])
            what = "gradient" if bool(evaluation.loss[bad].isfinite()) else "loss"
            raise FloatingPointError(
                f"the {what} of the image with sample id {int(self.sample_ids[bad])} (number {bad} "
                f"of the batch) is not finite, under draws from {draw} on; "
                "coup_fast.check_gradient says which way to differentiate this defence is sound"
            )
        return evaluation

    def value(self, images: Tensor, draw: int) -> Evaluation:
        """`gradient` without the gradient."""
        with self.counted(), torch.no_grad():
            rows = [self._scores_and_votes(images, first) for first in self._firsts(draw)]
            losses = torch.stack([self.loss(scores, self.labels) for scores, _ in rows])
            votes = torch.stack([own for _, own in rows])
        return self._evaluation(losses, votes, torch.zeros_like(images))

    def _evaluation(self, losses: Tensor, scores: Tensor, gradient: Tensor) -> Evaluation:
        """losses: [draws, B]. scores: [draws, B, K]."""
        fooled = ((scores.argmax(2) == self.labels) == self.targeted).double()
        draws = len(losses)
        return Evaluation(
            ordered_sum(losses.double().T) / draws, ordered_sum(fooled.T) / draws, gradient
        )

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the images that pass through the networks, where a result is made of it."""

        images: dict[nn.Module, int] = {}

        def count(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            given = arguments[0] if arguments else None
            if isinstance(given, Tensor) and given.ndim > 0 and counts():
                images[module] += len(given)

        purifiers, classifiers = self._counted_parts()
        scores = {purifier.score_model for purifier in purifiers}
        guiding = [purifier.classifier for purifier in purifiers]
        networks = _together(map(modules_behind, [*guiding, *classifiers]))
        images.update(dict.fromkeys([*scores, *(m for group in networks for m in group)], 0))
        hooks = [module.register_forward_pre_hook(count) for module in images]
        foreign = self.model if isinstance(self.model, Foreign) else None
        calls = 0 if foreign is None else foreign.calls
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.score_evaluations += sum(images[module] for module in scores)
            # Of modules that one function calls, that with the most images tells.
            self.classifier_evaluations += sum(max(images[m] for m in group) for group in networks)
            # Its calls are classifications, unless the hooks have counted those.
            if (
                foreign is not None
                and not classifiers
                and images.keys().isdisjoint(foreign.modules)
            ):
                self.classifier_evaluations += foreign.calls - calls

    def _counted_parts(self) -> tuple[list[Purifier], list[Any]]:
        """The purifiers, and the classifiers behind them, as far as they are known."""
        if isinstance(self.model, PurifiedClassifier):
            return [self.model.purifier], [self.model.classifier]
        purifiers: list[Purifier] = []
        classifiers: list[Any] = []
        for variant in self.model.variants.values():
            if isinstance(variant, PurifiedClassifier):
                purifiers.append(variant.purifier)
                classifiers.append(variant.classifier)
            elif isinstance(variant, Purifier):
                purifiers.append(variant)
            elif isinstance(variant, _Bare):
                classifiers.append(variant.classifier)
        return purifiers, classifiers


def _variant(
    defended: PurifiedClassifier,
    gradient: AttackGradient,
    through_vote: bool,
    deviation: float = 0.0,
) -> PurifiedClassifier:
    """The defence, differentiated in this way."""
    purifier = _differentiated(defended.purifier, gradient)
    if deviation:
        purifier = DeviatedPurifier.of(purifier, deviation)
    num_draws = defended.num_draws if through_vote else 1
    return PurifiedClassifier(purifier, defended.classifier, num_draws, defended.vote)


def _loss_vote(defended: PurifiedClassifier) -> str:
    """The vote that the loss is of. Counts are flat, so the mean softmax stands in for them."""
    return "softmax" if defended.vote == "majority" else defended.vote


def _with_slope(variant: Any) -> Any:
    """What takes the place of a defence inside a model, with the vote that the loss is of."""
    if not isinstance(variant, PurifiedClassifier):
        return variant
    vote = _loss_vote(variant)
    return PurifiedClassifier(variant.purifier, variant.classifier, variant.num_draws, vote)


def _counted(model: Foreign, images: Tensor, first: int) -> Tensor:
    """Scores [B, K] of a model with its majority votes counted."""
    with torch.no_grad(), model.frozen():
        return model.scores(images, first)


def _together(groups: Iterable[Iterable[nn.Module]]) -> list[set[nn.Module]]:
    """The groups that are not empty; those that share a module as one."""
    merged: list[set[nn.Module]] = []
    for group in map(set, groups):
        sharing = [known for known in merged if known & group]
        merged = [known for known in merged if not known & group]
        merged += [group.union(*sharing)] if group else []
    return merged


class _Bare:
    """A `PurifiedClassifier` without its purifier."""

    def __init__(self, classifier: Any) -> None:
        self.classifier = classifier

    def __call__(self, images: Tensor, *_: Any, **__: Any) -> Tensor:
        scores: Tensor = logits_of(self.classifier(in_dtype_of(self.classifier, images)))
        return scores

    def draw_logits(self, images: Tensor, *_: Any, **__: Any) -> Tensor:
        return self(images)[None]


def _not_purified(images: Tensor, *_: Any, **__: Any) -> Tensor:
    return images


def _stand_in(defence: Defence, gradient: AttackGradient, through_vote: bool) -> Any:
    """What takes the place of a defence inside a model, differentiated in this way."""
    if isinstance(defence, PurifiedClassifier):
        bare = gradient == "classifier"
        return _Bare(defence.classifier) if bare else _variant(defence, gradient, through_vote)
    if gradient == "classifier":
        return _not_purified
    return _differentiated(defence, gradient)


def _differentiated(purifier: Purifier, gradient: AttackGradient) -> Purifier:
    """The purifier with this gradient."""
    other = purifier.with_options(**GRADIENTS[gradient])
    if gradient == "unguided":
        other = other.with_plan(other.plan.without_guidance())
    return other
