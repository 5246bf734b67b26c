"""Whole training runs: data set and task to a weights file with its facts.

This is what `coup-fast train` calls. It chooses data, network and defaults; losses are in dsm.py
and classifier.py, the loop in trainer.py.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coup_fast.models.files import build_network, save_network
from coup_fast.training.classifier import classifier_loss, count_correct
from coup_fast.training.dsm import NCSNNoise, VPNoise, ncsn_error, ncsn_loss, vp_error, vp_loss
from coup_fast.training.trainer import Objective, TrainConfig, Trainer, generator_for

TASKS = ("score", "ncsn", "classifier")
DATASETS = ("mnist", "cifar10")
TIMES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8)  # where the held-out error of a VP model is reported


@dataclass(frozen=True)
class Recipe:
    """Defaults of one task on one data set."""

    config: TrainConfig
    arguments: dict[str, Any]  # of the network class
    ncsn: NCSNNoise = field(default_factory=NCSNNoise)


_MNIST_UNET = {"in_channels": 1, "channels": [32, 64], "patch": 2}
_CIFAR_UNET = {"in_channels": 3, "channels": [64, 128, 128], "blocks": 2}
RECIPES = {
    # 1 instead of 50: the smallest level that hides a digit from a purifier that starts at 0.25.
    ("mnist", "ncsn"): Recipe(
        TrainConfig(4000, batch_size=64, learning_rate=2e-3),
        {**_MNIST_UNET, "time_conditioned": False},
        NCSNNoise(sigma_max=1.0, sigma_min=0.01, num_levels=100),
    ),
    ("mnist", "score"): Recipe(TrainConfig(5200, batch_size=64, learning_rate=2e-3), _MNIST_UNET),
    ("mnist", "classifier"): Recipe(
        TrainConfig(4000, batch_size=128, learning_rate=2e-3), {"in_channels": 1, "size": 28}
    ),
    # The published rate and averaging (ADP, NCSNv2).
    ("cifar10", "ncsn"): Recipe(
        TrainConfig(200_000, learning_rate=1e-4), {**_CIFAR_UNET, "time_conditioned": False}
    ),
    ("cifar10", "score"): Recipe(TrainConfig(200_000, learning_rate=2e-4), _CIFAR_UNET),
    ("cifar10", "classifier"): Recipe(
        TrainConfig(40_000), {"in_channels": 3, "size": 32, "width": 64, "hidden": 256}
    ),
}


def load_data(dataset: str, folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] uint8 and labels [N] int64 for training or testing.

    MNIST's training split comes without the 5,000 held-out digits of `demo_digits`.
    """
    if dataset == "cifar10":
        from coup_fast.data.cifar10 import load_cifar10

        return load_cifar10(folder, split)
    from coup_fast.data import held_out_mask, load_mnist

    images, labels = load_mnist(folder, split)
    if split == "train":
        keep = ~held_out_mask(images)
        return images[keep], labels[keep]
    return images, labels


