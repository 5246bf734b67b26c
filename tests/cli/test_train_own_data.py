"""`coup-fast train` on a user's own images: networks that fit, what is written, what is refused."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import pages
from helpers.commands import fails
from helpers.scripts import ROOT
from PIL import Image

from coup_fast.cli import main
from coup_fast.data import Source, read_images
from coup_fast.models import load_network
from coup_fast.training.data import load_data
from coup_fast.training.recipes import recipe_for

QUICK = ("--steps", "2", "--batch-size", "4", "--no-progress", "--precision", "float32")


def fill(folder: Path, names: list[str], shape: tuple[int, ...] = (16, 16, 3)) -> Path:
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return fill(tmp_path / "photos", [f"{'abc'[i % 3]}/{i}.png" for i in range(12)])


def train(task: str, data: Path, out: Path, *more: str) -> dict[str, Any]:
    words = ["train", task, "--data", str(data), "--out", str(out), *QUICK, *more]
    assert main(words) == 0
    network, facts = load_network(out)
    return {**facts, "network": network}


def test_a_classifier_has_the_classes_of_the_folder(photos: Path, tmp_path: Path) -> None:
    facts = train("classifier", photos, tmp_path / "a.safetensors", "--set", "widths=[4]")
    assert facts["classes"] == ["a", "b", "c"]
    assert facts["network"](torch.rand(2, 3, 16, 16)).shape == (2, 3)
    assert facts["images"] == 11
    assert facts["report"]["images"] == 1
    assert facts["size"] == [16, 16]


def test_a_score_network_takes_the_images_as_they_are(photos: Path, tmp_path: Path) -> None:
    facts = train("score", photos, tmp_path / "a.safetensors", "--channels", "4", "8")
    assert facts["network"].config["in_channels"] == 3
    assert facts["kind"] == "eps"
    assert "t_max" not in facts
    grey = ("--color", "grey", "--size", "12x8", "--network", "NAFNet", "--set", "blocks=1")
    facts = train("score", photos, tmp_path / "b.safetensors", *grey, "--channels", "4")
    assert type(facts["network"]).__name__ == "NAFNet"
    assert facts["network"].config["in_channels"] == 1
    assert facts["size"] == [12, 8]
    flat = fill(tmp_path / "flat", ["1.png", "2.png", "3.png", "4.png", "5.png", "6.png"])
    facts = train("ncsn", flat, tmp_path / "c.safetensors", "--channels", "4")
    assert "classes" not in facts


def test_a_run_starts_from_an_existing_file(photos: Path, tmp_path: Path) -> None:
    """After a step of no length, the weights are those of the file."""
    first = tmp_path / "a.safetensors"
    begun = train("score", photos, first, "--channels", "4", "8", "--set", "patch=1")["network"]
    start = ("--init", str(first), "--learning-rate", "1e-30")
    facts = train("score", photos, tmp_path / "b.safetensors", *start)
    assert facts["network"].config == begun.config
    for name, tensor in facts["network"].state_dict().items():
        torch.testing.assert_close(tensor, begun.state_dict()[name], rtol=0, atol=1e-7)
    assert len(facts["init"]) == 64


def test_a_run_can_be_watched_and_resumed(photos: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "a.safetensors", tmp_path / "log"
    words = ("--channels", "4", "--watch", str(log), "--watch-every", "1")
    train("score", photos, out, *words)
    rows = list(csv.DictReader((log / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["1", "2"]
    errors = [name for name in rows[0] if name.startswith("held-out error, t=")]
    assert len(errors) == 8
    assert all(0 < float(row[name]) < 2 for row in rows for name in errors)
    assert sorted(p.name for p in log.glob("*.png")) == ["strip-0000001.png", "strip-0000002.png"]
    with Image.open(log / "strip-0000002.png") as strip:
        assert strip.size == (16, 7 * 16)  # one held-out image
        top = np.asarray(strip)[:16]
    held_out = load_data(Source(str(photos)), "score").held_out.images[0].permute(1, 2, 0)
    assert np.array_equal(top, held_out.numpy())
    train("score", photos, out, *words)  # finished: nothing is added
    assert len((log / "metrics.csv").read_text().splitlines()) == 3
    (log / "metrics.csv").write_text("a,b\n1,2\n")
    assert main(["train", "score", "--data", str(photos), "--out", str(out), *QUICK, *words]) == 2


def test_a_checkpoint_of_other_images_is_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--out", tmp_path / "a.safetensors", *QUICK, "--channels", "4")
    assert main([str(w) for w in ("train", "score", "--data", photos, *words)]) == 0
    fill(photos, ["a/0.png"], (16, 16, 3))
    image = np.asarray(Image.open(photos / "a" / "0.png")).copy()
    Image.fromarray(255 - image).save(photos / "a" / "0.png")
    capsys.readouterr()
    assert "another run: data" in fails(capsys, "train", "score", "--data", photos, *words)


def test_held_out_images_are_never_trained_on(photos: Path, tmp_path: Path) -> None:
    data = load_data(Source(str(photos)), "classifier")
    everything = read_images(Source(str(photos))).images
    both = torch.cat([data.train.images, data.held_out.images]).flatten(1).tolist()
    assert sorted(both) == sorted(everything.flatten(1).tolist())
    names = [f"{split}/a/{i}.png" for split in ("train", "val") for i in range(3)]
    split = load_data(Source(str(fill(tmp_path / "split", names))), "score")
    assert (len(split.train.images), len(split.held_out.images)) == (3, 3)
    assert split.split == "validation"


@pytest.mark.parametrize(
    ("task", "shape", "network", "arguments"),
    [
        ("score", (3, 32, 32), "UNet", {"channels": [64, 128, 128], "patch": 2}),
        ("score", (1, 28, 28), "UNet", {"channels": [32, 64], "patch": 2}),
        ("score", (3, 128, 64), "UNet", {"channels": [64, 128, 128, 128], "patch": 2}),
        ("score", (3, 30, 30), "UNet", {"channels": [64, 128], "patch": 1}),
        ("ncsn", (3, 20, 20), "UNet", {"channels": [64, 128], "time_conditioned": False}),
        ("classifier", (3, 32, 32), "ConvNet", {"widths": [64, 128, 256], "num_classes": 7}),
        ("classifier", (1, 224, 8), "ConvNet", {"widths": [64]}),
    ],
)
def test_a_recipe_suits_the_shape(
    task: str, shape: tuple[int, int, int], network: str, arguments: dict[str, Any]
) -> None:
    recipe = recipe_for("photos", task, None, shape, 7)
    assert recipe.network == network
    assert arguments.items() <= recipe.arguments.items()
    from coup_fast.models.network_files import build_network

    model = build_network(recipe.network, recipe.arguments).eval()
    time = [] if task == "classifier" else [torch.ones(1)]
    result = model(torch.zeros(1, *shape), *time)
    assert result.shape == ((1, 7) if task == "classifier" else (1, *shape))


def test_wrong_requests_are_one_sentence(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = fill(tmp_path / "flat", ["1.png", "2.png"])
    one = fill(tmp_path / "one", ["1.png"])
    only_test = fill(tmp_path / "only", ["test/a/1.png", "val/a/1.png"])
    same = fill(tmp_path / "same", ["a/1.png", "a/2.png"])
    file = tmp_path / "vp.safetensors"
    train("score", photos, file, "--channels", "4")
    capsys.readouterr()
    for task, data, words, message in (
        ("classifier", flat, (), "no labels, and a classifier needs them"),
        ("classifier", same, (), "one class only"),
        ("score", one, (), "1 image; one is held out"),
        ("score", only_test, (), "no split 'train'"),
        ("score", photos, ("--network", "ConvNet"), "network of score must be one of UNet, NAFNet"),
        ("score", photos, ("--set", "width=3"), "a UNet has no 'width'; it takes in_channels"),
        ("score", photos, ("--size", "33"), "33x33: give --size 32x32"),
        ("score", photos, ("--set", "patch=5"), "cannot take images of 3x16x16"),
        ("classifier", photos, ("--size", "4"), "--size 8"),
        ("classifier", photos, ("--network", "Classifier", "--size", "8x16"), "takes squares"),
        ("classifier", photos, ("--channels", "4"), "--set widths=[64,128]"),
        ("score", photos, ("--batch-size", "99"), "fewer than one batch of 99"),
        ("score", photos, ("--watch-every", "9"), "--watch-every is about --watch"),
        ("score", photos, ("--dataset", "imagenet"), "'imagenet' is none of"),
        ("score", photos, ("--dataset", "cifar10"), r"no data_batch_1.bin"),
        ("classifier", photos, ("--init", file), "a VP score network; a classifier is needed"),
        ("score", photos, ("--init", file, "--channels", "8"), "channels [4], here [8]"),
        ("score", photos, ("--init", file, "--color", "grey"), "in_channels 3, here 1"),
        ("score", photos, ("--init", file, "--network", "NAFNet"), "NAFNet was asked for"),
    ):
        out = tmp_path / "x.safetensors"
        argv = ("train", task, "--data", data, "--out", out, *QUICK, *words)
        assert message in fails(capsys, *argv), words
        assert not out.exists()


def test_the_page_on_own_data_is_true(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "your_data.md").read_text(encoding="utf-8")
    reading, models = (block.text for block in pages.blocks(page) if block.language == "python")
    names: dict[str, Any] = {}
    exec(reading, names)
    assert names["found"].classes == ("a", "b", "c")
    train("score", photos, Path("score.safetensors"), "--channels", "4")
    train("classifier", photos, Path("classifier.safetensors"), "--set", "widths=[4]")
    Path("my_models.py").write_text(models)
    words = ["eval", "--models", "./my_models.py:load", "--data", "photos", "--methods", "coup"]
    words += ["--images", "2", "--draws", "1", "--set", "num_steps=1", "--steps", "1"]
    assert main([*words, "--eot", "1", "--no-controls", "--out", "results", "--no-progress"]) == 0
    assert "coup" in Path("results/report.csv").read_text().lower()
    bad = [*words, "--size", "33", "--out", "other"]
    assert main(bad) in (1, 2)
