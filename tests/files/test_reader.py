"""Files that are damaged, of another kind or made to do harm: one sentence, with their name."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import digits, fails
from PIL import Image

from coup_fast import data
from coup_fast.benchmarking import results
from coup_fast.evaluation.config import read_toml
from coup_fast.files import FileError, memory, read_arrays, read_json, reading
from coup_fast.integrations.pictures import open_picture, read_picture
from coup_fast.models.checkpoint_files import read_state
from coup_fast.models.classifier import Classifier
from coup_fast.models.network_files import load_network, save_network


def picture(path: Path) -> Any:
    with open_picture(path) as image:
        return read_picture(image, str(path))


def write_npz(path: Path) -> None:
    np.savez_compressed(path, images=digits(2), labels=np.array([1, 2]))


def write_image(path: Path) -> None:
    Image.fromarray((255 * digits(1)[0, 0]).astype(np.uint8)).save(path)


def write_network(path: Path) -> None:
    save_network(path, Classifier(1, size=8, width=4, hidden=8), {})


READERS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "a.npy": (lambda path: np.save(path, digits(2)), read_arrays),
    "a.npz": (write_npz, read_arrays),
    "a.png": (write_image, picture),
    "a.tif": (write_image, picture),
    "a.webp": (write_image, picture),
    "a.jpg": (write_image, picture),
    "a.pth": (lambda path: torch.save({"a": torch.ones(2), "b": [3.5]}, path), read_state),
    "a.safetensors": (write_network, load_network),
    "b.safetensors": (write_network, read_state),
    "a.json": (lambda path: path.write_text(json.dumps({"a": [1, {"b": None}]})), read_json),
    "a.toml": (lambda path: path.write_text('a = 1\n[[b]]\nc = ["x", 2.5]\n'), read_toml),
}


def damaged(content: bytes, generator: np.random.Generator) -> bytes:
    """Cut off, with other bytes inside, or with a part left out."""
    way, at = generator.integers(0, 3), int(generator.integers(0, len(content)))
    if way == 0:
        return content[:at]
    if way == 1:
        return content[:at] + content[at + int(generator.integers(1, 50)) :]
    changed = bytearray(content)
    for _ in range(int(generator.integers(1, 8))):
        near = generator.random() < 0.7  # most headers are at the start or at the end
        end = generator.integers(0, min(300, len(content)))
        place = int(end if generator.random() < 0.5 else len(content) - 1 - end)
        place = place if near else int(generator.integers(0, len(content)))
        changed[place] = int(generator.integers(0, 256))
    return bytes(changed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_refused_in_one_sentence_or_read(name: str, tmp_path: Path) -> None:
    write, read = READERS[name]
    path = tmp_path / name
    write(path)
    content = path.read_bytes()
    read(path)
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    refused = []
    for _ in range(120):
        path.write_bytes(damaged(content, generator))
        try:
            read(path)
        except FileError as error:
            refused.append(str(error))
    assert all(text.startswith(str(path)) and "\n" not in text for text in refused)
    assert len(refused) > 10


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", [b"", b"only text, and that in three\nlines\n", b"\x00" * 99])
def test_files_of_another_kind(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    if name == "a.toml" and not content:
        return  # which is TOML
    with pytest.raises(FileError, match=path.name):
        READERS[name][1](path)


# --- made to do harm


def test_an_archive_that_does_not_fit_into_memory_is_not_unpacked(tmp_path: Path) -> None:
    """Its directory says how large its arrays are."""
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", b"\0" * 1000)
    content = path.read_bytes()
    place = content.rindex(b"PK\x01\x02") + 24
    huge = struct.pack("<I", 2**32 - 2)
    path.write_bytes(content[:place] + huge + content[place + 4 :])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coup_fast.files.reader.memory", lambda: 2**30)
        with pytest.raises(FileError, match=r"bomb\.npz .* 4\.0 GiB, more than the memory"):
            read_arrays(path)
    assert memory() > 2**20


def test_an_array_whose_header_asks_for_more_than_there_is(tmp_path: Path) -> None:
    path = tmp_path / "huge.npy"
    np.save(path, digits(1))
    content = path.read_bytes().replace(b"(1, 1, 28, 28)", b"(99999999, 28)")
    path.write_bytes(content.replace(b"(99999999, 28)", b"(9999999999,) "))
    with pytest.raises(FileError, match=r"huge\.npy cannot be read"):
        read_arrays(path)


def test_an_image_of_too_many_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 10)), (b"IEND", b"")]
    file = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    file.seek(8)
    for name, content in chunks:
        check = zlib.crc32(name + content)
        file.write(struct.pack(">I", len(content)) + name + content + struct.pack(">I", check))
    path.write_bytes(file.getvalue())
    assert "bomb.png cannot be read as an image" in fails(
        capsys, "purify", path, tmp_path / "out.png"
    )


@pytest.mark.parametrize(
    ("name", "content", "read"),
    [
        ("deep.json", "[" * 100_000, read_json),
        ("deep.toml", "a = " + "[" * 5_000, read_toml),
        ("number.toml", "a = " + "9" * 5_000, read_toml),
    ],
)
def test_text_that_is_nested_too_deeply(
    name: str, content: str, read: Callable[[Path], Any], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(FileError, match=name):
        read(tmp_path / name)


def test_an_option_that_is_nested_too_deeply(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "in.npy", digits(1))
    words = ["purify", tmp_path / "in.npy", tmp_path / "out.npy", "--set"]
    for value in ("(" * 1000 + ")" * 1000, "-" * 100_000 + "1", "{[]: 1}"):
        assert "t_star" in fails(capsys, *words, f"t_star={value}")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.zeros(3, 3, device="meta"),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "csr", "meta", "quantized"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_without_values_of_their_own(
    make: Callable[[], torch.Tensor], tmp_path: Path
) -> None:
    torch.save({"model": [1, {"weight": make()}]}, tmp_path / "a.pth")
    with pytest.raises(FileError, match=r"a\.pth"):
        read_state(tmp_path / "a.pth")


def changed_header(path: Path, **description: Any) -> None:
    """The same file with another description of its network."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    whole = json.loads(header["__metadata__"]["coup_fast"])
    header["__metadata__"]["coup_fast"] = json.dumps(whole | description)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ({"arguments": {"in_channels": 1, "width": 2**18}}, "does not fit Classifier"),
        ({"arguments": {"in_channels": 1, "width": 10**40}}, "cannot be read"),
        ({"network": "UNet", "arguments": {"in_channels": 1, "blocks": 10**9}}, "blocks asks for"),
        ({"network": "UNet", "arguments": {"channels": [32] * 10**4}}, "channels asks for"),
        ({"network": "Other", "arguments": {}}, "unknown network 'Other'"),
        ({"arguments": {"no": 1}}, "'no'"),
        ({"arguments": 7}, "cannot be read"),
    ],
)
def test_a_network_is_built_only_if_it_fits_its_file(
    description: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """A small file that asks for a network of many GiB allocates none of them."""
    path = tmp_path / "net.safetensors"
    write_network(path)
    assert path.stat().st_size < 40_000
    changed_header(path, **description)
    with pytest.raises(FileError, match=words) as caught:
        load_network(path)
    assert str(caught.value).startswith(str(path))


def test_a_network_whose_kind_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.safetensors"
    write_network(path)
    changed_header(path, kind="strange")
    np.save(tmp_path / "in.npy", digits(1))
    words = ["purify", tmp_path / "in.npy", tmp_path / "out.npy", "--score", path]
    assert "net.safetensors" in fails(capsys, *words)


def test_a_gzip_bomb_in_place_of_mnist(tmp_path: Path) -> None:
    import gzip

    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as file:
        for _ in range(100):
            file.write(b"\0" * 2**20)
    with pytest.raises(ValueError, match="train-images-idx3-ubyte"):
        data.load_mnist(tmp_path)
    content = (tmp_path / "train-images-idx3-ubyte.gz").read_bytes()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content[:50] + b"xyz" + content[53:])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz"):
        data.load_mnist(tmp_path)


def test_results_of_a_benchmark_that_are_none(tmp_path: Path) -> None:
    for content in ("[1, 2]", '{"format": 1}', '{"format": 1, "commands": [], "rows": [{}]}'):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(FileError, match=r"a\.json"):
            results.load(tmp_path / "a.json")


# --- the helper


def test_interruptions_and_missing_libraries_are_no_faults_of_a_file() -> None:
    for error in (KeyboardInterrupt, ImportError, FileNotFoundError):
        with pytest.raises(error), reading("file", "text"):
            raise error
    failed = "file cannot be read as text: "
    for fault, sentence in (
        (KeyError("a"), f"{failed}it has no 'a'. Try"),
        (AssertionError(), f"{failed}AssertionError. Try"),
        (ValueError("two\n lines."), f"{failed}two lines. Try"),
        (ValueError("file is wrong."), "file is wrong. Try"),
    ):
        with pytest.raises(FileError) as caught, reading("file", "text", "Try"):
            raise fault
        assert str(caught.value) == sentence
