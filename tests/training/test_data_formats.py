"""One reader for every format: what each gives, and what it refuses with the words that help."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coup_fast.cli.image_files import IMAGE_SUFFIXES
from coup_fast.data import Look, Source, find_source, mnist, pictures, read_images, svhn
from coup_fast.data.reading import FORMATS
from coup_fast.evaluation.config import Data, from_dict
from coup_fast.evaluation.sources import load_images

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four pictures of two classes, and a hidden folder as notebooks leave it behind."""
    place = tmp_path / "photos"
    for i, name in enumerate(("dog/b.png", "cat/a.png", "dog/deep/c.png", "cat/b.bmp")):
        save(place / name, PIXELS[i])
    (place / ".ipynb_checkpoints").mkdir()
    (place / "cat" / "notes.txt").write_text("no picture")
    return place


# --- folders of pictures


def test_sub_folders_are_classes_in_sorted_order(photos: Path) -> None:
    source = find_source(str(photos))
    found = read_images(source)
    assert found.classes == ("cat", "dog")
    assert found.num_classes == 2
    assert found.labels is not None
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.images.dtype == torch.uint8
    expected = PIXELS[[1, 3, 0, 2]].transpose(0, 3, 1, 2)
    assert np.array_equal(found.images.numpy(), expected)


def test_splits_of_a_folder_have_the_classes_of_its_training_split(tmp_path: Path) -> None:
    for i, name in enumerate(("train/a/1.png", "train/b/1.png", "train/c/1.png", "Val/c/1.png")):
        save(tmp_path / name, PIXELS[i])
    source = Source(str(tmp_path))
    assert read_images(source, "train").num_classes == 3
    held_out = read_images(source)  # the only split that is for evaluation
    assert held_out.labels is not None
    assert held_out.labels.tolist() == [2]
    assert torch.equal(held_out.images, read_images(source, "validation").images)
    with pytest.raises(ValueError, match=r"no split 'test'; it has (train, validation|.*, train)"):
        read_images(source, "test")
    save(tmp_path / "Val/d/1.png", PIXELS[4])
    with pytest.raises(ValueError, match=r"class 'd'.* are a, b, c"):
        read_images(source, "validation")


def test_pictures_without_sub_folders_have_no_labels(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.png", PIXELS[i])
    found = read_images(Source(str(tmp_path)))
    assert found.labels is None
    assert found.num_classes == 0
    assert len(found.images) == 3
    with pytest.raises(ValueError, match=r"no labels.*sub-folder of its name"):
        load_images(Data(str(tmp_path), 1))


def test_sizes_and_colours_are_checked_and_can_be_converted(photos: Path) -> None:
    save(photos / "dog" / "z.png", RNG.integers(0, 256, (10, 12, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"z\.png is 3x10x12 and .* 3x8x8 .*--size 32"):
        read_images(Source(str(photos)))
    small = read_images(Source(str(photos), look=Look((4, 6))))
    assert small.images.shape == (5, 3, 4, 6)
    save(photos / "dog" / "z.png", PIXELS[0, :, :, 0])
    with pytest.raises(ValueError, match=r"z\.png is 1x8x8 .*--color"):
        read_images(Source(str(photos)))
    grey = read_images(Source(str(photos), look=Look(color="grey")))
    assert grey.images.shape == (5, 1, 8, 8)
    assert np.array_equal(grey.images[4, 0].numpy(), PIXELS[0, :, :, 0])
    luma = np.array([0.299, 0.587, 0.114])
    assert np.abs(grey.images[0, 0].numpy() - PIXELS[1] @ luma).max() <= 0.5 + 1e-4
    with pytest.raises(ValueError, match=r"color must be one of grey, rgb, got 'red'"):
        read_images(Source(str(photos), look=Look(color="red")))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: (p / "cat" / "z.png").write_text("text"), r"z\.png is not an image"),
        (lambda p: save(p / "loose.png", PIXELS[0]), r"loose\.png beside sub-folders"),
        (lambda p: (p / "bird").mkdir(), "bird holds no pictures"),
        (
            lambda p: save(p / "cat" / "z.png", np.full((8, 8, 4), 9, np.uint8)),
            r"z\.png has an alpha channel; .*--color",
        ),
        (lambda p: save(p / "cat" / "z.png", np.full((8, 8), 999, np.uint16)), "16 bits"),
    ],
)
def test_what_a_folder_must_not_hold(photos: Path, make: object, message: str) -> None:
    make(photos)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        read_images(Source(str(photos)))


