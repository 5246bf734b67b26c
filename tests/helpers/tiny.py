"""Tiny models that several test files share. Not a test."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import coup_fast


class TinyNetwork(nn.Module):
    """A smooth convolutional network f(x, t) with `out` channels, plus a pull towards 0.5."""

    def __init__(
        self, channels: int = 3, out: int | None = None, seed: int = 0, pull: float = 0.0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.in_channels = channels
        self.pull = pull
        self.first = nn.Conv2d(channels, 8, 3, padding=1)
        self.last = nn.Conv2d(8, out or channels, 3, padding=1)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = (t / 999).to(x.dtype).reshape(-1, 1, 1, 1)
        out = self.last(torch.tanh(self.first(x) + time))
        return out + self.pull * (0.5 - x) if self.pull else out


class TinyClassifier(nn.Module):
    """A smooth classifier of 3x8x8 images, sharp enough that guidance matters."""

    def __init__(self, channels: int = 3, classes: int = 4, size: int = 8, seed: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.in_channels = channels
        self.conv = nn.Conv2d(channels, 4, 3, stride=2, padding=1)
        self.linear = nn.Linear(4 * (size // 2) ** 2, classes)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.6 * torch.randn(p.shape, generator=generator))

    def forward(self, u: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.conv(u)).flatten(1))


class Asking(nn.Module):
    """A network whose way depends on its values, so that the host has to ask for them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyNetwork()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.inner(x, t) if x.mean() < 100 else x


class PerSample(nn.Module):
    """Any module, one sample at a time in one layout: its bits cannot depend on the batch."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        rows = [
            self.module(x[i : i + 1].contiguous(), *(r[i : i + 1] for r in rest))
            for i in range(len(x))
        ]
        return torch.cat(rows)


def images(batch: int = 3, channels: int = 3, size: int = 8, dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(batch + 10 * channels + size)
    return torch.rand(batch, channels, size, size, generator=generator).to(dtype)


def score_model(kind: str = "eps", **options) -> coup_fast.ScoreModel:
    """A `ScoreModel` of a tiny network; one for ADP pulls hard enough to be worth following."""
    pull = 6.0 if kind == "ncsn" else 0.0
    return coup_fast.ScoreModel(TinyNetwork(pull=pull, **options), kind=kind)


# Every method, with the kind of network it wants and options that make a short chain of it.
SHORT = {
    "coup": ("eps", {"num_steps": 3}),
    "coup-l2": ("eps", {"num_steps": 3}),
    "coup-short": ("eps", {"num_steps": 3}),
    "diffpure": ("eps", {"num_steps": 3}),
    "diffpure-l2": ("eps", {"num_steps": 3}),
    "diffpure-short": ("eps", {"num_steps": 3}),
    "diffpure-imagenet": ("eps", {"num_steps": 3}),
    "vp-ode": ("eps", {"num_steps": 3}),
    "ldsde": ("eps", {"num_steps": 3}),
    "ddpm": ("eps", {"num_steps": 3}),
    "ddim": ("eps", {"num_steps": 3}),
    "gdmp": ("eps", {"rounds": 2, "t_star": 0.003}),
    "gradual": ("eps", {"rounds": (2, 3)}),
    "adp": ("ncsn", {"num_steps": 3}),
    "one-shot": ("eps", {}),
    "consistency": ("eps", {"sigmas": (0.25, 0.1)}),
    "flowpure": ("eps", {"num_steps": 3}),
    "langevin": ("score", {"num_steps": 3, "gradient_scale": 0.1}),
}


def short_purifier(
    method: str = "coup", double: bool = False, per_sample: bool = False, **options
) -> coup_fast.Purifier:
    """A purifier that runs a short chain of the method with tiny models.

    per_sample: the models take images one at a time, so that no bit can depend on the batch.
    """
    kind, short = SHORT[method]
    model = score_model(kind, out=6 if options.get("variance") == "learned" else None)
    classifier: nn.Module = TinyClassifier()
    if per_sample:
        model.network, classifier = PerSample(model.network), PerSample(classifier)
    if double:
        model, classifier = model.double(), classifier.double()
    return coup_fast.Purifier(model, classifier, method=method, **short | options)


def defended(
    method: str = "coup", per_sample: bool = False, **options
) -> coup_fast.PurifiedClassifier:
    """A short purifier before the classifier that guides it. options: of PurifiedClassifier."""
    purifier = short_purifier(method, per_sample=per_sample)
    return coup_fast.PurifiedClassifier(purifier, purifier.classifier, **options)


def gradient_of(clean: coup_fast.Purifier, u: Tensor, weight: Tensor, **call) -> Tensor:
    """The gradient of the weighted sum of the purified pixels."""
    leaf = u.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((clean(leaf, **call) * weight).sum(), leaf)
    return gradient


def flags(*modules: nn.Module) -> list[bool]:
    """`requires_grad` of every parameter."""
    return [p.requires_grad for module in modules for p in module.parameters()]
