"""benchmarks/eval_cost.py counts the runs that attacks take; the configurations beside it hold."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import eval_models, tiny
from helpers.scripts import ROOT, load_script

from coup_fast.attacks import PGD, AdaptiveGuided, Attack, Square
from coup_fast.evaluation.config import from_dict, read_toml

ATTACKS: list[Attack] = [
    PGD(eps=0.1, steps=3, eot=2),
    PGD(eps=0.1, steps=3, eot=2, keep="best", restarts=2),
    PGD(eps=0.1, steps=3, eot=2, keep="best", gradient="unguided"),
    PGD(eps=0.1, steps=3, eot=2, gradient="unguided"),
    AdaptiveGuided(eps=0.1, steps=2, eot=2, restarts=2, finish_steps=3),
    AdaptiveGuided(eps=0.1, steps=2, eot=1, restarts=1, finish_steps=0, gradients=("stopped",)),
    Square(eps=0.1, steps=4, eot=3),
]


@pytest.fixture(scope="module")
def cost() -> ModuleType:
    return load_script("benchmarks/eval_cost.py")


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_runs_are_those_that_the_attack_takes(cost: ModuleType, attack: Attack) -> None:
    defended, images = tiny.defended("coup"), tiny.images(3)
    result = attack.run(defended, images, torch.tensor([0, 1, 2]))
    found = cost.runs_of(attack)
    assert sum(n for kind, n in found.items() if kind != "value") == result.gradient_runs / 3
    calls = 3 * defended.purifier.plan.num_network_calls
    assert sum(found.values()) == result.score_evaluations / calls


def test_the_full_recipe_is_that_of_the_preset(cost: ModuleType) -> None:
    short = AdaptiveGuided(eps=0.1, steps=2, restarts=1, finish_steps=1, seed=3)
    assert cost.full(short) == AdaptiveGuided(eps=0.1, seed=3)
    assert cost.full(Square(steps=5, eot=1)) == Square()
    assert cost.full(PGD(steps=5)) == PGD(steps=5)


def test_it_says_how_long_an_evaluation_takes(
    cost: ModuleType, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    images, labels = eval_models.images(4)
    data = tmp_path / "images.npz"
    np.savez(data, images=images.numpy(), labels=labels.numpy())
    config = tmp_path / "config.toml"
    config.write_text(eval_models.TOML.format(images=400), encoding="utf-8")
    assert cost.main([str(config), "--data", str(data), "--runs", "4"]) == 0
    out = capsys.readouterr().out
    assert "COUP without guidance (λ=0)" in out
    assert "400 images, 1 process(es): " in out
    assert "(0 TFLOP)" not in out


EVALUATIONS = {path.name for path in (ROOT / "benchmarks").glob("*.toml")} - {"guidance_study.toml"}


@pytest.mark.parametrize("name", sorted(EVALUATIONS))
def test_configurations_of_the_benchmarks_are_read(name: str) -> None:
    config = from_dict(read_toml(ROOT / "benchmarks" / name))
    assert any(row.attack is not None for row in config.rows)
