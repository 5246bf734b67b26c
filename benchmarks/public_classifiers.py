"""Classifiers that others trained and published, as modules from pixels to logits.

    python benchmarks/public_classifiers.py --folder DIR --data TEST.npz   # their accuracy
    export PUBLIC_CLASSIFIERS=DIR                                          # for configurations:
    models = "./benchmarks/public_classifiers.py:resnet20"

DIR holds the files as they were published:

- `resnet20-*.th`, `resnet56-*.th`: CIFAR-10 ResNets of He et al. (2016, section 4.2) with shortcuts
  of option A, from akamaster/pytorch_resnet_cifar10 (BSD-2-Clause);
- `cifar_resnet4b_adv.pth`, `mnist_cnn_a_adv.model`: adversarially trained networks from
  Verified-Intelligence/alpha-beta-CROWN (BSD-3-Clause).

A file is read with `weights_only=True`, and its names and shapes must be those of the network.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from coup_fast import ScoreModel, load_bundled
from coup_fast.data import Source, read_images
from coup_fast.evaluation.intervals import Proportion
from coup_fast.models import Normalized

FOLDER = "PUBLIC_CLASSIFIERS"  # the environment variable


class OptionABlock(nn.Module):
    """Two convolutions with batch norm beside a shortcut without parameters (option A).

    Where the block has a stride, the shortcut takes every second pixel; where it widens, the new
    channels are zeros, half of them before and half of them behind the old ones.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride, self.more = stride, (after - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, H, W] -> [B, after, H / stride, W / stride]."""
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        kept = x[:, :, :: self.stride, :: self.stride]
        return F.relu(inner + F.pad(kept, (0, 0, 0, 0, self.more, self.more)))


class CifarResNet(nn.Module):
    """ResNet of 6 blocks + 2 layers for 32×32 images: normalised [B, 3, H, W] -> logits [B, 10]."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1, blocks)
        self.layer2 = _stage(16, 32, 2, blocks)
        self.layer3 = _stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def _stage(before: int, after: int, stride: int, blocks: int) -> nn.Sequential:
    first = OptionABlock(before, after, stride)
    return nn.Sequential(first, *(OptionABlock(after, after, 1) for _ in range(blocks - 1)))


class PlainBlock(nn.Module):
    """Two convolutions without norms beside a shortcut, which is a 1×1 convolution if strided."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1)
        projection = [nn.Conv2d(before, after, 1, stride)] if stride > 1 else []
        self.shortcut = nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, H, W] -> [B, after, H / stride, W / stride]."""
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class ResNet4b(nn.Module):
    """alpha-beta-CROWN's resnet4b: normalised [B, 3, 32, 32] -> logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 2, 1)
        self.layer1 = nn.Sequential(PlainBlock(16, 32, 2), PlainBlock(32, 32, 1))
        self.layer2 = nn.Sequential(PlainBlock(32, 32, 2), PlainBlock(32, 32, 1))
        self.linear1 = nn.Linear(512, 100)
        self.linear2 = nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        x = self.layer2(self.layer1(F.relu(self.conv1(x))))
        return self.linear2(F.relu(self.linear1(x.flatten(1))))  # type: ignore[no-any-return]


def mnist_cnn_a() -> nn.Sequential:
    """alpha-beta-CROWN's cnn_a for digits: pixels [B, 1, 28, 28] -> logits [B, 10]."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10)),
    )


@dataclass(frozen=True)
class Published:
    """A published classifier: its file's pattern, its network, what its pixels are normalised by,
    and the bundled score networks of the same images."""

    file: str
    network: Callable[[], nn.Module]
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]
    images: str


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # which the ResNets were trained with
_CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))

PUBLISHED = {
    "resnet20": Published("resnet20-*.th", lambda: CifarResNet(3), *_IMAGENET, "cifar10"),
    "resnet56": Published("resnet56-*.th", lambda: CifarResNet(9), *_IMAGENET, "cifar10"),
    "resnet4b_adv": Published("cifar_resnet4b_adv.pth", ResNet4b, *_CIFAR, "cifar10"),
    "mnist_cnn_a_adv": Published("mnist_cnn_a_adv.model", mnist_cnn_a, 0.0, 1.0, "mnist"),
}


