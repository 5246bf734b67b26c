"""A planted case where the gradient decides what an attack finds.

The classifier reads two groups of pixels. `shape` (6 pixels) carries the class: its mean is ±0.6.
`texture` (58 pixels) carries nothing: it is 0 ± 0.02 in every image, so purification brings it back
to 0 whatever is done to it, but the classifier, as classifiers do, counts it as evidence too.

Every attack lowers `shape` as far as it may, to the point where the score no longer knows which of
the two modes the image came from. What decides then is the guidance, which pushes `shape` back, the
harder the less sure the classifier is: with force w · σ(-m) for a margin m. So the right thing to
do with `texture` is to *raise* it: the classifier becomes sure of the right answer, the guidance
rests, and by the time purification has removed the texture the score has carried the image over to
the other mode. That way from the texture to the answer exists only through the guidance's own
derivative (texture -> margin -> guidance -> shape). Stopped guidance and BPDA see the texture's
direct effect alone, lower it, wake the guidance, and conclude that the defence is robust.

That holds while lowering the texture cannot turn the classifier's answer on the attacked image
itself. Where it can, the guidance pushes the wrong way from the first step, and the direction of
the guidance jumps there: a jump has no gradient, so the exact one does not point to it. The last
test is that case, and why an evaluation takes the worst of several attacks.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from coup_fast import PurifiedClassifier, Purifier, ScoreModel
from coup_fast.attacks import PGD, AttackResult
from coup_fast.models.analytic import GaussianMixture, MixtureNetwork

SHAPE = (torch.arange(64) < 6).reshape(1, 8, 8)
EPS = 0.3  # pixels; 0.6 in diffusion space
IMAGES, DRAWS, SEED = 12, 16, 0


class TwoGroups(nn.Module):
    """Logits ±m/2 with margin m = 2.5 Σ shape + texture Σ texture + 2.7, in diffusion space."""

    weights: Tensor

    def __init__(self, texture: float) -> None:
        super().__init__()
        self.register_buffer("weights", torch.where(SHAPE, 2.5, texture))

    def forward(self, u: Tensor) -> Tensor:
        margin = ((2 * u - 1) * self.weights).flatten(1).sum(1) + 2.7
        return torch.stack((margin / 2, -margin / 2), 1)


@functools.cache
def case(texture: float = 0.055) -> tuple[PurifiedClassifier, Tensor, Tensor]:
    """The defence (COUP, 20 steps, strong guidance), images of class 0, their labels."""
    mean = torch.where(SHAPE, 0.6, 0.0)
    mixture = GaussianMixture(torch.stack((mean, -mean)), torch.where(SHAPE, 0.1, 0.02))
    score_model = ScoreModel(MixtureNetwork(mixture), kind="eps", time_scale=1.0)
    classifier = TwoGroups(texture)
    purifier = Purifier(score_model, classifier, num_steps=20, guidance_scale=8.0)
    generator = torch.Generator().manual_seed(SEED)
    x = mixture.means[:1] + mixture.stds[:1] * torch.randn(IMAGES, 1, 8, 8, generator=generator)
    images = (0.5 * x + 0.5).clamp(0, 1)
    return PurifiedClassifier(purifier, classifier), images, torch.zeros(IMAGES, dtype=torch.int64)


def accuracy(images: Tensor, texture: float = 0.055) -> float:
    """Over images and draws that no attack has seen."""
    defended, _, labels = case(texture)
    with torch.no_grad():
        rows = [defended(images, None, draw).argmax(1) == labels for draw in range(DRAWS)]
    return torch.stack(rows).double().mean().item()


@functools.cache
def attacked(gradient: str, texture: float = 0.055) -> AttackResult:
    attack = PGD(eps=EPS, steps=8, step_size=2.5 * EPS / 8, eot=4, loss="margin", gradient=gradient)
    return attack.run(*case(texture))


def test_the_defence_is_perfect_on_clean_images() -> None:
    assert accuracy(case()[1]) == 1.0


@pytest.mark.parametrize("weak", ["stopped", "bpda"])
def test_the_exact_gradient_finds_what_others_miss(weak: str) -> None:
    exact, other = accuracy(attacked("exact").images), accuracy(attacked(weak).images)
    assert exact < other - 0.25, f"accuracy {exact:.2f} under exact, {other:.2f} under {weak}"


def test_the_difference_is_in_the_texture() -> None:
    images = case()[1]
    for gradient, way in (("exact", 1), ("stopped", -1), ("bpda", -1)):
        step = (attacked(gradient).images - images) / EPS
        assert step[:, SHAPE].mean() < -0.9
        assert way * step[:, ~SHAPE].mean() > 0.8


def test_no_gradient_points_to_where_the_answer_turns() -> None:
    exact, bare = (
        accuracy(attacked(gradient, texture=0.15).images, texture=0.15)
        for gradient in ("exact", "classifier")
    )
    assert bare < exact - 0.25, f"accuracy {exact:.2f} under exact, {bare:.2f} on the classifier"
