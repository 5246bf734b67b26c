"""`coup-fast purify`: layouts, shapes, files and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import digits, fails
from PIL import Image

import coup_fast
from coup_fast.cli import common, main
from coup_fast.cli.fitting import Fit
from coup_fast.cli.folders import RECORD
from coup_fast.cli.image_files import ImageFile, choose_layout
from coup_fast.integrations.pictures import picture_id, to_whole_numbers

MNIST = Fit(1, 28, 28)
CIFAR = Fit(3, 32, 32)
QUICK = ("--set", "t_star=0.002")  # COUP in two steps

# --- purify: layouts and shapes


@pytest.mark.parametrize(
    ("fit", "shape", "layout"),
    [
        (MNIST, (5, 1, 28, 28), "nchw"),
        (MNIST, (5, 28, 28, 1), "nhwc"),
        (CIFAR, (5, 3, 32, 32), "nchw"),
        (CIFAR, (3, 32, 32, 3), "nhwc"),
        (Fit(1, 28, 28, convert_color=True), (5, 28, 28, 3), "nhwc"),
    ],
)
def test_the_axis_of_the_networks_channels_decides(
    fit: Fit, shape: tuple[int, ...], layout: str
) -> None:
    assert choose_layout(shape, fit, "auto", "batch") == layout


@pytest.mark.parametrize(
    ("fit", "shape", "words"),
    [
        (CIFAR, (5, 3, 32, 3), "--layout"),
        (MNIST, (5, 3, 28, 28), "neither"),
        (CIFAR, (5, 1, 28, 28), "takes 3 channels"),
    ],
)
def test_open_layouts_are_refused(fit: Fit, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(common.CommandError, match=words):
        choose_layout(shape, fit, "auto", "batch")
    assert choose_layout(shape, fit, "nhwc", "batch") == "nhwc"


def test_shapes_that_do_not_fit_name_both() -> None:
    with pytest.raises(common.CommandError, match=r"1x32x32.*1x28x28.*--resize"):
        MNIST.check((1, 32, 32), "picture")
    with pytest.raises(common.CommandError, match=r"3x28x28.*1x28x28.*--convert-color"):
        MNIST.check((3, 28, 28), "picture")
    with pytest.raises(common.CommandError, match=r"2x28x28.*1x28x28$"):
        MNIST.check((2, 28, 28), "picture")


def test_fitting_there_and_back() -> None:
    fit = Fit(1, 14, 14, convert_color=True, resize=True)
    grey = torch.rand(2, 1, 28, 28)
    assert torch.allclose(fit.to_network(grey.expand(-1, 3, -1, -1)), fit.to_network(grey))
    inside = fit.to_network(grey)
    assert inside.shape == (2, 1, 14, 14)
    back = fit.from_network(inside, (3, 28, 28))
    assert back.shape == (2, 3, 28, 28)
    assert torch.equal(back[:, 0], back[:, 2])
    assert float(back.min()) >= 0
    assert float(back.max()) <= 1
    same = Fit(3, 28, 28)
    image = torch.rand(2, 3, 28, 28)
    assert torch.equal(same.from_network(same.to_network(image), (3, 28, 28)), image)


def test_eight_bits_survive_the_round_trip_and_clipping_is_counted() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_whole_numbers(values.float() / 255)[0], values)
    clipped, count = to_whole_numbers(torch.tensor([-0.1, 0.5, 1.2]))
    assert clipped.tolist() == [0, 128, 255]
    assert count == 2


# --- purify: files


def expected(images: np.ndarray, **options: Any) -> torch.Tensor:
    """What the library itself makes of [B, 1, 28, 28] images."""
    score_model, classifier = coup_fast.load_bundled("mnist")
    return coup_fast.purify(
        torch.from_numpy(images), score_model, classifier, t_star=0.002, **options
    )


def test_npy_batches_keep_shape_and_dtype(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = digits(3)
    np.save(tmp_path / "in.npy", images.transpose(0, 2, 3, 1))
    argv = ["purify", f"{tmp_path}/in.npy", f"{tmp_path}/out.npy", "--seed", "5", "--draw", "2"]
    assert main([*argv, "--batch-size", "2", *QUICK]) == 0
    result = np.load(tmp_path / "out.npy")
    assert result.shape == (3, 28, 28, 1)
    assert result.dtype == np.float32
    want = expected(images, seed=5, draw=2).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(result, want, atol=1e-4)
    message = capsys.readouterr().err
    assert "read as NHWC" in message
    assert "purified 3 images with coup (2 steps, seed 5, draw 2" in message


def test_bundled_settings_are_a_start_for_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from coup_fast.models import bundled

    chosen = {"mnist": {"methods": {"coup": {"t_star": 0.003}}}}
    monkeypatch.setattr(bundled, "_SETTINGS", chosen)
    np.save(tmp_path / "in.npy", digits(1))
    for options, steps in (([], 3), (["--set", "num_steps=1"], 1)):
        argv = ["purify", f"{tmp_path}/in.npy", f"{tmp_path}/out.npy", "--force", *options]
        assert main([*argv, "--bundled-settings"]) == 0
        assert f"with coup ({steps} step" in capsys.readouterr().err


def test_npz_carries_the_other_arrays(tmp_path: Path) -> None:
    images = (255 * digits(2)).astype(np.uint8)
    np.savez(tmp_path / "in.npz", x=images, y=np.array([3, 4]))
    assert main(["purify", f"{tmp_path}/in.npz", f"{tmp_path}/out.npz", *QUICK]) == 0
    result = np.load(tmp_path / "out.npz")
    assert result["y"].tolist() == [3, 4]
    assert result["x"].dtype == np.uint8
    want = expected(images.astype(np.float32) / 255).mul(255).round().numpy()
    assert np.abs(result["x"].astype(int) - want).max() <= 1


def test_pictures_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in", tmp_path / "deep" / "out"
    source.mkdir()
    pixels = (255 * digits(2)[:, 0]).astype(np.uint8)
    Image.fromarray(pixels[0]).save(source / "a.png")
    Image.fromarray(pixels[1]).save(source / "b.bmp")
    (source / "notes.txt").write_text("no picture")
    assert main(["purify", str(source), str(target), *QUICK]) == 0
    assert sorted(path.name for path in target.iterdir()) == ["a.png", "b.bmp", RECORD]
    purifier = coup_fast.Purifier(*coup_fast.load_bundled("mnist"), method="coup", t_star=0.002)
    ids = [picture_id("a.png"), picture_id("b.bmp")]
    scaled = torch.from_numpy(pixels[:, None].astype(np.float32) / 255)
    want = purifier(scaled, sample_ids=ids).mul(255).round().numpy()
    for name, wanted in zip(("a.png", "b.bmp"), want, strict=True):
        with Image.open(target / name) as image:
            assert image.mode == "L"
            assert np.abs(np.asarray(image).astype(int) - wanted[0]).max() <= 1
    message = capsys.readouterr().err
    assert "1 other file left out" in message
    assert "--force" in fails(capsys, "purify", source, target, *QUICK)
    assert main(["purify", str(source), str(target), "--force", *QUICK]) == 0


def test_colour_alpha_and_size_take_their_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(1)
    rgba = generator.integers(0, 256, (40, 30, 4), dtype=np.uint8)
    path, out = tmp_path / "in.png", tmp_path / "out.png"
    Image.fromarray(rgba).save(path)
    assert "--alpha" in fails(capsys, "purify", path, out)
    assert "--convert-color" in fails(capsys, "purify", path, out, "--alpha", "keep")
    options = ["--alpha", "keep", "--convert-color"]
    assert "--resize" in fails(capsys, "purify", path, out, *options)
    assert main(["purify", str(path), str(out), *options, "--resize", *QUICK]) == 0
    with Image.open(out) as image:
        result = np.asarray(image)
    assert result.shape == rgba.shape
    assert np.array_equal(result[:, :, 3], rgba[:, :, 3])
    assert np.array_equal(result[:, :, 0], result[:, :, 2])  # a grey network made it grey
    jpeg = tmp_path / "out.jpg"
    assert ".jpg" in fails(capsys, "purify", path, jpeg, *options, "--resize")
    options = ["--alpha", "drop", "--convert-color", "--resize"]
    assert main(["purify", str(path), str(jpeg), *options, *QUICK]) == 0
    assert "lossy" in capsys.readouterr().err
    with Image.open(jpeg) as image:
        assert image.size == (30, 40)


def test_a_folder_goes_on_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures keep their sample ids, so the results are those of a run that nobody stopped."""
    source, whole, target = (tmp_path / name for name in ("in", "whole", "out"))
    source.mkdir()
    for i, pixels in enumerate((255 * digits(5)[:, 0]).astype(np.uint8)):
        Image.fromarray(pixels).save(source / f"{i}.png")
    words = ["purify", str(source), str(target), "--batch-size", "1", *QUICK]
    assert main([*words[:2], str(whole), *words[3:]]) == 0
    write = ImageFile.write

    def stop_at_the_fourth(picture: ImageFile, purified: torch.Tensor) -> int:
        if picture.target.name == "3.png":
            raise KeyboardInterrupt
        return write(picture, purified)

    monkeypatch.setattr(ImageFile, "write", stop_at_the_fourth)
    assert main(words) == 130
    assert "3 of 5 results are written; --resume continues" in capsys.readouterr().err
    monkeypatch.undo()
    (target / "0.png").unlink()
    assert main([*words, "--resume"]) == 0
    assert "2 of 5 results are there" in capsys.readouterr().err
    assert len(list(whole.glob("*.png"))) == 5
    for path in whole.glob("*.png"):
        assert (target / path.name).read_bytes() == path.read_bytes()
    assert main([*words, "--resume"]) == 0  # with nothing left to do
    assert "--force" in fails(capsys, *words, "--resume", "--force")


