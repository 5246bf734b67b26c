"""A name that is misspelt is answered with the nearest one that there is."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import tiny
from helpers.eval_models import tables

import coup_fast
from coup_fast import checks
from coup_fast.cli import main
from coup_fast.evaluation.config import from_dict


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["purfy", "a.png", "b.png"], "purify"),
        (["purify", "a.png", "b.png", "--batchsize", "3"], "--batch-size"),
        (["purify", "a.png", "b.png", "--sed=3"], "--seed"),
        (["eval", "--methds", "coup"], "--methods"),
        (["purify", "a.png", "b.png", "--layout", "NWHC"], "nhwc"),
        (["train", "scores", "--data", "d", "--out", "o"], "score"),
    ],
)
def test_misspelt_commands_and_options(
    words: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert f"did you mean {meant!r}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "meant"),
    [
        ({"batchsize": 2}, "batch_size"),
        ({"data": {"nmae": "digits"}}, "name"),
        ({"attack": [{"preset": "pdg40"}]}, "pgd40"),
        ({"attack": [{"preset": "pgd40", "stepz": 3}]}, "steps"),
        ({"defence": [{"method": "Coupp"}]}, "coup"),
        ({"defence": [{"method": "coup", "voet": "logits"}]}, "vote"),
    ],
)
def test_misspelt_keys_of_a_configuration(changes: dict[str, Any], meant: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        from_dict(tables(**changes))


def test_misspelt_names_in_python() -> None:
    model = tiny.score_model()
    for options, meant in (
        ({"method": "difpure"}, "diffpure"),
        ({"t_stra": 0.1}, "t_star"),
        ({"cuda_grpah": True}, "cuda_graph"),
        ({"solver": "eular"}, "euler"),
    ):
        with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
            coup_fast.Purifier(model, tiny.TinyClassifier(), **options)
    with pytest.raises(ValueError, match="did you mean 'mnist'"):
        coup_fast.load_bundled("mnits")


def test_nothing_is_suggested_for_a_name_like_no_other() -> None:
    assert checks.nearest("zebra", ["coup", "diffpure"]) == ""
    assert checks.nearest(3, ["coup"]) == ""
    assert checks.nearest("cop", [True, "coup"]) == "; did you mean 'coup'?"