def test_more_pictures_than_memory_holds(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "memory", lambda: 4 * 3 * 8 * 8 - 1)
    with pytest.raises(ValueError, match=r"4 pictures of 3x8x8 take .*--size"):
        read_images(Source(str(photos)))


def test_places_without_anything(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no pictures .* and no sub-folders"):
        read_images(Source(str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        find_source(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"data 'mnits' is none of .*did you mean 'mnist'"):
        read_images(Source("mnits"))
    with pytest.raises(ValueError, match=r"folder 'x' is for data 'mnist', .* is 'digits'"):
        read_images(Source("digits", "x"))
    with pytest.raises(ValueError, match="dataset 'digits' must be one of mnist"):
        find_source(str(tmp_path), "digits")


# --- arrays


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_file_of_arrays(tmp_path: Path, dtype: type) -> None:
    images = PIXELS.transpose(0, 3, 1, 2)
    images = images if dtype == np.uint8 else (images / np.float32(255))
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(6, dtype=np.uint8) % 3)
    found = read_images(find_source(str(tmp_path / "a.npz")))
    assert np.array_equal(found.images.numpy(), images)
    assert found.labels is not None
    assert found.labels.dtype == torch.int64
    assert found.num_classes == 3
    resized = read_images(Source(str(tmp_path / "a.npz"), look=Look((4, 4), "grey")))
    assert resized.images.shape == (6, 1, 4, 4)
    assert resized.images.dtype == found.images.dtype
    with pytest.raises(ValueError, match="no split 'train'; it has none"):
        read_images(find_source(str(tmp_path / "a.npz")), "train")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (PIXELS, np.zeros(6, int), r"write images.transpose\(0, 3, 1, 2\)"),
        (PIXELS.transpose(0, 3, 1, 2), np.zeros((6, 1), int), r"write labels\[:, 0\]"),
        (PIXELS[..., 0], np.zeros(6, int), r"write images\[:, None\]"),
        (PIXELS.transpose(0, 3, 1, 2), np.arange(6) - 1, r"from 0; it has a label -1"),
        (PIXELS[:0].transpose(0, 3, 1, 2), np.zeros(0, int), "it has none"),
    ],
)
def test_other_arrays_say_what_to_write(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, message: str
) -> None:
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    with pytest.raises(ValueError, match=message):
        read_images(Source(str(tmp_path / "a.npz")))


# --- standard files


def idx_files(folder: Path) -> dict[str, str]:
    """Stand-ins for four idx files, and their MD5."""
    sums = {}
    for number, name in enumerate(mnist._MD5):
        body = PIXELS.tobytes()[:784] * 3 if "images" in name else bytes([3, 1, number])
        content = bytes(16 if "images" in name else 8) + body
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        sums[name] = hashlib.md5(content).hexdigest()
    return sums


def test_fashion_mnist_is_told_from_mnist_by_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = idx_files(tmp_path)
    for name, digest in sums.items():
        monkeypatch.setitem(mnist._FASHION_MD5, name, digest)
    source = find_source(str(tmp_path))
    assert source.name == "fashion-mnist"
    found = read_images(source, "train")
    assert found.images.shape == (3, 1, 28, 28)
    assert found.labels is not None
    assert found.labels.tolist() == [3, 1, 1]
    with pytest.raises(ValueError, match=r"is not MNIST's .* it is Fashion-MNIST's"):
        read_images(find_source(str(tmp_path), "mnist"))
    for name, digest in sums.items():
        monkeypatch.setitem(mnist._MD5, name, digest)
    assert find_source(str(tmp_path)).name == "mnist"
    monkeypatch.undo()
    assert find_source(str(tmp_path)).name == "mnist"  # nobody's files: its loader says so
    with pytest.raises(ValueError, match="download it again"):
        read_images(find_source(str(tmp_path)))


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    pixels = RNG.integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    digits = np.array([[10], [1], [9], [10]], np.uint8)
    path = tmp_path / "test_32x32.mat"
    savemat(path, {"X": pixels, "y": digits})
    source = find_source(str(tmp_path))
    assert source.name == "svhn"
    with pytest.raises(ValueError, match=r"not SVHN's test_32x32\.mat: MD5"):
        read_images(source)
    monkeypatch.setitem(svhn._MD5, "test", hashlib.md5(path.read_bytes()).hexdigest())
    found = read_images(source)
    assert np.array_equal(found.images[2, 1].numpy(), pixels[:, :, 1, 2])
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1, 9, 0]
    with pytest.raises(FileNotFoundError, match=r"train_32x32\.mat"):
        read_images(source, "train")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        read_images(source)


