"""DiffHammer's selection of draws: its weights by hand, and a defence that only it fools."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import tiny
from torch import Tensor, nn

from coup_fast.attacks import APGD, PGD, AutoAttack, Square, preset
from coup_fast.attacks.draw_weights import EmWeights
from coup_fast.attacks.eot import eot_gradient
from coup_fast.attacks.losses import LOSSES
from coup_fast.evaluation.config import from_dict

LABELS = torch.tensor([0, 1, 2, 3, 0])


def chance(estimate: float) -> float:
    return 1 / (1 + math.exp(-5 * estimate))


# --- the weights


@pytest.mark.parametrize(("norm", "gain"), [("linf", 7.0), ("l2", 5.0)])
def test_weights_are_the_chances_after_the_common_change(norm: str, gain: float) -> None:
    """Two draws want (3, 4), one the opposite, and one has no gradient."""
    way = torch.tensor([3.0, 4.0]).reshape(1, 1, 1, 2)
    gradients = torch.stack([way, way, -way, 0 * way])  # [4, 1, 1, 1, 2]
    losses = torch.tensor([[-0.3], [-0.1], [-0.2], [0.1]])
    found = EmWeights(norm, eps=0.02)(losses, gradients)[:, 0]
    moved = 0.02 * gain
    chances = [chance(-0.3 + moved), chance(-0.1 + moved), chance(-0.2 - moved), chance(0.1)]
    assert found.tolist() == pytest.approx([c / sum(chances) for c in chances], rel=1e-6)


def test_the_common_change_need_not_be_that_of_any_draw() -> None:
    """One draw wants the first pixel brighter and one the second; both can have it."""
    gradients = torch.tensor([[1.0, 0.0], [0.0, 3.0]]).reshape(2, 1, 1, 1, 2)
    found = EmWeights("linf", eps=0.1)(torch.tensor([[-0.1], [-0.2]]), gradients)[:, 0]
    chances = [chance(-0.1 + 0.1), chance(-0.2 + 0.3)]
    assert found.tolist() == pytest.approx([c / sum(chances) for c in chances], rel=1e-6)


def test_it_takes_the_change_that_most_draws_share_and_not_the_steepest() -> None:
    """One draw that is far from a mistake has by far the largest gradient."""
    way = torch.tensor([1.0, -1.0]).reshape(1, 1, 1, 2)
    gradients = torch.stack([-50 * way, way, way])
    losses = torch.tensor([[-40.0], [-0.1], [-0.1]])
    assert float((gradients.mean(0) * way).sum()) < 0
    weights = EmWeights("linf", eps=0.1)(losses, gradients)
    selected = (weights[:, :, None, None, None] * gradients).sum(0)
    assert float((selected * way).sum()) > 0
    assert weights[:, 0].tolist() == pytest.approx([0, 0.5, 0.5], abs=1e-12)


def test_chances_that_are_all_tiny_still_select() -> None:
    way = torch.ones(1, 1, 1, 2)
    losses = torch.tensor([[-2000.0], [-1000.0]])
    weights = EmWeights("linf", eps=0.1)(losses, torch.stack([way, way]))
    assert weights[:, 0].tolist() == [0, 1]


def test_draws_that_are_alike_give_the_plain_mean() -> None:
    losses, gradients = torch.full((4, 3), -1.5), torch.randn(1, 3, 2, 4, 4).expand(4, -1, -1, 4, 4)
    weights = EmWeights("linf", eps=0.1)(losses, gradients)
    assert torch.equal(weights, torch.full((4, 3), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_images_weights_do_not_depend_on_its_neighbours(norm: str) -> None:
    losses, gradients = torch.randn(5, 7), torch.randn(5, 7, 3, 8, 8)
    weigh = EmWeights(norm, eps=0.1)
    together = weigh(losses, gradients)
    assert together.sum(0).tolist() == pytest.approx([1.0] * 7)
    for rows in ([3], [6, 0], [2, 1, 5, 4]):
        assert torch.equal(weigh(losses[:, rows], gradients[:, rows]), together[:, rows])


# --- their place in a gradient


@pytest.mark.parametrize("normalise", [False, True])
def test_a_gradient_is_the_weighted_sum_of_its_draws(normalise: bool) -> None:
    defence, u, weigh = tiny.defended("diffpure", per_sample=True), tiny.images(5), _first_of_most
    options = {"loss": LOSSES["margin"], "draws": 3, "draw": 2, "normalise_draws": normalise}
    found = eot_gradient(defence, u, LABELS, draw_weights=weigh, micro_batch=15, **options)
    by_hand = torch.zeros_like(u)
    for draw, weight in zip((2, 3, 4), (0.5, 0.3, 0.2), strict=True):
        one = eot_gradient(defence, u, LABELS, LOSSES["margin"], draw=draw).gradient
        size = one.flatten(1).norm(dim=1)[:, None, None, None]
        by_hand += weight * (one / size if normalise else one)
    assert torch.allclose(found.gradient, by_hand, rtol=1e-4, atol=1e-7)
    assert found.weights.tolist() == [[0.5] * 5, [0.3] * 5, [0.2] * 5]
    for micro_batch in (1, 4, 7):
        other = eot_gradient(
            defence, u, LABELS, draw_weights=weigh, micro_batch=micro_batch, **options
        )
        assert torch.equal(other.gradient, found.gradient)
    wrapped = eot_gradient(lambda x: defence(x), u, LABELS, draw_weights=weigh, **options)
    assert torch.allclose(wrapped.gradient, by_hand, rtol=1e-4, atol=1e-7)


def _first_of_most(losses: Tensor, gradients: Tensor) -> Tensor:
    assert gradients.shape == (*losses.shape, 3, 8, 8)
    return torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)[:, None].expand(3, losses.shape[1])


def test_weights_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"draw_weights must return .*\[2, 5\], got \[5, 2\]"):
        eot_gradient(
            *(tiny.defended(), tiny.images(5), LABELS),
            draws=2,
            draw_weights=lambda losses, _: losses.T,
        )


def test_an_empty_batch_has_an_empty_gradient() -> None:
    weigh = EmWeights("linf", 0.1)
    for model in (tiny.defended(), lambda x: x.flatten(1)[:, :4]):
        empty = eot_gradient(model, tiny.images(5)[:0], LABELS[:0], draws=2, draw_weights=weigh)
        assert empty.gradient.shape == (0, 3, 8, 8)


# --- the gradient of the iterates before


class Turning(nn.Module):
    """A loss whose gradient is along the first pixel, then along the second, and so on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = -1

    def set_draw(self, draw: int, sample_ids: Tensor) -> None:
        self.calls += 1

    def forward(self, images: Tensor) -> Tensor:
        loss = 3 * images.flatten(1)[:, self.calls]
        return torch.stack((-loss, 0 * loss), 1)


