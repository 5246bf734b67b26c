"""What an evaluation refuses, and what it says while it works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import eval_models
from torch import Tensor, nn

from coup_fast.cli import main
from coup_fast.evaluation.config import Data, from_dict
from coup_fast.evaluation.evaluate import evaluate
from coup_fast.evaluation.sources import load_images, model_loader
from coup_fast.evaluation.state import EvaluationError


class Crashing(nn.Module):
    """A classifier that takes no image of these."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError(f"mat1 and mat2 do not fit:\n{list(x.shape)}")


def test_what_a_network_raises_is_one_sentence(tmp_path: Path) -> None:
    def load(score: str) -> Any:
        return eval_models.load(score)[0], Crashing()

    config, data = from_dict(eval_models.tables()), eval_models.images(6)
    with pytest.raises(EvaluationError, match=r"fit: \[2, 3, 8, 8\]: undefended, clean"):
        evaluate(config, tmp_path, models=load, data=data)


def test_networks_and_labels_that_do_not_fit_the_images(tmp_path: Path) -> None:
    pixels, labels = eval_models.images(6)
    config = from_dict(eval_models.tables())

    def narrow(score: str) -> Any:
        score_model, classifier = eval_models.load(score)
        classifier.in_channels = 1
        return score_model, classifier

    with pytest.raises(ValueError, match=r"classifier .* 1 channels, got 3"):
        evaluate(config, tmp_path, models=narrow, data=(pixels, labels))
    with pytest.raises(ValueError, match=r"labels .* 0 to 3, got 9 to 11"):
        evaluate(config, tmp_path, models=eval_models.load, data=(pixels, labels + 9))
    assert not list((tmp_path / "state").glob("batch-*"))


def test_progress_within_a_batch(tmp_path: Path) -> None:
    heard: list[str] = []
    config = from_dict(eval_models.tables(count=2))
    images = eval_models.images(2)
    evaluate(config, tmp_path, models=eval_models.load, data=images, say=heard.append, interval=0)
    row = "  COUP, PGD-2 ce, EOT 2, exact gradient"
    inside = [line.rpartition(" (")[0] for line in heard if row in line]
    parts = [f"iterate {k} of 2" for k in (1, 2)] + [f"draw {k} of 3" for k in (1, 2, 3)]
    parts += [f"8 bits, draw {k} of 3" for k in (1, 2, 3)]
    assert inside[:-1] == [f"5/7{row}: {part}" for part in parts]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": 0}, "images and labels.*'pictures'"),
        ({"images": np.zeros((4, 8, 8)), "labels": np.zeros(4, int)}, r"images .*got \[4, 8, 8\]"),
        ({"images": np.zeros((4, 3, 8, 8), int), "labels": np.zeros(4, int)}, "images .*int64"),
        ({"images": np.full((4, 3, 8, 8), 2.0), "labels": np.zeros(4, int)}, r"images .*\[0, 1\]"),
        ({"images": np.zeros((4, 3, 8, 8)), "labels": np.zeros(4)}, "labels .*float64"),
        (None, r"images\.npz cannot be read"),
    ],
)
def test_files_of_images_that_hold_something_else(
    arrays: dict | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "images.npz"
    if arrays is None:
        path.write_text("text")
    else:
        np.savez(path, **arrays)
    with pytest.raises((ValueError, TypeError), match=message):
        load_images(Data(str(path), images=2))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        load_images(Data("nowhere.npz"))


def test_models_are_named_by_a_function_that_returns_both() -> None:
    load = model_loader("json:dumps", torch.device("cpu"))
    with pytest.raises(TypeError, match=r"dumps\('vp'\) .* got str"):
        load("vp")
    with pytest.raises(ImportError, match="'no_such_module:f'"):
        model_loader("no_such_module:f", torch.device("cpu"))


def test_a_folder_holds_the_data_set_of_the_bundled_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--models", "cifar10", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(["eval", *words]) == 2
    assert "test_batch.bin" in capsys.readouterr().err
