"""No half-drawn bars where stderr is no terminal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import digits

from coup_fast.cli import main
from coup_fast.training.trainer import TrainConfig, Trainer


def test_a_log_holds_whole_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "in.npy", digits(1))
    words = ["purify", f"{tmp_path}/in.npy", f"{tmp_path}/out.npy", "--set", "t_star=0.002"]
    assert main(words) == 0
    message = capsys.readouterr().err
    assert "\r" not in message
    assert "%" not in message
    assert "purified 1 image" in message


def test_training_says_what_it_begins_and_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)),
        lambda net, x, y, _: torch.nn.functional.cross_entropy(net(x), y),
        torch.zeros(4, 1, 2, 2, dtype=torch.uint8),
        torch.tensor([0, 1, 0, 1]),
        TrainConfig(steps=2, batch_size=2, precision="float32"),
    ).run()
    message = capsys.readouterr().err
    assert "\r" not in message
    begun, reached = message.splitlines()
    assert begun == "training 2 steps of 2 images, learning rate 0.001, float32"
    assert reached.startswith("step 2 of 2, loss ")
