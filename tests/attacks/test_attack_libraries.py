"""Other people's attacks, unchanged, against the defended model; none of them needs torchvision.

Each library is installed as docs/attacks.md says; a missing one is skipped by name.
"""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from helpers import tiny
from torch import Tensor, nn

from coup_fast import PurifiedClassifier
from coup_fast.attacks import APGD
from coup_fast.attacks.ball import Ball
from coup_fast.attacks.losses import LOSSES
from coup_fast.attacks.objective import Objective

EPS = 0.1


@pytest.fixture
def model() -> PurifiedClassifier:
    """Randomised, as attacks that average over draws must see it."""
    purifier = tiny.short_purifier("coup", num_steps=2)
    assert purifier.classifier is not None
    defended = PurifiedClassifier(purifier, purifier.classifier, fresh_draws=True).eval()
    defended.reset_draws()
    return defended


@pytest.fixture
def images() -> Tensor:
    return tiny.images(4)


@pytest.fixture
def labels(model: PurifiedClassifier, images: Tensor) -> Tensor:
    """What the defence says of the clean images."""
    with torch.no_grad():
        answer = model(images).argmax(1)
    model.reset_draws()
    return answer


def check_attack(model: PurifiedClassifier, images: Tensor, labels: Tensor, found: Tensor) -> None:
    """Inside the ball to float32 rounding, and of higher loss under fresh draws."""
    assert found.shape == images.shape
    assert (found - images).abs().max() <= EPS + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    assert all(parameter.grad is None for parameter in model.parameters())

    def loss(u: Tensor) -> Tensor:
        with torch.no_grad():
            rows = [model.logits_at(u, torch.arange(4), 1000 + k)[0] for k in range(8)]
        return torch.stack([LOSSES["ce"](row, labels) for row in rows]).mean()

    assert loss(found) > loss(images) + 0.02


# --- pyautoattack


def small_rand(model: nn.Module):
    pyautoattack = pytest.importorskip("pyautoattack")
    attack = pyautoattack.AutoAttack(model, norm="Linf", eps=EPS, version="rand", seed=0)
    shorten(attack.apgd, 4)
    attack.apgd.eot_iter = 2
    return attack


def shorten(apgd, steps: int) -> None:
    apgd.n_iter = apgd.n_iter_orig = steps
    apgd.n_iter_2 = apgd.n_iter_min = apgd.size_decr = 1


def test_autoattack_rand(model: PurifiedClassifier, images: Tensor, labels: Tensor) -> None:
    found, _ = small_rand(model).run_standard_evaluation(images, labels, batch_size=4)
    check_attack(model, images, labels, found)


@pytest.mark.parametrize("component", ["apgd-ce", "apgd-t", "fab-t", "square"])
def test_each_component_of_autoattack_standard(
    model: PurifiedClassifier, images: Tensor, labels: Tensor, component: str
) -> None:
    """On the defence with its noise fixed, for which alone the standard version is meant."""
    pyautoattack = pytest.importorskip("pyautoattack")
    model.fresh_draws = False
    attack = pyautoattack.AutoAttack(
        model, norm="Linf", eps=EPS, version="custom", attacks=[component], seed=0
    )
    for apgd in (attack.apgd, attack.apgd_targeted):
        shorten(apgd, 3)
    attack.apgd.n_restarts = attack.fab.n_restarts = 1
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = 1
    attack.fab.n_iter, attack.square.n_queries = 3, 20
    found, predicted = attack.run_standard_evaluation(images, labels, batch_size=1)
    assert (found - images).abs().max() <= EPS + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    for i in range(4):  # one image a batch, so that all have the noise of position 0
        with torch.no_grad():
            assert model(found[i : i + 1]).argmax().item() == predicted[i].item()


