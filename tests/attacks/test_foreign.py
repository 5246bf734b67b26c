"""Attacks on what is no `PurifiedClassifier`: how often it runs, under whose noise, or why not."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import tiny
from torch import Tensor, nn

from coup_fast import PurifiedClassifier, eot_gradient
from coup_fast.attacks import APGD, FIRST_ATTACK_DRAW, PGD
from coup_fast.attacks.eot import cross_entropy

BATCH = 3
LABELS = torch.tensor([0, 1, 2])
ATTACK = PGD(eps=0.1, steps=2, step_size=0.04, eot=3)


@pytest.fixture
def images() -> Tensor:
    return tiny.images(BATCH)


class Noisy(nn.Module):
    """A randomised defence of somebody else's; counts the forwards that are differentiated."""

    def __init__(self, noise_like: Callable[[Tensor], Tensor] = torch.randn_like) -> None:
        super().__init__()
        self.classifier, self.noise_like = tiny.TinyClassifier(), noise_like
        self.differentiated = 0
        self.seen: list[Tensor] = []

    def forward(self, u: Tensor) -> Tensor:
        noise = self.noise_like(u)
        self.differentiated += torch.is_grad_enabled()
        if torch.is_grad_enabled():
            self.seen.append(noise)
        return self.classifier(u + 0.2 * noise)


