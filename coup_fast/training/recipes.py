"""Defaults of each task: of the data sets that the bundled models know, and of any other images."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from coup_fast import checks
from coup_fast.training.dsm import NCSNNoise, VPNoise
from coup_fast.training.trainer import TrainConfig

NETWORKS = {"score": ("UNet", "NAFNet"), "ncsn": ("UNet", "NAFNet")}
CLASSIFIERS = ("ConvNet", "Classifier")
_WIDTHS = (64, 128, 256, 256, 256)  # of a ConvNet's groups


@dataclass(frozen=True)
class Recipe:
    """Defaults of one task on one data set."""

    config: TrainConfig
    arguments: dict[str, Any]  # of the network class
    network: str = "UNet"
    vp: VPNoise = field(default_factory=VPNoise)
    ncsn: NCSNNoise = field(default_factory=NCSNNoise)


_MNIST_UNET = {"in_channels": 1, "channels": [32, 64], "patch": 2}
_CIFAR_UNET = {"in_channels": 3, "channels": [64, 128, 128], "patch": 2}
# (data set, task), or (data set, task, network) for a network that is not the default.
RECIPES: dict[tuple[str, ...], Recipe] = {
    # 1 instead of 50: the smallest level that hides a digit from a purifier that starts at 0.25.
    ("mnist", "ncsn"): Recipe(
        TrainConfig(4000, batch_size=64, learning_rate=2e-3),
        {**_MNIST_UNET, "time_conditioned": False},
        ncsn=NCSNNoise(sigma_max=1.0, sigma_min=0.01, num_levels=100),
    ),
    ("mnist", "score"): Recipe(TrainConfig(5200, batch_size=64, learning_rate=2e-3), _MNIST_UNET),
    ("mnist", "classifier"): Recipe(
        TrainConfig(4000, batch_size=128, learning_rate=2e-3),
        {"in_channels": 1, "size": 28},
        network="Classifier",
    ),
    # Sized for two CPU cores. Purification starts at t = 0.2 or below: no later time is trained.
    ("cifar10", "score"): Recipe(
        TrainConfig(9000, batch_size=32), _CIFAR_UNET, vp=VPNoise(t_focus=0.2, focus_share=1.0)
    ),
    # For about twelve hours of one core: a constant rate until the last fifth, so that the run can
    # be looked at, and its end be moved, on the way. Chains start at t = 0.15 or below.
    ("cifar10", "score", "NAFNet"): Recipe(
        TrainConfig(80_000, batch_size=32, warmup=500, cooldown=0.2),
        {"in_channels": 3, "channels": [64, 128, 192], "blocks": 2, "patch": 2},
        network="NAFNet",
        vp=VPNoise(t_focus=0.15, t_last=0.3),
    ),
    # From the network above (`init`), for about an hour of one core; its end can be moved too.
    ("cifar10", "ncsn", "NAFNet"): Recipe(
        TrainConfig(9000, batch_size=32, learning_rate=5e-4, warmup=300, cooldown=0.4),
        {"in_channels": 3, "channels": [64, 128, 192], "blocks": 2, "patch": 2},
        network="NAFNet",
        ncsn=NCSNNoise(sigma_max=0.5, sigma_min=0.01, num_levels=100),
    ),
    ("cifar10", "ncsn"): Recipe(
        TrainConfig(6000, batch_size=32),
        {**_CIFAR_UNET, "time_conditioned": False},
        ncsn=NCSNNoise(sigma_max=0.5, sigma_min=0.01, num_levels=100),
    ),
    ("cifar10", "classifier"): Recipe(
        TrainConfig(
            1566,  # 18 epochs
            batch_size=512,
            learning_rate=0.75,
            warmup=200,
            cooldown=0.7,
            ema=0.98,
            grad_clip=100.0,
            momentum=0.85,
            weight_decay=1.33e-3,
            norm_bias_rate=64.0,
            alternating_flip=True,
        ),
        {"in_channels": 3, "widths": [64, 256, 256]},
        network="ConvNet",
    ),
}
# For half an hour of a large GPU: 28.7 M parameters, and with bfloat16 about 28 GFLOP an image and
# step. Batch and learning rate are those of EDM on CIFAR-10 (Karras et al. 2022).
LARGE: dict[tuple[str, str], Recipe] = {
    ("cifar10", "score"): Recipe(
        TrainConfig(10_000, batch_size=512, warmup=1000, cooldown=0.3, precision="bfloat16"),
        {"in_channels": 3, "channels": [128, 256, 256, 256], "blocks": 2},
        vp=VPNoise(t_focus=0.15, t_last=0.3),
    ),
}


def recipe_for(
    dataset: str,
    task: str,
    network: str | None,
    shape: tuple[int, int, int],
    num_classes: int,
    large: bool = False,
) -> Recipe:
    """The recipe of a task on a data set, for its default network or for the one named.

    Args:
        dataset: its name; those that are not in `RECIPES` get a recipe by their shape.
        task: "score", "ncsn" or "classifier".
        network: class of the network; None: the default.
        shape: channels, height and width of the images.
        num_classes: how many classes a classifier tells apart.
        large: the one for a GPU, see `LARGE`.

    Raises:
        ValueError: if there is no recipe for that network, or the images do not suit it.
    """
    names = NETWORKS.get(task, CLASSIFIERS)
    if network is not None:
        checks.choice(f"network of {task}", network, names)
    if large:
        if (dataset, task) not in LARGE or network not in (None, LARGE[dataset, task].network):
            known = ", ".join(f"{r.network} for {d} {t}" for (d, t), r in LARGE.items())
            raise ValueError(
                f"there is no large {network or 'network'} for {dataset} {task}; there is {known}."
            )
        return LARGE[dataset, task]
    default = RECIPES.get((dataset, task))
    if default is None:
        return _general(task, network or names[0], shape, num_classes)
    if network is None or network == default.network:
        return default
    if (dataset, task, network) not in RECIPES:
        raise ValueError(f"there is no recipe for the network {network} in {dataset} {task}.")
    return RECIPES[(dataset, task, network)]


def _general(task: str, network: str, shape: tuple[int, int, int], num_classes: int) -> Recipe:
    """A recipe for images of which only the shape is known."""
    channels, *size = shape
    arguments: dict[str, Any]
    if task == "classifier":
        config = TrainConfig(4000, learning_rate=2e-3, warmup=300, ema=0.99)
        if network == "Classifier":
            arguments = {"in_channels": channels, "num_classes": num_classes, "size": size[0]}
            if size[0] != size[1] or size[0] % 4:
                raise ValueError(
                    f"a Classifier takes squares with a side divisible by 4, and the images are "
                    f"{_text(size)}: give --size {_near(min(size), 4)}, or --network ConvNet"
                )
            return Recipe(config, arguments, network)
        if min(size) < 8:
            raise ValueError(
                f"a ConvNet needs 8 pixels a side, and the images are {_text(size)}: give --size 8"
            )
        groups = min(len(_WIDTHS), int(math.log2(min(size))) - 2)
        arguments = {
            "in_channels": channels,
            "num_classes": num_classes,
            "widths": list(_WIDTHS[:groups]),
        }
        return Recipe(config, arguments, network)
    if size[0] % 2 or size[1] % 2:
        near = "x".join(str(_near(side, 8)) for side in size)
        raise ValueError(
            f"a {network} needs sides divisible by 2, by 8 better, and the images are "
            f"{_text(size)}: give --size {near}"
        )
    patch = 2 if size[0] % 4 == 0 and size[1] % 4 == 0 else 1
    most = 4 if min(size) >= 64 else 3
    levels = max(
        k for k in range(1, most + 1) if all(s % (patch * 2 ** (k - 1)) == 0 for s in size)
    )
    first = 32 if channels == 1 else 64
    arguments = {
        "in_channels": channels,
        "channels": [first, *[2 * first] * (levels - 1)],
        "patch": patch,
    }
    if task == "ncsn":
        noise = NCSNNoise(sigma_max=1.0, sigma_min=0.01, num_levels=100)
        arguments["time_conditioned"] = False
        return Recipe(TrainConfig(8000, batch_size=64), arguments, network, ncsn=noise)
    return Recipe(TrainConfig(10_000, batch_size=64), arguments, network)


def _near(side: int, divisor: int) -> int:
    """The multiple of `divisor` that is nearest to `side`."""
    return max(divisor, divisor * round(side / divisor))


def _text(size: list[int]) -> str:
    return "x".join(map(str, size))
