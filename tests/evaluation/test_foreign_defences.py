"""Defences that are not ours in a table: the same protocol, and what could not be verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import eval_models, foreign

from coup_fast.attacks import FIRST_ATTACK_DRAW
from coup_fast.evaluation.config import from_dict
from coup_fast.evaluation.evaluate import evaluate
from coup_fast.evaluation.metrics import numbers
from coup_fast.evaluation.report import Report

ATTACK = {"preset": "pgd40", "steps": 2, "eot": 2, "eps": 0.1}


def tables(*functions: str, **changes: Any) -> dict[str, Any]:
    defences = [{"method": f"helpers.foreign:{name}"} for name in functions]
    return eval_models.tables(defence=defences, attack=[ATTACK]) | changes


def run(given: dict, out: Path, count: int = 6) -> Report:
    data = eval_models.images(count)
    report = evaluate(from_dict(given), out, models=eval_models.load, data=data)
    assert report is not None
    return report


def test_numbers_are_those_of_fresh_draws_of_the_hook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[foreign.Hooked] = []

    def hooked(scale: float) -> foreign.Hooked:
        made.append(foreign.Hooked(scale))
        return made[-1]

    monkeypatch.setattr(foreign, "hooked", hooked)
    given = tables("hooked")
    given["defence"][0]["options"] = {"scale": 0.3}
    report = run(given, tmp_path)
    (line,) = (line for line in report.lines if line.row.defence.name == "hooked")
    attacked = [draw for draw in made[0].draws if draw >= FIRST_ATTACK_DRAW]
    assert {draw for draw in made[0].draws if draw < FIRST_ATTACK_DRAW} == {0, 1, 2}
    assert len(set(attacked)) == 2 * 2  # steps, eot
    images, labels = eval_models.images(6)
    defence, ids = foreign.Hooked(0.3), torch.arange(6)
    attack = line.row.attack
    for part, pixels in ((line.clean, images), (line.attacked, attack(defence, images, labels))):
        draws = []
        for k in range(3):
            defence.set_draw(k, ids)
            draws.append(defence(pixels).argmax(1))
        assert part == numbers(torch.stack(draws, 1).tolist(), labels.tolist())
    whole = run({**given, "batch_size": 6}, tmp_path / "whole")
    assert whole.csv() == report.csv()


@pytest.mark.parametrize("seed", [0, 1])
def test_fixed_noise_is_that_of_the_judge_for_any_seed(tmp_path: Path, seed: int) -> None:
    attack = {"preset": "fixed-noise", "steps": 2, "eps": 0.02, "step_size": 0.01, "keep": "best"}
    given = tables("lying", attack=[attack], seed=seed, draws=1, batch_size=24, controls=False)
    given["defence"][0]["options"] = {"scale": 0.5}
    report = run(given, tmp_path, 24)
    (line,) = report.lines
    fooled = line.attack_run["fooled_own_draws"]  # type: ignore[index]
    assert 0 < fooled < 1
    assert line.attacked.one_draw.rate == pytest.approx(1 - fooled)  # type: ignore[union-attr]


def test_rows_say_what_could_not_be_verified(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = ("hooked", "lying", "unrepeatable")
    report = run(tables(*names), tmp_path)
    notes = {n: next(x for x in report.notes() if x.startswith(f"{n} is foreign")) for n in names}
    assert (
        "(helpers.foreign:hooked): the gradient agrees with finite differences" in notes["hooked"]
    )
    assert "driven by its set_draw" in notes["hooked"]
    assert "the gradient IS NOT that of the values" in notes["lying"]
    assert "torch's global generator" in notes["lying"]
    assert "the gradient COULD NOT BE CHECKED" in notes["unrepeatable"]
    assert "COULD NOT BE REPEATED" in notes["unrepeatable"]
    for name in names:
        assert f"{name} (foreign)" in report.table()
    report.write(tmp_path)
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    passed = {
        row["defence"]["name"]: row["foreign"]["gradient_passed"]
        for row in rows
        if "foreign" in row
    }
    assert passed == {"hooked": True, "lying": False, "unrepeatable": False}
    assert {row["draws"] for row in rows if "foreign" in row} == {3}


def test_they_stand_beside_ours_and_need_no_models_of_ours(tmp_path: Path) -> None:
    ours = eval_models.tables()["defence"]
    given = tables("hooked")
    both = run({**given, "defence": [*ours, *given["defence"]]}, tmp_path / "both")
    alone = evaluate(
        from_dict({**given, "controls": False, "models": "no.such:module"}),
        tmp_path / "alone",
        models=lambda score: pytest.fail("loaded"),
        data=eval_models.images(6),
    )
    assert {line.row.defence.name for line in both.lines} >= {"COUP", "hooked", "undefended"}
    assert alone.lines[0].attacked == both.lines[-1].attacked


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"defence": [{"method": "helpers.foreign:"}]}, r'"module:function", got'),
        ({"defence": [{"method": ":hooked"}]}, r'"module:function", got'),
        ({"defence": [{"method": "helpers.foreign:hooked", "vote": "logits"}]}, "takes no vote"),
        (
            {"attack": [{"preset": "bpda", "eps": 0.1, "defences": ["hooked"]}]},
            r"'bpda' \(bpda gradient\) needs a purifier of coup_fast, and 'hooked'",
        ),
    ],
)
def test_wrong_configurations_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(tables("hooked") | changes)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("absent", ValueError, "has no function 'absent'"),
        ("nothing", TypeError, r"must return a module or callable .* got NoneType"),
        ("cut", ValueError, "do not depend on the images"),
    ],
)
def test_functions_that_give_no_defence(
    name: str, error: type, message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run(tables(name), tmp_path)


def test_the_bare_classifier_takes_the_attack_that_ignores_purifiers(tmp_path: Path) -> None:
    attack = {**ATTACK, "preset": "classifier", "eot": 1, "defences": ["undefended"]}
    report = run(eval_models.tables(attack=[attack]), tmp_path)
    assert report.lines[0].row.defence.name == "undefended"
    assert report.lines[0].attacked is not None
