"""A majority vote is attacked by the slope of its mean softmax, and judged by its own counts."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny
from torch import Tensor, nn

from coup_fast import PurifiedClassifier
from coup_fast.attacks import PGD, AdaptiveGuided, Square
from coup_fast.attacks.attack import Attack
from coup_fast.attacks.eot import cross_entropy, eot_gradient
from coup_fast.attacks.losses import LOSSES
from coup_fast.attacks.objective import Objective
from coup_fast.purified_classifier import combine_votes

BATCH = 24
"""Enough images that the counted votes and the mean softmax of some answer differently."""


def alone(defended: PurifiedClassifier) -> nn.Module:
    return defended


def inside(defended: PurifiedClassifier) -> nn.Module:
    return nn.Sequential(nn.Identity(), defended)


@pytest.fixture
def images() -> Tensor:
    return tiny.images(BATCH)


@pytest.fixture
def defended() -> PurifiedClassifier:
    return tiny.defended("diffpure", per_sample=True, num_draws=3, vote="majority")


@pytest.fixture
def labels(defended: PurifiedClassifier, images: Tensor) -> Tensor:
    """The answers of the vote by softmax under draw 0, with which the counts do not agree."""
    with torch.no_grad():
        logits = defended.draw_logits(images)
    labels = combine_votes(logits, "softmax").argmax(1)
    assert not torch.equal(labels, combine_votes(logits, "majority").argmax(1))
    return labels


@pytest.mark.parametrize("wrap", [alone, inside])
def test_fooled_is_counted_and_the_loss_is_of_the_mean_softmax(
    wrap, defended: PurifiedClassifier, images: Tensor, labels: Tensor
) -> None:
    options = (torch.arange(BATCH), LOSSES["ce"], "exact", 2, True, None)
    objective = Objective(wrap(defended), labels, *options)
    objective.settle(images, 0, fixed=True)
    with torch.no_grad():
        logits = [defended.draw_logits(images, draw=draw) for draw in (0, 3)]
    counted = [combine_votes(one, "majority").argmax(1) != labels for one in logits]
    losses = [cross_entropy(combine_votes(one, "softmax"), labels) for one in logits]
    for found in (objective.gradient(images, 0), objective.value(images, 0)):
        assert torch.equal(found.fooled, torch.stack(counted).double().mean(0))
        assert torch.allclose(found.loss, torch.stack(losses).double().mean(0), atol=1e-6)
    half = torch.arange(0, BATCH, 2)
    with objective.only(half):
        part = objective.value(images[half], 0)
    assert torch.equal(part.fooled, torch.stack(counted).double().mean(0)[half])


PGD_FIXED = PGD(eps=0.1, steps=4, step_size=0.02, eot=1, noise="fixed", random_start=False)
ATTACKS = {
    "best": PGD_FIXED.replace(keep="best"),
    "stopped": PGD_FIXED.replace(stop_when_fooled=True),
    "adaptive": AdaptiveGuided(eps=0.1, steps=2, restarts=1, finish_steps=1, eot=1, noise="fixed"),
    "square": Square(eps=0.1, steps=6, eot=1, noise="fixed"),
}


@pytest.mark.parametrize("wrap", [alone, inside])
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_what_an_attack_calls_fooled_is_wrong_under_the_defence(
    attack: Attack, wrap, defended: PurifiedClassifier, images: Tensor, labels: Tensor
) -> None:
    found = attack.run(wrap(defended), images, labels)
    with torch.no_grad():
        wrong = defended(found.images).argmax(1) != labels
    fooled = found.fooled == 1
    assert int(fooled.sum()) > 0
    # An image that was not stopped is a step further than what `fooled` says with keep="last".
    known = fooled if attack.stop_when_fooled else torch.ones_like(fooled)
    assert torch.equal(fooled[known], wrong[known])


def test_a_gradient_tells_the_scores_of_the_vote_and_the_loss_of_the_stand_in(
    defended: PurifiedClassifier, images: Tensor, labels: Tensor
) -> None:
    soft = PurifiedClassifier(defended.purifier, defended.classifier, 3, "softmax")
    found = eot_gradient(defended, images, labels, loss_vote="softmax", micro_batch=BATCH)
    expected = eot_gradient(soft, images, labels, micro_batch=BATCH)
    assert torch.equal(found.gradient, expected.gradient)
    assert torch.equal(found.losses, expected.losses)
    with torch.no_grad():
        assert torch.equal(found.scores[0], defended(images))
