"""Training a classifier behind a purifier: classifier(purifier(x)) works, the rest is said."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers.tiny import defended, images
from torch.nn.functional import cross_entropy

from coup_fast import PurifiedClassifier

LABELS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize("method", ["coup", "diffpure"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_classifier_in_training_mode_is_told_that_it_gets_no_gradient(
    method: str, wrapped: bool
) -> None:
    model = defended(method)
    classifier = model.classifier
    if wrapped:
        model = PurifiedClassifier(model.purifier, lambda u: classifier(u))
    with pytest.warns(UserWarning, match=r"gives none to parameters.*classifier\(purifier"):
        cross_entropy(model(images().requires_grad_()), LABELS).backward()
    assert all(p.grad is None for p in classifier.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images().requires_grad_())  # once
        for quiet in (defended(method).eval(), defended(method).requires_grad_(False)):
            quiet(images().requires_grad_())
        with torch.no_grad():
            defended(method)(images())


@pytest.mark.parametrize("method", ["coup", "diffpure"])
def test_a_classifier_is_trained_on_purified_images(method: str) -> None:
    model = defended(method)
    purifier, classifier = model.purifier, model.classifier
    u = images().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        purified = purifier(u)
        cross_entropy(classifier.train()(purified), LABELS).backward()
    leaf = purified.detach()
    parameters = list(classifier.parameters())
    want = torch.autograd.grad(cross_entropy(classifier(leaf), LABELS), parameters)
    for parameter, gradient in zip(parameters, want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(p.grad is None for p in purifier.score_model.parameters())
    again = u.detach().clone().requires_grad_()
    (of_images,) = torch.autograd.grad(cross_entropy(model.eval()(again), LABELS), again)
    torch.testing.assert_close(u.grad, of_images, rtol=1e-4, atol=1e-6)