def test_what_autoattack_says_of_this_defence(
    model: PurifiedClassifier,
    images: Tensor,
    labels: Tensor,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its check for dynamic defences counts Python calls named grad or backward in one forward.

    It sees the guidance of the Python loop. It misses the same network-valued gradient where it
    comes from C++, and keeps its count, so that whatever is tested next looks dynamic as well.
    """
    checks = pytest.importorskip("pyautoattack.checks")
    monkeypatch.setattr(checks, "funcs", dict.fromkeys(checks.funcs, 0))
    logger = logging.getLogger("auto-attack")

    def said(defence: nn.Module) -> str:
        caplog.clear()
        checks.check_dynamic(defence, images, logger=logger)
        return caplog.text

    class InCpp(nn.Module):
        """A guided step whose gradient autograd's C++ engine computes, without Python's grad."""

        def forward(self, u: Tensor) -> Tensor:
            with torch.enable_grad():
                leaf = u.detach().requires_grad_()
                confidence = model.classifier(leaf).logsumexp(1).sum()
            run = torch.autograd.Variable._execution_engine.run_backward
            (slope,) = run((confidence,), (torch.ones(()),), False, False, (leaf,), True, False)
            return model.classifier(u + 0.01 * slope)

    assert "dynamic" not in said(InCpp())
    assert "dynamic" in said(model)
    assert "dynamic" in said(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
    checks.check_randomized(model, images, labels, bs=4, logger=logger)
    assert 'version="rand"' in caplog.text


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_our_apgd_takes_the_steps_of_its_authors(
    model: PurifiedClassifier, images: Tensor, labels: Tensor, norm: str, loss: str
) -> None:
    """On a deterministic defence, from the same start: the same best points and losses."""
    base = pytest.importorskip("pyautoattack.autopgd_base")
    steps, eps = 24, 0.1 if norm == "linf" else 0.6
    model.fresh_draws = False
    names = {"linf": "Linf", "l2": "L2"}
    theirs = base.APGDAttack(
        model, n_iter=steps, norm=names[norm], eps=eps, loss=loss, eot_iter=1, device="cpu"
    )
    theirs.init_hyperparam(images)
    best, _, best_loss, _ = theirs.attack_single_run(images, labels, x_init=images)

    attack = APGD(norm=norm, eps=eps, steps=steps, loss=loss, eot=1, noise="fixed")
    ball = Ball(images, norm, eps)
    ids = torch.arange(4)
    objective = Objective(model, labels, ids, LOSSES[loss], "exact", 1, True, None)
    rule, x = attack.rule(ball), images
    for _ in range(steps + 1):
        x = ball.project(rule(x, objective.gradient(x, 0)))
    assert (rule.step_size < 2 * eps).any(), "no window was judged bad: a test of nothing"
    assert torch.allclose(rule.best_loss.float(), best_loss, rtol=1e-4, atol=1e-5)
    assert torch.allclose(rule.best, best, atol=1e-4)


# --- torchattacks


@pytest.mark.parametrize("name", ["PGD", "EOTPGD", "APGD"])
def test_torchattacks(model: PurifiedClassifier, images: Tensor, labels: Tensor, name: str) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    options = {
        "PGD": {"eps": EPS, "alpha": 0.04, "steps": 4},
        "EOTPGD": {"eps": EPS, "alpha": 0.04, "steps": 4, "eot_iter": 2},
        "APGD": {"norm": "Linf", "eps": EPS, "steps": 6, "eot_iter": 2},
    }[name]
    found = getattr(torchattacks, name)(model, **options)(images, labels)
    check_attack(model, images, labels, found)
    assert not model.training


# --- foolbox


def test_foolbox(model: PurifiedClassifier, images: Tensor, labels: Tensor) -> None:
    foolbox = pytest.importorskip("foolbox")
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    attack = foolbox.attacks.LinfPGD(abs_stepsize=0.04, steps=4)
    _, found, _ = attack(wrapped, images, labels, epsilons=EPS)
    check_attack(model, images, labels, found)


# --- ART


def art_classifier(module: nn.Module, **options):
    classification = pytest.importorskip("art.estimators.classification")
    return classification.PyTorchClassifier(
        module,
        loss=nn.CrossEntropyLoss(),
        input_shape=(3, 8, 8),
        nb_classes=4,
        clip_values=(0.0, 1.0),
        device_type="cpu",
        **options,
    )


def art_pgd(estimator):
    evasion = pytest.importorskip("art.attacks.evasion")
    return evasion.ProjectedGradientDescentPyTorch(
        estimator, eps=EPS, eps_step=0.04, max_iter=4, batch_size=4, verbose=False
    )


def one_hot(labels: Tensor) -> np.ndarray:
    return np.eye(4, dtype=np.float32)[labels.numpy()]


def test_art_on_the_defended_model(
    model: PurifiedClassifier, images: Tensor, labels: Tensor
) -> None:
    found = art_pgd(art_classifier(model)).generate(images.numpy(), one_hot(labels))
    model.zero_grad()  # ART back-propagates to everything, frozen parameters aside
    check_attack(model, images, labels, torch.from_numpy(found))


def test_art_with_the_purifier_as_preprocessor(
    model: PurifiedClassifier, images: Tensor, labels: Tensor
) -> None:
    pytest.importorskip("art")
    from coup_fast.integrations.art import Purification

    defence = Purification(model.purifier)
    assert (
        defence.next_draw != Purification(model.purifier).next_draw
    )  # nobody's noise is another's
    assert Purification(model.purifier, fresh_draws=False).next_draw == 0
    estimator = art_classifier(model.classifier, preprocessing_defences=[defence])
    with torch.no_grad():
        expected = model.classifier(model.purifier(images, draw=defence.next_draw))
    assert np.allclose(estimator.predict(images.numpy()), expected.numpy(), atol=1e-5)

    draw = defence.next_draw
    gradient = estimator.loss_gradient(images.numpy(), one_hot(labels))
    leaf = images.clone().requires_grad_()
    logits = model.classifier(model.purifier(leaf, draw=draw))
    (exact,) = torch.autograd.grad(nn.CrossEntropyLoss()(logits, labels), leaf)
    assert np.allclose(gradient, exact.numpy(), atol=1e-7)

    found = art_pgd(estimator).generate(images.numpy(), one_hot(labels))
    assert defence.next_draw >= draw + 5  # a new draw for each gradient
    model.zero_grad()
    check_attack(model, images, labels, torch.from_numpy(found))
