"""Steps that shrink, unit-norm draws, surrogates, given starts, and stopping early."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import tiny
from torch import Tensor, nn

from coup_fast import PurifiedClassifier
from coup_fast.attacks import APGD, PGD
from coup_fast.attacks.attack import Attack
from coup_fast.attacks.eot import eot_gradient
from coup_fast.attacks.losses import LOSSES
from coup_fast.attacks.objective import Objective
from coup_fast.evaluation.config import from_dict

LABELS = torch.tensor([0, 1, 2, 3])


@pytest.fixture
def images() -> Tensor:
    return tiny.images(4)


# --- step_schedule


def test_a_cosine_goes_from_the_first_length_to_the_last() -> None:
    attack = PGD(steps=5, step_size=0.4, step_schedule="cosine", final_step_size=0.1)
    by_hand = [0.4, 0.25 + 0.15 / math.sqrt(2), 0.25, 0.25 - 0.15 / math.sqrt(2), 0.1]
    assert attack.step_sizes() == pytest.approx(by_hand)
    assert PGD(steps=1, step_size=0.4, step_schedule="cosine").step_sizes() == [0.4]
    twelfth = PGD(steps=2, step_size="12/255", step_schedule="cosine").step_sizes()
    assert twelfth == pytest.approx([12 / 255, 1 / 255])
    assert PGD(steps=3, step_size=0.4).step_sizes() == [0.4] * 3


class Plane(nn.Module):
    """Scores ±Σu: its gradient has one sign everywhere."""

    def forward(self, images: Tensor) -> Tensor:
        total = images.flatten(1).sum(1)
        return torch.stack((total, -total), 1)


@pytest.mark.parametrize("restarts", [1, 2])
def test_an_attack_takes_steps_of_those_lengths(restarts: int) -> None:
    centre = torch.full((2, 1, 4, 4), 0.5, dtype=torch.float64)
    attack = PGD(eps=0.4, steps=4, step_size=0.08, step_schedule="cosine", eot=1)
    attack = attack.replace(random_start=False, loss="margin", restarts=restarts)
    found = attack(Plane(), centre, torch.tensor([0, 1]))
    way = sum(attack.step_sizes()) * torch.tensor([-1.0, 1.0]).double().reshape(2, 1, 1, 1)
    assert torch.allclose(found, centre + way)


# --- normalise_draws


@pytest.mark.parametrize("wrapped", [False, True])
def test_each_draw_counts_with_unit_norm(wrapped: bool, images: Tensor) -> None:
    defended = tiny.defended("diffpure")
    model = (lambda u: defended(u)) if wrapped else defended
    mean = eot_gradient(model, images, LABELS, draws=3, draw=7, normalise_draws=True)
    by_hand = torch.zeros_like(images)
    for draw in (7, 8, 9):
        one = eot_gradient(defended, images, LABELS, draw=draw).gradient
        by_hand += one / one.flatten(1).norm(dim=1)[:, None, None, None] / 3
    assert torch.allclose(mean.gradient, by_hand, atol=1e-6)
    plain = eot_gradient(model, images, LABELS, draws=3, draw=7)
    assert torch.equal(plain.losses, mean.losses)
    assert not torch.allclose(plain.gradient, mean.gradient, atol=1e-3)


# --- surrogates


@pytest.mark.parametrize("options", [{}, {"guidance_norm": "clipped", "guidance_max_norm": 0.5}])
def test_unguided_is_the_gradient_without_guidance(options: dict, images: Tensor) -> None:
    defended = PurifiedClassifier(tiny.short_purifier("coup", **options), tiny.TinyClassifier())
    ids = torch.arange(4)
    loss = LOSSES["ce"]
    objective = Objective(defended, LABELS, ids, loss, "unguided", 2, True, None)
    twin = defended.with_purifier(defended.purifier.with_options(guidance_scale=0.0))
    expected = eot_gradient(twin, images, LABELS, loss, 2, sample_ids=ids, draw=3)
    assert torch.equal(objective.gradient(images, 3).gradient, expected.gradient)
    guided = eot_gradient(defended, images, LABELS, loss, 2, sample_ids=ids, draw=3)
    assert not torch.equal(guided.gradient, expected.gradient)


class Stairs(nn.Module):
    """A classifier behind stairs, through which no gradient passes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return self.inner((images * 100).round() / 100)


