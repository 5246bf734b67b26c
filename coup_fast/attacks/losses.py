"""What an attack maximises: functions of scores and labels, one number per image.

scores: [B, K]; labels: int64 [B]; result: [B]. Larger is worse for the defence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from coup_fast.attacks.eot import cross_entropy
from coup_fast.attacks.options import LossName
from coup_fast.run.validation import check_classes

Loss = Callable[[Tensor, Tensor], Tensor]


def margin(scores: Tensor, labels: Tensor) -> Tensor:
    """The best wrong score minus the right one: positive where the image is misclassified.

    This is f6 of Carlini & Wagner, arXiv 1608.04644, without its floor. It does not saturate where
    the classifier is sure of its answer, as cross-entropy does.
    """
    check_classes(labels, scores)
    right = scores.gather(1, labels[:, None])[:, 0]
    is_label = torch.arange(scores.shape[1], device=scores.device) == labels[:, None]
    return scores.masked_fill(is_label, -torch.inf).amax(1) - right


def dlr(scores: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio: the margin over (largest - third largest score).

    The source is Croce & Hein, arXiv 2003.01690, section 4. The loss does not change with shift and
    scale of the scores. Raises ValueError for fewer than three classes, where it is not defined.
    """
    if scores.shape[1] < 3:
        raise ValueError(
            f"the DLR loss needs at least 3 classes, got {scores.shape[1]}; use loss='margin'"
        )
    top = scores.topk(3, dim=1).values
    return margin(scores, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def _top_spread(scores: Tensor) -> Tensor:
    if scores.shape[1] < 4:
        raise ValueError(
            f"the targeted DLR loss needs at least 4 classes, got {scores.shape[1]}; use "
            "loss='margin'"
        )
    top = scores.topk(4, dim=1).values
    return top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12


LOSSES: dict[LossName, Loss] = {"ce": cross_entropy, "dlr": dlr, "margin": margin}
"""What `Attack(loss=...)` names: functions of scores [B, K] and labels [B]; larger is worse for the
defence. "ce" is cross-entropy, "dlr" the difference of logits ratio (Croce and Hein 2020), "margin"
the best wrong score minus the right one (Carlini and Wagner 2017)."""

# The same for attacks that want the label for an answer: larger is nearer to it. The DLR loss has
# the best other score where Croce & Hein have that of the right class.
TARGETED: dict[LossName, Loss] = {
    "ce": lambda scores, targets: -cross_entropy(scores, targets),
    "dlr": lambda scores, targets: -margin(scores, targets) / _top_spread(scores),
    "margin": lambda scores, targets: -margin(scores, targets),
}


def other_classes(labels: Tensor, sample_ids: Tensor, number: int, classes: int) -> Tensor:
    """A wrong class for each image, int64 [B]: the same in any batch, another for each `number`.

    Numbers 0 to classes - 2 go through all of them. Raises ValueError for a single class.
    """
    if classes < 2:
        raise ValueError(f"a targeted attack needs at least 2 classes, got {classes}")
    return (labels + 1 + (sample_ids + number) % (classes - 1)) % classes