def load_public(name: str, folder: str | Path | None = None) -> nn.Module:
    """A published classifier, in evaluation mode: pixels [B, C, H, W] in [0, 1] -> logits [B, 10].

    Args:
        name: a key of PUBLISHED.
        folder: where its file is; by default the environment variable PUBLIC_CLASSIFIERS.

    Raises:
        ValueError: there is no such classifier, no folder was given, or the file holds another
            network.
        FileNotFoundError: the folder has no such file, or several.
    """
    if name not in PUBLISHED:
        raise ValueError(f"name must be one of {', '.join(PUBLISHED)}, got {name!r}")
    folder = folder or os.environ.get(FOLDER)
    if not folder:
        raise ValueError(f"{name} needs the folder of its file: set {FOLDER}, or give folder=")
    published = PUBLISHED[name]
    found = sorted(Path(folder).glob(published.file))
    if len(found) != 1:
        raise FileNotFoundError(f"{folder} must hold one {published.file}, it has {len(found)}")
    content = torch.load(found[0], map_location="cpu", weights_only=True)
    content = content.get("state_dict", content)
    weights = {key.removeprefix("module."): value for key, value in content.items()}
    network = published.network()
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{found[0]} does not hold {name}: {error}") from error
    return Normalized(network, published.mean, published.std).eval()


def beside_bundled(name: str, score: str) -> tuple[ScoreModel, nn.Module]:
    """The bundled score model of the same images ("vp" or "ncsn"), and a published classifier."""
    score_model, _ = load_bundled(PUBLISHED[name].images, score=score)
    return score_model, load_public(name)


def resnet20(score: str) -> tuple[ScoreModel, nn.Module]:
    """`models` of a configuration: ResNet-20, trained as usual."""
    return beside_bundled("resnet20", score)


def resnet56(score: str) -> tuple[ScoreModel, nn.Module]:
    """`models` of a configuration: ResNet-56, trained as usual."""
    return beside_bundled("resnet56", score)


def resnet4b_adv(score: str) -> tuple[ScoreModel, nn.Module]:
    """`models` of a configuration: resnet4b, trained to be robust."""
    return beside_bundled("resnet4b_adv", score)


def mnist_cnn_a_adv(score: str) -> tuple[ScoreModel, nn.Module]:
    """`models` of a configuration: cnn_a for digits, trained to be robust."""
    return beside_bundled("mnist_cnn_a_adv", score)


@torch.no_grad()
def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> Proportion:
    """Share of images [N, C, H, W] in [0, 1] that get their labels [N]."""
    guesses = torch.cat([classifier(part).argmax(1) for part in images.split(250)])
    return Proportion(int((guesses == labels).sum()), len(labels))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help=f"of the files; by default ${FOLDER}")
    parser.add_argument("--data", required=True, help="images, as docs/your_data.md says")
    parser.add_argument("--data-folder", default="", help="where the files of a named set are")
    parser.add_argument("--split", default="", help="of a named set")
    parser.add_argument("--images", type=int, help="only the first of them")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PUBLISHED)}; those that fit")
    arguments = parser.parse_args(argv)
    found = read_images(Source(arguments.data, arguments.data_folder), arguments.split)
    if found.labels is None:
        parser.error(f"{arguments.data} has no labels")
    images, labels = found.images[: arguments.images], found.labels[: arguments.images]
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    fitting = "mnist" if images.shape[1] == 1 else "cifar10"
    names = arguments.names or [n for n, p in PUBLISHED.items() if p.images == fitting]
    rows = []
    for name in names:
        classifier = load_public(name, arguments.folder)
        rows.append([name, len(images), accuracy(classifier, images, labels).percent()])
    print(tabulate(rows, ["classifier", "images", "accuracy"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