def test_a_surrogate_is_differentiated_and_the_defence_judged(images: Tensor) -> None:
    smooth = tiny.TinyClassifier()
    labels = smooth(images).argmax(1)
    judged = Stairs(smooth)
    attack = PGD(eps=0.3, steps=20, step_size=0.03, eot=1, keep="best", random_start=False)
    blind = attack.run(judged, images, labels)
    found = attack.run(judged, images, labels, surrogate=smooth)
    wrong = judged(found.images).argmax(1) != labels
    assert float(blind.fooled.mean()) == 0
    assert float(found.fooled.mean()) >= 0.75
    assert torch.equal(found.fooled == 1, wrong)


def test_the_best_iterate_is_the_defences_not_the_surrogates() -> None:
    """The surrogate never says that it is fooled, the defence only after the first step."""
    grey = torch.full((4, 1, 4, 4), 0.5)

    class Near(nn.Module):
        def forward(self, u: Tensor) -> Tensor:
            moved = (u - grey[: len(u)]).abs().flatten(1).amax(1)
            margin = torch.where((moved > 0.005) & (moved < 0.015), -1.0, 1.0)
            return torch.stack((margin, -margin), 1)

    class Sure(nn.Module):
        def forward(self, u: Tensor) -> Tensor:
            margin = 100 + u.flatten(1).sum(1)
            return torch.stack((margin, -margin), 1)

    zeros = torch.zeros(4, dtype=torch.int64)
    attack = PGD(eps=0.1, steps=3, step_size=0.01, eot=1, keep="best", loss="margin")
    attack = attack.replace(random_start=False)
    found = attack.run(Near(), grey, zeros, surrogate=Sure())
    assert found.fooled.tolist() == [1.0] * 4
    assert torch.allclose(found.images, grey - 0.01)
    stopped = attack.replace(stop_when_fooled=True, keep="last")
    assert torch.equal(stopped(Near(), grey, zeros, surrogate=Sure()), found.images)


@pytest.mark.parametrize("surrogate", [False, True])
def test_loss_and_fooled_of_the_last_iterate_are_the_defences(
    surrogate: bool, images: Tensor
) -> None:
    guided = PurifiedClassifier(
        tiny.short_purifier("coup", guidance_scale=20.0), tiny.TinyClassifier()
    )
    labels = guided(images).argmax(1)
    ids = torch.arange(4)
    attack = PGD(eps=0.2, steps=3, step_size=0.1, eot=2, noise="fixed")
    if surrogate:
        found = attack.run(guided, images, labels, surrogate=tiny.TinyClassifier())
    else:
        found = attack.replace(gradient="unguided").run(guided, images, labels)
    judge = Objective(guided, labels, ids, LOSSES["ce"], "exact", 2, True, None)
    expected = judge.value(found.images, 0)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.fooled, expected.fooled)


# --- init


def test_an_attack_starts_from_given_images(images: Tensor) -> None:
    seen = []

    class Watched(nn.Module):
        def forward(self, u: Tensor) -> Tensor:
            seen.append(u.detach().clone())
            return Plane()(u)

    attack = PGD(eps=0.1, steps=1, eot=1, restarts=2)
    start = (images + 0.05).clamp(0, 1)
    attack.run(Watched(), images, LABELS % 2, init=start)
    assert torch.equal(seen[0], start)
    assert not any(torch.equal(one, start) for one in seen[1:])
    seen.clear()
    attack.run(Watched(), images, LABELS % 2, init=(images + 0.5).clamp(0, 1))
    assert float((seen[0] - images).abs().max()) == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize(
    ("init", "error", "message"),
    [
        (torch.zeros(2, 3, 8, 8), ValueError, r"init must be \[4, 3, 8, 8\].*\[2, 3, 8, 8\]"),
        (torch.full((4, 3, 8, 8), 1.5), ValueError, r"init must be in \[0, 1\], got 1\.5"),
        (torch.full((4, 3, 8, 8), torch.nan), ValueError, r"init must be in \[0, 1\], got nan"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.float64), TypeError, "init must be .*float32.*64"),
        ("clean", TypeError, "init must be a tensor .*got str"),
    ],
)
def test_wrong_starts_are_refused(init, error, message: str, images: Tensor) -> None:
    with pytest.raises(error, match=message):
        PGD(eot=1).run(tiny.TinyClassifier(), images, LABELS, init=init)


