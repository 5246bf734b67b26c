"""What a run trains on and what it keeps for looking: no image is in both."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coup_fast.data import Labelled, Source, demo_digits, held_out_mask, read_images
from coup_fast.data.reading import format_of

CIFAR_VALIDATION = 5000  # the last training images: never trained on, for choosing settings
_MOST_HELD_OUT = 5000


@dataclass(frozen=True)
class TrainingData:
    """Images to train on, images that are held out, and what the latter are called in reports."""

    train: Labelled
    held_out: Labelled
    split: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def load_data(source: Source, task: str) -> TrainingData:
    """The data of a task.

    MNIST's training images come without the 5,000 digits of `demo_digits`; held out are half of
    those, or MNIST's test images for a classifier. Of CIFAR-10 the last 5,000 training images are
    held out. Of any other source the split "validation" is, or a tenth of the training images that
    is always the same, 5,000 at most.

    Raises what `read_images` does, and ValueError for fewer than two images, splits without
    "train", held-out images of another shape or class, or a classifier's images without labels.
    """
    if source.name == "mnist":
        whole = read_images(source, "train")
        train = _part(whole, ~held_out_mask(whole.images))
        if task == "classifier":
            return TrainingData(train, read_images(source, "test"), "test")
        return TrainingData(train, Labelled(*demo_digits(1000, split="validation")), "validation")
    if source.name == "cifar10":
        whole = read_images(source, "train")
        late = torch.arange(len(whole.images)) >= len(whole.images) - CIFAR_VALIDATION
        return TrainingData(_part(whole, ~late), _part(whole, late), "validation")
    splits = format_of(source).splits(source)
    if splits and "train" not in splits:
        raise ValueError(f"{source.name} has no split 'train' to train on; it has {splits}")
    whole = read_images(source, "train" if splits else "")
    if task == "classifier" and whole.labels is None:
        raise ValueError(
            f"{source.name} has no labels, and a classifier needs them; in a folder, the pictures "
            "of a class stand in a sub-folder of its name"
        )
    if task == "classifier" and whole.num_classes < 2:
        raise ValueError(f"{source.name} has one class only, and a classifier tells two or more")
    if "validation" in splits:
        held_out = read_images(source, "validation")
        if held_out.images.shape[1:] != whole.images.shape[1:]:
            shapes = [list(x.images.shape[1:]) for x in (whole, held_out)]
            raise ValueError(
                f"{source.name}: images to train on are {shapes[0]} and those of the validation "
                f"split {shapes[1]}; give one --size and --color for both"
            )
        if held_out.num_classes > whole.num_classes:
            raise ValueError(
                f"{source.name}: the validation split has {held_out.num_classes} classes and the "
                f"training split {whole.num_classes}"
            )
        return TrainingData(whole, held_out, "validation")
    count = len(whole.images)
    if count < 2:
        raise ValueError(f"{source.name} has {count} image; one is held out, so give two or more")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    late = torch.zeros(count, dtype=torch.bool)
    late[order[: min(_MOST_HELD_OUT, max(1, count // 10))]] = True
    return TrainingData(_part(whole, ~late), _part(whole, late), "held out")


def _part(whole: Labelled, rows: torch.Tensor) -> Labelled:
    labels = None if whole.labels is None else whole.labels[rows]
    return Labelled(whole.images[rows], labels, whole.classes)
