"""DiffHammer, DiffAttack and smooth perturbations as rows of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import eval_models

from coup_fast.evaluation.config import from_dict
from coup_fast.evaluation.evaluate import evaluate
from coup_fast.evaluation.report import Report

SMALL = {"steps": 2, "eot": 2, "eps": 0.1}
ATTACKS = [
    {"preset": "diffhammer", "restarts": 1, **SMALL},
    {"preset": "diffattack", **SMALL},
    {"preset": "pgd-low-frequency", **SMALL},
]
DIFFPURE = {"name": "D", "method": "diffpure", "options": {"num_steps": 3}}


def run(out: Path, defences: list[dict[str, Any]], attacks: list[dict], **changes: Any) -> Report:
    given = eval_models.tables(defence=defences, attack=attacks) | changes
    data = eval_models.images(6)
    report = evaluate(from_dict(given), out, models=eval_models.load, data=data)
    assert report is not None
    return report


def test_they_are_rows_and_the_bare_classifier_has_one_draw_and_no_states(tmp_path: Path) -> None:
    report = run(tmp_path / "twos", [DIFFPURE], ATTACKS, controls=True, batch_size=2)
    names = {
        defence: [
            line.row.attack.name
            for line in report.lines
            if line.row.defence.name == defence and line.row.attack is not None
        ]
        for defence in ("D", "undefended")
    }
    assert names["D"] == [
        "APGD-2 margin, EOT 2, EM-weighted exact gradient",
        "APGD-2 ce + deviation, EOT 2, exact gradient",
        "PGD-2 ce low-frequency, EOT 2, exact gradient",
    ]
    assert names["undefended"] == [
        "APGD-2 margin, EOT 1, exact gradient",
        "PGD-2 ce low-frequency, EOT 1, exact gradient",
    ]
    whole = run(tmp_path / "whole", [DIFFPURE], ATTACKS, controls=True, batch_size=6)
    assert whole.csv() == report.csv()


def test_a_deviation_is_refused_before_any_work_where_it_is_not_known(tmp_path: Path) -> None:
    gdmp = {"name": "G", "method": "gdmp", "options": {"rounds": 2, "t_star": 0.003}}
    with pytest.raises(ValueError, match=r"deviation needs one round .*'gdmp'"):
        run(tmp_path, [gdmp], ATTACKS[1:2])
    assert not (tmp_path / "state").exists()
    foreign = {"name": "F", "method": "helpers.foreign:hooked"}
    with pytest.raises(ValueError, match=r"'diffattack' \(deviation\) needs a purifier .*'F'"):
        run(tmp_path, [foreign], [{**ATTACKS[1], "defences": ["F"]}])