def test_an_iterate_follows_its_gradient_and_those_before() -> None:
    attack = PGD(norm="l2", eps=1, steps=3, step_size=0.1, eot=1, noise="fresh", loss="margin")
    attack = attack.replace(gradient_averaging=0.5, random_start=False)
    grey = torch.full((1, 1, 1, 4), 0.5, dtype=torch.float64)
    found = attack(Turning(), grey, torch.tensor([0]))
    gradient, expected = torch.zeros(4).double(), grey.flatten()
    for t in (1, 2, 3):
        own = torch.zeros(4).double()
        own[t - 1] = 3.0
        gradient = t**-0.5 * own + (1 - t**-0.5) * gradient
        expected = expected + 0.1 * gradient / gradient.norm()
    assert torch.allclose(found.flatten(), expected)


# --- the planted case


class TwoKinds(nn.Module):
    """A random defence: a third of its draws can be fooled by brighter images.

    The others cannot be fooled within the ball, have twice the slope, and want darker images.
    """

    def set_draw(self, draw: int, sample_ids: Tensor) -> None:
        self.weak = (sample_ids + draw) * 2654435761 % 2**32 < 2**32 // 3

    def forward(self, images: Tensor) -> Tensor:
        brighter = images.flatten(1).mean(1) - 0.5
        loss = torch.where(self.weak, -1 + 20 * brighter, -6 - 40 * brighter)
        return torch.stack((-loss, 0 * loss), 1)


GREY, ZEROS = torch.full((8, 1, 4, 4), 0.5), torch.zeros(8, dtype=torch.int64)


def accuracy(images: Tensor) -> float:
    defence, ids = TwoKinds(), torch.arange(8)
    right = []
    for draw in range(60):
        defence.set_draw(draw, ids)
        right.append(defence(images).argmax(1) == 0)
    return torch.stack(right).double().mean().item()


PLAIN = PGD(eps=0.1, steps=10, step_size=0.02, eot=8, loss="margin")


@pytest.mark.parametrize(
    "plain",
    [PLAIN, PLAIN.replace(normalise_draws=True), APGD(eps=0.1, steps=10, eot=8, loss="margin")],
    ids=["pgd", "unit-norm", "apgd"],
)
def test_selected_draws_fool_a_defence_whose_draws_disagree(plain: PGD) -> None:
    selective = plain.replace(draw_weights="em")
    without, found = (attack.run(TwoKinds(), GREY, ZEROS) for attack in (plain, selective))
    assert without.gradient_runs == found.gradient_runs
    assert accuracy(without.images) == 1
    assert accuracy(found.images) == pytest.approx(2 / 3, abs=0.1)


def test_the_preset_is_the_published_one() -> None:
    attack = preset("diffhammer", eot=8, eps=0.1, steps=6, restarts=1)
    assert attack.name == "APGD-6 margin, EOT 8, EM-weighted exact gradient"
    assert attack.weakness is None
    assert accuracy(attack(TwoKinds(), GREY, ZEROS)) < 0.8


# --- refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"draw_weights": "em", "eot": 1}, ValueError, "draw_weights='em' selects .*eot=1"),
        ({"draw_weights": "best"}, ValueError, "draw_weights .*uniform, em.*'best'"),
        ({"gradient_averaging": 1.5}, ValueError, r"gradient_averaging .*\[0, 1\].*1\.5"),
        ({"gradient_averaging": "half"}, TypeError, "gradient_averaging .*'half'"),
    ],
)
def test_wrong_values_are_refused(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        PGD(**options)
    tables = {"defence": [{"method": "coup"}], "attack": [{"preset": "pgd40", **options}]}
    with pytest.raises(error, match=message):
        from_dict(tables)


@pytest.mark.parametrize("kind", [Square, AutoAttack])
def test_attacks_that_take_no_gradient_of_ours_decide(kind: type) -> None:
    for option in ({"draw_weights": "em"}, {"gradient_averaging": 0.5}, {"low_frequency": 0.5}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is decided by {kind.__name__}"):
            kind(**option)
