"""`coup-fast train` from arguments to weights files, on a handful of random images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coup_fast.cli import main
from coup_fast.data import Labelled, Source
from coup_fast.models import load_network
from coup_fast.training import runs
from coup_fast.training.data import TrainingData


@pytest.fixture
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_data(source: Source, task: str) -> TrainingData:
        rng = torch.Generator().manual_seed(0)
        side = (1, 28, 28) if source.name == "mnist" else (3, 32, 32)
        images = torch.randint(0, 256, (12, *side), generator=rng).to(torch.uint8)
        found = Labelled(images, torch.arange(12) % 10)
        return TrainingData(found, found, "test")

    monkeypatch.setattr(runs, "load_data", load_data)


SMALL = [
    "--dataset",
    "mnist",
    "--data",
    "unused",
    "--steps",
    "3",
    "--batch-size",
    "4",
    "--no-progress",
]


@pytest.mark.usefixtures("small_data")
@pytest.mark.parametrize(
    ("arguments", "kind", "network"),
    [
        (["score", "--channels", "4", "8"], "eps", "UNet"),
        (["ncsn", "--channels", "4", "8", "--half"], "ncsn", "UNet"),
        (["score", "--energy", "--channels", "4"], "score", "EnergyUNet"),
        (["ncsn", "--energy", "--channels", "4"], "ncsn", "EnergyUNet"),
        (["classifier"], "classifier", "Classifier"),
        (["score", "--dataset", "cifar10", "--channels", "4", "4"], "eps", "UNet"),
        (
            ["score", "--dataset", "cifar10", "--network", "NAFNet", "--channels", "4", "4"],
            "eps",
            "NAFNet",
        ),
        (
            ["score", "--dataset", "cifar10", "--large", "--channels", "4", "4"],
            "eps",
            "UNet",
        ),
        (["classifier", "--dataset", "cifar10"], "classifier", "ConvNet"),
    ],
)
def test_each_task_writes_a_network_that_can_be_loaded(
    arguments: list[str], kind: str, network: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out.safetensors"
    assert main(["train", *SMALL, *arguments, "--out", str(out)]) == 0
    loaded, facts = load_network(out)
    assert type(loaded).__name__ == network
    assert facts["kind"] == kind
    assert facts["training"]["steps"] == 3
    printed = capsys.readouterr().out
    assert printed.startswith("3 steps of 4 images from 12, ")
    assert (" accuracy " in printed) == (kind == "classifier")
    before = out.read_bytes()
    assert main(["train", *SMALL, *arguments, "--out", str(out)]) == 0  # from its checkpoint
    assert out.read_bytes() == before


@pytest.mark.usefixtures("small_data")
def test_wrong_requests_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ["--out", str(tmp_path / "out.safetensors")]
    assert main(["train", "classifier", "--energy", *SMALL, *out]) == 2
    assert "--energy" in capsys.readouterr().err
    assert main(["train", "score", "--network", "NAFNet", *SMALL, *out]) == 2
    assert "NAFNet in mnist score" in capsys.readouterr().err
    words = ["--dataset", "cifar10", "--network", "NAFNet", "--energy"]
    assert main(["train", "score", *SMALL, *words, *out]) == 2
    assert "energy" in capsys.readouterr().err
    assert main(["train", "score", "--large", *SMALL, *out]) == 2
    assert "no large network for mnist score" in capsys.readouterr().err
    assert main(["train", "classifier", *SMALL, *out]) == 0
    assert main(["train", "classifier", *SMALL, *out, "--seed", "1"]) == 2
    assert "seed (0, now 1)" in capsys.readouterr().err
    fast = ["--seed", "2", "--learning-rate", "1e30", "--out", str(tmp_path / "b.safetensors")]
    assert main(["train", "score", *SMALL, "--channels", "4", *fast]) == 2
    assert "lower the learning rate" in capsys.readouterr().err
    cifar = ["--dataset", "cifar10", "--out", str(tmp_path / "c.safetensors")]
    assert main(["train", "classifier", *SMALL, *cifar]) == 0
    begun = ["--init", str(tmp_path / "c.safetensors")]
    cifar[-1] = str(tmp_path / "d.safetensors")
    assert main(["train", "classifier", *SMALL, *cifar, *begun]) == 2
    assert "learning rate of 0.75 is that of a new network" in capsys.readouterr().err
    assert main(["train", "classifier", *SMALL, *cifar, *begun, "--learning-rate", "0.01"]) == 0
    assert main(["train", "classifier", *SMALL, *cifar, "--learning-rate", "0.01"]) == 2
    assert "another run: init ('" in capsys.readouterr().err
    for words, message in (
        (["--device", "meta"], "--device meta"),
        (["--out", "a.txt"], "--out a.txt"),
        (["--out", "no/a.safetensors"], "no is not a folder"),
        (["--init", "no.safetensors"], "--init no.safetensors is not a file"),
    ):
        assert main(["train", "ncsn", *SMALL, *out, "--force", *words]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "out.safetensors.checkpoint").unlink()
    assert main(["train", "classifier", *SMALL, *out]) == 2
    assert "out.safetensors.checkpoint" in capsys.readouterr().err
    monkeypatch.undo()
    out.append("--force")
    nowhere = ["--data", str(tmp_path / "nowhere"), "--no-progress"]
    assert main(["train", "classifier", *nowhere, *out]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    assert main(["train", "classifier", "--dataset", "mnist", *nowhere, *out]) == 2
    assert "train-images-idx3-ubyte" in capsys.readouterr().err
