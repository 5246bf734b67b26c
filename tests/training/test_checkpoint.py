"""Training checkpoints: a damaged file is refused before a byte of it becomes a weight."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
import torch
from test_training import tiny_trainer

from coup_fast.training.checkpoint import averaged_network, read_checkpoint, write_checkpoint


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The checkpoint of a finished run."""
    path = tmp_path_factory.mktemp("run") / "c"
    tiny_trainer(path, steps=5).run()
    return path.read_bytes()


def test_content_comes_back(tmp_path: Path) -> None:
    content = {"a": torch.arange(3), "b": [1, "two", {"c": 3.0}]}
    write_checkpoint(tmp_path / "c", content)
    found = read_checkpoint(tmp_path / "c", torch.device("cpu"))
    assert torch.equal(found["a"], content["a"])
    assert found["b"] == content["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def refused(path: Path, damaged: bytes) -> str:
    """The sentence with which a trainer refuses the file, which stays as it is."""
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"checksum|format") as error:
        tiny_trainer(path, steps=5)
    assert path.read_bytes() == damaged
    assert str(path) in str(error.value)
    assert "delete it" in str(error.value)
    return str(error.value)


def test_every_flipped_byte_is_refused(written: bytes, tmp_path: Path) -> None:
    places = random.Random(0).sample(range(len(written)), 400)
    header = range(written.index(b"\n") + 1)
    for place in {*places, *header, len(written) - 1}:
        damaged = bytearray(written)
        damaged[place] ^= 1 << place % 8
        refused(tmp_path / "c", bytes(damaged))


def test_every_truncated_file_is_refused(written: bytes, tmp_path: Path) -> None:
    header = range(0, written.index(b"\n") + 2, 7)
    for length in {*header, *range(200, len(written), 997), len(written) - 1}:
        refused(tmp_path / "c", written[:length])
    refused(tmp_path / "c", written + b"\0")


def test_a_file_without_a_checksum_is_refused(written: bytes, tmp_path: Path) -> None:
    """As versions before this format wrote it, whole or damaged."""
    buffer = io.BytesIO()
    torch.save({"identity": {}, "state": {}}, buffer)
    sentence = refused(tmp_path / "c", buffer.getvalue())
    assert "Finish that run with the version that began it" in sentence
    refused(tmp_path / "c", b"weights")


def test_a_file_of_another_format_is_refused(written: bytes, tmp_path: Path) -> None:
    later = written.replace(b"format 1,", b"format 27,", 1)
    assert "has format 27; this coup_fast reads format 1" in refused(tmp_path / "c", later)


def test_a_checkpoint_without_a_network_is_not_averaged(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", {"identity": {}})
    with pytest.raises(ValueError, match="does not say which network"):
        averaged_network(tmp_path / "c")
