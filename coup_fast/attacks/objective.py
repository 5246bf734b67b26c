"""The attacked quantity: loss, success and gradient of images against a defence, over draws.

Knows the defence and how its gradient is to be taken; knows no attack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coup_fast._torch.frozen import frozen_parameters
from coup_fast._torch.modules import in_dtype_of, module_of
from coup_fast.attacks.ball import ordered_sum
from coup_fast.attacks.eot import eot_gradient
from coup_fast.attacks.losses import Loss
from coup_fast.purified_classifier import PurifiedClassifier

Defended = PurifiedClassifier | Callable[[Tensor], Tensor]

# How the gradient is taken -> the purifier's options. "classifier" does without the purifier.
GRADIENTS: dict[str, dict[str, str]] = {
    "exact": {"gradient": "exact", "guidance_gradient": "full"},
    "autograd": {"gradient": "autograd", "guidance_gradient": "full"},
    "stopped": {"gradient": "exact", "guidance_gradient": "stopped"},
    "bpda": {"gradient": "bpda"},
    "classifier": {},
}

# Why a gradient makes an attack weak, for tables; the others are those of the run itself.
WEAK_GRADIENTS = {
    "stopped": "treats the guidance as a constant",
    "bpda": "takes the purifier's Jacobian as the identity",
    "classifier": "attacks the bare classifier and ignores the purifier",
}


@dataclass(frozen=True)
class Evaluation:
    """loss [B]: mean over draws. fooled [B]: share of draws that were misclassified, in [0, 1].
    gradient [B, C, H, W]: of the loss; zeros where none was asked for."""

    loss: Tensor
    fooled: Tensor
    gradient: Tensor


class Objective:
    """One defence under one way to differentiate it.

    Args:
        defended: a `PurifiedClassifier`, or any module or callable, pixels -> scores [B, K], which
            is differentiated as it is (then `gradient`, `draws` and `through_vote` say nothing).
        labels, sample_ids: int64 [B].
        through_vote: the loss is taken of the combined vote over `num_draws`; False: of each draw.
        draws: repetitions over which the loss is averaged.
    """

    def __init__(
        self,
        defended: Defended,
        labels: Tensor,
        sample_ids: Tensor,
        loss: Loss,
        gradient: str,
        draws: int,
        through_vote: bool,
        memory_budget: int | None,
    ) -> None:
        self.labels, self.sample_ids, self.loss = labels, sample_ids, loss
        self.memory_budget = memory_budget
        self.model: Defended = defended
        self.draws = 1
        self._micro_batch: int | None = None
        self.score_evaluations = 0
        self.classifier_evaluations = 0
        if not isinstance(defended, PurifiedClassifier):
            return
        if gradient == "classifier":
            self.model = defended.classifier
            return
        self.draws = draws
        # Votes that are counted have no slope; the mean of their softmax stands in for them.
        vote = "softmax" if defended.vote == "majority" else defended.vote
        self.model = PurifiedClassifier(
            defended.purifier.with_options(**GRADIENTS[gradient]),
            defended.classifier,
            defended.num_draws if through_vote else 1,
            vote,
        )

    @property
    def draws_used(self) -> int:
        """Consecutive draws that one evaluation takes."""
        votes = self.model.num_draws if isinstance(self.model, PurifiedClassifier) else 1
        return self.draws * votes

    def gradient(self, images: Tensor, draw: int) -> Evaluation:
        """Loss and gradient at images [B, C, H, W], under the draws from `draw` on.

        Raises FloatingPointError for a loss or gradient that is not finite, naming the image.
        """
        with self._counted():
            if isinstance(self.model, PurifiedClassifier):
                found = eot_gradient(
                    self.model,
                    images,
                    self.labels,
                    self.loss,
                    self.draws,
                    sample_ids=self.sample_ids,
                    draw=draw,
                    memory_budget=self.memory_budget,
                    micro_batch=self._micro_batch,
                )
                self._micro_batch = found.micro_batch  # measured once, at the first iterate
                losses, scores, gradient = found.losses, found.scores, found.gradient
            else:
                with torch.enable_grad(), frozen_parameters(self.model):
                    leaf = images.detach().requires_grad_()
                    scores = self.model(in_dtype_of(self.model, leaf))[None]
                    losses = self.loss(scores[0], self.labels)[None]
                    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        evaluation = self._evaluation(losses.detach(), scores.detach(), gradient)
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
        with self._counted(), torch.no_grad():
            rows = []
            for repetition in range(self.draws):
                if isinstance(self.model, PurifiedClassifier):
                    first = draw + repetition * self.model.num_draws
                    rows.append(self.model(images, self.sample_ids, first))
                else:
                    rows.append(self.model(in_dtype_of(self.model, images)))
            losses = torch.stack([self.loss(scores, self.labels) for scores in rows])
        return self._evaluation(losses, torch.stack(rows), torch.zeros_like(images))

    def _evaluation(self, losses: Tensor, scores: Tensor, gradient: Tensor) -> Evaluation:
        """losses: [draws, B]. scores: [draws, B, K]."""
        fooled = (scores.argmax(2) != self.labels).double()
        draws = len(losses)
        return Evaluation(
            ordered_sum(losses.double().T) / draws, ordered_sum(fooled.T) / draws, gradient
        )

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count the images that pass through the networks."""

        def count_score(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self.score_evaluations += len(arguments[0])

        def count_classifier(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self.classifier_evaluations += len(arguments[0])

        hooks = []
        classifiers: tuple[object, ...] = (self.model,)
        if isinstance(self.model, PurifiedClassifier):
            purifier = self.model.purifier
            hooks.append(purifier.score_model.register_forward_pre_hook(count_score))
            classifiers = (self.model.classifier, purifier.classifier)
        modules = {id(module): module for module in map(module_of, classifiers)}
        for module in modules.values():
            if module is not None:
                hooks.append(module.register_forward_pre_hook(count_classifier))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
