"""Users' own pictures: every kind of file, in Python and from the command line."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import fails
from PIL import Image

import coup_fast
from coup_fast.cli import main
from coup_fast.integrations.pictures import picture_id, purify_image, read_picture
from coup_fast.models import Classifier, UNet, save_network

RGB = np.random.default_rng(0).integers(0, 256, (18, 27, 3), dtype=np.uint8)
QUICK = ("--method", "diffpure", "--set", "num_steps=1")


KIND = {"kind": "classifier"}  # as coup-fast train writes it


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a user's own networks, as `coup-fast train` writes them."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    save_network(folder / "rgb.safetensors", UNet(3, (8,)), {"kind": "eps"})
    save_network(folder / "halving.safetensors", UNet(3, (8, 8)), {"kind": "eps"})
    save_network(folder / "grey.safetensors", UNet(1, (8,)), {"kind": "eps"})
    save_network(folder / "classifier.safetensors", Classifier(3, size=16, width=4, hidden=8), KIND)
    return folder


def purifier(channels: int = 3) -> coup_fast.Purifier:
    torch.manual_seed(0)
    return coup_fast.Purifier(
        coup_fast.ScoreModel(UNet(channels, (8,))), method="diffpure", num_steps=1
    )


def pixels_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# --- in Python


def test_three_lines_of_python(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "in.png")
    ours = purifier()
    purify_image(tmp_path / "in.png", ours).save(tmp_path / "out.png")
    tensor = torch.from_numpy(RGB).permute(2, 0, 1)[None].float() / 255
    want = (ours(tensor)[0].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    with Image.open(tmp_path / "out.png") as image:
        assert image.mode == "RGB"
        assert np.abs(pixels_of(image) - want).max() <= 1
    again = purify_image(Image.fromarray(RGB), ours, draw=1)
    assert np.abs(pixels_of(again) - want).max() > 1


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "1", "P"])
def test_pictures_come_back_in_their_size_and_mode(mode: str) -> None:
    image = Image.fromarray(RGB).convert(mode)
    result = purify_image(image, purifier(), convert_color=True)
    assert result.size == image.size
    assert result.mode == {"1": "L", "P": "RGB"}.get(mode, mode)
    if mode.endswith("A"):
        assert np.array_equal(np.asarray(result)[:, :, -1], np.asarray(image)[:, :, -1])


def test_sixteen_bits_of_grey_are_kept() -> None:
    deep = np.random.default_rng(1).integers(0, 65536, (8, 8), dtype=np.uint16)
    picture = read_picture(Image.fromarray(deep))
    assert picture.bits == 16
    assert picture.pixels.max() <= 1
    same, clipped = picture.image(picture.pixels)
    assert np.array_equal(np.asarray(same), deep)
    assert clipped == 0
    assert purify_image(Image.fromarray(deep), purifier(1)).mode == "I;16"


def test_the_network_sees_the_size_that_is_asked_for() -> None:
    seen = []
    ours = purifier()
    ours.score_model.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    assert purify_image(Image.fromarray(RGB), ours).size == (27, 18)
    assert purify_image(Image.fromarray(RGB), ours, resize=(16, 12)).size == (27, 18)
    assert seen == [(1, 3, 18, 27), (1, 3, 16, 12)]


def test_pictures_that_cannot_be_purified() -> None:
    cmyk = Image.fromarray(RGB).convert("CMYK")
    floats = Image.fromarray(RGB[:, :, 0].astype(np.float32))
    grey = Image.fromarray(RGB[:, :, 0])
    for image, words in ((cmyk, "CMYK"), (floats, "mode F"), (grey, "convert_color=True")):
        with pytest.raises(ValueError, match=words):
            purify_image(image, purifier())


def test_meta_data_and_remarks(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the pixels are stored on their side
    image = Image.fromarray(RGB)
    image.save(tmp_path / "turned.jpg", exif=exif, icc_profile=b"profile")
    image.save(tmp_path / "two.jpg", format="MPO", save_all=True, append_images=[image])
    with Image.open(tmp_path / "turned.jpg") as opened:
        picture = read_picture(opened)
    assert picture.keep["icc_profile"] == b"profile"
    upright = purify_image(tmp_path / "turned.jpg", purifier())
    assert upright.size == (18, 27)
    assert upright.info["icc_profile"] == b"profile"
    with Image.open(tmp_path / "two.jpg") as opened:
        assert "holds 2 pictures" in read_picture(opened).remarks[0]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)  # 2x2, 16 bits a channel, RGB
    body = zlib.compress((b"\0" + bytes(12)) * 2)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    with Image.open(tmp_path / "deep.png") as opened:
        assert "16 bits a channel" in read_picture(opened).remarks[0]


# --- from the command line


def test_a_users_own_networks(
    networks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in.png", tmp_path / "out.png"
    Image.fromarray(RGB).save(source)
    score = ("--score", networks / "rgb.safetensors")
    words = [str(word) for word in ("purify", source, out, *score, *QUICK)]
    assert main(words) == 0
    ours = purifier()
    with Image.open(out) as image:
        assert np.abs(pixels_of(image) - pixels_of(purify_image(source, ours))).max() <= 1
    assert "--size" in fails(capsys, "purify", source, out, "--force", *score, *QUICK, "--resize")
    assert main([*words, "--force", "--resize", "--size", "12x16"]) == 0
    guided = ("--force", *score, "--set", "num_steps=1")
    assert "--classifier" in fails(capsys, "purify", source, out, *guided)
    guided = (*guided, "--classifier", networks / "classifier.safetensors")
    assert "3x16x16" in fails(capsys, "purify", source, out, *guided)
    assert main([str(w) for w in ("purify", source, out, *guided, "--resize")]) == 0
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(source, exif=exif)
    assert main([*words, "--force"]) == 0
    with Image.open(out) as image:  # stored as it was, and turned as it was
        assert (image.size, image.getexif()[0x0112]) == ((27, 18), 6)


def test_a_folder_of_pictures_of_all_sizes(
    networks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures of one size share a batch; noise goes by the name in the folder all the same."""
    source = tmp_path / "in"
    source.mkdir()
    for k, size in enumerate([(9, 7), (9, 7), (5, 8), (9, 7)]):
        Image.fromarray(RGB[: size[0], : size[1]]).save(source / f"{k}.png")
    score = ["--score", str(networks / "rgb.safetensors")]
    assert main(["purify", str(source), str(tmp_path / "out"), *score, *QUICK]) == 0
    assert "purified 4 images" in capsys.readouterr().err
    for k in range(4):
        want = purify_image(source / f"{k}.png", purifier(), sample_id=picture_id(f"{k}.png"))
        with Image.open(tmp_path / "out" / f"{k}.png") as image:
            assert np.abs(pixels_of(image) - pixels_of(want)).max() <= 1