def test_an_ending_that_says_grey_takes_no_colours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "in.png")
    words = ["purify", tmp_path / "in.png", tmp_path / "out.pgm", "--bundled", "cifar10", *QUICK]
    assert ".pgm" in fails(capsys, *words)


def test_a_failed_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "in.npy", digits(1))
    (tmp_path / "out.npy").write_text("old")

    def full(file: Any, array: np.ndarray) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    argv = ["purify", f"{tmp_path}/in.npy", f"{tmp_path}/out.npy", "--force", *QUICK]
    assert main(argv) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert (tmp_path / "out.npy").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npy", "out.npy"]


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("three.npy", np.zeros((3, 28, 28), np.float32), "four dimensions"),
        ("empty.npy", np.zeros((0, 1, 28, 28), np.float32), "none zero"),
        ("range.npy", np.full((1, 1, 28, 28), 1.5, np.float32), r"outside [0, 1]"),
        ("nan.npy", np.full((1, 1, 28, 28), np.nan, np.float32), "NaN"),
        ("int.npy", np.zeros((1, 1, 28, 28), np.int64), "dtype int64"),
        ("size.npy", np.zeros((1, 1, 32, 32), np.float32), "1x28x28"),
        ("channels.npy", np.zeros((1, 3, 28, 28), np.float32), "1 channel,"),
    ],
)
def test_batches_that_cannot_be_purified(
    name: str,
    array: np.ndarray,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    np.save(tmp_path / name, array)
    assert words in fails(capsys, "purify", tmp_path / name, tmp_path / "out.npy")
    assert not (tmp_path / "out.npy").exists()


def test_files_that_cannot_be_purified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "text.doc").write_text("no idea")
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "two.npz", a=digits(1), b=digits(1))
    np.save(tmp_path / "one.npy", digits(1))
    np.save(tmp_path / "again.npy", digits(1))
    Image.fromarray(np.zeros((28, 28), np.int32)).save(tmp_path / "deep.tif")
    cases: list[tuple[str, str, list[str], str]] = [
        ("none.png", "out.png", [], "does not exist"),
        ("text.png", "out.png", [], "not an image"),
        ("text.npy", "out.npy", [], "NumPy"),
        ("text.doc", "out.doc", [], "neither a folder"),
        ("empty", "out", [], "no image files"),
        ("two.npz", "out.npz", [], "--key"),
        ("two.npz", "out.npz", ["--key", "c"], "no array 'c'"),
        ("one.npy", "out.npy", ["--key", "a"], ".npz"),
        ("one.npy", "out.npz", [], ".npy"),
        ("one.npy", "again.npy", [], "--force"),
        ("one.npy", "one.npy", ["--force"], "the same file"),
        ("one.npy", "out.npy", ["--method", "coop"], "coup"),
        ("one.npy", "out.npy", ["--set", "t_stra=1"], "t_star"),
        ("one.npy", "out.npy", ["--set", "t_star"], "key=value"),
        ("one.npy", "out.npy", ["--bundled", "imagenet"], "mnist"),
        ("deep.tif", "out.tif", [], "mode I"),
    ]
    for source, target, options, words in cases:
        sentence = fails(capsys, "purify", tmp_path / source, tmp_path / target, *options)
        assert words in sentence, sentence
    assert not out.exists()
