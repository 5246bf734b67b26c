"""What a user meets on the first day: names, their listing, README's installation line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from helpers.scripts import ROOT, environment

import coup_fast
from coup_fast import DiscreteSchedule, ScoreModel

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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


def extras(name: str) -> set[str]:
    """The packages of an extra, those of the extras that it names among them."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = set()
    for line in table["optional-dependencies"][name]:
        nested = re.match(r"coup-fast\[(.*)\]", line)
        if nested:
            found |= {package for one in nested[1].split(",") for package in extras(one)}
        else:
            match = re.match(r"[\w-]+", line)
            assert match is not None
            found.add(match[0])
    return found


def test_readmes_installation_is_enough_for_readmes_examples() -> None:
    readme = (ROOT / "README.md").read_text()
    line = re.search(r"--no-build-isolation '\.\[(\w+)\]'", readme)
    assert line is not None
    installed = extras(line[1])
    for command, needs in {
        "coup-fast purify": {"safetensors", "pillow"},
        "coup-fast eval": {"safetensors", "tabulate", "matplotlib", "mlxtend"},
    }.items():
        assert command in readme
        assert needs <= installed


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
