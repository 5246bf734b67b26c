"""The options' types against the functions that take them, and what type checkers and help say."""

from __future__ import annotations

import inspect
import pydoc
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from helpers import tiny
from helpers.scripts import ROOT, environment

import coup_fast
from coup_fast.attacks import APGD, GRADIENTS, LOSSES, PGD, AdaptiveGuided, AutoAttack, Square
from coup_fast.attacks.options import AttackGradient, AttackOptions, LossName
from coup_fast.methods import METHODS
from coup_fast.options import MethodOptions, PurifierOptions
from coup_fast.run.options import _CHOICES, RunOptions


def alternatives(hint: Any) -> set[Any]:
    """The types that a union joins; one for any other type."""
    return set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}


def parameters(method: str) -> dict[str, tuple[Any, Any]]:
    """The options of a method's function: type and default."""
    function = METHODS[method]
    names = vars(sys.modules[function.__module__])
    return {
        p.name: (eval(p.annotation, names), p.default)
        for p in inspect.signature(function).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    }


def test_the_options_of_methods_are_those_of_their_functions() -> None:
    taken: dict[str, set[Any]] = {}
    for method in METHODS:
        for option, (hint, _) in parameters(method).items():
            taken.setdefault(option, set()).update(alternatives(hint))
    typed = {option: alternatives(hint) for option, hint in get_type_hints(MethodOptions).items()}
    assert typed == taken


def test_the_options_of_a_run_are_those_that_it_checks() -> None:
    own = {f.name for f in fields(RunOptions)}
    hints = get_type_hints(PurifierOptions)
    assert set(hints) == own | set(get_type_hints(MethodOptions))
    assert {name: hints[name] for name in own} == get_type_hints(RunOptions)
    for name, choices in _CHOICES.items():
        assert choices == ((True, False) if hints[name] is bool else get_args(hints[name]))


def test_the_options_of_attacks_are_their_fields() -> None:
    taken: dict[str, set[Any]] = {}
    for attack in (PGD, APGD, AutoAttack, AdaptiveGuided, Square):
        options = {field.name for field in fields(attack)}
        for name, hint in get_type_hints(attack).items():
            if name in options:
                taken.setdefault(name, set()).update(alternatives(hint))
    # What `attacks.units` reads:
    told = {"norm": {float}, "eps": {str}, "step_size": {str}, "final_step_size": {str}}
    typed = {name: alternatives(hint) for name, hint in get_type_hints(AttackOptions).items()}
    assert typed == {name: hints | told.get(name, set()) for name, hints in taken.items()}
    assert get_args(AttackGradient) == tuple(GRADIENTS)
    assert get_args(LossName) == tuple(LOSSES)


@pytest.mark.parametrize("name", ["Purifier", "purify"])
def test_help_lists_every_option_with_its_methods_and_defaults(name: str) -> None:
    text = re.sub(r"^ \|", " ", pydoc.plain(pydoc.render_doc(getattr(coup_fast, name))), flags=re.M)
    lists = re.split(r"^ *Options that .* take.*:\n", text, flags=re.M)
    assert len(lists) == 3
    entries = re.compile(r"^ {5,8}(\w+): (.*(?:\n {9,}.*)*)", re.M)
    of_runs, of_methods = (
        {option: " ".join(rest.split()) for option, rest in entries.findall(part)}
        for part in (re.split(r"\n *\n", after)[0] for after in lists[1:])
    )
    for field in fields(RunOptions):
        assert re.search(
            rf"\w{{3}}.* default {re.escape(repr(field.default))}$", of_runs[field.name]
        )
    shown = {
        option: {
            default: set(methods.split(", "))
            for default, methods in re.findall(r" default (.*?): (.*?)(?= default |$)", entry)
        }
        for option, entry in of_methods.items()
    }
    taken: dict[str, dict[str, set[str]]] = {}
    for method in METHODS:
        for option, (_, default) in parameters(method).items():
            taken.setdefault(option, {}).setdefault(repr(default), set()).add(method)
    assert shown == taken
    assert not [option for option, entry in of_methods.items() if entry.startswith("default")]


