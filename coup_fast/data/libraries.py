"""Data sets of Hugging Face's `datasets` and of torchvision, where those packages are installed.

Both are imported inside the functions. Nothing is downloaded from torchvision; `datasets` loads
what its own cache, the hub or a folder has.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coup_fast import checks
from coup_fast.data.image_folder import SPLITS
from coup_fast.data.pictures import Look, stack
from coup_fast.files import FileError, reading

if TYPE_CHECKING:
    from PIL import Image

HUGGING_FACE, TORCHVISION = "huggingface:", "torchvision:"
_CHOICES = ("image", "label", "config")  # what may follow the name of a data set on the hub
_SAVED = ("dataset_dict.json", "dataset_info.json")  # of `save_to_disk`


def _library(module: str, what: str) -> ModuleType:
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{what} needs {package}: pip install {package} ({error})") from error
    except RuntimeError as error:  # as of a torchvision that was built for another torch
        raise ImportError(f"{what} needs {package}, whose import fails: {error}") from error


# Hugging Face


def saved_to_disk(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote a folder."""
    return any((folder / name).is_file() for name in _SAVED)


def hugging_face_splits(name: str) -> dict[str, str]:
    """The splits of a data set, by the name that they have here."""
    return {SPLITS.get(own, own): own for own in _tables(name)}


def load_hugging_face(
    name: str, split: str, look: Look, *, progress: bool = False
) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
    """Images, labels and names of classes as of `load_image_folder`.

    name: "huggingface:" and a name on the hub or a folder; the columns and the configuration may
    follow, as in "huggingface:uoft-cs/cifar100,image=img,label=fine_label".
    """
    _, options = _parts(name)
    splits = hugging_face_splits(name)
    table = _tables(name)[splits[split]]
    columns = {column: type(kind).__name__ for column, kind in table.features.items()}
    image = _column(name, "image", options, columns, ("Image",), required=True)
    label = _column(name, "label", options, columns, ("ClassLabel",), required=False)

    def pictures() -> Iterator[tuple[str, Image.Image]]:
        for i, row in enumerate(table.select_columns([image])):
            yield f"{name}, {image} of row {i},", row[image]

    if len(table) == 0:
        raise ValueError(f"{name} has no rows in {splits[split]}")
    images = stack(pictures(), len(table), look, progress=progress)
    if label is None:
        return images, None, ()
    numbers = table[label][:]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(f"{name}: the column {label} must hold whole numbers from 0, one a row")
    classes = tuple(getattr(table.features[label], "names", None) or ())
    return images, torch.tensor(numbers), classes


def _column(
    name: str,
    role: str,
    options: dict[str, str],
    columns: dict[str, str],
    kinds: tuple[str, ...],
    *,
    required: bool,
) -> str | None:
    """The column that plays a role: the one that is named, or the only one of its kind."""
    listed = ", ".join(f"{column} ({kind})" for column, kind in columns.items())
    if role in options:
        if options[role] not in columns:
            raise ValueError(f"{name} has no column {options[role]!r}; it has {listed}")
        return options[role]
    found = [column for column, kind in columns.items() if kind in kinds]
    if not found and role == "label" and "label" in columns:
        return "label"
    if len(found) == 1:
        return found[0]
    if found or required:
        raise ValueError(
            f"{name} has {len(found)} columns of type {kinds[0]}: say which with {role}=COLUMN "
            f"after the name and a comma; it has {listed}"
        )
    return None


@functools.lru_cache(maxsize=2)
def _tables(name: str) -> dict[str, Any]:
    """The data set's tables by their own names of splits."""
    place, options = _parts(name)
    datasets = _library("datasets", name)
    with reading(name, "a data set of Hugging Face"):
        if saved_to_disk(Path(place)):
            found = datasets.load_from_disk(place)
        else:
            found = datasets.load_dataset(place, options.get("config"))
    return dict(found) if isinstance(found, dict) else {"train": found}


def _parts(name: str) -> tuple[str, dict[str, str]]:
    """The place, and the options that follow it."""
    place, *rest = name.removeprefix(HUGGING_FACE).split(",")
    options: dict[str, str] = {}
    for text in rest:
        key, sign, value = text.partition("=")
        if key not in _CHOICES or not sign:
            raise ValueError(
                f"{name}: after the name may follow {', '.join(f'{c}=…' for c in _CHOICES)}, each "
                f"after a comma; got {text!r}"
            )
        options[key] = value
    if not place:
        raise ValueError(f"{name} names no data set; write {HUGGING_FACE}ylecun/mnist")
    return place, options


# torchvision


def torchvision_splits(name: str) -> tuple[str, ...]:
    """The splits of one of torchvision's data sets, as far as its arguments say them."""
    taken = inspect.signature(_data_set(name)).parameters
    return ("train", "test") if {"train", "split"} & taken.keys() else ()


def load_torchvision(
    name: str, folder: Path, split: str, look: Look, *, progress: bool = False
) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
    """Images, labels and names of classes as of `load_image_folder`.

    name: "torchvision:CIFAR100", any data set there whose items are pairs of a picture and a whole
    number. folder: its `root`.
    """
    made = _data_set(name)
    taken = inspect.signature(made).parameters
    options: dict[str, Any] = {"root": str(folder)} if "root" in taken else {}
    options |= {"train": split == "train"} if "train" in taken else {}
    options |= {"split": split} if "split" in taken else {}
    options |= {"download": False} if "download" in taken else {}
    with reading(
        name,
        f"torchvision's files in {folder}",
        f"torchvision.datasets.{name.removeprefix(TORCHVISION)}({str(folder)!r}, download=True) "
        "downloads them, where it can",
    ):
        data = made(**options)
        count = len(data)
        labels = [0] * count

    def pictures() -> Iterator[tuple[str, Image.Image]]:
        for i in range(count):
            item = data[i]
            if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], int)):
                raise FileError(
                    f"{name}: item {i} is {type(item).__name__}, and a pair of a picture and a "
                    "whole number is needed"
                )
            picture, labels[i] = item
            yield f"{name}, item {i},", picture

    if count == 0:
        raise ValueError(f"{name} has no items in {folder}")
    images = stack(pictures(), count, look, progress=progress)
    return images, torch.tensor(labels), tuple(map(str, getattr(data, "classes", ())))


def _data_set(name: str) -> Any:
    datasets = _library("torchvision.datasets", name)
    known = [
        key
        for key, value in vars(datasets).items()
        if inspect.isclass(value)
        and issubclass(value, datasets.VisionDataset)
        and value is not datasets.VisionDataset
    ]
    wanted = name.removeprefix(TORCHVISION)
    if wanted not in known:
        raise ValueError(f"torchvision has no data set {wanted!r}{checks.nearest(wanted, known)}")
    return getattr(datasets, wanted)