# --- stop_when_fooled


@pytest.mark.parametrize("kind", [PGD, APGD])
@pytest.mark.parametrize("restarts", [1, 2])
def test_it_stops_images_whose_draws_are_all_fooled_and_no_others(
    kind: type[Attack], restarts: int
) -> None:
    model, images = tiny.defended("coup", per_sample=True), tiny.images(8)
    with torch.no_grad():
        labels = model(images).argmax(1)
    ids = torch.arange(8) + 3
    attack = kind(eps=0.02, steps=6, eot=3, restarts=restarts, seed=3)
    full = attack.run(model, images, labels, sample_ids=ids)
    short = attack.replace(stop_when_fooled=True).run(model, images, labels, sample_ids=ids)
    stopped = short.fooled == 1
    assert 0 < int(stopped.sum()) == short.stopped < 8, "the case has to have both"
    assert torch.equal(short.images[~stopped], full.images[~stopped])
    assert torch.equal(short.loss[~stopped], full.loss[~stopped])
    assert short.gradient_runs < full.gradient_runs
    assert full.stopped == 0
    for i in (int(stopped.nonzero()[0]), int((~stopped).nonzero()[0])):
        rows = slice(i, i + 1)
        alone = attack.replace(stop_when_fooled=True).run(
            model, images[rows], labels[rows], sample_ids=ids[rows]
        )
        assert torch.equal(alone.images[0], short.images[i])
        assert alone.stopped == int(stopped[i])


def test_a_stopped_image_is_misclassified_under_the_draw_that_it_was_attacked_by(
    images: Tensor,
) -> None:
    model = tiny.defended("diffpure", per_sample=True)
    with torch.no_grad():
        labels = model(images).argmax(1)
    attack = PGD(eps=0.3, steps=20, step_size=0.03, noise="fixed", eot=1, stop_when_fooled=True)
    found = attack.run(model, images, labels)
    with torch.no_grad():
        wrong = model(found.images).argmax(1) != labels
    assert found.stopped == int((found.fooled == 1).sum()) >= 3
    assert bool(wrong[found.fooled == 1].all())


def test_models_that_are_not_ours_are_narrowed_with_their_sample_ids(images: Tensor) -> None:
    seen = []

    class Told(nn.Module):
        def set_draw(self, draw: int, sample_ids: Tensor) -> None:
            seen.append((draw, sample_ids.tolist()))

        def forward(self, u: Tensor) -> Tensor:
            assert len(u) == len(seen[-1][1])
            scores = Plane()(u)
            return torch.where((u.flatten(1)[:, :1] > 0.5), scores, -scores)

    pixels = images.clone()
    pixels[:, 0, 0, 0] = torch.tensor([0.9, 0.9, 0.1, 0.1])
    attack = PGD(eps=0.01, steps=2, eot=2, stop_when_fooled=True, random_start=False)
    found = attack.run(Told(), pixels, torch.zeros(4, dtype=torch.int64), sample_ids=[7, 8, 9, 3])
    assert found.stopped == 2
    assert [ids for _, ids in seen[-2:]] == [[7, 8]] * 2


# --- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_schedule": "linear"}, r"step_schedule .*cosine.*'linear'"),
        ({"final_step_size": 0.1}, "final_step_size is for step_schedule='cosine'"),
        ({"step_schedule": "cosine", "final_step_size": 8}, r"final_step_size .*\(0, 1\].*8"),
    ],
)
def test_wrong_values_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PGD(**options)
    tables = {"defence": [{"method": "coup"}], "attack": [{"preset": "pgd40", **options}]}
    with pytest.raises(ValueError, match=message):
        from_dict(tables)


@pytest.mark.parametrize("name", ["normalise_draws", "stop_when_fooled"])
def test_flags_are_flags(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be True or False"):
        PGD(**{name: "yes"})


def test_names_say_what_was_done() -> None:
    attack = PGD(steps=9, normalise_draws=True, stop_when_fooled=True, gradient="unguided")
    name = "PGD-9 ce, EOT 20, unit-norm unguided gradient, stopped when fooled"
    assert attack.name == name
    assert "guidance out" in attack.weakness
