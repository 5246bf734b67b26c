"""AutoAttack as a row: its own draws and seeds for each image, its two versions, its refusals."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from helpers import eval_models, tiny
from torch import Tensor

from coup_fast.attacks import FIRST_ATTACK_DRAW, AutoAttack, preset
from coup_fast.attacks.ball import Ball
from coup_fast.evaluation.config import from_dict
from coup_fast.evaluation.work import Worker

LABELS = torch.tensor([0, 1, 2])
RAND = AutoAttack(eps=0.3, steps=4, eot=2)
STANDARD = AutoAttack(eps=0.3, steps=3, eot=1, version="standard", noise="fixed", queries=10)


@pytest.fixture
def images() -> Tensor:
    return tiny.images(3)


@pytest.mark.parametrize("attack", [RAND, STANDARD], ids=["rand", "standard"])
def test_results_belong_to_sample_ids(attack: AutoAttack, images: Tensor) -> None:
    pytest.importorskip("pyautoattack")
    defended = tiny.defended("diffpure", per_sample=True)
    ids = torch.tensor([5, 17, 2])
    torch.manual_seed(3)
    state = torch.get_rng_state()
    together = attack.run(defended, images, LABELS, sample_ids=ids)
    assert torch.equal(torch.get_rng_state(), state)
    Ball(images, "linf", 0.3).check(together.images)
    assert not torch.equal(together.images, images)
    flip = [2, 0, 1]
    again = attack.run(defended, images[flip], LABELS[flip], sample_ids=ids[flip])
    assert torch.equal(again.images, together.images[flip])
    assert together.gradient_runs > 0
    assert together.score_evaluations > together.gradient_runs
    assert together.fooled.mean() > 0.3


def test_rand_sees_fresh_draws_only_and_standard_draw_0(images: Tensor) -> None:
    pytest.importorskip("pyautoattack")
    from helpers.foreign import Hooked

    for attack, first in ((RAND, FIRST_ATTACK_DRAW), (STANDARD, 0)):
        model = Hooked(0.01)
        answer = model.classifier(images[:1]).argmax(1)  # AutoAttack leaves a wrong image alone
        found = attack.run(model, images[:1], answer, sample_ids=[7])
        assert min(model.draws) == first
        assert (len(set(model.draws)) == 1) == (attack is STANDARD)
        assert found.gradient_runs > 2
        assert model.sample_ids.tolist() == [7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "plus"}, "version must be one of rand, standard, got 'plus'"),
        ({"version": "standard"}, 'needs noise="fixed" and eot=1'),
        ({"noise": "fixed"}, "'rand' needs noise=\"fresh\""),
        ({"loss": "dlr"}, "loss is decided by AutoAttack"),
        ({"targeted": True}, "targeted is decided by AutoAttack"),
        ({"queries": 0}, "queries .* 0"),
    ],
)
def test_options_are_checked(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoAttack(**change)


def test_without_the_package_it_says_how_to_get_it(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'coup-fast\[attacks\]'"):
        RAND.run(tiny.TinyClassifier(), images, LABELS)
    config = from_dict(eval_models.tables(attack=[{"preset": "autoattack-rand"}]))
    with pytest.raises(ImportError, match=r"pip install 'coup-fast\[attacks\]'"):  # at once
        Worker(config, *eval_models.images(6), eval_models.load, torch.device("cpu"))


def test_too_few_classes_are_refused(images: Tensor) -> None:
    pytest.importorskip("pyautoattack")
    with pytest.raises(ValueError, match="standard needs at least 4 classes, got 3"):
        STANDARD.run(lambda u: tiny.TinyClassifier()(u)[:, :3], images, LABELS)


def test_it_may_be_a_row_of_a_table() -> None:
    attacks = [{"preset": "autoattack-rand", "eot": 2}, {"preset": "autoattack-standard"}]
    config = from_dict(eval_models.tables(attack=attacks))
    found = {row.name for row in config.rows if row.attack is not None}
    assert "COUP, AutoAttack-100 rand, EOT 2, exact gradient" in found
    assert "COUP, AutoAttack-100 standard, fixed noise, exact gradient" in found
    assert preset("autoattack-standard", eps="8/255").eps == 8 / 255
