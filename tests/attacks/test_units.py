"""Norms and lengths as people write them, and lengths that were meant as grey levels."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import eval_models, tiny

from coup_fast.attacks import APGD, PGD, preset
from coup_fast.cli import build_parser
from coup_fast.cli.eval import _tables
from coup_fast.evaluation.config import from_dict, read_toml

LABELS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("given", "name"),
    [
        *((s, "linf") for s in ("linf", "Linf", "LINF", "inf", "l_inf", "L-inf", "ℓ∞", math.inf)),
        *((s, "l2") for s in ("l2", "L2", "2", "ℓ2", 2, 2.0)),
    ],
)
def test_norms_are_understood(given: object, name: str) -> None:
    assert PGD(norm=given, eps=0.5).norm == name
    assert APGD(norm=given, eps=0.5).as_dict()["norm"] == name
    assert preset("pgd40", norm=given).norm == name


@pytest.mark.parametrize("given", ["l1", "", "l0", 1, None, True, "linf2"])
def test_other_norms_are_refused(given: object) -> None:
    with pytest.raises(ValueError, match=r"norm must be one of linf, l2, got"):
        PGD(norm=given)


@pytest.mark.parametrize("given", ["no", 0, 1, None])
@pytest.mark.parametrize("name", ["through_vote", "random_start", "targeted"])
def test_flags_are_flags(name: str, given: object) -> None:
    """The text "no", of a configuration, would count as True."""
    for attack in (PGD, APGD):
        with pytest.raises(TypeError, match=f"^{name} must be True or False, got "):
            attack(**{name: given})
    with pytest.raises(TypeError, match=r"^fresh_draws must be True or False, got "):
        tiny.defended(fresh_draws=given)


@pytest.mark.parametrize("given", ["8/255", " 8 / 255 ", "8.0/255.", "0.8e1/255", 8 / 255])
def test_fractions_are_understood(given: object) -> None:
    assert PGD(eps=given).eps == 8 / 255
    assert PGD(eps=given) == PGD(eps=8 / 255)
    assert PGD(step_size=given).as_dict()["step_size"] == 8 / 255
    assert preset("pgd-linf", eps=given) == preset("pgd-linf", eps=8 / 255)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"eps": 8}, ValueError, r'^eps must be in \(0, 1\], .* got 8; .* "8/255"'),
        ({"eps": "8"}, ValueError, r'^eps .* got \'8\'; .* "8/255"'),
        ({"eps": 16.0}, ValueError, r'"16/255"'),
        ({"step_size": 2}, ValueError, r'^step_size must be in \(0, 1\], .* "2/255"'),
        ({"eps": "eight"}, TypeError, r"^eps must be a number or a fraction .* 'eight'"),
        ({"eps": "8/0"}, ValueError, r"^eps .* '8/0'"),
        ({"eps": "1e400"}, ValueError, r"^eps .* inf"),
        ({"eps": "-8/255"}, ValueError, r"^eps "),
        ({"eps": "8/255/2"}, TypeError, r"^eps "),
        ({"step_size": "2 of 255"}, TypeError, "^step_size .*'2 of 255'"),
    ],
)
def test_grey_levels_and_other_texts_are_refused(change, error, message: str) -> None:
    with pytest.raises(error, match=message):
        PGD(**change)


def test_an_l2_radius_is_judged_by_the_images() -> None:
    defended, images = tiny.defended("diffpure"), tiny.images(3)  # 192 values: √192 = 13.86
    attack = PGD(norm="L2", eps=0.5, steps=1, eot=1)
    with pytest.raises(ValueError, match=r'ℓ2 .* 192 values .* below 13\.86\).*"128/255"'):
        attack.replace(eps=128)(defended, images, LABELS)
    with pytest.warns(UserWarning, match=r'ℓ2 .* 192 values change by 0\.58 .*"8/255"'):
        attack.replace(eps=8)(defended, images, LABELS)
    attack.replace(eps=3)(defended, images, LABELS)


def test_toml_understands_them(tmp_path: Path) -> None:
    path = tmp_path / "eval.toml"
    text = eval_models.TOML.format(images=6)
    more = 'eps = ["8/255", "4 / 255"]\nstep_size = "2/255"\nnorm = "Linf"\n'
    path.write_text(text.replace("eps = 0.1\n", more))
    attacks = {row.attack for row in from_dict(read_toml(path)).rows if row.attack is not None}
    assert {attack.eps for attack in attacks} == {8 / 255, 4 / 255}
    assert {(attack.norm, attack.step_size) for attack in attacks} == {("linf", 2 / 255)}
    path.write_text(text.replace("eps = 0.1", "eps = 8"))
    with pytest.raises(ValueError, match=r'eps .* got 8; .*"8/255"'):
        from_dict(read_toml(path))


def test_the_command_line_understands_them(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "--attacks", "pgd40", "apgd-ce", "--eps", "8/255", "0.1"]
    args = build_parser().parse_args([*words, "--step-size", "2/255"])
    attacks = {row.attack for row in from_dict(_tables(args)).rows if row.attack is not None}
    assert {attack.eps for attack in attacks} == {8 / 255, 0.1}
    assert {a.step_size for a in attacks if isinstance(a, PGD)} == {2 / 255}
    with pytest.raises(SystemExit):
        build_parser().parse_args(["eval", "--eps", "8/x"])
    assert "--eps: must be a number, got 'x'" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r'"8/255"'):
        from_dict(_tables(build_parser().parse_args(["eval", "--eps", "8"])))
