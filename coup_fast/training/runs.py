"""Whole training runs: data set and task to a weights file with its facts.

This is what `coup-fast train` calls. It chooses data, network and defaults; losses are in dsm.py
and classifier.py, the loop in trainer.py.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coup_fast.models.conv_net import ConvNet
from coup_fast.models.network_files import build_network, load_network, save_network
from coup_fast.models.unet import UNet
from coup_fast.training.classifier import classifier_loss, count_correct, shifted
from coup_fast.training.dsm import NCSNNoise, VPNoise, ncsn_error, ncsn_loss, vp_error, vp_loss
from coup_fast.training.trainer import Objective, TrainConfig, Trainer, generator_for
from coup_fast.training.transfer import ncsn_from_vp

TIMES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8)  # where a VP model's error is reported
INIT_TIME = 0.1  # whose denoiser an NCSN network starts from with `init`


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
CIFAR_VALIDATION = 5000  # the last training images: never trained on, for choosing settings
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
    ("cifar10", "ncsn"): Recipe(
        TrainConfig(6000, batch_size=32),
        {**_CIFAR_UNET, "time_conditioned": False},
        ncsn=NCSNNoise(sigma_max=0.5, sigma_min=0.01, num_levels=100),
    ),
    ("cifar10", "classifier"): Recipe(
        TrainConfig(2500, learning_rate=4e-3, warmup=300, ema=0.99),
        {"in_channels": 3, "widths": [64, 128, 256]},
        network="ConvNet",
    ),
}


def recipe_for(dataset: str, task: str, network: str | None = None) -> Recipe:
    """The recipe of a task on a data set, for its default network or for the one named.

    Raises:
        ValueError: if there is no recipe for that network.
    """
    default = RECIPES[(dataset, task)]
    if network is None or network == default.network:
        return default
    if (dataset, task, network) not in RECIPES:
        raise ValueError(f"there is no recipe for the network {network} in {dataset} {task}.")
    return RECIPES[(dataset, task, network)]


def load_data(dataset: str, folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] uint8 and labels [N] int64 for training or testing.

    MNIST's training split comes without the 5,000 held-out digits of `demo_digits`, CIFAR-10's
    without its last 5,000 images, which are the split "validation".
    """
    if dataset == "cifar10":
        from coup_fast.data.cifar10 import load_cifar10

        if split == "test":
            return load_cifar10(folder, split)
        images, labels = load_cifar10(folder, "train")
        cut = len(images) - CIFAR_VALIDATION
        part = slice(cut, None) if split == "validation" else slice(cut)
        return images[part], labels[part]
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
    network: str | None = None,
    channels: list[int] | None = None,
    energy: bool = False,
    init: Path | None = None,
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
        network: class of the network in place of the task's default (see `RECIPES`).
        channels: widths of the network's levels in place of the recipe's.
        energy: train a scalar `EnergyUNet` by the same loss.
        init: a trained VP network's file that an "ncsn" run starts from, see `ncsn_from_vp`.
        half: store float16 weights.
    """
    recipe = recipe_for(dataset, task, network)
    if energy and recipe.network != "UNet":
        raise ValueError("energy is for the network UNet.")
    config = replace(recipe.config, **(overrides or {}))
    arguments = dict(recipe.arguments)
    if channels:
        arguments["channels"] = channels
    name = "EnergyUNet" if energy else recipe.network
    kind = {"score": "score" if energy else "eps", "ncsn": "ncsn", "classifier": "classifier"}[task]
    images, labels = load_data(dataset, folder, "train")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = build_network(name, arguments)
    facts: dict[str, Any] = {"kind": kind, "dataset": dataset, "images": len(images)}
    if task == "score" and recipe.vp.t_max < 1.0:
        facts["t_max"] = recipe.vp.t_max
    if isinstance(model, ConvNet):
        model.whiten_patches(images[:5000].float() / 255.0)
    if init is not None:
        model = _initialised(init, task, energy, arguments)
        facts["init"] = hashlib.sha256(init.read_bytes()).hexdigest()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainer = Trainer(
        _callable_network(model, energy),
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


def _initialised(init: Path, task: str, energy: bool, arguments: dict[str, Any]) -> nn.Module:
    """The NCSN network that starts from the VP network in `init`; ValueError if it does not fit."""
    trained, described = load_network(init)
    start = {**arguments, "time_conditioned": True}
    if task != "ncsn" or energy:
        raise ValueError("init is for an ncsn network, and not for an energy.")
    if not isinstance(trained, UNet) or described["kind"] != "eps":
        raise ValueError(f"init: {init} holds a {described['kind']!r} network; 'eps' is needed.")
    differing = {k: (trained.config[k], v) for k, v in start.items() if trained.config[k] != v}
    if differing:
        raise ValueError(f"init: {init} has another shape than this run: {differing}.")
    return ncsn_from_vp(trained, VPNoise(), INIT_TIME)


def _callable_network(network: nn.Module, energy: bool) -> nn.Module:
    if not energy:
        return network
    from coup_fast.score_model import EnergyModel

    return EnergyModel(network)


def _objective(task: str, kind: str, recipe: Recipe, flip: bool) -> Objective:
    if task == "classifier":
        return functools.partial(classifier_loss, flip=flip, smoothing=0.1 if flip else 0.0)

    def score_loss(network: nn.Module, images: Tensor, _: Tensor, rng: torch.Generator) -> Tensor:
        x = shifted(images, rng, reach=0, flip=True) if flip else images
        if task == "ncsn":
            return ncsn_loss(network, x, rng, recipe.ncsn)
        return vp_loss(network, x, rng, recipe.vp, kind)

    return score_loss


def _report(
    task: str,
    kind: str,
    recipe: Recipe,
    network: nn.Module,
    dataset: str,
    folder: Path,
    images: Tensor,
) -> dict[str, Any]:
    """Accuracy on unseen images, or the error per noise level on training and held-out images.

    A classifier's unseen images are MNIST's test set or CIFAR-10's validation split; a score
    network's held-out images are 1,000 of the validation split.
    """
    if task == "classifier":
        split = "validation" if dataset == "cifar10" else "test"
        unseen, labels = load_data(dataset, folder, split)
        right = count_correct(network, unseen, labels)
        return {"split": split, "correct": right, "images": len(unseen)}
    if dataset == "mnist":
        from coup_fast.data import demo_digits

        held_out = demo_digits(1000, split="validation")[0]
    else:
        held_out = load_data(dataset, folder, "validation")[0][:1000].float() / 255.0
    seen = images[: len(held_out)].float() / 255.0
    if task == "ncsn":
        levels = recipe.ncsn.levels()[:: max(1, recipe.ncsn.num_levels // 8)].tolist()
    else:
        levels = [t for t in TIMES if t <= recipe.vp.t_max]
    return {
        "level": [round(level, 4) for level in levels],
        "train": error_per_level(network, seen, kind, levels),
        "held_out": error_per_level(network, held_out, kind, levels),
    }


@torch.no_grad()
def error_per_level(
    network: nn.Module, images: Tensor, kind: str, levels: list[float], batch: int = 250
) -> list[float]:
    """Mean squared error of the noise at each level, with fixed noise.

    images: [N, C, H, W] float32 in [0, 1]. levels: times t, or for kind "ncsn" standard deviations
    in pixel space.
    """
    z = torch.randn(images.shape, generator=generator_for(0, "report", 0))
    noise, errors = VPNoise(), []
    for level in levels:
        total = 0.0
        for x, normal in zip(torch.split(images, batch), torch.split(z, batch), strict=True):
            at = torch.full((len(x),), level, dtype=torch.float64)
            if kind == "ncsn":
                total += float(ncsn_error(network, x, at, normal).sum())
            else:
                total += float(vp_error(network, x, at, normal, noise, kind).sum())
        errors.append(round(total / len(images), 5))
    return errors