def train(
    task: str,
    dataset: str,
    folder: Path,
    out: Path,
    *,
    overrides: dict[str, Any] | None = None,
    channels: list[int] | None = None,
    energy: bool = False,
    device: torch.device | str = "cpu",
    save_every: float = 60.0,
    half: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Run one task from data to `out` (safetensors) and return the facts stored with it.

    Args:
        task: "score" (VP), "ncsn" (ADP) or "classifier". dataset: "mnist" or "cifar10".
        folder: where the data set's standard files are.
        out: weights file; the checkpoint is `out` + ".checkpoint" and is resumed if present.
        overrides: fields of `TrainConfig` that replace the recipe's.
        channels: U-Net widths in place of the recipe's.
        energy: train a scalar `EnergyUNet` by the same loss.
        half: store float16 weights.
    """
    recipe = RECIPES[(dataset, task)]
    config = replace(recipe.config, **(overrides or {}))
    arguments = dict(recipe.arguments)
    if channels:
        arguments["channels"] = channels
    name = "Classifier" if task == "classifier" else ("EnergyUNet" if energy else "UNet")
    kind = {"score": "score" if energy else "eps", "ncsn": "ncsn", "classifier": "classifier"}[task]
    images, labels = load_data(dataset, folder, "train")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        network = build_network(name, arguments)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    facts: dict[str, Any] = {"kind": kind, "dataset": dataset, "images": len(images)}
    trainer = Trainer(
        _callable_network(network, energy),
        _objective(task, kind, recipe, flip=dataset == "cifar10"),
        images,
        labels,
        config,
        checkpoint=out.with_name(out.name + ".checkpoint"),
        identity={"network": name, "arguments": json.dumps(arguments), **facts},
        device=device,
        save_every=save_every,
        progress=progress,
    )
    averaged = trainer.run().cpu()
    facts["training"] = {**asdict(config), "bfloat16": trainer.bfloat16}
    facts["seconds"] = round(trainer.state.seconds)
    facts["loss"] = trainer.state.history[-1][1]
    facts["report"] = _report(task, kind, recipe, averaged, dataset, folder, images)
    plain = averaged.network if energy else averaged
    assert isinstance(plain, nn.Module)
    save_network(out, plain, facts, torch.float16 if half else torch.float32)
    return facts


def _callable_network(network: nn.Module, energy: bool) -> nn.Module:
    if not energy:
        return network
    from coup_fast.score_model import EnergyModel

    return EnergyModel(network)


def _objective(task: str, kind: str, recipe: Recipe, flip: bool) -> Objective:
    if task == "classifier":
        reach = 4 if flip else 2
        return functools.partial(classifier_loss, reach=reach, flip=flip)
    if task == "ncsn":
        return lambda network, images, _, rng: ncsn_loss(network, images, rng, recipe.ncsn)
    noise = VPNoise()
    return lambda network, images, _, rng: vp_loss(network, images, rng, noise, kind)


def _report(
    task: str,
    kind: str,
    recipe: Recipe,
    network: nn.Module,
    dataset: str,
    folder: Path,
    images: Tensor,
) -> dict[str, Any]:
    """Accuracy on the test set, or the error per noise level on training and held-out images.

    Held-out are 1,000 validation digits for MNIST and test images for CIFAR-10.
    """
    if task == "classifier":
        test_images, test_labels = load_data(dataset, folder, "test")
        right = count_correct(network, test_images, test_labels)
        return {"test_correct": right, "test_images": len(test_images)}
    if dataset == "mnist":
        from coup_fast.data import demo_digits

        held_out = demo_digits(1000, split="validation")[0]
    else:
        held_out = load_data(dataset, folder, "test")[0][:1000].float() / 255.0
    seen = images[: len(held_out)].float() / 255.0
    levels = recipe.ncsn.levels()[:: max(1, recipe.ncsn.num_levels // 8)].tolist()
    return {
        "level": [round(level, 4) for level in (levels if task == "ncsn" else TIMES)],
        "train": error_per_level(network, seen, kind, levels),
        "held_out": error_per_level(network, held_out, kind, levels),
    }


@torch.no_grad()
def error_per_level(
    network: nn.Module, images: Tensor, kind: str, sigmas: list[float], batch: int = 250
) -> list[float]:
    """Mean squared error of the noise at TIMES, or for kind "ncsn" at `sigmas`; fixed noise.

    images: [N, C, H, W] float32 in [0, 1].
    """
    z = torch.randn(images.shape, generator=generator_for(0, "report", 0))
    noise, errors = VPNoise(), []
    for level in sigmas if kind == "ncsn" else TIMES:
        total = 0.0
        for x, normal in zip(torch.split(images, batch), torch.split(z, batch), strict=True):
            at = torch.full((len(x),), level, dtype=torch.float64)
            if kind == "ncsn":
                total += float(ncsn_error(network, x, at, normal).sum())
            else:
                total += float(vp_error(network, x, at, normal, noise, kind).sum())
        errors.append(round(total / len(images), 5))
    return errors
