"""`torch.utils.checkpoint` around a defence and inside its models: right, or one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny import TinyClassifier, TinyNetwork, defended, images, short_purifier
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coup_fast import PurifiedClassifier, Purifier, ScoreModel, eot_gradient
from coup_fast.attacks.foreign import Foreign

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
REENTRANT = [True, False]
AGAIN = "called within a backward pass"


def gradient(model: Any, **call: Any) -> Tensor:
    leaf = images().requires_grad_()
    model(leaf, **call).square().sum().backward()
    assert leaf.grad is not None
    return leaf.grad


class Checkpointed(nn.Module):
    """A module whose activations are computed again."""

    def __init__(self, module: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.module, self.reentrant = module, reentrant

    def forward(self, *inputs: Tensor) -> Tensor:
        return checkpoint(self.module, *inputs, use_reentrant=self.reentrant)


# --- around a defence


@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("way", ["exact", "autograd", "bpda"])
def test_around_a_purifier_the_gradient_is_the_same(way: str, reentrant: bool) -> None:
    clean = short_purifier("coup", gradient=way).eval()
    for model in (clean, PurifiedClassifier(clean, clean.classifier, num_draws=2)):
        assert torch.equal(gradient(Checkpointed(model, reentrant)), gradient(model))


@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("way", ["exact", "autograd", "bpda"])
def test_fresh_draws_are_not_drawn_again(way: str, reentrant: bool) -> None:
    """They would be others, and the gradient that of other noise."""
    clean = short_purifier("coup", gradient=way).eval()
    model = PurifiedClassifier(clean, clean.classifier, fresh_draws=True)
    with pytest.raises(RuntimeError, match=AGAIN):
        gradient(Checkpointed(model, reentrant))


@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("way", ["exact", "autograd", "bpda"])
def test_an_attack_drives_a_defence_that_is_computed_again(way: str, reentrant: bool) -> None:
    """The noise of draw 3 and of the attack's ids, where the model itself says neither."""
    model = defended("coup").eval()
    model.purifier.gradient = way
    labels, ids = torch.tensor([0, 1, 2]), torch.tensor([7, 8, 9])
    want = eot_gradient(model, images(), labels, sample_ids=ids, draw=3)
    if reentrant:  # torch.autograd.grad cannot pass, and attacks use it
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            eot_gradient(Checkpointed(model, True), images(), labels, sample_ids=ids, draw=3)
        return
    found = eot_gradient(Checkpointed(model, False), images(), labels, sample_ids=ids, draw=3)
    assert torch.equal(found.losses, want.losses)
    assert torch.equal(found.gradient, want.gradient)
    other = eot_gradient(model, images(), labels)
    assert not torch.equal(found.gradient, other.gradient)


def test_a_driven_defence_with_fresh_draws_is_not_computed_again() -> None:
    model = defended("coup", fresh_draws=True).eval()
    around = Foreign(Checkpointed(model, False), torch.arange(3))
    with pytest.raises(RuntimeError, match=AGAIN):
        around.gradient(
            images(), torch.tensor([0, 1, 2]), nn.CrossEntropyLoss(reduction="none"), draw=3
        )


# --- inside its models


def built(inside: str, reentrant: bool, way: str, guidance: str = "full") -> Purifier:
    network, classifier = TinyNetwork(), TinyClassifier()
    return Purifier(
        ScoreModel(Checkpointed(network, reentrant) if inside == "network" else network),
        Checkpointed(classifier, reentrant) if inside == "classifier" else classifier,
        num_steps=3,
        gradient=way,
        guidance_gradient=guidance,
    ).eval()


@pytest.mark.parametrize("guidance", ["full", "stopped"])
@pytest.mark.parametrize("way", ["exact", "bpda"])
@pytest.mark.parametrize("inside", ["network", "classifier"])
def test_models_may_use_checkpoints_that_are_not_reentrant(
    inside: str, way: str, guidance: str
) -> None:
    with_one, without = built(inside, False, way, guidance), built("", False, way, guidance)
    assert torch.equal(with_one(images()), without(images()))
    assert torch.equal(gradient(with_one), gradient(without))


@pytest.mark.parametrize("check_values", [True, False])
@pytest.mark.parametrize("way", ["exact", "autograd", "bpda"])
def test_reentrant_ones_are_refused_by_name(way: str, check_values: bool) -> None:
    guided = built("classifier", True, way)
    guided.check_values = check_values
    sentence = r"the classifier uses torch\.utils\.checkpoint .* say use_reentrant=False"
    with pytest.raises(RuntimeError, match=sentence):
        guided(images())
    plain = built("network", True, way)
    plain.check_values = check_values
    assert torch.equal(plain(images()), built("", True, way)(images()))
    if way == "exact" or (way == "autograd" and check_values):
        with pytest.raises(RuntimeError, match=r"the score network .* say use_reentrant=False"):
            gradient(plain)


def test_the_final_classifier_is_named_with_the_cure() -> None:
    classifier = TinyClassifier().eval()
    clean = short_purifier("coup").eval()
    model = PurifiedClassifier(clean, Checkpointed(classifier, False).eval())
    with pytest.raises(RuntimeError, match=r"the classifier uses .*\.requires_grad_\(False\)"):
        gradient(model)
    with torch.no_grad():
        model(images())
    classifier.requires_grad_(False)
    assert torch.equal(gradient(model), gradient(PurifiedClassifier(clean, classifier)))


def test_an_energy_network_is_named() -> None:
    from coup_fast import EnergyModel

    energy = EnergyModel(
        lambda x, t: checkpoint(lambda y: y.square().sum((1, 2, 3)), x, use_reentrant=True)
    )
    with pytest.raises(RuntimeError, match=r"the energy network uses .* use_reentrant=False"):
        energy(images(), torch.ones(3))
