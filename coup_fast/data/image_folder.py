"""A folder of pictures whose sub-folders are classes, as torchvision's ImageFolder lays them out.

    photos/cat/1.png  photos/dog/2.jpg                        one set
    photos/train/cat/1.png  photos/test/cat/2.png             with splits
    photos/1.png                                              pictures without labels

Class k is the k-th name in sorted order. Hidden folders are no classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coup_fast.data.pictures import Look, stack
from coup_fast.files import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from PIL import Image

# What people call a split: what it is called here.
SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}


def folder_splits(folder: Path) -> dict[str, Path]:
    """The splits of an image folder by name; empty if its sub-folders are classes."""
    found = {place.name.lower(): place for place in _below(folder)}
    if not found or not found.keys() <= SPLITS.keys():
        return {}
    return {SPLITS[name]: place for name, place in found.items()}


def load_image_folder(
    folder: Path, split: str, look: Look, *, progress: bool = False
) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
    """Images uint8 [N, C, H, W], labels int64 [N] and the names of the classes.

    Labels are None, and there are no names, where the pictures stand in no sub-folders. Classes
    are those of the split "train" where there is one, so that a number means the same everywhere.

    Raises:
        FileNotFoundError: there is no picture.
        ValueError: pictures stand both in and beside sub-folders, a class is empty or unknown to
            the training split, or what `stack` refuses.
    """
    splits = folder_splits(folder)
    place = splits[split] if split else folder
    classes = [path.name for path in _below(splits.get("train", place))]
    loose = _pictures(place, deep=False)
    own = [path.name for path in _below(place)]
    if loose and any(_pictures(place / name) for name in own):
        raise ValueError(
            f"{place} holds {loose[0].name} beside sub-folders of pictures; the sub-folders are "
            "the classes, so move it into one of them"
        )
    if loose or not own:
        if not loose:
            endings = " ".join(IMAGE_SUFFIXES)
            raise FileNotFoundError(f"{place} holds no pictures ({endings}) and no sub-folders")
        return stack(_opened(loose), len(loose), look, progress=progress), None, ()
    unknown = sorted(set(own) - set(classes))
    if unknown:
        raise ValueError(
            f"{place} has the class {unknown[0]!r}, which {splits['train']} has not; the classes "
            f"there are {', '.join(classes[:10])}{', …' if len(classes) > 10 else ''}"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for name in own:
        members = _pictures(place / name)
        if not members:
            raise ValueError(
                f"{place / name} holds no pictures ({' '.join(IMAGE_SUFFIXES)}), and a sub-folder "
                "is a class: fill it or remove it"
            )
        paths += members
        labels += [classes.index(name)] * len(members)
    images = stack(_opened(paths), len(paths), look, progress=progress)
    return images, torch.tensor(labels), tuple(classes)


def _below(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _pictures(folder: Path, deep: bool = True) -> list[Path]:
    found = folder.rglob("*") if deep else folder.iterdir()
    return sorted(p for p in found if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def _opened(paths: list[Path]) -> Iterator[tuple[str, Image.Image]]:
    from coup_fast.integrations.pictures import open_picture

    for path in paths:
        with open_picture(path) as image:
            yield str(path), image
