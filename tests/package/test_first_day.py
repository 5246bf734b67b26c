"""What a user meets on the first day: names, their listing, what they print as."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers.scripts import ROOT, environment

import coup_fast
from coup_fast import DiscreteSchedule, ScoreModel

PACKAGES = sorted(
    path.parent.name
    for path in (ROOT / "coup_fast").glob("*/__init__.py")
    if path.parent.name not in ("_torch", "run")
)


def test_submodules_are_there_without_an_import_of_them() -> None:
    names = [*PACKAGES, "schedules", "plan", "noise"]
    code = (
        "import sys, coup_fast\n"
        "assert not [name for name in sys.modules if name.startswith('coup_fast.attacks')]\n"
        "assert coup_fast.attacks.PGD is coup_fast.attacks.pgd.PGD\n"
        f"for name in {names}:\n"
        "    assert name in dir(coup_fast)\n"
        "    assert getattr(coup_fast, name) is sys.modules['coup_fast.' + name]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_dir_shows_public_names_and_no_imports() -> None:
    names = dir(coup_fast)
    assert set(coup_fast.__all__) <= set(names)
    assert {"__version__"} == {name for name in names if name.startswith("_")}
    for name in names:
        value = getattr(coup_fast, name)
        origin = getattr(value, "__module__", None) or getattr(value, "__name__", "coup_fast")
        assert origin.startswith("coup_fast"), name
    assert not {"importlib", "Any", "TYPE_CHECKING", "annotations"} & set(names)


def test_a_score_model_is_shown_in_a_few_words() -> None:
    linear = DiscreteSchedule()
    assert repr(linear) == "DiscreteSchedule.linear(0.0001, 0.02, 1000)"
    assert eval(repr(linear)) == linear
    for schedule in (linear, DiscreteSchedule.cosine(), DiscreteSchedule((0.1, 0.3, 0.2))):
        text = repr(ScoreModel(lambda x, t: x, schedule=schedule))
        assert len(text) < 200
        assert str(schedule.num_steps) in text


def test_the_packages_are_those_of_the_folder() -> None:
    assert set(PACKAGES) <= set(dir(coup_fast))
    assert Path(coup_fast.__file__).parent == ROOT / "coup_fast"