@pytest.mark.parametrize("name", ["Purifier", "purify"])
def test_signatures_name_every_option_for_notebooks(name: str) -> None:
    signature = inspect.signature(getattr(coup_fast, name))
    *named, rest = signature.parameters.values()
    assert rest.kind is inspect.Parameter.VAR_KEYWORD
    defaults = {p.name: p.default for p in named if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert set(get_type_hints(PurifierOptions)) < set(defaults)
    assert {f.name: f.default for f in fields(RunOptions)}.items() <= defaults.items()
    assert inspect.Parameter.empty not in defaults.values()
    assert signature.return_annotation == ("None" if name == "Purifier" else "Tensor")
    instance = inspect.signature(tiny.short_purifier())
    assert set(instance.parameters) == {"args", "kwargs"}


# What follows "# error" is in mypy's sentence on that line; no other line may have an error.
SCRIPT = """
from typing import Any

import torch
from typing_extensions import Unpack

import coup_fast
from coup_fast.attacks import PGD, preset
from coup_fast.options import PurifierOptions

score_model, classifier = coup_fast.load_bundled()
images = torch.rand(2, 1, 28, 28)
clean = coup_fast.purify(images, score_model, classifier, t_star=0.1, solver="exponential")
purifier = coup_fast.Purifier(score_model, classifier, num_steps=10, gradient="bpda", compile=True)
other = purifier.with_options(precision="bf16", max_batch=None)
purifier.gradient = "none"
ours: PurifierOptions = {"rounds": (30, 50), "channels_last": "auto"}
gradual = coup_fast.Purifier(score_model, method="gradual", seed=3, **ours)
unknown: dict[str, Any] = {"levels": 3}
mine = coup_fast.Purifier(score_model, method="mine", **unknown)
attack = preset("pgd40", eps="4/255", norm="Linf").replace(gradient="bpda")


def defend(**options: Unpack[PurifierOptions]) -> coup_fast.Purifier:
    return coup_fast.Purifier(score_model, classifier, **options)


defend(t_star=0.1)
defend(tstar=0.1)  # error "tstar"
coup_fast.purify(images, score_model, t_sart=0.1)  # error "t_sart"
coup_fast.purify(images, score_model, num_steps="10")  # error "str"; expected "int | None"
coup_fast.Purifier(score_model, sovler="euler")  # error "sovler"
coup_fast.Purifier(score_model, solver="exponental")  # error "Literal['exponental']"
coup_fast.Purifier(score_model, chanels_last=True)  # error "chanels_last"
coup_fast.Purifier(score_model, forward_noise="yes")  # error expected "bool"
purifier.with_options(gradient="exct")  # error "Literal['exct']"
purifier.gradient = "exct"  # error "Literal['exct']"
wrong: PurifierOptions = {"guidance_scal": 1.0}  # error "guidance_scal"
coup_fast.methods.coup_short(coup_fast.VPSchedule(), tstar=0.1)  # error "tstar"
coup_fast.methods.plan("coup", coup_fast.VPSchedule(), "eps", gradient="bpda")  # error "gradient"
preset("pgd40", epss=0.1)  # error "epss"
attack.replace(step_sise="2/255")  # error "step_sise"
PGD(gradient="exct")  # error "Literal['exct']"
"""


def test_mypy_rejects_misspelt_options_and_wrong_types_in_a_users_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", script.name],
        cwd=tmp_path,
        env=environment(MYPYPATH=str(ROOT), MYPY_CACHE_DIR=str(ROOT / ".mypy_cache")),
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    errors = re.findall(r"^script\.py:(\d+): error: (.*)$", done.stdout, re.M)
    found = dict(errors)
    expected = {
        str(number): line.partition("# error ")[2]
        for number, line in enumerate(SCRIPT.splitlines(), 1)
        if "# error " in line
    }
    assert found.keys() == expected.keys(), done.stdout + done.stderr
    assert not [sentence for n, sentence in found.items() if expected[n] not in sentence]
    assert len(errors) == len(found)