# --- libraries


@pytest.mark.parametrize(
    ("module", "name"),
    [("datasets", "huggingface:x"), ("torchvision.datasets", "torchvision:CIFAR100")],
)
def test_a_library_that_is_missing_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"{name} needs .*pip install {module.partition('.')[0]}"):
        read_images(Source(name))


def test_a_data_set_of_hugging_face(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine": datasets.ClassLabel(names=["ant", "bee", "cow"]),
            "coarse": datasets.ClassLabel(names=["insect", "mammal"]),
        }
    )
    rows = {
        "img": [Image.fromarray(one) for one in PIXELS],
        "fine": [0, 1, 2, 0, 1, 2],
        "coarse": [0, 0, 1, 0, 0, 1],
    }
    table = datasets.Dataset.from_dict(rows, features=features)
    place = tmp_path / "saved"
    datasets.DatasetDict({"train": table, "test": table.select([2])}).save_to_disk(str(place))
    with pytest.raises(ValueError, match=r"2 columns of type ClassLabel: .*label=COLUMN"):
        read_images(find_source(str(place)))
    source = Source(f"huggingface:{place},label=fine")
    found = read_images(source, "train")
    assert np.array_equal(found.images.numpy(), PIXELS.transpose(0, 3, 1, 2))
    assert found.labels is not None
    assert found.labels.tolist() == rows["fine"]
    assert found.classes == ("ant", "bee", "cow")
    assert len(read_images(source).images) == 1  # the test split
    with pytest.raises(ValueError, match="no column 'kind'; it has img"):
        read_images(Source(f"huggingface:{place},label=kind"))
    with pytest.raises(ValueError, match=r"may follow image=…"):
        read_images(Source(f"huggingface:{place},columns=fine"))
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        read_images(Source(f"huggingface:{tmp_path / 'nowhere'}"))


def test_a_data_set_of_torchvision(tmp_path: Path) -> None:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:  # missing, or built for another torch
        pytest.skip(f"torchvision: {error}")
    with pytest.raises(ValueError, match=r"no data set 'Cifar10'; did you mean 'CIFAR10'"):
        read_images(Source("torchvision:Cifar10"))
    with pytest.raises(ValueError, match=r"CIFAR10.*download=True"):
        read_images(find_source(str(tmp_path), "torchvision:CIFAR10"))
    folder = tmp_path / "eurosat" / "2750"
    for i, name in enumerate(("Forest/a.png", "River/b.png", "River/c.png")):
        save(folder / name, PIXELS[i])
    found = read_images(find_source(str(tmp_path), "torchvision:EuroSAT"))
    assert found.classes == ("Forest", "River")
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1, 1]
    assert np.array_equal(found.images.numpy(), PIXELS[:3].transpose(0, 3, 1, 2))


# --- evaluations


def test_an_evaluation_reads_every_format(photos: Path) -> None:
    tables = {
        "data": {"name": str(photos), "images": 3, "size": 4, "color": "rgb"},
        "defence": [{"method": "none"}],
    }
    config = from_dict(tables)
    assert config.data.size == (4, 4)
    json.dumps(config.as_dict())
    images, labels = load_images(config.data)
    assert images.shape == (3, 3, 4, 4)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    with pytest.raises(ValueError, match="has 4 images, 5 were asked for"):
        load_images(Data(str(photos), 5))
    with pytest.raises(TypeError, match=r"size of \[data\]"):
        from_dict({**tables, "data": {"size": "4"}})


def test_every_row_of_the_table_is_named_in_the_documentation() -> None:
    from helpers.scripts import ROOT

    page = (ROOT / "docs" / "your_data.md").read_text()
    for one in FORMATS:
        assert f"`{one.name}`" in page


def test_the_endings_of_pictures_are_pillows() -> None:
    Image.init()
    assert set(IMAGE_SUFFIXES) <= set(Image.registered_extensions())
