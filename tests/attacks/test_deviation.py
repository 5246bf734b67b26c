"""DiffAttack's deviated-reconstruction loss: its value, its exact gradient, and what it finds."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny
from torch import Tensor, nn

from coup_fast import PurifiedClassifier, Purifier, ScoreModel
from coup_fast.attacks import APGD, PGD, AutoAttack, Square, preset
from coup_fast.attacks.deviation import DeviatedPurifier
from coup_fast.attacks.eot import eot_gradient
from coup_fast.evaluation.config import from_dict
from coup_fast.models.analytic import GaussianMixture, MixtureNetwork

LABELS = torch.tensor([0, 1, 2])


def by_hand(purifier: Purifier, images: Tensor, ids: Tensor) -> Tensor:
    """The mean over the steps of the mean squared distance to the forward states, [B]."""
    levels = [*purifier.score_model.schedule.alpha_bar_told(purifier.plan.times)[1:], 1.0]
    states = [2 * state - 1 for _, state in purifier.trajectory(images, ids)]
    x = 2 * images - 1
    top = purifier.plan.start[0] / 2  # √ᾱ of the noised start, 1 without noise
    eps = (states[0] - top * x) / (1 - top**2) ** 0.5 if top < 1 else None
    total = torch.zeros(len(images), dtype=images.dtype)
    for state, level in zip(states[1:], levels, strict=True):
        forward = x if eps is None else level**0.5 * x + (1 - level) ** 0.5 * eps
        total += (state - forward).square().mean((1, 2, 3)) / (len(states) - 1)
    return total


@pytest.mark.parametrize("method", ["diffpure", "coup", "ddim", "one-shot"])
def test_its_value_and_gradient_are_those_of_the_formula(method: str) -> None:
    """By the states that a trajectory shows, and by finite differences in float64."""
    purifier = tiny.short_purifier(method, double=True)
    deviating = DeviatedPurifier.of(purifier, weight=0.5)
    images, ids = 0.2 + 0.6 * tiny.images(3).double(), torch.tensor([4, 7, 1])
    leaf = images.clone().requires_grad_()
    assert torch.equal(deviating(leaf, ids), purifier(images, ids))
    found = deviating.taken(1)
    assert torch.allclose(found, 0.5 * by_hand(purifier, images, ids), rtol=1e-10)
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    way = torch.randn_like(images)
    step = 1e-6 * way
    ahead, behind = (by_hand(purifier, images + s, ids).sum() for s in (step, -step))
    slope = 0.5 * (ahead - behind) / 2e-6
    assert float((gradient * way).sum()) == pytest.approx(float(slope), rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"states": "sqrt"}, {"graph_memory": 10**9}, {"max_batch": 2}, {"gradient": "autograd"}],
    ids=lambda options: "-".join(map(str, options.values())) or "exact",
)
@pytest.mark.parametrize("method", ["diffpure", "coup"])
def test_the_gradient_is_the_same_however_it_is_taken(method: str, options: dict) -> None:
    images, ids = tiny.images(3).double(), torch.arange(3)
    weight, gradients = torch.randn_like(images), []
    for some in ({"gradient": "autograd", "backend": "reference"}, options):
        purifier = tiny.short_purifier(method, double=True, num_steps=5, **some)
        deviating = DeviatedPurifier.of(purifier, weight=2.0)
        leaf = images.clone().requires_grad_()
        result = deviating(leaf, ids)
        loss = deviating.taken(1).sum() + (result * weight).sum()
        if some.get("gradient") != "autograd":  # a caller may write into what it was given
            result.detach().zero_()
        gradients += torch.autograd.grad(loss, leaf)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_the_runs_gradient_is_the_sum_of_both() -> None:
    purifier = tiny.short_purifier("diffpure", per_sample=True)
    plain = PurifiedClassifier(purifier, purifier.classifier or tiny.TinyClassifier(), 2)
    with_deviation = plain.with_purifier(DeviatedPurifier.of(purifier, 3.0))
    images, ids = tiny.images(3), torch.tensor([5, 0, 2])
    options = {"sample_ids": ids, "draws": 2}
    both = eot_gradient(with_deviation, images, LABELS, micro_batch=6, **options)
    alone = eot_gradient(plain, images, LABELS, micro_batch=6, **options)
    assert torch.equal(both.losses, alone.losses)
    extra = torch.zeros_like(images)
    for draw in range(4):
        one = DeviatedPurifier.of(purifier, 3.0)
        leaf = images.clone().requires_grad_()
        one(leaf, ids, draw)
        extra += torch.autograd.grad(one.taken(1).sum(), leaf)[0] / 4
    assert float(extra.abs().max()) > 1e-3
    assert torch.allclose(both.gradient, alone.gradient + extra, atol=1e-6)
    for micro_batch in (1, 4):
        other = eot_gradient(with_deviation, images, LABELS, micro_batch=micro_batch, **options)
        assert torch.equal(other.gradient, both.gradient)


def test_an_image_does_not_depend_on_its_batch() -> None:
    model, images = tiny.defended("coup", per_sample=True), tiny.images(3)
    attack = PGD(eps=0.1, steps=3, step_size=0.04, eot=2, deviation=1.0)
    ids = torch.tensor([5, 17, 2])
    together = attack.run(model, images, LABELS, sample_ids=ids)
    plain = attack.replace(deviation=0.0).run(model, images, LABELS, sample_ids=ids)
    assert not torch.equal(together.images, plain.images)
    assert together.score_evaluations == plain.score_evaluations
    for i in (2, 0):
        rows = slice(i, i + 1)
        one = attack.run(model, images[rows], LABELS[rows], sample_ids=ids[rows])
        assert torch.equal(one.images[0], together.images[i])
        assert torch.equal(one.loss[0], together.loss[i])


# --- the planted case


class Threshold(nn.Module):
    """Class 0 for bright images and class 1 for dark ones, by a step without a slope."""

    def forward(self, images: Tensor) -> Tensor:
        answer = torch.sign(images.flatten(1).mean(1) - 0.8)
        return torch.stack((answer, -answer), 1)


def planted() -> tuple[PurifiedClassifier, Tensor, Tensor]:
    """DiffPure on images that are white ± 0.25, before that classifier; images that are light grey.

    Purification pulls an image towards white by a share of its distance, so the states deviate the
    more, the darker the image is.
    """
    mixture = GaussianMixture(torch.ones(1, 1, 4, 4), torch.tensor(0.5))  # in diffusion space
    score_model = ScoreModel(MixtureNetwork(mixture), kind="eps", time_scale=1.0)
    purifier = Purifier(score_model, method="diffpure", num_steps=5, solver="exponential")
    images = torch.full((8, 1, 4, 4), 0.9)
    return PurifiedClassifier(purifier, Threshold()), images, torch.zeros(8).long()


def accuracy(images: Tensor) -> float:
    defended, _, labels = planted()
    with torch.no_grad():
        rows = [defended(images, None, draw).argmax(1) == labels for draw in range(12)]
    return torch.stack(rows).double().mean().item()


@pytest.mark.parametrize(
    "plain",
    [PGD(eps=0.4, steps=12, step_size=0.06, eot=4), APGD(eps=0.4, steps=12, eot=4, keep="last")],
    ids=["pgd", "apgd"],
)
def test_it_moves_images_whose_classifier_gradient_vanishes(plain: PGD) -> None:
    defended, images, labels = planted()
    blind = plain.run(defended, images, labels)
    found = plain.replace(deviation=1.0).run(defended, images, labels)
    assert blind.gradient_runs == found.gradient_runs
    assert (blind.zero_gradients, found.zero_gradients) == (12 * 8, 0)
    assert accuracy(images) == 1
    assert accuracy(blind.images) > 0.95
    assert accuracy(found.images) < 0.2


def test_the_preset_is_the_published_one() -> None:
    attack = preset("diffattack")
    assert attack == APGD(deviation=1.0)
    assert attack.name == "APGD-100 ce + deviation, EOT 20, exact gradient"
    assert attack.weakness is None


# --- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deviation": -1}, r"deviation .*\[0, inf\).* -1"),
        ({"deviation": 1.0, "gradient": "bpda"}, "deviation .* gradient='bpda' does not go"),
        ({"deviation": 1.0, "gradient": "classifier"}, "deviation .*'classifier' does not go"),
    ],
)
def test_wrong_values_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PGD(**options)
    tables = {"defence": [{"method": "coup"}], "attack": [{"preset": "pgd40", **options}]}
    with pytest.raises(ValueError, match=message):
        from_dict(tables)


@pytest.mark.parametrize("kind", [Square, AutoAttack])
def test_attacks_that_do_not_know_it_decide(kind: type) -> None:
    with pytest.raises(ValueError, match=f"deviation is decided by {kind.__name__}"):
        kind(deviation=1.0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (tiny.TinyClassifier(), "deviation .*needs a PurifiedClassifier, got .*TinyClassifier"),
        (tiny.defended("adp"), "deviation needs one round .*'adp' of a network with"),
        (tiny.defended("gdmp"), "deviation needs one round .*'gdmp' of a network with a VPSched"),
    ],
)
def test_defences_without_known_states_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PGD(eps=0.1, steps=1, eot=1, deviation=1.0)(model, tiny.images(3), LABELS)