class Hooked(nn.Module):
    """Another, whose noise is a function of sample ids and draw."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = tiny.TinyClassifier()
        self.draws: list[int] = []

    def set_draw(self, draw: int, sample_ids: Tensor) -> None:
        self.draws.append(draw)
        self.sample_ids = sample_ids

    def forward(self, u: Tensor) -> Tensor:
        rows = []
        for row, name in zip(u, self.sample_ids.tolist(), strict=True):
            generator = torch.Generator().manual_seed((self.draws[-1] * 1000 + name) % 2**31)
            rows.append(row + 0.2 * torch.randn(row.shape, generator=generator))
        return self.classifier(torch.stack(rows))


def of_numpy(u: Tensor) -> Tensor:
    return torch.from_numpy(np.random.standard_normal(u.shape)).to(u)  # noqa: NPY002


def of_python(u: Tensor) -> Tensor:
    return u.new_tensor([random.gauss(0, 1) for _ in range(u.numel())]).reshape(u.shape)


OWN = torch.Generator().manual_seed(7)


def of_its_own(u: Tensor) -> Tensor:
    return torch.randn(u.shape, generator=OWN)


# --- how often


@pytest.mark.parametrize("attack", [ATTACK, APGD(eps=0.1, steps=2, eot=3)], ids=["pgd", "apgd"])
@pytest.mark.parametrize("noise_like", [torch.randn_like, of_numpy, of_python, of_its_own])
def test_a_random_model_runs_as_often_as_eot_says(
    attack: PGD | APGD, noise_like: Callable[[Tensor], Tensor], images: Tensor
) -> None:
    model = Noisy(noise_like)
    found = attack.run(model, images, LABELS)
    assert model.differentiated == attack.steps * 3
    assert len({tuple(noise.flatten().tolist()) for noise in model.seen}) == attack.steps * 3
    assert found.gradient_runs == attack.steps * 3 * BATCH
    assert found.draws == 3
    assert found.classifier_evaluations >= found.gradient_runs


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: lambda u: m(u)], ids=["module", "lambda"])
def test_a_model_without_noise_runs_once_and_that_is_said(
    wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]], images: Tensor
) -> None:
    classifier = tiny.TinyClassifier()
    with pytest.warns(UserWarning, match="eot=3 does nothing for .*; say eot=1"):
        found = ATTACK.run(wrap(classifier), images, LABELS)
    assert found.draws == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        once = ATTACK.replace(eot=1).run(classifier, images, LABELS)
    assert torch.equal(found.images, once.images)
    assert once.classifier_evaluations == once.gradient_runs == 2 * BATCH


def test_the_gradient_is_the_mean_over_the_draws_of_the_hook(images: Tensor) -> None:
    model = Hooked()
    ids = torch.tensor([4, 9, 2])
    found = eot_gradient(model, images, LABELS, draws=4, sample_ids=ids, draw=5)
    assert model.draws == [5, 6, 7, 8]
    leaf = images.clone().requires_grad_()
    for draw in range(5, 9):
        model.set_draw(draw, ids)
        (cross_entropy(model(leaf), LABELS).sum() / 4).backward()
    torch.testing.assert_close(found.gradient, leaf.grad, rtol=1e-5, atol=1e-7)
    assert found.scores.shape == (4, BATCH, 4)


# --- whose noise


def test_a_hook_gets_the_attacks_draws_in_a_sequential_too(images: Tensor) -> None:
    model = Hooked()
    ATTACK.run(nn.Sequential(nn.Identity(), model), images, LABELS, sample_ids=[8, 6, 7])
    assert min(model.draws) == FIRST_ATTACK_DRAW
    assert len(set(model.draws)) == 6
    assert model.sample_ids.tolist() == [8, 6, 7]


def test_the_global_generator_is_seeded_by_draw_and_put_back(images: Tensor) -> None:
    model = Noisy()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = ATTACK(model, images, LABELS)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(ATTACK(model, images, LABELS), first)
    assert not torch.equal(ATTACK.replace(seed=1)(model, images, LABELS), first)
    # Torch's CPU generator reads 32 bits of a seed: draws that differ above must differ as well.
    low, high = (eot_gradient(model, images, LABELS, draw=d).gradient for d in (5, 5 + 2**32))
    assert not torch.equal(low, high)


def test_fixed_noise_is_fixed_or_refused(images: Tensor) -> None:
    attack = ATTACK.replace(noise="fixed", eot=1)
    model = Noisy()
    attack(model, images, LABELS)
    assert torch.equal(*model.seen)
    hooked = Hooked()
    attack(hooked, images, LABELS)
    assert set(hooked.draws) == {0}
    with pytest.raises(ValueError, match=r'noise="fixed" .*Noisy .*set_draw'):
        attack(Noisy(of_its_own), images, LABELS)


# --- defences of ours inside other models


class Wrapper(nn.Module):
    def __init__(self, defended: nn.Module) -> None:
        super().__init__()
        self.parts = [defended]  # which nn.Module does not see

    def forward(self, u: Tensor) -> Tensor:
        return self.parts[0](u)


class Plain:
    def __init__(self, defended: nn.Module) -> None:
        self.defended = defended

    def __call__(self, u: Tensor) -> Tensor:
        return self.defended(u)

    def method(self, u: Tensor) -> Tensor:
        return self.defended(u)


def call(u: Tensor, defended: nn.Module) -> Tensor:
    return defended(u)


def behind_a_global(defended: nn.Module) -> Callable[[Tensor], Tensor]:
    global HIDDEN
    HIDDEN = defended
    return lambda u: HIDDEN(u)


WRAPPERS = {
    "sequential": lambda d: nn.Sequential(nn.Identity(), d),
    "attribute": Wrapper,
    "lambda": lambda d: lambda u: d(u),
    "partial": lambda d: functools.partial(call, defended=d),
    "method": lambda d: Plain(d).method,
    "object": Plain,
    "global": behind_a_global,
    "purifier": lambda d: nn.Sequential(d.purifier, d.classifier),
    "composed": lambda d: lambda u: d.classifier(d.purifier(u)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_defence_inside_another_model_is_attacked_as_it_is_alone(
    wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]], images: Tensor
) -> None:
    defended = tiny.defended(per_sample=True, fresh_draws=True)
    defended.reset_draws(5)
    ids = [5, 17, 2]
    alone = ATTACK.run(defended, images, LABELS, sample_ids=ids)
    within = ATTACK.run(wrap(defended), images, LABELS, sample_ids=ids)
    assert torch.equal(within.images, alone.images)
    assert torch.equal(within.loss, alone.loss)
    assert within.gradient_runs == alone.gradient_runs == 2 * 3 * BATCH
    steps = defended.purifier.plan.num_steps
    looked = 2 * steps * BATCH  # how many draws a forward takes
    assert within.score_evaluations == within.gradient_runs * steps + looked
    assert defended.next_draw == 5
    assert defended.driver is None
    assert defended.purifier.driver is None


def test_eot_gradient_drives_what_it_finds(images: Tensor) -> None:
    defended = tiny.defended(per_sample=True, num_draws=2)
    alone = eot_gradient(defended, images, LABELS, draws=3, draw=4)
    for wrap in (WRAPPERS["sequential"], WRAPPERS["lambda"]):
        within = eot_gradient(wrap(defended), images, LABELS, draws=3, draw=4)
        assert torch.equal(within.gradient, alone.gradient)
        assert torch.equal(within.scores, alone.scores)


@pytest.mark.parametrize("gradient", ["autograd", "stopped", "bpda", "classifier"])
def test_gradients_reach_into_other_models(gradient: str, images: Tensor) -> None:
    defended = tiny.defended(per_sample=True, num_draws=2, vote="majority")
    for through_vote in (True, False):
        attack = ATTACK.replace(gradient=gradient, through_vote=through_vote, eot=1)
        alone = attack.run(defended, images, LABELS)
        within = attack.run(nn.Sequential(nn.Identity(), defended), images, LABELS)
        assert torch.equal(within.images, alone.images)


def test_a_model_that_asks_several_times_never_sees_a_draw_twice(images: Tensor) -> None:
    defended = tiny.defended("diffpure")
    seen: list[int] = []
    prepare = type(defended.purifier).prepare

    def spied(purifier, images, sample_ids=None, draw=0, noise=None):
        if torch.is_grad_enabled():
            seen.extend(set(draw.tolist()))
        return prepare(purifier, images, sample_ids, draw, noise)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(defended.purifier), "prepare", spied)
        ATTACK(lambda u: sum(defended(u, draw=k) for k in range(3)), images, LABELS)
    assert len(seen) == len(set(seen)) == 2 * 3 * 3
    assert min(seen) == FIRST_ATTACK_DRAW


def test_a_batch_of_another_size_is_refused_with_what_to_write(images: Tensor) -> None:
    defended = tiny.defended("diffpure")
    with pytest.raises(ValueError, match=r"6 images .* 3.*sample_ids.*defended\(images, sample"):
        ATTACK(lambda u: defended(torch.cat((u, u.flip(3))))[:3], images, LABELS)

    def both(u: Tensor) -> Tensor:
        ids = torch.arange(BATCH).repeat(2)
        return defended(torch.cat((u, u.flip(3))), ids).unflatten(0, (2, BATCH)).mean(0)

    assert ATTACK.run(both, images, LABELS).draws == 3


# --- refusals


@pytest.mark.parametrize("gradient", ["stopped", "bpda", "classifier"])
def test_gradients_of_a_purifier_that_nobody_knows_are_refused(
    gradient: str, images: Tensor
) -> None:
    with pytest.raises(ValueError, match=rf"gradient='{gradient}' .*PurifiedClassifier.* Noisy"):
        ATTACK.replace(gradient=gradient)(Noisy(), images, LABELS)


def test_models_that_cut_the_gradient_or_return_no_scores(images: Tensor) -> None:
    classifier = tiny.TinyClassifier()
    attack = ATTACK.replace(eot=1)
    for model in (lambda u: classifier(u.detach()), lambda u: classifier(u).detach() + 0 * u.sum()):
        if model(images.requires_grad_()).requires_grad:
            continue
        with pytest.raises(ValueError, match="do not depend on the images"):
            attack(model, images.detach(), LABELS)
    with pytest.raises(ValueError, match=r"must return scores \[3, K\]; got \[3\]"):
        attack(lambda u: u.flatten(1).mean(1), images, LABELS)


def test_a_defence_left_alone_is_not_driven_after_an_error(images: Tensor) -> None:
    defended = tiny.defended("diffpure")

    def broken(u: Tensor) -> Tensor:
        defended(u)
        raise RuntimeError("of the model")

    with pytest.raises(RuntimeError, match="of the model"):
        ATTACK(broken, images, LABELS)
    assert defended.driver is None
    assert isinstance(defended, PurifiedClassifier)


def test_attributes_that_are_made_when_they_are_asked_for_are_not_asked_for() -> None:
    class Lazy:  # as `six.moves` has: an attribute imports a module that is not there
        def __getattr__(self, name: str) -> object:
            raise ImportError(f"{name} was asked for")

    lazy, images = Lazy(), torch.rand(2, 3, 4, 4)

    def model(u: Tensor) -> Tensor:
        assert lazy is not None
        return u.flatten(1)[:, :3]

    found = PGD(eps=0.1, steps=1, eot=1).run(model, images, torch.zeros(2, dtype=torch.int64))
    assert found.images.shape == images.shape
