"""Every data set of every command, read in one place: `FORMATS` is the table of what there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from coup_fast import checks
from coup_fast.data import libraries
from coup_fast.data.arrays import load_npz
from coup_fast.data.cifar10 import holds_cifar10, load_cifar10
from coup_fast.data.digits import demo_digits
from coup_fast.data.image_folder import folder_splits, load_image_folder
from coup_fast.data.mnist import load_fashion_mnist, load_mnist, which_mnist
from coup_fast.data.pictures import COLOURS, Look
from coup_fast.data.svhn import holds_svhn, load_svhn


@dataclass(frozen=True)
class Source:
    """Where images are, and what they are to look like.

    Args:
        name: a name or place as `FORMATS` lists them: "mnist", "photos/", "images.npz",
            "huggingface:ylecun/mnist", "torchvision:CIFAR100".
        folder: where the files of a named set are; default: the working folder.
        look: size and colours that all images are brought to.
        progress: show a bar while pictures are read.
    """

    name: str
    folder: str = ""
    look: Look = field(default_factory=Look)
    progress: bool = False

    @property
    def place(self) -> Path:
        """The folder as a path."""
        return Path(self.folder or ".")


@dataclass(frozen=True)
class Labelled:
    """Images with their labels.

    Args:
        images: [N, C, H, W], uint8, or float32 in [0, 1].
        labels: [N] int64, or None where nobody said what the pictures show.
        classes: names of the classes in order, where they are known.
    """

    images: Tensor
    labels: Tensor | None
    classes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """How many classes there are: as many as have names, or one more than the largest label."""
        largest = -1 if self.labels is None else int(self.labels.max())
        return max(len(self.classes), largest + 1)


Loaded = tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, tuple[str, ...]]


@dataclass(frozen=True)
class Format:
    """One row of the table.

    Args:
        name: how one asks for it, with an example in place of what varies.
        fits: whether a source is of this format.
        splits: the splits that a source has, the one that is evaluated by default first.
        read: images and labels of a source and one of its splits ("" where it has none).
        recognised: whether a folder holds it; None for formats that are asked for by name only.
        needs_folder: whether `Source.folder` means something.
    """

    name: str
    fits: Callable[[Source], bool]
    splits: Callable[[Source], tuple[str, ...]]
    read: Callable[[Source, str], Loaded]
    recognised: Callable[[Path], bool] | None = None
    needs_folder: bool = False


def _standard(
    name: str,
    load: Callable[[str | Path, str], tuple[Tensor, Tensor]],
    splits: tuple[str, ...],
    recognised: Callable[[Path], bool],
) -> Format:
    return Format(
        name,
        lambda source: source.name == name,
        lambda _: splits,
        lambda source, split: load(source.place, split),
        recognised,
        needs_folder=True,
    )


def _digits(source: Source, split: str) -> Loaded:
    images, labels = demo_digits(2500, 0, split)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    kept, truth = torch.empty_like(images), torch.empty_like(labels)
    kept[order], truth[order] = images, labels  # as the file has them
    return kept, truth


def _is_saved(source: Source) -> bool:
    return libraries.saved_to_disk(Path(source.name))


def _hugging_face(source: Source) -> str:
    return source.name if _named(source) else f"{libraries.HUGGING_FACE}{source.name}"


def _named(source: Source) -> bool:
    return source.name.startswith(libraries.HUGGING_FACE)


FORMATS = (
    Format(
        "digits",
        lambda source: source.name == "digits",
        lambda _: ("report", "validation"),
        _digits,
    ),
    _standard("mnist", load_mnist, ("test", "train"), lambda p: which_mnist(p) == "mnist"),
    _standard(
        "fashion-mnist",
        load_fashion_mnist,
        ("test", "train"),
        lambda p: which_mnist(p) == "fashion-mnist",
    ),
    _standard("cifar10", load_cifar10, ("test", "train"), holds_cifar10),
    _standard("svhn", load_svhn, ("test", "train", "extra"), holds_svhn),
    Format(
        "torchvision:CIFAR100",
        lambda source: source.name.startswith(libraries.TORCHVISION),
        lambda source: libraries.torchvision_splits(source.name)[::-1],
        lambda source, split: libraries.load_torchvision(
            source.name, source.place, split, source.look, progress=source.progress
        ),
        needs_folder=True,
    ),
    Format(
        "huggingface:ylecun/mnist",
        lambda source: _named(source) or _is_saved(source),
        lambda source: tuple(libraries.hugging_face_splits(_hugging_face(source))),
        lambda source, split: libraries.load_hugging_face(
            _hugging_face(source), split, source.look, progress=source.progress
        ),
    ),
    Format(
        "images.npz",
        lambda source: source.name.endswith(".npz"),
        lambda _: (),
        lambda source, _: load_npz(Path(source.name)),
    ),
    Format(
        "folder/",
        lambda source: Path(source.name).is_dir(),
        lambda source: tuple(folder_splits(Path(source.name))),
        lambda source, split: load_image_folder(
            Path(source.name), split, source.look, progress=source.progress
        ),
    ),
)
_DEFAULT_SPLITS = ("report", "test", "validation", "train")  # the first that a source has


def find_source(
    data: str, dataset: str | None = None, look: Look | None = None, *, progress: bool = False
) -> Source:
    """The source that a user means by `data`, and by `dataset` where that is given.

    Args:
        data: a file, a folder of pictures or of a standard set's files, or a name with a colon.
        dataset: the name of a set whose files are in the folder `data`; default: whatever the
            folder is found to hold.
        look: see `Source`. progress: see `Source`.

    Raises:
        FileNotFoundError: there is no such place.
        ValueError: `dataset` is no name of a set with files.
    """
    look = look or Look()
    if dataset is not None:
        source = Source(dataset, data, look, progress)
        if not format_of(source).needs_folder:
            named = ", ".join(f.name for f in FORMATS if f.needs_folder)
            raise ValueError(f"dataset {dataset!r} must be one of {named}")
        return source
    if ":" not in data and not Path(data).exists():
        raise FileNotFoundError(f"{data} does not exist")
    for one in FORMATS:
        if one.recognised is not None and Path(data).is_dir() and one.recognised(Path(data)):
            return Source(one.name, data, look, progress)
    return Source(data, "", look, progress)


def format_of(source: Source) -> Format:
    """The row of the table that a source is of. Raises ValueError if it is of none."""
    for one in FORMATS:
        if one.fits(source):
            return one
    known = [one.name for one in FORMATS]
    raise ValueError(
        f"data {source.name!r} is none of {', '.join(known)}{checks.nearest(source.name, known)}"
    )


def read_images(source: Source, split: str = "") -> Labelled:
    """The images of a source.

    Args:
        source: where they are.
        split: one of the source's; "" stands for the one that is for evaluation ("test", or what
            there is), and for everything where a source has no splits.

    Raises:
        ValueError: an unknown source or split, images that do not fit together, a damaged file.
        TypeError: arrays of another dtype.
        FileNotFoundError: a file is missing.
        ImportError: the source needs a package that is not installed.
    """
    if source.look.color:
        checks.choice("color", source.look.color, COLOURS)
    found = format_of(source)
    if source.folder and not found.needs_folder:
        named = ", ".join(repr(one.name) for one in FORMATS if one.needs_folder)
        raise ValueError(
            f"folder {source.folder!r} is for data {named}, and the data is {source.name!r}"
        )
    splits = found.splits(source)
    if split and split not in splits:
        has = f"it has {', '.join(splits)}" if splits else "it has none: leave split out"
        raise ValueError(f"{source.name} has no split {split!r}; {has}")
    if not split and splits:
        split = next((name for name in _DEFAULT_SPLITS if name in splits), splits[0])
    images, labels, *classes = found.read(source, split)
    return Labelled(source.look.of(images), labels, classes[0] if classes else ())
