"""Defences that name their own networks, in one table with those that have the file's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import eval_models

from coup_fast.attacks import PGD
from coup_fast.cli import main
from coup_fast.evaluation.config import from_dict, read_toml
from coup_fast.evaluation.evaluate import evaluate
from coup_fast.evaluation.report import Report
from coup_fast.evaluation.state import StateError

OTHER = "helpers.eval_models:load_other"
SHORT = {"num_steps": 2}
COUP = {"name": "COUP", "method": "coup", "options": SHORT}
BESIDE = {"name": "COUP, other", "method": "coup", "options": SHORT, "models": OTHER}
ATTACKS = [
    {"preset": "pgd40", "steps": 2, "eot": 2, "eps": 0.1},
    {"preset": "classifier", "steps": 2, "eps": 0.1},
]


def tables(*defences: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return eval_models.tables(4, defence=list(defences), attack=ATTACKS) | changes


def run(given: dict[str, Any], out: Path) -> Report:
    report = evaluate(from_dict(given), out, data=eval_models.images(4))
    assert report is not None
    return report


def numbers(report: Report) -> dict[tuple[str, str], Any]:
    return {
        (line.row.defence.name, line.attack_label): (line.clean, line.attacked)
        for line in report.lines
    }


def test_a_row_is_what_it_would_be_if_the_file_named_its_models(tmp_path: Path) -> None:
    both = numbers(run(tables(COUP, BESIDE), tmp_path / "both"))
    ours = numbers(run(tables(COUP), tmp_path / "ours"))
    other = numbers(run(tables({**BESIDE, "models": OTHER}, models=OTHER), tmp_path / "other"))
    renamed = {"undefended": "undefended, load_other"}
    other = {(renamed.get(name, name), attack): found for (name, attack), found in other.items()}
    assert both == ours | other
    assert ours.keys().isdisjoint(other)
    clean = {name: found[0] for (name, _), found in both.items()}
    assert clean["undefended"] != clean["undefended, load_other"]


def test_controls_are_those_of_each_pair_of_models() -> None:
    config = from_dict(tables(COUP, BESIDE, {"method": "none", "name": "bare", "models": OTHER}))
    names = [row.defence.name for row in config.rows if row.attack is None]
    twins = [f"{name} without guidance (λ=0)" for name in ("COUP", "COUP, other")]
    assert names == ["undefended", "COUP", twins[0], "COUP, other", twins[1], "bare"]
    models = {row.defence.name: row.defence.models for row in config.rows}
    assert [models[name] for name in names] == ["", "", "", OTHER, OTHER, OTHER]


def test_the_models_of_the_file_may_be_repeated() -> None:
    config = from_dict(tables(COUP, {**BESIDE, "models": "helpers.eval_models:load"}))
    assert {row.defence.models for row in config.rows} == {""}
    again = from_dict(tables(COUP, {**COUP, "name": "again"}))
    assert [row.defence.as_dict() for row in again.rows if row.defence.name == "COUP"] == [
        row.defence.as_dict() for row in config.rows if row.defence.name == "COUP"
    ]
    assert all("models" not in row["defence"] for row in config.as_dict()["rows"])


def test_the_bare_classifier_is_attacked_once_for_all_its_defences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ADP has another score network, and the same classifier beside it."""
    calls: list[str] = []
    attack_run = PGD.run
    monkeypatch.setattr(
        PGD, "run", lambda self, *a, **k: calls.append(self.gradient) or attack_run(self, *a, **k)
    )
    adp = {"method": "adp", "options": {"num_steps": 2, "sigma": 0.1}}
    defences = [
        COUP,
        BESIDE,
        {**adp, "name": "ADP"},
        {**adp, "name": "ADP, other", "models": OTHER},
    ]
    given = tables(*defences, controls=False, attack=ATTACKS[1:], batch_size=4)
    report = run(given, tmp_path)
    assert calls == ["classifier", "classifier"]
    found = [line.attack_run["fooled_own_draws"] for line in report.lines]  # type: ignore[index]
    assert found[0] == found[2]
    assert found[1] == found[3]


def test_comparisons_cross_models(tmp_path: Path) -> None:
    path = tmp_path / "compare.toml"
    path.write_text('[[compare]]\na = "COUP, other"\nb = "undefended, load_other"\n')
    report = run({**tables(COUP, BESIDE), **read_toml(path)}, tmp_path)
    assert [c.attack for c in report.comparisons] == ["none", "PGD-2 ce, ℓ∞ 0.1"]
    assert report.comparisons[0].counts.total == 4


def test_reports_say_whose_models_a_row_has(tmp_path: Path) -> None:
    report = run(tables(COUP, BESIDE), tmp_path)
    (note,) = (note for note in report.notes() if OTHER in note)
    assert "“COUP, other”" in note
    assert "“COUP”" not in note
    report.write(tmp_path)
    rows = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["rows"]
    assert {row["defence"]["name"] for row in rows if row["defence"].get("models") == OTHER} == {
        "COUP, other",
        "COUP, other without guidance (λ=0)",
        "undefended, load_other",
    }
    assert not any(OTHER in note for note in run(tables(COUP), tmp_path / "one").notes())


def test_other_weights_of_a_named_pair_are_another_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tables(COUP, BESIDE), tmp_path)
    monkeypatch.setattr(eval_models, "OTHER_SCALE", 0.5)
    with pytest.raises(StateError, match=r"networks\.named\.helpers\.eval_models:load_other\.vp"):
        run(tables(COUP, BESIDE), tmp_path)


@pytest.mark.parametrize(
    ("defence", "error", "message"),
    [
        ({**COUP, "models": 3}, TypeError, r"models of \[\[defence\]\] must be a string, got 3"),
        ({**COUP, "models": ""}, ValueError, r"models of \[\[defence\]\] is empty"),
        (
            {"method": "helpers.foreign:hooked", "models": OTHER},
            ValueError,
            "'helpers.foreign:hooked' has its own networks and takes no models",
        ),
    ],
)
def test_models_that_cannot_be_meant_are_refused(
    defence: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        from_dict(tables(defence))


def test_models_that_are_not_there_end_the_run_before_it_begins(tmp_path: Path) -> None:
    given = tables(COUP, {**BESIDE, "models": "helpers.eval_models:no_such"})
    with pytest.raises(ValueError, match=r"eval_models has no function 'no_such'"):
        run(given, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_of_the_working_folder_may_hold_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    monkeypatch.chdir(tmp_path)
    images, labels = eval_models.images(4)
    np.savez("images.npz", images=images.numpy(), labels=labels.numpy())
    Path("mine_of_a_defence.py").write_text("from helpers.eval_models import load_other\n")
    text = eval_models.TOML.format(images=4).replace(
        'name = "COUP"', 'name = "COUP"\nmodels = "mine_of_a_defence:load_other"'
    )
    Path("config.toml").write_text(text, encoding="utf-8")
    assert main(["eval", "config.toml", "--out", "out", "--no-progress"]) == 0
    assert "mine_of_a_defence:load_other" in capsys.readouterr().out
