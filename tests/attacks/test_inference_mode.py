"""Attacks under `torch.inference_mode`, or on tensors made there: the same result as elsewhere."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import TinyClassifier, images, short_purifier
from torch import Tensor

from coup_fast import PurifiedClassifier, check_gradient
from coup_fast.attacks import APGD, PGD, Attack

pytestmark = pytest.mark.filterwarnings("ignore:eot=2 does nothing")


def labels() -> Tensor:
    return torch.tensor([0, 1, 2])


def model_of(kind: str) -> object:
    clean = short_purifier("diffpure" if kind == "diffpure" else "coup").eval()
    classifier = TinyClassifier().eval()
    if kind == "bare":
        return classifier
    if kind == "foreign":
        return lambda u: classifier(clean(u))
    return PurifiedClassifier(clean, classifier, num_draws=2)


@pytest.mark.parametrize(
    "attack",
    [
        PGD(steps=2, eot=2),
        PGD(steps=2, eot=1, gradient="stopped"),
        PGD(steps=2, eot=1, gradient="bpda", keep="best", restarts=2),
        PGD(steps=2, eot=2, gradient="classifier"),
        PGD(steps=2, eot=1, targeted=True, noise="fixed"),
        APGD(steps=3, eot=1, norm="l2", eps=0.5),
    ],
    ids=lambda attack: attack.name,
)
@pytest.mark.parametrize("kind", ["coup", "diffpure", "foreign", "bare"])
def test_an_attack_finds_the_same(kind: str, attack: Attack) -> None:
    if kind == "bare" and attack.gradient != "exact":
        pytest.skip("the other gradients are those of a purifier")
    model = model_of(kind)
    want = attack.run(model, images(), labels())
    with torch.inference_mode():
        inside = images(), labels()
        for u, y in (inside, (images().clone(), labels())):
            found = attack.run(model, u, y)
            assert torch.equal(found.images, want.images)
            assert torch.equal(found.loss, want.loss)
    found = attack.run(model, *inside)  # tensors that autograd takes in no graph
    assert torch.equal(found.images, want.images)
    assert not torch.equal(want.images, images())


@pytest.mark.parametrize("kind", ["coup", "foreign"])
def test_gradients_are_checked_all_the_same(kind: str) -> None:
    model = model_of(kind)
    with torch.inference_mode():
        inside = images(), labels()
        assert check_gradient(model, *inside, sample_ids=torch.arange(3)).passed
    assert check_gradient(model, *inside).passed


def test_models_made_there_are_named() -> None:
    with torch.inference_mode():
        clean = short_purifier("diffpure").eval()
        classifier = TinyClassifier().eval()
        made = PurifiedClassifier(clean, classifier)
    for model in (made, lambda u: classifier(clean(u))):
        with pytest.raises(RuntimeError, match=r"made under torch\.inference_mode.*outside"):
            PGD(steps=1, eot=1)(model, images(), labels())
