"""What an attack returns, what it tells on its way, and the numbers of the draws that it takes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

FIRST_ATTACK_DRAW = 2**32
"""Draws of a defence below this number are left to whoever measures it; attacks never use them."""
FIRST_START_DRAW = 2**62


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
    they are no measure of robustness. Of a majority vote, `loss` is that of the mean softmax, since
    counts are flat almost everywhere, and `fooled` goes by the counts.

    Attributes:
        images: [B, C, H, W], inside the ball.
        loss: float64 [B], at the iterate that is returned. With keep="last", one restart and a
            gradient of the defence itself, at the iterate before it, which was evaluated last.
            Where a surrogate or the run without guidance is differentiated, it is the defence's.
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
        stopped: how many images `stop_when_fooled` ended before the last iterate.
    """

    images: Tensor
    loss: Tensor
    fooled: Tensor
    zero_gradients: int
    gradient_runs: int
    score_evaluations: int
    classifier_evaluations: int
    draws: int
    stopped: int = 0