def test_files_of_sixteen_bits_and_webp(networks: Path, tmp_path: Path) -> None:
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(RGB).save(tmp_path / "in.webp", lossless=True)
    for name, score in (("deep.png", "grey"), ("in.webp", "rgb")):
        source, out = tmp_path / name, tmp_path / f"out_{name}"
        words = ["purify", str(source), str(out), "--score", str(networks / f"{score}.safetensors")]
        assert main([*words, *QUICK]) == 0
        want = purify_image(source, purifier(1 if score == "grey" else 3))
        with Image.open(out) as image:
            assert np.abs(pixels_of(image) - pixels_of(want)).max() <= 1


def test_networks_and_pictures_that_do_not_go_together(
    networks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(RGB).save(tmp_path / "in.png")
    Image.fromarray(RGB[:, :, 0].astype(np.uint16)).save(tmp_path / "deep.png")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "text.safetensors").write_text("no tensors")
    rgb, classifier = networks / "rgb.safetensors", networks / "classifier.safetensors"
    other = tmp_path / "other.pth"
    cases: list[tuple[str, list[object], str]] = [
        ("in.png", ["--score", other], "--score-format"),
        ("in.png", ["--score", other, "--score-format", "score-sde"], "other.pth"),
        ("in.png", ["--score", other, "--score-format", "guided-diffusion"], "other.pth"),
        ("in.png", ["--score", tmp_path / "no.pth"], "does not exist"),
        ("in.png", ["--score", tmp_path / "text.safetensors"], "text.safetensors"),
        ("in.png", ["--score", classifier], "no score network"),
        ("in.png", ["--score", tmp_path], "pipeline"),
        ("in.png", ["--score", rgb, "--classifier", rgb], "no classifier"),
        ("in.png", ["--score", rgb, "--classifier", "no.safetensors"], "does not exist"),
        ("in.png", ["--score", rgb, "--score-config", "x"], "--score-config"),
        ("in.png", ["--score-format", "score-sde"], "give --score"),
        ("in.png", ["--score", rgb, "--bundled-settings"], "--bundled-settings"),
        (
            "in.png",
            ["--score", networks / "grey.safetensors"],
            "1 channel",
        ),
        ("in.png", ["--score", networks / "halving.safetensors"], "18x27"),
        ("deep.png", ["--score", networks / "grey.safetensors"], "16 bits"),
    ]
    for source, options, words in cases:
        target = tmp_path / "out.jpg"
        sentence = fails(capsys, "purify", tmp_path / source, target, *QUICK, *options)
        assert words in sentence, sentence
