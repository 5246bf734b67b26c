"""Models, images and labels as users have them: understood, or one sentence with what to write."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import eval_models
from torch import Tensor

from coup_fast.evaluation import evaluate
from coup_fast.evaluation.config import Data, from_dict
from coup_fast.evaluation.report import Report
from coup_fast.evaluation.sources import load_images, model_loader

TABLES = eval_models.tables(4, defence=[{"method": "none"}], attack=[], draws=1)
IMAGES, LABELS = eval_models.images(4)


def run(out: Path, models: Any = eval_models.load, data: Any = (IMAGES, LABELS)) -> Report:
    report = evaluate(from_dict(TABLES), out, models=models, data=data)
    assert report is not None
    return report


def test_a_pair_of_models_is_a_loader(tmp_path: Path) -> None:
    pair = eval_models.load("vp")
    assert run(tmp_path / "a", pair).csv() == run(tmp_path / "b").csv()
    adp = from_dict(TABLES | {"defence": [{"method": "adp"}]})
    with pytest.raises(ValueError, match="adp needs a network of kind ncsn"):
        evaluate(adp, tmp_path / "c", models=pair, data=(IMAGES, LABELS))


def test_models_that_are_none_say_what_to_write(tmp_path: Path) -> None:
    score_model, classifier = eval_models.load("vp")
    network = score_model.network
    for models in ((network, classifier), lambda score: (network, classifier)):
        with pytest.raises(TypeError, match=re.escape("(coup_fast.ScoreModel(network")) as error:
            run(tmp_path, models)
        assert "(ScoreModel, classifier), got (Faulty, PerSample)" in str(error.value)
    for wrong in (score_model, (score_model,), (score_model, 3), "mnist", lambda score: None):
        with pytest.raises(TypeError, match=r"\(ScoreModel, classifier\), got"):
            run(tmp_path, wrong)
    assert not list(tmp_path.iterdir())


def test_models_may_be_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.py").write_text("from helpers.eval_models import load\nthree = 3\n")
    monkeypatch.chdir(tmp_path)
    device = torch.device("cpu")
    for name in ("./m.py:load", f"{tmp_path}/m.py:load"):
        assert model_loader(name, device)("vp")[0].kind == "eps"
    with pytest.raises(
        ImportError, match=r"models './n.py:load': ./n.py is not a file .relative to the cur"
    ):
        model_loader("./n.py:load", device)
    with pytest.raises(ValueError, match=r"m.py has no function 'three'"):
        model_loader("m.py:three", device)


def test_arrays_are_understood(tmp_path: Path) -> None:
    arrays = (IMAGES.numpy(), LABELS.numpy().astype(np.int16))
    assert run(tmp_path / "a", data=arrays).csv() == run(tmp_path / "b").csv()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES[:, 0], LABELS, r"\[4, 8, 8\] and \[4\]; .* write images\[:, None\]"),
        (IMAGES.permute(0, 2, 3, 1), LABELS, r"write images.(transpose|permute)\(0, 3, 1, 2\)"),
        (IMAGES, LABELS[:, None], r"\[4, 1\]; .* write labels\[:, 0\]"),
        (IMAGES, torch.eye(4)[LABELS].long(), r"write labels\.argmax\(1\)"),
        (IMAGES, LABELS[:3], r"got \[4, 3, 8, 8\] and \[3\]"),
    ],
)
def test_other_shapes_say_what_to_write(
    tmp_path: Path, images: Tensor, labels: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, data=(images, labels))
    np.savez(tmp_path / "data.npz", images=images.numpy(), labels=labels.numpy())
    with pytest.raises(ValueError, match=message):
        load_images(Data(str(tmp_path / "data.npz"), 4))


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (
            (IMAGES * 255).to(torch.uint8),
            LABELS,
            TypeError,
            r"uint8; .*float\(\) / 255",
        ),
        (IMAGES * 255, LABELS, ValueError, "images / 255"),
        (IMAGES * torch.nan, LABELS, ValueError, "NaN"),
        (IMAGES, LABELS.float(), TypeError, "whole numbers, got torch.float32"),
        (IMAGES[:3], LABELS[:3], ValueError, "3 images, .* asks for 4"),
        ("cats", LABELS, TypeError, "images of data .* got str"),
        (IMAGES, torch.tensor([0, 1, 2, 4]), ValueError, "0 to 3, got 0 to 4"),
        (IMAGES, torch.tensor([0, 1, 2, -1]), ValueError, "0 to 3, got -1 to 2"),
    ],
)
def test_other_values_say_what_to_write(
    tmp_path: Path, images: Any, labels: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(tmp_path, data=(images, labels))
    assert not list(tmp_path.glob("state/batch-*"))


def test_data_that_is_no_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"data must be \(images, labels\), got Tensor"):
        run(tmp_path, data=IMAGES)
