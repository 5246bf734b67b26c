"""The networks that whole loops are timed with, by name.

Speed does not depend on the weights, so the larger ones are drawn at random; the results say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Models:
    """A score network f(x, 999 t) -> eps and a classifier of pixels, both frozen and in eval mode.

    Without a classifier, a guided loop is given a constant tensor as the guidance.
    """

    label: str
    shape: tuple[int, int, int]
    network: Callable[[Tensor, Tensor], Tensor]
    classifier: Callable[[Tensor], Tensor] | None

    @property
    def free(self) -> bool:
        """Calls of the network cost nothing."""
        return self.classifier is None


class Constant(nn.Module):
    """A network of no cost: always the same output, for any batch up to the one it was made for."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.register_buffer("output", output)
        self.output: Tensor

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.output[: len(x)]


def random_tensor(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Standard normals of CPU torch under this seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _drawn(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with its weights of zero (the last of a residual block) drawn instead."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim > 1 and not bool(parameter.any()):
            deviation = 1.0 / math.sqrt(parameter[0].numel())
            with torch.no_grad():
                parameter.copy_(deviation * torch.randn(parameter.shape, generator=generator))
    return module.to(device).eval().requires_grad_(False)


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"


def _mnist(device: torch.device) -> Models:
    from coup_fast.models import load_bundled

    score_model, classifier = load_bundled("mnist", device=device)
    network = score_model.network
    assert isinstance(network, nn.Module)
    frozen = [module.eval().requires_grad_(False) for module in (network, classifier)]
    label = f"bundled MNIST networks, {_millions(network)} + {_millions(classifier)}"
    return Models(label, (1, 28, 28), frozen[0], frozen[1])


def _cifar(device: torch.device) -> Models:
    from coup_fast.models import Classifier, UNet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = _drawn(UNet(3, (64, 128, 128), patch=2), device)
        classifier = _drawn(Classifier(3, size=32, width=64), device)
    label = f"CIFAR-sized networks, random weights, {_millions(network)} + {_millions(classifier)}"
    return Models(label, (3, 32, 32), network, classifier)


class WideBlock(nn.Module):
    """Two 3x3 convolutions after normalisation and ReLU (Zagoruyko and Komodakis 2016)."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(out)
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        same = width == out and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm1(x))
        kept = x if isinstance(self.skip, nn.Identity) else self.skip(h)
        out: Tensor = kept + self.conv2(torch.relu(self.norm2(self.conv1(h))))
        return out


def wide_resnet(blocks: int = 4, widen: int = 10) -> nn.Sequential:
    """WRN-28-10 by default: 6 blocks + 4 layers, 32x32 pixels to 10 logits."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    width = 16
    for stride, base in ((1, 16), (2, 32), (2, 64)):
        for index in range(blocks):
            layers.append(WideBlock(width, base * widen, stride if index == 0 else 1))
            width = base * widen
    pool = (nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, *pool, nn.Linear(width, 10))


def _large(device: torch.device) -> Models:
    from coup_fast.models.score_sde_network import NCSNpp, NCSNppConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = _drawn(NCSNpp(NCSNppConfig(num_blocks=8)), device)
        classifier = _drawn(wide_resnet(), device)
    label = (
        f"DDPM++ and WRN-28-10 networks, random weights, {_millions(network)} + "
        f"{_millions(classifier)}"
    )
    return Models(label, (3, 32, 32), network, classifier)


@lru_cache(maxsize=4)
def load(name: str, device: torch.device, batch: int = 1) -> Models:
    """The models called `name`: "none" (no cost), "mnist", "cifar" or "large".

    "large" is of the size DiffPure and COUP are published with and meant for GPUs. `batch` is the
    largest batch that "none" will see.
    """
    if name == "none":
        output = random_tensor((batch, 3, 32, 32), 1, device)
        return Models("networks of no cost", (3, 32, 32), Constant(output), None)
    return {"mnist": _mnist, "cifar": _cifar, "large": _large}[name](device)
