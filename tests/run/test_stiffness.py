"""How stiff guidance is: the classifier's slope, the share of stiff states, the warning."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import interpreter
from helpers.tiny import TinyClassifier, images, short_purifier
from torch import nn

from coup_fast import PurifiedClassifier, Purifier, ScoreModel, VPSchedule
from coup_fast.models.analytic import MixtureClassifier, MixtureNetwork, two_gaussians
from coup_fast.stiffness import steepness, stiffness

MEAN, STD = 0.5, 0.15
SLOPE = 2 * MEAN / STD**2  # of the margin of two Gaussians, everywhere


def toy(**options) -> Purifier:
    mixture = two_gaussians(MEAN, STD)
    model = ScoreModel(MixtureNetwork(mixture), "eps", VPSchedule(), time_scale=1.0)
    return Purifier(model, MixtureClassifier(mixture), **{"method": "coup", **options})


U = torch.linspace(0.1, 0.9, 6).reshape(6, 1, 1, 1)


def test_the_steepness_of_two_gaussians() -> None:
    found = steepness(toy().classifier, U)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.full((6,), SLOPE).double(), rtol=1e-5, atol=0)


def test_the_steepness_of_a_network_is_the_gradient_of_its_margin() -> None:
    classifier, u = TinyClassifier(), images()
    gradient, _ = interpreter.margin_gradient(classifier, 2 * u - 1)
    expected = gradient.flatten(1).norm(dim=1).double()
    torch.testing.assert_close(steepness(classifier, u), expected, rtol=1e-5, atol=0)
    assert not any(p.grad is not None for p in classifier.parameters())


@pytest.mark.parametrize("solver", ["explicit", "stable"])
def test_the_share_of_stiff_states_is_the_formula(solver: str) -> None:
    """The slope is constant here, so whole steps are stiff or not: by β h λ a² / 4."""
    clean = toy(num_steps=8, guidance_scale=0.3, guidance_solver=solver, check_values=False)
    times = 0.1 - 0.0125 * torch.arange(8, dtype=torch.float64)
    lengths = torch.full((8,), 0.0125, dtype=torch.float64)
    lengths[-1] -= 1e-5
    expected = 0.3 * (0.1 + 19.9 * times) * lengths * SLOPE**2 / 4 > 2
    assert 0 < expected.sum() < 8
    found = stiffness(clean, U)
    assert found.stiff.tolist() == [[bool(row)] * 6 for row in expected]
    assert found.share == pytest.approx(float(expected.double().mean()))
    assert found.steepness.shape == (8, 6)
    as_dict = found.as_dict()
    assert (as_dict["images"], as_dict["guided_steps"]) == (6, 8)
    assert as_dict["steepness"] == pytest.approx({"0.1": SLOPE, "0.5": SLOPE, "0.9": SLOPE})


def test_a_learned_variance_counts_with_its_largest() -> None:
    fixed, learned = (
        short_purifier("ddpm", guidance_scale=2.0, variance=variance)
        for variance in ("fixed-large", "learned")
    )
    c = stiffness(fixed, images()).coefficients
    torch.testing.assert_close(stiffness(learned, images()).coefficients[:-1], c[:-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 0.0}, "coup .*no guidance"),
        ({"guidance_norm": "normalised"}, "guidance_norm=.normalised"),
    ],
)
def test_what_has_no_stiffness_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stiffness(toy(**options), U)


def test_no_images_have_no_stiffness() -> None:
    with pytest.raises(ValueError, match=r"at least one image, .*\[0, 1, 1, 1\]"):
        stiffness(toy(), U[:0])


def test_adp_has_no_guidance() -> None:
    with pytest.raises(ValueError, match=r"adp .*no guidance"):
        stiffness(short_purifier("adp"), images())


def test_the_first_batch_warns_once_of_stiff_steps() -> None:
    clean = toy(num_steps=8, guidance_scale=0.3)
    with pytest.warns(UserWarning, match=r"guidance overshoot at (25|38|50|62|75)%") as said:
        clean(U, list(range(6)))
    assert "guidance_solver='stable'" in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clean(U, list(range(6)))
        toy(num_steps=8, guidance_scale=0.03)(U, list(range(6)))  # within the bound
        toy(num_steps=8, guidance_scale=0.3, guidance_solver="stable")(U, list(range(6)))


def test_a_look_leaves_classifiers_as_they_are() -> None:
    clean = short_purifier("coup", guidance_scale=1e4)
    model = PurifiedClassifier(clean, nn.Sequential(clean.classifier)).eval()
    with pytest.warns(UserWarning, match="guidance overshoot"):
        model(images(), [0, 1, 2])
    assert not any(p.grad is not None for p in clean.classifier.parameters())
