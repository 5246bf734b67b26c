"""Targeted attacks: which classes they want, that they get there, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from helpers import eval_models, tiny
from torch import Tensor

from coup_fast.attacks import APGD, PGD, preset
from coup_fast.attacks.losses import TARGETED, other_classes
from coup_fast.evaluation.config import from_dict

LABELS = torch.tensor([0, 1, 2, 3])
ATTACK = PGD(eps=0.4, steps=12, step_size=0.08, eot=2, targeted=True, keep="best")


@pytest.fixture
def images() -> Tensor:
    return tiny.images(4)


def test_losses_rise_towards_the_target() -> None:
    scores = torch.randn(4, 6, dtype=torch.float64)
    for name, loss in TARGETED.items():
        raised = scores + torch.nn.functional.one_hot(LABELS, 6) * 0.1
        assert bool((loss(raised, LABELS) > loss(scores, LABELS)).all()), name
        leaf = scores.clone().requires_grad_()
        loss(leaf, LABELS).sum().backward()
        assert torch.isfinite(leaf.grad).all()
    z, t = [3.0, 1.0, 2.0, -1.0], 1
    expected = (z[t] - 3.0) / (3.0 - (1.0 + -1.0) / 2)  # Croce & Hein, section 4, the right class 0
    assert TARGETED["dlr"](torch.tensor([z]), torch.tensor([t])).item() == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"DLR .*4 classes, got 3"):
        TARGETED["dlr"](scores[:, :3], LABELS % 3)


def test_restarts_go_through_all_wrong_classes_and_belong_to_sample_ids() -> None:
    ids = torch.tensor([7, 0, 100, 3])
    chosen = torch.stack([other_classes(LABELS, ids, number, 4) for number in range(3)])
    for row, label in zip(chosen.T.tolist(), LABELS.tolist(), strict=True):
        assert sorted(row) == sorted({0, 1, 2, 3} - {label})
    alone = torch.cat([other_classes(LABELS[i : i + 1], ids[i : i + 1], 1, 4) for i in range(4)])
    assert torch.equal(alone, chosen[1])
    with pytest.raises(ValueError, match="2 classes, got 1"):
        other_classes(LABELS, ids, 0, 1)


@pytest.mark.parametrize("kind", [PGD, APGD])
@pytest.mark.parametrize("loss", ["ce", "dlr", "margin"])
def test_they_reach_the_classes_that_they_want(kind: type, loss: str, images: Tensor) -> None:
    classifier = tiny.TinyClassifier()
    attack = kind(eps=0.5, steps=30, eot=1, targeted=True, loss=loss, keep="best")
    targets = other_classes(LABELS, torch.arange(4), 0, 4)
    found = attack.run(classifier, images, LABELS)
    answers = classifier(found.images).argmax(1)
    assert torch.equal(found.fooled == 1, answers == targets)
    assert found.fooled.sum() >= 3
    given = attack.run(classifier, images, LABELS, targets=targets)
    assert torch.equal(given.images, found.images)


def test_defences_are_attacked_with_targets_too(images: Tensor) -> None:
    defended = tiny.defended("diffpure", per_sample=True)
    ids = torch.tensor([5, 2, 9, 4])
    together = ATTACK.replace(restarts=2, steps=3).run(defended, images, LABELS, sample_ids=ids)
    for i in range(4):
        rows = slice(i, i + 1)
        alone = ATTACK.replace(restarts=2, steps=3).run(
            defended, images[rows], LABELS[rows], sample_ids=ids[rows]
        )
        assert torch.equal(alone.images[0], together.images[i])
    assert ATTACK.name == "PGD-12 ce targeted, EOT 2, exact gradient"


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (LABELS, ValueError, "wrong classes; that of image 0 is its label"),
        (LABELS + 1, ValueError, "targets must be classes, 0 to 3, got 1 to 4"),
        (LABELS[:2] + 1, ValueError, r"targets must be \[4\] .*\[2\]"),
        ([1, 2, 3, 0], TypeError, "targets must be an int64 tensor"),
    ],
)
def test_wrong_targets_are_refused(targets, error, message: str, images: Tensor) -> None:
    with pytest.raises(error, match=message):
        ATTACK.run(tiny.TinyClassifier(), images, LABELS, targets=targets)
    with pytest.raises(ValueError, match="targeted=False"):
        PGD(eot=1).run(tiny.TinyClassifier(), images, LABELS, targets=targets)
    with pytest.raises(TypeError, match="targeted must be True or False"):
        PGD(targeted="yes")


def test_rows_of_a_table_may_be_targeted() -> None:
    attacks = [{"preset": "pgd40", "targeted": True}, {"preset": "apgd-t", "restarts": 3}]
    config = from_dict(eval_models.tables(attack=attacks, controls=False))
    found = [row.attack for row in config.rows if row.attack is not None]
    assert [a.targeted for a in found] == [True, True]
    assert found[0].name == "PGD-40 ce targeted, EOT 8, exact gradient"
    assert preset("apgd-t").loss == "dlr"
